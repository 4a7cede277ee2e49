"""Drives a headless Chromium by its debugging protocol over pipes, to look at pages as a reader would.

The path of the program is in ``NNLEARN_CHROMIUM``, or one named chromium or google-chrome is on the path.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
)


def find_chromium() -> str | None:
    """The program, or None."""
    return os.environ.get("NNLEARN_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page of the browser.

    Attributes:
      problems: messages of the console that are warnings or errors, and uncaught exceptions.
      requests: every address that the page asked for, besides its own.
    """

    def __init__(self, to_browser: Any, from_browser: Any):
        self._write, self._read, self._ids, self._session = to_browser, from_browser, itertools.count(1), None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        parts = []
        while (byte := self._read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            parts.append(byte)
        event = json.loads(b"".join(parts))
        params = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(str([part.get("value") for part in params["args"]]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
        return event

    def open(self, path: Path, width: int = 1280, height: int = 900) -> float:
        """Open a file; return the seconds until it is drawn and answers."""
        self.resize(width, height)
        self._loaded = False
        address = path.resolve().as_uri()
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._next()
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seconds = self.run("performance.now() / 1000")
        self.requests = [each for each in self.requests if each != address and not each.startswith("data:")]
        return seconds

    def resize(self, width: int, height: int) -> None:
        """Change the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "error in the page"))
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
        codes |= {"ArrowDown": 40, "End": 35, "Home": 36}
        text = {"Enter": "\r", " ": " "}.get(name, name if len(name) == 1 else "")
        down: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": codes.get(name, ord(name[0]))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **down, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **down)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """A mouse event: ``mouseMoved``, ``mousePressed`` or ``mouseReleased``."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def prefer(self, theme: str) -> None:
        """What the system prefers, ``"light"`` or ``"dark"``."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def picture(self, path: Path, whole: bool = True) -> Path:
        """Write a PNG of the page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.contextmanager
def browsing(program: str | None = None) -> Iterator[Tab]:
    """A tab of a new browser, which ends with the block.

    Raises:
      RuntimeError: if there is no browser.
    """
    program = program or find_chromium()
    if program is None:
        raise RuntimeError("there is no chromium: install it, or set NNLEARN_CHROMIUM to its path")
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def wire() -> None:  # the browser reads descriptor 3 and writes to 4
            os.dup2(in_read, 13)
            os.dup2(out_write, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        process = subprocess.Popen(
            [program, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(3, 4, in_read, out_write),
            preexec_fn=wire,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(in_read)
        os.close(out_write)
        with os.fdopen(in_write, "wb") as to_browser, os.fdopen(out_read, "rb") as from_browser:
            try:
                yield Tab(to_browser, from_browser)
            finally:
                process.terminate()
                process.wait(timeout=10)
