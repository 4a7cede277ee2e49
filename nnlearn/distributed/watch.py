"""A thread that notices when another process has died or failed, and then ends this one with the cause."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

from nnlearn.distributed.store import client

BEAT = 1.0  # seconds between two signs of life
FAILED = 70  # the exit status of a process that ends because of another one
LOST = ("gloo", "nccl", "coordination", "connection closed", "connection reset", "socket closed", "peer")
"""Words in errors of collectives, which follow from the end of another process."""


class Watch:
    """Gives signs of life through the store of the coordinator, and looks for those of the others.

    Args:
      process, processes: the place of this process.
      silence: seconds without a sign of life after which a process counts as dead.
    """

    def __init__(self, process: int, processes: int, silence: float):
        self.process, self.processes, self.silence = process, processes, silence
        self._client, self._parent = client(), os.getppid()
        self._launched = "NNLEARN_LAUNCHER" in os.environ
        self._closing = threading.Event()
        self._ended = threading.Lock()  # held by the first that ends this process
        self._seen: dict[int, tuple[str, float]] = {}
        self._names: dict[int, str] = {}
        self._reached = time.monotonic()
        self._announced: float | None = None  # when this process has told the others that it failed

    def start(self) -> None:
        """Start the thread, and report errors that nothing catches."""
        place = f"pid {os.getpid()} on {socket.gethostname()}"
        self._client.key_value_set(f"nnlearn/place/{self.process}", place)
        threading.Thread(target=self._run, name="nnlearn-watch", daemon=True).start()
        before = sys.excepthook

        def report(kind: Any, error: Any, trace: Any) -> None:
            before(kind, error, trace)
            self.fail(kind, error)

        sys.excepthook = report

    def close(self) -> None:
        """Leave: the end of this process is no failure from now on."""
        self._closing.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"nnlearn/done/{self.process}", "")

    def announce(self, error: BaseException) -> None:
        """Tell the others that this process fails; it ends after some seconds, even if it waits for them."""
        cause = traceback.format_exception_only(type(error), error)[-1].strip()
        if self._announced is None and not any(word in cause.lower() for word in LOST):
            self._announced = time.monotonic()
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"nnlearn/failed/{self.process}", cause[:2000], allow_overwrite=True)

    def fail(self, kind: type, error: BaseException) -> None:
        """End this process after an error that nothing caught, and tell the others."""
        if any(word in str(error).lower() for word in LOST):
            time.sleep(self.silence + 3 * BEAT)  # another process is the cause: the thread names it and ends this one
        self.announce(error)
        self._end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def _run(self) -> None:
        beat, last = 0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - last > 3 * BEAT:  # this process was paused: its view of the others is old
                self._seen, self._reached = {}, now
            last, beat = now, beat + 1
            if self._launched and os.getppid() != self._parent:
                self._stop("the launcher has ended")
            try:
                self._client.key_value_set(f"nnlearn/alive/{self.process}", str(beat), allow_overwrite=True)
                self._look(now)
                self._reached = now
            except Exception:
                if self._closing.is_set():
                    return  # the connection is closed
                if now - self._reached > min(self.silence, 3 * BEAT):
                    self._stop(
                        f"{self._name(0)}, the coordinator, cannot be reached: it was killed, its machine stopped, or "
                        "the network failed"
                    )
            time.sleep(BEAT)

    def _look(self, now: float) -> None:
        """End this process if another one has failed or is silent."""
        failed, done, alive, self_places = (
            {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(f"nnlearn/{folder}/")}
            for folder in ("failed", "done", "alive", "place")
        )
        self._names |= self_places
        if self._announced is not None and now - self._announced > self.silence:
            self._end(1)
        for other, cause in failed.items():
            if other != self.process:
                self._stop(f"{self._name(other)} failed: {cause}")
        for other, beat in alive.items():
            before = self._seen.get(other)
            if before is None or before[0] != beat:
                self._seen[other] = (beat, now)
            elif now - before[1] > self.silence and other not in done and other != self.process:
                self._stop(
                    f"{self._name(other)} has given no sign of life for {self.silence:g} s: it was killed, or its "
                    "machine stopped"
                )

    def _name(self, other: int) -> str:
        place = self._names.get(other)
        return f"process {other} of {self.processes}" + (f" ({place})" if place else "")

    def _stop(self, cause: str) -> None:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"nnlearn: {cause}. Process {self.process} ends too.\n")
        self._end(FAILED)

    def _end(self, status: int) -> None:
        self._ended.acquire()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        if self.process == 0:  # without the coordinator the others could not learn the cause
            time.sleep(3 * BEAT)
        os._exit(status)  # at an ordinary exit JAX would wait for the other processes


__all__ = ["Watch"]
