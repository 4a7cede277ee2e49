"""The first Ctrl-C, or the end of a job, as a request to stop at the next step."""

import signal
import threading
from typing import Any

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupt:
    """While it is entered, SIGINT and SIGTERM are noted in ``reason``; a second SIGINT raises ``KeyboardInterrupt``.

    Only in the main thread, as Python lets no other one handle signals. Elsewhere, and for signals that the process
    ignores or that are handled outside of Python, nothing changes.

    >>> import os
    >>> with Interrupt() as interrupt:
    ...     os.kill(os.getpid(), signal.SIGINT)
    >>> interrupt.reason
    'interrupted'
    """

    def __init__(self):
        self.reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in REASONS:
                handler = signal.getsignal(number)
                if handler is not None and handler != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = self.reason or REASONS[number]


__all__ = ["Interrupt"]
