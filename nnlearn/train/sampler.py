"""Sources of batches for a compiled run: arrays in epochs, arrays sampled at random, or a function of key and step.

A run requests the rows of many steps at once, because random numbers and gathers then cost far less. Every batch
depends only on the run's key and the step, so a resumed run receives the same batches.
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

GATHER_BYTES = 4 << 20  # the largest size of the batches of many steps that are gathered at once
FAR = 4  # the order of an epoch of more rounds than this is stored, not recomputed in every round

Remainder = Literal["mask", "drop", "error"]


class _Rows(NamedTuple):
    """Indices of examples that have not been gathered yet."""

    indices: jax.Array


class Sampler(NamedTuple):
    """A source of batches inside a compiled program, made by ``shuffled``, ``poisson_sampled`` or ``generated``.

    Attributes:
      epoch_steps: the number of steps in an epoch, or None if there are no epochs.
      start: ``start(key, stride) -> order``, the state before the first round; ``stride`` is the number of steps in a
        round.
      rows: ``rows(key, order, first, count, stride) -> (order, rows)``, the stacked rows of ``count`` steps from step
        ``first``, which may be traced and is a multiple of ``stride``.
      batch: ``batch(row) -> batch``, the batch of one step.
      examples: ``examples() -> arrays``, all the examples; None if they are generated.
      batch_size: the number of examples in a batch, for ``poisson_sampled`` the expected one; None if they are
        generated.
      shuffle: whether the order is random.
      over: ``over(arrays) -> sampler``, the same sampler of other examples, with equal batches of indices if there are
        equally many; None if they are generated.
    """

    epoch_steps: int | None
    start: Callable[[Key, int], PyTree]
    rows: Callable[[Key, PyTree, Any, int, int], tuple[PyTree, PyTree]]
    batch: Callable[[PyTree], Batch]
    examples: Callable[[], Batch] | None = None
    batch_size: int | None = None
    shuffle: bool = True
    over: Callable[[Batch], "Sampler"] | None = None


def shuffled(examples: Batch, batch_size: int, *, shuffle: bool = True, remainder: Remainder = "mask") -> Sampler:
    """Batches that contain each example once in an epoch, in a new random order for every epoch.

    Args:
      examples: a pytree of arrays of shape (size, ...). They become constants of the compiled program. Large arrays, or
        arrays with a vmapped axis, should be arguments instead: call ``make_train`` in the function that takes them.
      batch_size: the number of examples in a batch.
      shuffle: whether the order is random.
      remainder: ``"mask"`` pads an incomplete last batch, and every batch is a ``MaskedBatch(examples, where)``.
        ``"drop"`` drops it and ``"error"`` raises; a batch is then a tree like ``examples``.

    Raises:
      ValueError: if arrays differ in length, or the batch size does not fit.

    >>> sampler = shuffled(jnp.arange(6), 2, shuffle=False, remainder="drop")
    >>> order, rows = sampler.rows(None, sampler.start(None, 3), 0, 3, 3)
    >>> sampler.batch(jax.tree.map(lambda row: row[1], rows))
    Array([2, 3], dtype=int32)
    """
    batch_count(example_count(examples), batch_size, remainder=remainder)
    return _shuffled(jax.tree.map(jnp.asarray, examples), batch_size, shuffle, remainder)


@comparable  # after the conversion to JAX arrays, which are immutable and need no copy
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
        """The largest number of epochs that a round overlaps.

        A round can begin at any multiple of the greatest common divisor within an epoch.
        """
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

    def over(others):
        return shuffled(others, batch_size, shuffle=shuffle, remainder=remainder)

    return Sampler(per_epoch, start, rows, batch, lambda: examples, batch_size, shuffle, over)


@comparable
def poisson_sampled(
    examples: Batch, batch_size: int, *, epoch_steps: int | None = None, capacity: int | None = None
) -> Sampler:
    """Batches by Poisson sampling, as privacy accountants of DP-SGD assume.

    At every step each of the ``size`` examples is in the batch with probability ``q = batch_size / size``,
    independently of other examples and steps. The number of examples in a batch is random, so every batch is a
    ``MaskedBatch(examples, where)`` of ``capacity`` rows, of which the first ones count. A batch can be empty. For
    DP-SGD, divide by the expected size: ``clipped_value_and_grad(loss_fn, clip_norm, noise_multiplier,
    batch_size=batch_size)``.

    Args:
      examples: a pytree of arrays of shape (size, ...), as in ``shuffled``.
      batch_size: the expected number of examples in a batch, in [1, size].
      epoch_steps: the number of steps in an epoch; None for ``ceil(size / batch_size)``, in which each example occurs
        about once.
      capacity: the number of rows in a batch. If more examples are drawn, those with the largest indices are dropped,
        which privacy accountants do not allow for. With None this happens in fewer than one step in a billion.

    Raises:
      ValueError: if arrays differ in length, or an argument is out of range.

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
    # A random 32-bit integer is below the bound with probability q to within 2 ** -32; floats round q to 2 ** -23.
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

    def over(others):
        return poisson_sampled(others, batch_size, epoch_steps=epoch_steps, capacity=capacity)

    return Sampler(per_epoch, lambda key, stride: (), rows, batch, lambda: examples, batch_size, True, over)


def poisson_capacity(size: int, batch_size: int) -> int:
    """Rows that suffice for a Poisson batch in all but one step in a billion, by Bernstein's inequality.

    >>> poisson_capacity(50_000, 500)
    651
    """
    bits = math.log(1e9)
    variance = batch_size * (1 - batch_size / size)
    return min(size, math.ceil(batch_size + bits / 3 + math.sqrt((bits / 3) ** 2 + 2 * variance * bits)))


@comparable
def generated(batch_fn: Callable[[Key, jax.Array], Batch]) -> Sampler:
    """Batches from a function, for example new random data at every step.

    Args:
      batch_fn: ``batch_fn(key, step) -> batch``, a function that JAX can trace. ``key`` differs at every step, and
        ``step`` counts from 0.

    Raises:
      TypeError: if it does not take two arguments.

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
