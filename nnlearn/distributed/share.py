"""The part of each batch that a process reads."""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import numpy as np

from nnlearn.data import MaskedBatch, batch_count, example_count
from nnlearn.types import Batch


def own_rows(batch_size: int, process: int | None = None, processes: int | None = None) -> slice:
    """The rows of a batch that this process reads: a contiguous part, in the order of the processes.

    Args:
      batch_size: the number of examples in the batch of all processes.
      process, processes: the place of the process; None for that of this one.

    Raises:
      ValueError: if the number of examples is no multiple of the number of processes.

    >>> own_rows(8, 1, 2)
    slice(4, 8, None)
    """
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if batch_size % processes:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {processes} processes: make it a multiple of that"
        )
    each = batch_size // processes
    return slice(process * each, (process + 1) * each)


def own_batches(
    examples: Batch,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    remainder: Literal["mask", "drop", "error"] = "mask",
    process: int | None = None,
    processes: int | None = None,
) -> Callable[[int], Iterator[MaskedBatch]]:
    """Batches for ``fit`` of which each process reads only its own rows.

    The batches depend on the seed and the epoch, and not on the number of processes, so a run can be resumed with
    another number: every example is still seen once an epoch.

    Args:
      examples: arrays with one number of examples, such as ``np.memmap``. All processes must be able to read them.
      batch_size: the number of examples in the batch of all processes.
      seed: the seed of the order.
      shuffle: whether the order of each epoch is random.
      remainder: what to do with an incomplete last batch, see ``nnlearn.shuffled``.
      process, processes: the place of the process; None for that of this one.

    Returns:
      ``batches(epoch)``, an iterator of ``MaskedBatch(examples, where)`` with ``batch_size / processes`` rows.
      ``where`` is False in the padding of the last batch.

    Raises:
      ValueError: if the batch cannot be shared, or the remainder is an error.

    >>> batches = own_batches(np.arange(5), 4, shuffle=False, process=1, processes=2)
    >>> [(batch.examples.tolist(), batch.where.tolist()) for batch in batches(0)]
    [([2, 3], [True, True]), ([4, 4], [False, False])]
    """
    rows, size = own_rows(batch_size, process, processes), example_count(examples)
    count = batch_count(size, batch_size, remainder=remainder)

    def batches(epoch: int) -> Iterator[MaskedBatch]:
        order = np.random.default_rng([seed, epoch]).permutation(size) if shuffle else np.arange(size)
        for number in range(count):
            places = number * batch_size + np.arange(rows.start, rows.stop)
            chosen = order[np.minimum(places, size - 1)]
            yield MaskedBatch(jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], examples), places < size)

    return batches


__all__ = ["own_batches", "own_rows"]
