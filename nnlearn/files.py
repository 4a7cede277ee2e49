"""Atomic writes, locks on folders, and the cache folder."""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"


def cache_folder() -> Path:
    """Return the folder of unpacked packages and compiled kernels.

    It is ``$NNLEARN_CACHE``, or ``nnlearn`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Without a home folder it is
    in the system's temporary folder.

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
    """Lock a folder for one process at a time; the lock ends with the process, even if it is killed.

    The file ``.lock`` stays in the folder. Without file locks in the system or file system this does nothing.

    Args:
      folder: an existing folder.
      action: what the process does there, for the message.

    Raises:
      ValueError: if another process, or other code in this one, holds the lock.

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
    """Lock an open file until it is closed or its process ends; return False if another process holds the lock.

    Forked children, such as the workers of a data loader, do not keep the lock.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _HELD.add(file)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


_HELD: weakref.WeakSet[Any] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: put the null device in place of locked files, which would stay locked as long as it runs."""
    null = os.open(os.devnull, os.O_RDWR)
    for file in list(_HELD):
        if not file.closed:
            os.dup2(null, file.fileno())
    os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w", **settings: Any) -> Iterator[Any]:
    """Open a file that replaces ``path`` when it is complete; after an error ``path`` is unchanged.

    A killed process may leave a draft, whose name is ``path`` with a random suffix and ``.part``.

    Args:
      path: the file to replace or create.
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
