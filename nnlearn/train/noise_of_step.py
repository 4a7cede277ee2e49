"""The noise scale of a step's batch, in one or several parts, on one or several devices."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.calls import hand
from nnlearn.data import MaskedBatch, example_count
from nnlearn.gradients.batch import Outcome, split_batch
from nnlearn.gradients.devices import AxisName, device_key
from nnlearn.gradients.noise_scale import NoiseScale, noise_scale_from_batches
from nnlearn.gradients.per_example import gradient_moments, per_example_norms
from nnlearn.programs.slices import without_effects
from nnlearn.train.state import TrainState
from nnlearn.tree import global_norm, safe_divide, safe_sqrt
from nnlearn.types import Batch, Key, LossFn


class _Small(NamedTuple):
    """Sums over the small batches of a step: their number, squared norms, sizes and 1 / size."""

    number: jax.Array
    squares: jax.Array
    sizes: jax.Array
    inverses: jax.Array


def make_noise_of(
    loss_fn: LossFn, axis_name: AxisName | None, microbatches: int, *, clean: bool
) -> Callable[..., NoiseScale]:
    """``noise_of(state, batch, key, outcome, scale, hparams)``, the noise scale of the whole batch on all devices.

    It compares the microbatches of all devices, or the examples if there are no microbatches, with the whole batch. If
    the gradient of the step is not ``clean``, for example because it is clipped, the mean is also computed from the
    examples' gradients.
    """

    def loss_with(model_state, scale, hparams, params, batch, key):
        @without_effects  # the effects of the loss have already occurred with the gradient
        def loss_alone(params, batch, key):
            result = hand(loss_fn, params, batch, key, model_state=model_state, hparams=hparams)
            loss = result[0] if isinstance(result, tuple) else result
            return loss if scale is None else loss * scale.astype(loss.dtype)

        return loss_alone(params, batch, key)

    def noise_of(state: TrainState, batch: Batch, key: Key, outcome: Outcome, scale, hparams) -> NoiseScale:
        # Arrays are arguments, because code with automatic axes cannot capture arrays of an explicit mesh.
        loss_alone = jax.tree_util.Partial(loss_with, state.model_state, scale, hparams)
        key, total = device_key(key, axis_name), None
        if not clean:
            total, small = _moments(loss_alone, state.stored, batch, key, microbatches)
        elif outcome.part_squares is not None and outcome.part_counts is not None:
            small = _of_parts(outcome.part_squares, outcome.part_counts)
        else:
            count = jnp.sum(batch.where) if isinstance(batch, MaskedBatch) else example_count(batch)
            squares = jnp.sum(jnp.square(per_example_norms(loss_alone, state.stored, batch, key)))
            small = _Small(*(jnp.asarray(n, jnp.float32) for n in (count, squares, count, count)))
        if axis_name is not None:
            total, small = jax.lax.psum((total, small), axis_name)
        small_norm = safe_sqrt(safe_divide(small.squares, small.number))
        if scale is not None and (not clean or outcome.part_squares is None):
            small_norm = small_norm / scale
        if clean:
            whole = global_norm(outcome.grads)
        else:
            whole = safe_divide(global_norm(total), small.sizes if scale is None else small.sizes * scale)
        return noise_scale_from_batches(small_norm, whole, safe_divide(small.number, small.inverses), small.sizes)

    return noise_of


def _of_parts(squares: jax.Array, counts: jax.Array) -> _Small:
    """Sums over the microbatches in which at least one example counts."""
    some = counts > 0
    sums = jnp.ones_like(counts), squares, counts, safe_divide(1, counts)
    return _Small(*(jnp.sum(n, where=some) for n in sums))


def _moments(loss_fn, stored, batch: Batch, key: Key, microbatches: int):
    """The sum of the examples' gradients, and sums over the examples as small batches."""

    def on_part(part, key):
        total, squares, count = gradient_moments(loss_fn, stored, part, key)
        return total, _Small(count, squares, count, count)

    if microbatches == 1:
        return on_part(batch, key)
    found = jax.lax.map(lambda part: on_part(*part), split_batch(batch, microbatches, key))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), found)


__all__ = ["make_noise_of"]
