"""A stream of batches as blocks of several steps, cut at checks, callbacks and the ends of epochs."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from nnlearn.calls import check_takes
from nnlearn.stream.place import START, Place, iterator_state, resumed
from nnlearn.stream.stack import Stacker
from nnlearn.train.sampler import Sampler
from nnlearn.types import Batch, PyTree

MOST_STEPS = 32  # default limit of the steps of a block, which share the cost of one call
BLOCK_BYTES = 8 << 20  # default limit of its memory: with larger batches the cost of a call does not matter


class EpochEnd(NamedTuple):
    """A pass over the stream is complete; ``last`` if there is no other. ``place`` is that of the next batch."""

    last: bool
    place: Place


class Block(NamedTuple):
    """Stacked batches for several steps.

    Attributes:
      batches: a batch whose leaves have a leading axis of ``size``.
      steps: number of batches in it, ``<= size``; the rest is undefined.
      size: room for batches.
      end: the end of the epoch, if it is known to come after this block.
      place: where the stream is after these batches.
    """

    batches: PyTree
    steps: int
    size: int
    end: EpochEnd | None = None
    place: Place = START


class Boundaries(NamedTuple):
    """The steps after which a block must end.

    Attributes:
      first, last: steps made before and after the run; ``last`` is None if only the end of the data ends it.
      periods: a block ends at every multiple of each.
      epoch_ends: whether a block ends with every epoch.
      epoch_steps: batches of an epoch, if known.

    >>> boundaries = Boundaries(0, 100, (30,))
    >>> boundaries.distance(0), boundaries.distance(55), boundaries.distance(95)
    (30, 5, 5)
    """

    first: int
    last: int | None
    periods: tuple[int, ...]
    epoch_ends: bool = False
    epoch_steps: int | None = None

    def distance(self, step: int) -> float:
        """Steps from ``step`` to the next boundary."""
        ends = [period - step % period for period in self.periods]
        return min(ends, default=math.inf) if self.last is None else min([*ends, self.last - step])

    def block_size(self, batch_bytes: int) -> int:
        """The block size that gives few calls and full blocks.

        >>> Boundaries(0, 1000, (100,)).block_size(1000), Boundaries(0, None, ()).block_size(100 << 20)
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


class Epoch(NamedTuple):
    """One pass over the batches; ``last`` if there is no other. ``index`` counts them from 0."""

    batches: Iterable[Batch]
    last: bool
    index: int


