"""A folder that no other user can change: compiled kernels are loaded from it and run."""

import os
import stat
from pathlib import Path

UNMAPPED = 65534  # in a container, the owner that Linux shows for users that do not exist there


def private_folder(folder: Path) -> Path:
    """Create a folder with mode 0700 if it is missing, and check that only this user can change its content.

    The folders above it are checked too: a user who can rename one of them can replace the folder. A sticky folder such
    as ``/tmp`` is safe, because only the owner of an entry can rename it.

    Returns:
      The folder as a resolved path.

    Raises:
      PermissionError: if another user owns the folder, or can write to it or to a folder above it. The message names
        that folder, the cause and the cure.
      OSError: if the folder cannot be created.
    """
    folder = Path(os.path.abspath(folder))
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: set NNLEARN_CACHE to a folder that you own")
    if hasattr(os, "getuid"):
        for path in (folder, *folder.parents):
            fault = _fault(path, path == folder)
            if fault:
                raise PermissionError(f"{path} {fault}, or set NNLEARN_CACHE to a folder that you own")
    return folder


def _fault(path: Path, innermost: bool) -> str:
    """Explain how another user can change the folder, with the cure; empty if no other user can."""
    status, user = _status(path), os.getuid()
    trusted = {user} if innermost else {user, 0, UNMAPPED}
    if status.st_uid not in trusted:
        return f"belongs to user {status.st_uid}, and this process runs as user {user}: change its owner"
    # If every user has a group with the same id (umask 002), the group contains this user alone.
    own_group = status.st_gid == user == os.getgid()
    writers = status.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
    if writers and (innermost or not status.st_mode & stat.S_ISVTX):
        return "can be written to by other users: remove their permission (chmod go-w)"
    return ""


def _status(path: Path) -> os.stat_result:
    return path.stat()


__all__ = ["private_folder"]
