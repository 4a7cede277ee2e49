"""An epoch of steps as one pure function, batches and all."""

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
    """One pass over all examples in random order, to be compiled, vmapped over states and keys, and scanned again.

    Args:
      step: from ``make_step``, or a step of your own, see ``nnlearn.train.custom_step``. Its batch is a
        ``MaskedBatch(examples, where)``: a tree like ``examples`` whose leading axis is ``batch_size`` long, and
        booleans of shape (batch_size,) that are False where the last batch was filled up; the loss is to leave those
        out, ``jnp.mean(losses_b, where=where_b)``.
      examples: a pytree of arrays of shape (size, ...).
      batch_size: examples in a batch.
      shuffle: whether the order is random.
      remainder: what to do with an incomplete last batch; see ``epoch_indices``.

    Returns:
      ``epoch(state, key) -> (state, infos)``; every leaf of ``infos`` has a leading axis of steps.

    Raises:
      ValueError: arrays differ in length, or the batch size does not fit.

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
    batch_count(size, batch_size, remainder=remainder)  # a bad batch size is an error here, not at the first epoch

    def epoch(state: State, key: Key) -> tuple[State, Info]:
        def on_batch(state, batch):
            indices_b, where_b = batch
            return on_state(state, MaskedBatch(take(examples, indices_b), where_b))

        batches = epoch_indices(key if shuffle else None, size, batch_size, shuffle=shuffle, remainder=remainder)
        carried, infos = jax.lax.scan(on_batch, carry_state(state), batches)
        return own_state(carried), infos

    return epoch


__all__ = ["make_epoch"]
