"""Files that are complete or not there at all, and where those lie that need not be made again."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"


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
def only_one(folder: str | Path, action: str) -> Iterator[None]:
    """Hold a folder for one process at a time: by a lock that ends with the process, however that ends.

    The file ``.lock`` stays in the folder. Nothing is held where the system or the file system has no such locks.

    Args:
      folder: one that exists.
      action: what is done there, for the message.

    Raises:
      ValueError: another process holds the folder, or this one does elsewhere.

    >>> with tempfile.TemporaryDirectory() as folder, only_one(folder, "training"):
    ...     with only_one(folder, "training"):
    ...         pass
    Traceback (most recent call last):
    ValueError: '...' is in use: another process is training there; wait until it has ended, or give another folder
    """
    with open(Path(folder) / LOCK, "a") as file:
        if not hold(file):
            raise ValueError(
                f"{str(folder)!r} is in use: another process is {action} there; wait until it has ended, or give "
                "another folder"
            )
        yield


def hold(file: Any) -> bool:
    """Lock an open file until it is closed, or its process ends; False if it is locked by somebody else."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w", **settings: Any) -> Iterator[Any]:
    """A file to write that takes the place of ``path`` when it is complete; after an error nothing has changed.

    A process that is killed may leave a draft beside it, ``path`` with more letters and ``.part`` at its end.

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
            file.flush()
            os.fsync(file.fileno())  # or a power failure may leave an empty file under the new name
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
