"""Files that are complete or not there at all, and where those lie that need not be made again."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder of unpacked packages and compiled kernels.

    It is ``$NNLEARN_CACHE``, or ``nnlearn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A user without a home folder has
    one in the system's temporary folder.

    >>> isinstance(cache_folder(), Path)
    True
    """
    if os.environ.get("NNLEARN_CACHE"):
        return Path(os.environ["NNLEARN_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "nnlearn"
    try:
        return Path.home() / ".cache" / "nnlearn"
    except RuntimeError:  # HOME is not set, and the user has no entry in the password database
        return Path(tempfile.gettempdir()) / f"nnlearn-{os.getuid()}"


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w", **settings: Any) -> Iterator[Any]:
    """A file to write that takes the place of ``path`` when it is complete; after an error nothing has changed.

    Args:
      path: what is replaced, or made.
      mode, **settings: as for ``open``.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as file:
    ...         _ = file.write("whole")
    ...     os.listdir(folder), (Path(folder) / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = Path(path)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, mode, **settings) as file:
            yield file
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
