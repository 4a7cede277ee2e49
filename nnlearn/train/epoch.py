"""An epoch of steps, including its batches, as one pure function."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from nnlearn.data import MaskedBatch, batch_count, epoch_indices, example_count, take
from nnlearn.train.custom_step import carry_state, check_step, lift_step, own_state
from nnlearn.train.sampler import Remainder
from nnlearn.train.step import Info
from nnlearn.types import Batch, Key

State = TypeVar("State")


def make_epoch(
    step: Callable[..., tuple[State, Any]],
    examples: Batch,
    batch_size: int,
    *,
    shuffle: bool = True,
    remainder: Remainder = "mask",
) -> Callable[[State, Key], tuple[State, Info]]:
    """One pass over all examples in random order. It can be compiled, vmapped over states and keys, and scanned.

    Args:
      step: a step from ``make_step`` or a custom step, see ``nnlearn.train.custom_step``. Its batch is a
        ``MaskedBatch(examples, where)``: a tree like ``examples`` with a leading axis of length ``batch_size``, and
        booleans of shape (batch_size,) that are False for the padding of the last batch. The loss must exclude these
        examples, as in ``jnp.mean(losses_b, where=where_b)``.
      examples: a pytree of arrays of shape (size, ...).
      batch_size: the number of examples in a batch.
      shuffle: whether the order is random.
      remainder: how to treat an incomplete last batch; see ``epoch_indices``.

    Returns:
      ``epoch(state, key) -> (state, infos)``. Every leaf of ``infos`` has a leading axis of steps.

    Raises:
      ValueError: if arrays differ in length, or the batch size does not fit.

    >>> import jax.numpy as jnp
    >>> import nnlearn
    >>> def loss_fn(params, batch, key):
    ...     examples_b, where_b = batch
    ...     return jnp.mean((params - examples_b) ** 2, where=where_b)
    >>> tx = nnlearn.sgd(0.25)
    >>> epoch = make_epoch(nnlearn.make_step(loss_fn, tx), jnp.array([1.0, 2.0, 3.0]), batch_size=2)
    >>> state, infos = epoch(nnlearn.init_state(jnp.array(2.0), tx), jax.random.key(0))
    >>> int(state.step), infos.loss.shape
    (2, (2,))
    """
    check_step(step, factory=False)
    on_state = lift_step(step)
    size = example_count(examples)
    batch_count(size, batch_size, remainder=remainder)  # so that a bad batch size raises here, not in the first epoch

    def epoch(state: State, key: Key) -> tuple[State, Info]:
        def on_batch(state, batch):
            indices_b, where_b = batch
            return on_state(state, MaskedBatch(take(examples, indices_b), where_b))

        batches = epoch_indices(key if shuffle else None, size, batch_size, shuffle=shuffle, remainder=remainder)
        carried, infos = jax.lax.scan(on_batch, carry_state(state), batches)
        return own_state(carried), infos

    return epoch


__all__ = ["make_epoch"]
