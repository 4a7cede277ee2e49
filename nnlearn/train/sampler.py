"""Where a compiled run takes its batches from: arrays, in an order or drawn at random, or a function of key and step.

A run asks for the rows of many steps at once, because random numbers and gathers cost far less together. Every batch is
a function of the run's key and the step alone, so a run that is taken up again sees what it would have seen.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.calls import check_takes
from nnlearn.checks import check_count
from nnlearn.data import MaskedBatch, batch_count, epoch_indices, example_count
from nnlearn.settings import comparable
from nnlearn.sharding.axes import take_rows
from nnlearn.types import Batch, Key, PyTree

GATHER_BYTES = 4 << 20  # batches of many steps that are taken out of the arrays at once, if they need no more than this
FAR = 4  # an epoch of so many rounds is ordered once and kept, not again in every round

Remainder = Literal["mask", "drop", "error"]


class _Rows(NamedTuple):
    """Examples that are yet to be taken out of the arrays."""

    indices: jax.Array


class Sampler(NamedTuple):
    """Batches inside of a program; made by ``shuffled``, ``poisson_sampled`` or ``generated``.

    Attributes:
      epoch_steps: steps of an epoch, or None where there are none.
      start: ``start(key, stride) -> order``, what is kept from round to round; ``stride`` is the steps of a round.
      rows: ``rows(key, order, first, count, stride) -> (order, rows)``, what ``count`` steps from step ``first`` on
        need, stacked; ``first`` may be traced, and is a multiple of ``stride``.
      batch: ``batch(row) -> batch``, the batch of one step.
    """

    epoch_steps: int | None
    start: Callable[[Key, int], PyTree]
    rows: Callable[[Key, PyTree, Any, int, int], tuple[PyTree, PyTree]]
    batch: Callable[[PyTree], Batch]


def shuffled(examples: Batch, batch_size: int, *, shuffle: bool = True, remainder: Remainder = "mask") -> Sampler:
    """Batches of arrays, each example once an epoch, in an order drawn anew for every epoch.

    Args:
      examples: a pytree of arrays of shape (size, ...). They become part of the compiled program; large ones, or those
        of a vmapped axis, rather be arguments: call ``make_train`` inside of the function that takes them.
      batch_size: examples in a batch.
      shuffle: whether the order is random.
      remainder: ``"mask"`` fills an incomplete last batch up, and every batch is a ``MaskedBatch(examples, where)``;
        ``"drop"`` leaves it out and ``"error"`` refuses it, and a batch is a tree like ``examples``.

    Raises:
      ValueError: arrays differ in length, or the batch size does not fit.

    >>> sampler = shuffled(jnp.arange(6), 2, shuffle=False, remainder="drop")
    >>> order, rows = sampler.rows(None, sampler.start(None, 3), 0, 3, 3)
    >>> sampler.batch(jax.tree.map(lambda row: row[1], rows))
    Array([2, 3], dtype=int32)
    """
    batch_count(example_count(examples), batch_size, remainder=remainder)
    return _shuffled(jax.tree.map(jnp.asarray, examples), batch_size, shuffle, remainder)


@comparable  # by the arrays that JAX has by now, which need not be copied
def _shuffled(examples: Batch, batch_size: int, shuffle: bool, remainder: Remainder) -> Sampler:
    size = example_count(examples)
    per_epoch = batch_count(size, batch_size, remainder=remainder)
    example_bytes = sum(leaf.nbytes // size for leaf in jax.tree.leaves(examples))
    where_pb = np.arange(per_epoch * batch_size).reshape(per_epoch, batch_size) < size

    def take_in_range(indices):
        return jax.tree.map(lambda array: take_rows(array, indices, spread=True, mode="clip"), examples)

    def order_of(key, epochs):
        def one(epoch):
            key_e = jax.random.fold_in(key, epoch) if shuffle else None
            return epoch_indices(key_e, size, batch_size, shuffle=shuffle, remainder=remainder)[0]

        return jax.vmap(one)(epochs).reshape(-1, batch_size)

    def epochs_touched(count, stride):
        """A round may begin at any multiple of the greatest common divisor within an epoch."""
        return -(-(per_epoch - math.gcd(stride, per_epoch) + count) // per_epoch)

    def is_kept(stride):
        return shuffle and per_epoch > FAR * stride

    def start(key, stride):
        return order_of(key, jnp.arange(epochs_touched(stride, stride))) if is_kept(stride) else ()

    def rows(key, order, first, count, stride):
        epoch, touched = first // per_epoch, epochs_touched(count, stride)
        if is_kept(stride):
            entered = epoch > jnp.maximum(first - stride, 0) // per_epoch
            epochs = epoch + jnp.arange(epochs_touched(stride, stride))
            order = jax.lax.cond(entered, lambda: order_of(key, epochs), lambda: order)
            window = order
        else:
            window = order_of(key, epoch + jnp.arange(touched))
        offset = first - epoch * per_epoch
        indices = jax.lax.dynamic_slice_in_dim(window, offset, count)
        at_once = count * batch_size * example_bytes <= GATHER_BYTES
        batches = take_in_range(indices) if at_once else _Rows(indices)
        if remainder == "mask":
            where = jnp.tile(where_pb, (touched, 1))
            batches = MaskedBatch(batches, jax.lax.dynamic_slice_in_dim(where, offset, count))
        return order, batches

    def batch(row):
        if remainder == "mask":
            return row._replace(examples=batch_of(row.examples))
        return batch_of(row)

    def batch_of(row):
        return take_in_range(row.indices) if isinstance(row, _Rows) else row

    return Sampler(per_epoch, start, rows, batch)


@comparable
def poisson_sampled(
    examples: Batch, batch_size: int, *, epoch_steps: int | None = None, capacity: int | None = None
) -> Sampler:
    """Batches that each example joins by itself with one probability: what accounts of DP-SGD's privacy assume.

    At every step each of the ``size`` examples is in the batch with probability ``q = batch_size / size``, whatever the
    others and other steps do. The number of examples in a batch is random, so every batch is a
    ``MaskedBatch(examples, where)`` of ``capacity`` rows of which the first count; it may be empty. For DP-SGD divide
    by the expected size, ``clipped_value_and_grad(loss_fn, clip_norm, noise_multiplier, batch_size=batch_size)``.

    Args:
      examples: a pytree of arrays of shape (size, ...), as in ``shuffled``.
      batch_size: the expected number of examples in a batch, in [1, size].
      epoch_steps: steps of an epoch; None for ``ceil(size / batch_size)``, which see each example about once.
      capacity: rows of a batch. Where more are drawn, those of the largest index are left out, which no account of
        privacy allows for. None for so many that this happens at fewer than one step in a billion.

    Raises:
      ValueError: arrays differ in length, or a number is out of its range.

    Source: Abadi et al. 2016, arXiv:1607.00133, section 3.1; Mironov et al. 2019, arXiv:1908.10530.

    >>> sampler = poisson_sampled(jnp.arange(100), 5)
    >>> order, rows = sampler.rows(jax.random.key(0), sampler.start(None, 3), 0, 3, 3)
    >>> batch = sampler.batch(jax.tree.map(lambda row: row[1], rows))
    >>> batch.examples.shape, int(batch.where.sum())
    ((28,), 10)
    """
    size = example_count(examples)
    batch_size = check_count("batch_size", batch_size)
    if batch_size > size:
        raise ValueError(f"batch_size={batch_size} is the expected number of examples, so at most all {size}")
    capacity = poisson_capacity(size, batch_size) if capacity is None else check_count("capacity", capacity)
    if capacity < batch_size:
        raise ValueError(
            f"capacity={capacity} must be at least batch_size={batch_size}, the expected number of examples"
        )
    per_epoch = -(-size // batch_size) if epoch_steps is None else check_count("epoch_steps", epoch_steps)
    examples = jax.tree.map(jnp.asarray, examples)
    # A 32-bit number is below the bound with probability q to within 2 ** -32; floats would round q to 2 ** -23.
    bound = min(batch_size * 2**32 // size, 2**32 - 1)

    def draw(key):
        every = jnp.ones(size, bool)
        chosen = every if batch_size == size else jax.random.bits(key, (size,), jnp.uint32) < jnp.uint32(bound)
        (indices,) = jnp.nonzero(chosen, size=capacity, fill_value=0)
        return MaskedBatch(_Rows(indices), jnp.arange(capacity) < jnp.sum(chosen))

    def rows(key, order, first, count, stride):
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(count))
        return order, jax.lax.map(draw, keys)

    def batch(row):
        indices = row.examples.indices
        taken = jax.tree.map(lambda array: take_rows(array, indices, spread=True, mode="clip"), examples)
        return MaskedBatch(taken, row.where)

    return Sampler(per_epoch, lambda key, stride: (), rows, batch)


def poisson_capacity(size: int, batch_size: int) -> int:
    """Rows that a Poisson batch needs more of at fewer than one step in a billion, by Bernstein's inequality.

    >>> poisson_capacity(50_000, 500)
    651
    """
    bits = math.log(1e9)
    variance = batch_size * (1 - batch_size / size)
    return min(size, math.ceil(batch_size + bits / 3 + math.sqrt((bits / 3) ** 2 + 2 * variance * bits)))


@comparable
def generated(batch_fn: Callable[[Key, jax.Array], Batch]) -> Sampler:
    """Batches that a function makes, such as fresh random data.

    Args:
      batch_fn: ``batch_fn(key, step) -> batch``, traced: ``key`` is another at every step, ``step`` counts from 0.

    Raises:
      TypeError: it does not take two arguments.

    >>> sampler = generated(lambda key, step: jax.random.uniform(key) + step)
    >>> _, rows = sampler.rows(jax.random.key(0), (), 5, 2, 2)
    >>> int(sampler.batch(jax.tree.map(lambda row: row[1], rows)))
    6
    """
    check_takes(batch_fn, "batch_fn", "key, step")

    def rows(key, order, first, count, stride):
        steps = first + jnp.arange(count)
        return order, (jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, steps), steps)

    return Sampler(None, lambda key, stride: (), rows, lambda row: batch_fn(*row))


__all__ = ["Sampler", "generated", "poisson_capacity", "poisson_sampled", "shuffled"]
