"""Read an iterator ahead in a thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax

JOIN_SECONDS = 1.0  # how long the end of a run waits for an item that is being read
WAKE_SECONDS = 0.1  # how often a caller that waits for an item looks for an interrupt

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Reads an iterator ahead in a thread. ``get`` raises the iterator's exceptions, after the items before them.

    Args:
      items: the iterator; only the thread reads it.
      depth: number of items to read ahead; 0 reads each item when it is requested, without a thread.

    >>> with Prefetch(iter("ab"), 2) as ahead:
    ...     ahead.get(), ahead.get(), ahead.get()
    ('a', 'b', None)
    """

    def __init__(self, items: Iterator[Item], depth: int):
        self.items, self.depth = items, depth
        self.stopped = False
        self._ready: queue.SimpleQueue[tuple[Item | None, BaseException | None]] = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Prefetch[Item]":
        if self.depth:
            # The thread needs these settings as arguments: contexts such as jax.enable_x64 are local to a thread.
            device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
            x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
            self._thread = threading.Thread(target=self._read, args=(device, x64), name="nnlearn-prefetch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        self._slots.release()
        if self._thread is not None:
            # With a timeout, as an iterator may hang; the daemon thread then ends when the iterator returns.
            self._thread.join(timeout=JOIN_SECONDS)

    def get(self, interrupted: Callable[[], bool] = lambda: False) -> Item | None:
        """The next item; None after the last, or as soon as ``interrupted()``."""
        if self._thread is None:
            return None if interrupted() else next(self.items, None)
        while not interrupted():
            with contextlib.suppress(queue.Empty):
                item, error = self._ready.get(timeout=WAKE_SECONDS)
                self._slots.release()
                if error is not None:
                    raise error
                return item
        return None

    def _read(self, device: Any, x64: bool) -> None:
        item, error = None, None
        with jax.default_device(device), jax.enable_x64(x64):
            while not self.stopped and error is None:
                self._slots.acquire()
                try:
                    item = None if self.stopped else next(self.items, None)
                except BaseException as raised:
                    item, error = None, raised
                self._ready.put((item, error))
                if item is None:
                    return


__all__ = ["Prefetch"]
