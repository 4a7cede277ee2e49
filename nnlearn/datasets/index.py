"""Download single files of Python packages from the package index that pip is configured for, without executing them.

The index is read through its simple interface (PEP 503, and PEP 691 for JSON). The settings are those of pip:
``PIP_...`` variables first, then the files ``pip.conf`` of the environment, the user and the machine. Supported options
are ``index-url``, ``extra-index-url``, ``find-links``, ``no-index``, ``proxy``, ``cert``, ``trusted-host`` and
``timeout``. ``UV_DEFAULT_INDEX`` and ``UV_INDEX`` are read too, because environments of uv have no pip.
"""

import base64
import configparser
import hashlib
import html.parser
import json
import netrc
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"
LARGEST = 1 << 30  # bytes of the largest file that is read
JSON_FORM = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON_FORM}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


def pip_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """pip's settings for a download, by option name.

    Args:
      environment: environment variables; None for those of the process.

    Raises:
      OSError: if a file of settings cannot be read.

    >>> pip_settings({"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "https://example.org/simple"})
    {'index-url': 'https://example.org/simple'}
    """
    environment = os.environ if environment is None else environment
    settings: dict[str, str] = {}
    for path in _config_files(environment):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise OSError(f"cannot read pip's settings in {path}: {error}") from error
        for section in ("global", "download"):
            if parser.has_section(section):
                settings |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    for uv, name in (("UV_INDEX_URL", "index-url"), ("UV_DEFAULT_INDEX", "index-url"), ("UV_INDEX", "extra-index-url")):
        if environment.get(uv):
            urls = re.sub(r"(?<!\S)[\w-]+=(?=\w+://)", "", environment[uv])  # drop names, as in mine=https://...
            settings.setdefault(name, urls)
    for name, value in environment.items():
        if name.startswith("PIP_") and name != "PIP_CONFIG_FILE" and value:
            settings[name[4:].lower().replace("_", "-")] = value
    return settings


def _config_files(environment: Mapping[str, str]) -> list[Path]:
    """pip's configuration files, in increasing order of precedence."""
    named = environment.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path(environment.get("HOME") or environment.get("USERPROFILE") or "/nonexistent")
    machine = [Path(folder) / "pip" for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]
    user = [home / ".pip", Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "pip"]
    if sys.platform == "darwin":
        machine, user = [Path("/Library/Application Support/pip")], [*user, home / "Library/Application Support/pip"]
    folders = [*reversed(machine), Path("/etc"), *user, Path(sys.prefix)]
    return [*(folder / "pip.conf" for folder in folders), *([Path(named)] if named else [])]


def fetch_file(project: str, filename: str, sha256: str, folder: Path) -> Path:
    """Download one file of a project from the configured index, and check its content.

    Args:
      project: the name of the package.
      filename: the name of the wheel or source archive.
      sha256: the SHA-256 hash of its content, in hexadecimal digits.
      folder: the folder for the file.

    Returns:
      The path of the file.

    Raises:
      OSError: if no index has the file with that content; the message includes the answer of each index.
    """
    settings, faults = pip_settings(), []
    for page in _pages(project, settings):
        try:
            links = read_links(page, settings)
            if filename not in links:
                faults.append(f"{_shown(page)}: it has no {filename}")
                continue
            content = read_url(links[filename], settings)
        except (OSError, ValueError) as error:
            faults.append(f"{_shown(page)}: {error}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found == sha256:
            path = folder / filename
            path.write_bytes(content)
            return path
        faults.append(f"{_shown(links[filename])}: its content has the hash {found}, not {sha256}")
    said = "; ".join(faults) or "pip's settings have no-index and no find-links"
    raise OSError(f"cannot fetch {filename}: {said}. The index comes from pip's settings, see `pip config list`")


def _pages(project: str, settings: Mapping[str, str]) -> Iterator[str]:
    """The addresses that may list a project's files: folders and pages of ``find-links``, then the indexes."""
    yield from settings.get("find-links", "").split()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return
    name = re.sub(r"[-_.]+", "-", project).lower()
    for index in [settings.get("index-url", DEFAULT_INDEX), *settings.get("extra-index-url", "").split()]:
        yield f"{index.rstrip('/')}/{name}/"


def read_links(page: str, settings: Mapping[str, str]) -> dict[str, str]:
    """The addresses of the files that a page or a folder lists, by file name."""
    folder = _local_folder(page)
    if folder is not None and not (folder / "index.html").is_file():
        return {path.name: path.as_uri() for path in folder.iterdir() if path.is_file()}
    if folder is not None:
        page = (folder / "index.html").as_uri()
    content, kind, page = _open(page, settings, ACCEPT)
    if kind == JSON_FORM:
        found = {each["filename"]: each["url"] for each in json.loads(content)["files"]}
    else:
        parser = _Links()
        parser.feed(content.decode("utf-8", "replace"))
        page = urllib.parse.urljoin(page, parser.base)
        found = {_last_part(link): link for link in parser.links}
    return {name: urllib.parse.urljoin(page, link) for name, link in found.items()}


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        link = dict(attrs).get("href")
        if link and tag == "base":
            self.base = link
        elif link and tag == "a":
            self.links.append(link)


def _last_part(link: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(link).path.rpartition("/")[2])


def _local_folder(page: str) -> Path | None:
    """The local folder that an address or a path names, or None for a remote address."""
    parts = urllib.parse.urlsplit(page)
    if parts.scheme == "file":
        page = urllib.request.url2pathname(parts.path)
    elif "://" in page:
        return None
    path = Path(page).expanduser()
    if not path.is_dir():
        raise FileNotFoundError("there is no such folder")
    return path.resolve()


def read_url(url: str, settings: Mapping[str, str] | None = None) -> bytes:
    """The content of an address, read through pip's proxy and certificates.

    Raises:
      OSError: if the address cannot be read.
      ValueError: if it is not an address, or its content has more than ``LARGEST`` bytes.
    """
    return _open(url, pip_settings() if settings is None else settings, "*/*")[0]


def _open(url: str, settings: Mapping[str, str], accept: str) -> tuple[bytes, str, str]:
    """The content, its type, and the address after redirections."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"{_shown(url)} is not an address of http, https or file")
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(
        urllib.parse.urlunsplit(parts._replace(netloc=host, fragment="")), headers={"Accept": accept}
    )
    login = _login(parts)
    if login is not None:  # not sent to the target of a redirection
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=_certificates(host, settings))]
    if settings.get("proxy"):
        handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), settings["proxy"])))
    timeout = float(settings.get("timeout") or settings.get("default-timeout") or 15)
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
        content = answer.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{_shown(url)} has more than {LARGEST} bytes")
        return content, answer.headers.get_content_type(), answer.geturl()


def _certificates(host: str, settings: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.get("cert") or None)
    if settings.get("client-cert"):
        context.load_cert_chain(settings["client-cert"])
    if {host, host.partition(":")[0]} & set(settings.get("trusted-host", "").split()):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _login(parts: urllib.parse.SplitResult) -> str | None:
    """``user:password`` from the address or from the file ``.netrc``, or None."""
    if parts.username is not None:
        return f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    try:
        found = netrc.netrc().authenticators(parts.hostname or "")
    except (OSError, RuntimeError, netrc.NetrcParseError):  # no such file, or no home folder
        return None
    return f"{found[0]}:{found[2]}" if found else None


def _shown(url: str) -> str:
    """The address without its user name and password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else url


__all__ = ["fetch_file", "pip_settings", "read_links", "read_url"]
