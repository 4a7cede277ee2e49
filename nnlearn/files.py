"""Atomic writes, clear errors for full disks, locks on folders, and the cache folder."""

import contextlib
import errno
import math
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = ".lock"
FULL = {
    errno.ENOSPC: "Free space on that disk, or write elsewhere",
    errno.EDQUOT: "Delete files under that quota, or write elsewhere",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or write elsewhere",
}
"""The errors of a disk that takes no more, and their cures."""


class FullDiskError(OSError):
    """A file could not be written: the disk, a quota, or the largest size of a file does not permit it.

    The message has the path, the bytes needed and free where they are known, what is safe, and the cure.
    """


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
def explaining_full_disk(path: str | Path, safe: str, needed: int | None = None) -> Iterator[None]:
    """Raise ``FullDiskError`` if the code inside fails because the disk is full; nested ones raise the outermost's.

    Args:
      path: what is written.
      safe: a sentence that says what was not lost.
      needed: the bytes that will be written, if known.

    >>> with explaining_full_disk("a.npz", "The old file is unchanged"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    nnlearn.files.FullDiskError: [Errno 28] 'a.npz' could not be written: No space left on device...
    """
    free = free_bytes(path)
    try:
        yield
    except Exception as error:
        full = full_disk_error(error)
        if full is None:
            raise
        known = {"needed": needed, "free": free}
        sizes = "; ".join(f"{_readable(size)} {word}" for word, size in known.items() if size is not None)
        reason = os.strerror(full.errno) + (f" ({sizes})" if sizes else "")
        message = f"{str(path)!r} could not be written: {reason}. {safe}. {FULL[full.errno]}"
        raise FullDiskError(full.errno, message) from full


def _readable(size: float) -> str:
    """A number of bytes with a unit.

    >>> _readable(512), _readable(12_345_678)
    ('512 B', '12.3 MB')
    """
    unit = next(unit for unit in (1, 1e3, 1e6, 1e9) if size < 1000 * unit or unit == 1e9)
    return f"{size} B" if unit == 1 else f"{size / unit:,.1f} {'kMG'[round(math.log10(unit)) // 3 - 1]}B"


def full_disk_error(error: BaseException | None) -> Any:
    """The error of a full disk that has led to ``error``, or ``error`` itself; None if there is none.

    >>> full_disk_error(FileNotFoundError(2, "No such file")) is None
    True
    """
    if error is None or (isinstance(error, OSError) and error.errno in FULL):
        return error
    return full_disk_error(error.__cause__ or error.__context__)


def free_bytes(path: str | Path) -> int | None:
    """The free bytes of the disk on which ``path`` is or will be; None where the system does not tell."""
    path = Path(path).absolute()
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    return None


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk; where the system cannot, do nothing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w", **settings: Any) -> Iterator[Any]:
    """Open a file that replaces ``path`` when it is on the disk; after an error ``path`` is unchanged.

    A killed process may leave a draft, whose name is ``path`` with a random suffix and ``.part``. A new file has the
    permissions of the process, and a replacement those of the old file.

    Args:
      path: the file to replace or create.
      mode, **settings: as for ``open``.

    Raises:
      FullDiskError: if the disk is full; no draft stays.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as file:
    ...         _ = file.write("whole")
    ...     os.listdir(folder), (Path(folder) / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}{secrets.token_hex(4)}.part")
    safe = "The file that was there is unchanged" if path.exists() else "Nothing was left behind"
    with explaining_full_disk(path, safe):
        try:
            with open(draft, mode.replace("w", "x"), **settings) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a power failure may leave an empty file under the new name
            with contextlib.suppress(OSError):  # there is no old file, or the file system has no permissions
                os.chmod(draft, stat.S_IMODE(path.stat().st_mode))
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)
