"""A stream of batches as blocks of several steps, read ahead and put on the device by a thread."""

import contextlib
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from nnlearn.calls import check_takes
from nnlearn.stream.stack import Stacker
from nnlearn.train.sampler import Sampler
from nnlearn.types import Batch, PyTree

MOST_STEPS = 32  # steps of a block where none are asked for: what a call costs is spread over so many
BLOCK_BYTES = 8 << 20  # and no more memory than this, as steps on larger batches outweigh a call by themselves
JOIN_SECONDS = 1.0  # how long the end of a run waits for a batch that is being read
WAKE_SECONDS = 0.1  # how often a caller who waits for data looks whether it was interrupted


class EpochEnd(NamedTuple):
    """A pass over the stream is complete; ``last`` if there is no other."""

    last: bool


class Block(NamedTuple):
    """A stack with room for ``size`` batches, and ``count`` in it; ``end``, if the epoch is known to end with it."""

    batches: PyTree
    count: int
    size: int
    end: EpochEnd | None = None


class Plan(NamedTuple):
    """Where blocks end: at the last step, at the multiples of some numbers of steps, and at the ends of epochs.

    Attributes:
      first, last: steps made before and after the run; ``last`` is None where only the data know.
      periods: a block ends at every multiple of each.
      epoch_ends: whether one ends with every epoch.
      epoch_steps: batches of an epoch, if they are known.

    >>> plan = Plan(0, 100, (30,))
    >>> plan.room(0), plan.room(55), plan.room(95)
    (30, 5, 5)
    """

    first: int
    last: int | None
    periods: tuple[int, ...]
    epoch_ends: bool = False
    epoch_steps: int | None = None

    def room(self, step: int) -> float:
        """Steps from ``step`` to the next end."""
        ends = [period - step % period for period in self.periods]
        return min(ends, default=math.inf) if self.last is None else min([*ends, self.last - step])

    def block_size(self, batch_bytes: int) -> int:
        """Steps of a block, to make calls few and blocks full.

        >>> Plan(0, 1000, (100,)).block_size(1000), Plan(0, None, ()).block_size(100 << 20)
        (25, 1)
        """
        most = max(1, min(MOST_STEPS, BLOCK_BYTES // max(batch_bytes, 1)))
        gaps = [*self.periods, *([] if self.last is None else [self.last - self.first])]
        if self.epoch_steps and (self.epoch_ends or self.last is None):
            gaps.append(self.epoch_steps)
        if not gaps:
            return most
        most, common = min(most, *gaps), math.gcd(*gaps)
        return next((size for size in range(most, most // 2, -1) if common % size == 0), most)


def passes(batches: Any, epochs: int | None, steps: int | None) -> Iterator[tuple[Iterable[Batch], bool]]:
    """Each pass over the batches, and whether it is the last.

    Args:
      batches: an iterable, or a function from the epoch, counted from 0, to one.
      epochs: how many passes; None for one, or for as many as ``steps`` need.
      steps: whether a number of steps ends the run.

    Raises:
      TypeError: ``batches`` is neither.
      ValueError: there is to be more than one pass over what can be read only once.

    >>> [(list(one), last) for one, last in passes([1, 2], 2, None)]
    [([1, 2], False), ([1, 2], True)]
    """
    if isinstance(batches, Sampler):
        raise TypeError("batches of shuffled(...) or generated(...) are made inside of a program: use make_train")
    if isinstance(batches, np.ndarray | jax.Array | dict | str):
        raise TypeError(f"batches must be an iterable of batches, such as a list of them; got {type(batches).__name__}")
    readable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not readable and not callable(batches):
        raise TypeError(f"batches must be an iterable, or a function epoch -> iterable; got {batches!r}")
    if not readable:
        check_takes(batches, "batches, if it is a function,", "epoch")
    once = readable and isinstance(batches, Iterator)
    if once and epochs is not None and epochs > 1:
        raise ValueError(
            f"epochs={epochs}, but batches can be read only once: give what can be read again, such as a list or a "
            "DataLoader, or a function epoch -> iterable"
        )
    if once or (epochs is None and steps is None):
        epochs = 1
    numbers = itertools.count() if epochs is None else range(epochs)
    return ((batches if readable else batches(epoch), epoch + 1 == epochs) for epoch in numbers)


class _Source:
    """The batches of an epoch, and whether they are over; what goes wrong in finding out is raised by ``next``.

    Args:
      batches: an iterable.
      ahead: whether to read the next batch to find out; where the length is known there is none to be read.
    """

    def __init__(self, batches: Iterable[Batch], ahead: bool):
        self._batches, self._length, self._ahead = iter(batches), known_length(batches), ahead
        self._count = 0
        self._held: tuple[Batch, Exception | None] | None = None

    def __next__(self) -> Batch:
        (batch, error), self._held = self._held or self._read(), None
        if error is not None:
            raise error
        self._count += 1
        return batch

    def is_over(self) -> bool:
        """Whether there is no other batch, as far as that can be told."""
        if self._ahead if self._length is None else self._count >= self._length:
            self._held = self._held or self._read()
        return self._held is not None and isinstance(self._held[1], StopIteration)

    def _read(self) -> tuple[Batch, Exception | None]:
        try:
            return next(self._batches), None
        except Exception as error:
            return None, error


def read_blocks(
    epochs: Iterator[tuple[Iterable[Batch], bool]],
    plan: Plan,
    stacker: Stacker,
    stopped: Callable[[], bool],
    ahead: bool,
) -> Iterator[Block | EpochEnd]:
    """Blocks of as many steps as fit between the plan's ends, and a mark at the end of each epoch.

    What goes wrong while batch n is read or checked is raised after the block with the batches before it.

    Args:
      epochs: what ``passes`` returns.
      plan: where blocks end.
      stacker: makes the blocks.
      stopped: whether the rest is not needed any more.
      ahead: whether a batch may be read before the block before it is given away. Where a block ends at a period, that
        tells whether the epoch ends there too, so that all there is to do after a step is done at once.

    Raises:
      ValueError: an epoch has no batches, or the batches end before the plan does.
    """
    step = plan.first
    for number, (batches, last) in enumerate(epochs):
        before, source, marked = step, _Source(batches, ahead), False
        end_matters = plan.last is None if last else plan.epoch_ends
        while step != plan.last and not stopped():
            try:
                batch = next(source)
                stacker.add(batch, step + 1)
            except StopIteration:
                break
            except Exception:
                if stacker.count:
                    yield _block(stacker)
                raise
            step += 1
            at_period = plan.room(step - 1) == 1
            if stacker.count == stacker.size or at_period:
                block = _block(stacker)  # before another batch is read, perhaps into the same arrays
                marked = end_matters and at_period and step != plan.last and source.is_over()
                yield block._replace(end=EpochEnd(last)) if marked else block
        if stopped() or step == plan.last:
            return
        if step == before:
            once = " (an iterator is read only once)" if number else ""
            raise ValueError(f"epoch {number} of batches is empty{once}")
        if stacker.count and (last or plan.epoch_ends):
            yield _block(stacker)
        if last and plan.last is not None:
            raise ValueError(
                f"batches ended after {step - plan.first} of steps={plan.last - plan.first}: give what can be read "
                "again, such as a list or a DataLoader, or a function epoch -> iterable"
            )
        if not marked:
            yield EpochEnd(last)
        if last:
            return


def _block(stacker: Stacker) -> Block:
    count = stacker.count
    return Block(stacker.take(), count, stacker.size)


class Prefetch:
    """Reads an iterator ahead in a thread; what it raises is raised by ``get``, in its turn.

    Args:
      items: what to read; its own thread is the only one that touches it.
      depth: how many items are made before they are asked for; 0 to make each when it is.

    >>> with Prefetch(iter("ab"), 2) as ahead:
    ...     ahead.get(), ahead.get(), ahead.get()
    ('a', 'b', None)
    """

    def __init__(self, items: Iterator[Any], depth: int):
        self.items, self.depth = items, depth
        self.stopped = False
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Prefetch":
        if self.depth:
            # contexts such as jax.enable_x64 hold for one thread only
            settings = (jax.config.jax_default_device, jax.config.jax_enable_x64)
            self._thread = threading.Thread(target=self._read, args=settings, name="nnlearn-prefetch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped = True
        self._slots.release()
        if self._thread is not None:
            # An iterator that hangs would hold up the end for ever; its thread ends when it comes back.
            self._thread.join(timeout=JOIN_SECONDS)

    def get(self, interrupted: Callable[[], bool] = lambda: False) -> Any:
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


def known_length(batches: Any) -> int | None:
    """Batches of an epoch, where ``batches`` knows them."""
    if not hasattr(batches, "__len__"):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over a stream has the method, and raises
        return None


__all__ = ["Block", "EpochEnd", "Plan", "Prefetch", "known_length", "passes", "read_blocks"]
