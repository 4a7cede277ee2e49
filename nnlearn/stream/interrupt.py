"""Ctrl-C and SIGTERM as requests to stop after the present step."""

import signal
import threading
from typing import Any

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupt:
    """A context that stores SIGINT or SIGTERM in ``reason``; a second SIGINT raises ``KeyboardInterrupt``.

    It works in the main thread only, because Python handles signals there. In other threads, and for signals that the
    process ignores or that are handled outside Python, nothing changes.

    >>> import os
    >>> with Interrupt() as interrupt:
    ...     os.kill(os.getpid(), signal.SIGINT)
    >>> interrupt.reason
    'interrupted'
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in REASONS:
                handler = signal.getsignal(signum)
                if handler is not None and handler != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = self.reason or REASONS[signal.Signals(signum)]


__all__ = ["Interrupt"]