def passes(batches: Any, epochs: int | None, steps: int | None, first: int = 0) -> Iterator[Epoch]:
    """The passes over the batches.

    Args:
      batches: an iterable, or a function from the epoch, counted from 0, to one.
      epochs: number of passes; None for one, or for as many as ``steps`` need.
      steps: the number of steps that ends the run, or None.
      first: the pass to begin with, in a resumed run.

    Raises:
      TypeError: if ``batches`` is neither.
      ValueError: if several passes are needed over batches that can be read only once.

    >>> [(list(epoch.batches), epoch.last) for epoch in passes([1, 2], 2, None)]
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
        try:
            check_takes(batches, "batches, if it is a function,", "epoch")
        except TypeError as error:
            raise TypeError(f"{error}: write `def batches(epoch)`, or give batches() itself") from None
    once = readable and isinstance(batches, Iterator)
    if once and epochs is not None and epochs > 1:
        raise ValueError(
            f"epochs={epochs}, but batches can be read only once: give batches that can be read again, such as a list "
            "or a DataLoader, or a function epoch -> iterable"
        )
    if once or (epochs is None and steps is None):
        epochs = 1
    indices = itertools.count(first) if epochs is None else range(first, epochs)
    read: Any = batches  # hasattr narrows the type of ``batches`` too far
    return (Epoch(read if readable else read(index), index + 1 == epochs, index) for index in indices)


class _Source:
    """The batches of an epoch, and whether any are left. ``next`` raises the errors of reading.

    Args:
      batches: an iterable.
      ahead: whether ``is_over`` may read the next batch. It does so only if the length is unknown.
      place: where to begin.

    Attributes:
      count: batches of the epoch that have been given away, in earlier runs too.
    """

    def __init__(self, batches: Iterable[Batch], ahead: bool, place: Place):
        begun = place.batches > 0 or place.state is not None
        self._given, self._length, self._ahead = batches, known_length(batches), ahead
        self._batches = resumed(batches, place) if begun else iter(batches)
        self.count = place.batches
        self._held: tuple[Batch, Exception | None] | None = None

    def __next__(self) -> Batch:
        (batch, error), self._held = self._held or self._read(), None
        if error is not None:
            raise error
        self.count += 1
        return batch

    def state(self) -> Any:
        """The state of the iterator after the last batch, see ``iterator_state``."""
        return None if self._held else iterator_state(self._batches, self._given)

    def is_over(self) -> bool:
        """Whether the epoch is known to have no other batch."""
        if self._ahead if self._length is None else self.count >= self._length:
            self._held = self._held or self._read()
        return self._held is not None and isinstance(self._held[1], StopIteration)

    def _read(self) -> tuple[Batch, Exception | None]:
        try:
            return next(self._batches), None
        except Exception as error:
            return None, error


def read_blocks(
    epochs: Iterator[Epoch],
    boundaries: Boundaries,
    stacker: Stacker,
    stopped: Callable[[], bool],
    ahead: bool,
    place: Place = START,
    tracked: bool = False,
) -> Iterator[Block | EpochEnd]:
    """Yield blocks of as many steps as fit between the boundaries, and a mark at the end of each epoch.

    An error while batch n is read or checked is raised after the block with the batches before it.

    Args:
      epochs: the result of ``passes``.
      boundaries: where blocks end.
      stacker: makes the blocks.
      stopped: whether the rest is no longer needed.
      ahead: whether a batch may be read before the previous block is yielded. If a block ends at a period, this tells
        whether the epoch ends there too, so that one call handles both.
      place: where a resumed run begins.
      tracked: whether blocks carry the state of the iterator, for checkpoints.

    Raises:
      ValueError: if an epoch is empty, or the batches end before the last boundary.
    """
    step = boundaries.first
    for batches, last, index in epochs:
        source, marked = _Source(batches, ahead, place), False
        place, next_epoch = START, EpochEnd(last, Place(index + 1, 0))
        end_matters = boundaries.last is None if last else boundaries.epoch_ends
        while step != boundaries.last and not stopped():
            try:
                batch = next(source)
                stacker.add(batch, step + 1)
            except StopIteration:
                break
            except Exception:
                if stacker.count:
                    yield _block(stacker, Place(index, source.count))
                raise
            step += 1
            at_period = boundaries.distance(step - 1) == 1
            if stacker.count == stacker.size or at_period:
                # before another batch is read, perhaps into the same arrays
                block = _block(stacker, Place(index, source.count, source.state() if tracked else None))
                marked = end_matters and at_period and step != boundaries.last and source.is_over()
                yield block._replace(end=next_epoch, place=next_epoch.place) if marked else block
        if stopped() or step == boundaries.last:
            return
        if not source.count:
            once = " (an iterator is read only once)" if index else ""
            raise ValueError(f"epoch {index} of batches is empty{once}")
        if stacker.count and (last or boundaries.epoch_ends):
            yield _block(stacker, Place(index, source.count))
        if last and boundaries.last is not None:
            raise ValueError(
                f"batches ended after {step - boundaries.first} of steps={boundaries.last - boundaries.first}: give "
                "batches that can be read again, such as a list or a DataLoader, or a function epoch -> iterable"
            )
        if not marked:
            yield next_epoch
        if last:
            return


def _block(stacker: Stacker, place: Place) -> Block:
    count = stacker.count
    return Block(stacker.take(), count, stacker.size, place=place)


def known_length(batches: Any) -> int | None:
    """Batches of an epoch, or None if ``batches`` has no length."""
    if not hasattr(batches, "__len__"):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over a stream has the method, and raises
        return None


__all__ = ["Block", "Boundaries", "Epoch", "EpochEnd", "known_length", "passes", "read_blocks"]
