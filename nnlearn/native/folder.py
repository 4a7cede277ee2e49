"""A folder that nobody else can change: compiled kernels are loaded from it and run."""

import os
import stat
from pathlib import Path

UNMAPPED = 65534  # the owner that Linux shows inside of a container for users that it does not know there


def private_folder(folder: Path) -> Path:
    """The folder, created with mode 0700 if it is missing, after checks that only this user can change its content.

    The folders above it are checked too: whoever can rename one of them can put another folder in its place. A sticky
    folder such as ``/tmp`` is safe, because there only the owner can rename an entry.

    Raises:
      PermissionError: another user owns the folder, or can write to it or to one above it. The message names that
        folder, the cause and the cure.
      OSError: it cannot be created.
    """
    folder = Path(os.path.abspath(folder))
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: set NNLEARN_CACHE to a folder of your own")
    if hasattr(os, "getuid"):
        for path in (folder, *folder.parents):
            fault = _fault(path, path == folder)
            if fault:
                raise PermissionError(f"{path} {fault}, or set NNLEARN_CACHE to a folder of your own")
    return folder


def _fault(path: Path, innermost: bool) -> str:
    """What lets another user change the folder, and the cure; empty if nothing does."""
    status, user = _status(path), os.getuid()
    trusted = {user} if innermost else {user, 0, UNMAPPED}
    if status.st_uid not in trusted:
        return f"belongs to user {status.st_uid}, and this process runs as user {user}: change its owner"
    # Where every user has a group of the same number (umask 002), the group is the user alone.
    own_group = status.st_gid == user == os.getgid()
    writers = status.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
    if writers and (innermost or not status.st_mode & stat.S_ISVTX):
        return "can be written to by other users: remove their permission (chmod go-w)"
    return ""


def _status(path: Path) -> os.stat_result:
    return path.stat()


__all__ = ["private_folder"]
