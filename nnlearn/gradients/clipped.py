"""The gradient of DP-SGD: the mean of the examples' clipped gradients, plus noise."""

import dataclasses
import math
from itertools import accumulate
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_nonnegative, check_number, known
from nnlearn.data import MaskedBatch, example_count
from nnlearn.gradients.examples import as_differentiable, differentiate_examples, loss_and_aux, select
from nnlearn.packing import unpack
from nnlearn.settings import comparable
from nnlearn.sharding.axes import automatic, lie_like
from nnlearn.tree import as_hyperparam, compute_dtype, real_dtype
from nnlearn.types import Batch, Key, LossFn, Params, PyTree, Scalar

NOISE_STREAM = 0x7D9F1E55  # an arbitrary constant, above any batch size: example i's key may be fold_in(key, i)

Tree = TypeVar("Tree")


@comparable
def clipped_value_and_grad(
    loss_fn: LossFn, clip_norm: Scalar, noise_multiplier: Scalar = 0.0, *, batch_size: Scalar | None = None
) -> "ClippedGradient":
    """The mean of the examples' clipped gradients plus noise: the gradient of DP-SGD.

    With ``g_b`` the gradient of example b, and n examples that count::

        grads = (sum_b min(1, clip_norm / |g_b|) g_b + noise_multiplier * clip_norm * normal) / n

    Up to rounding, no example changes the sum by more than ``clip_norm``. An example whose gradient is not finite adds
    0 to the sum and still counts in n: its gradient has no direction to keep, and one bad example must not break the
    bound.

    Only ``grads`` is private: the loss, the aux, and n, the number of examples that count, are not. No accountant is
    included: the privacy that a run spends depends on how its batches are drawn, see ``poisson_sampled``.

    In ``make_step(value_and_grad=...)`` with ``microbatches`` or an ``axis_name`` the noise is added once, to the sum
    of the whole batch. Called directly in ``jax.shard_map``, every device clips, and adds noise to, the mean of its own
    examples.

    The whole batch takes one forward and one backward pass: the sum is computed from the layers' inputs and deltas,
    as the norms are, so nothing of size batch_size x parameters is stored for dense layers.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; the mean over a batch.
      clip_norm: the largest norm of one example's gradient, > 0; may be traced.
      noise_multiplier: the noise's standard deviation in units of ``clip_norm``, >= 0; may be traced. 0 adds none.
      batch_size: divisor used in place of n, > 0; may be traced. With ``poisson_sampled`` give the expected size, which
        unlike n does not depend on who takes part.

    Returns:
      ``f(params, batch, key) -> ((loss, aux), grads)``, like ``jax.value_and_grad(loss_fn, has_aux=True)``. ``loss`` is
      the mean of the examples' losses. ``aux`` is what ``loss_fn`` returns beside the loss for the whole batch, or
      None; a compiled program computes it only if it is used. ``grads`` is like ``params``, a tree or ``Packed``. If no
      example counts, it is zero plus the noise for n = 1.

    Raises:
      TypeError: if an argument is not a number; in ``f``, as ``per_example_norms`` does.
      ValueError: if ``clip_norm`` is not positive and finite, or ``noise_multiplier`` is negative or not finite; in
        ``f``, if there is noise to draw and no key, or the arrays of ``batch`` have no common leading axis.

    Source: Abadi et al. 2016, arXiv:1607.00133; the single pass is that of Bu et al. 2023, arXiv:2210.00038.

    >>> f = clipped_value_and_grad(lambda params, batch, key: jnp.mean(batch @ params), clip_norm=1.0)
    >>> (loss, aux), grads = f(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]), None)
    >>> float(loss), aux, grads.tolist()
    (3.75, None, [0.30, 0.65])
    """
    check_number("clip_norm", clip_norm, low=0.0, low_open=True, high=math.inf, high_open=True)
    check_nonnegative("noise_multiplier", noise_multiplier)
    if batch_size is not None:
        check_number("batch_size", batch_size, low=0.0, low_open=True, high=math.inf, high_open=True)
    return ClippedGradient(loss_fn, clip_norm, noise_multiplier, batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGradient:
    """The gradient of DP-SGD as a function, and in two stages for a batch in parts.

    ``over_part`` clips and averages the gradients of one part; ``finish`` adds the noise, once, to the average over all
    parts. Made by ``clipped_value_and_grad``.
    """

    loss_fn: LossFn
    clip_norm: Scalar
    noise_multiplier: Scalar
    batch_size: Scalar | None

    def __call__(
        self, params: Tree, batch: Batch, key: Key | None = None, loss_scale: Scalar | None = None
    ) -> tuple[tuple[jax.Array, PyTree], Tree]:
        """``((loss, aux), grads)`` of a whole batch."""
        tree, to_stored = jax.vjp(unpack, as_differentiable(params, batch))
        value, grads = self.over_part(tree, batch, key, loss_scale)
        count = jnp.sum(batch.where) if isinstance(batch, MaskedBatch) else example_count(batch)
        return value, to_stored(self.finish(grads, count, key))[0]

    def over_part(
        self, params: Tree, batch: Batch, key: Key | None = None, loss_scale: Scalar | None = None
    ) -> tuple[tuple[jax.Array, PyTree], Tree]:
        """``((loss, aux), grads)`` of a part of a batch, the mean over its examples, without noise.

        Args:
          params: the parameters, as a tree.
          batch, key: the part and its key.
          loss_scale: factor of the loss during differentiation, for float16. Clipping and results are those of the
            loss itself. A gradient that is not finite may come from the scale: unless the scale is 1, the result is
            then infinite, so that ``dynamic_loss_scale`` skips the step.
        """
        tree = as_differentiable(params, batch)
        loss, leaves, more = automatic(_clipped_mean, self.loss_fn, tree, batch, key, self.clip_norm, loss_scale)
        leaves = map(lie_like, leaves, jax.tree.leaves(tree))
        # The examples are differentiated without effects: here the effects of the loss occur, once for the batch.
        aux = None if more is None else loss_and_aux(self.loss_fn, tree, batch, key)[1]
        return (loss, aux), jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def finish(self, grads: Tree, count: Scalar, key: Key | None) -> Tree:
        """Add the noise to the average over all parts, and divide by ``batch_size`` in place of ``count``.

        Args:
          grads: the average of the results of ``over_part``, each part weighted by its examples that count.
          count: the number of examples that count in all parts.
          key: the whole batch's key, the same on all devices.
        """
        leaves, treedef = jax.tree.flatten(grads)
        dtype = compute_dtype(*(real_dtype(leaf.dtype) for leaf in leaves))
        examples = jnp.asarray(count).astype(dtype)
        size = jnp.maximum(examples, 1) if self.batch_size is None else as_hyperparam(self.batch_size, dtype)
        if self.batch_size is not None:
            leaves = [(_wide(leaf) * (examples / size)).astype(leaf.dtype) for leaf in leaves]
        if not known(self.noise_multiplier) or float(np.asarray(self.noise_multiplier)) != 0:
            if key is None:
                raise ValueError(
                    f"noise_multiplier={self.noise_multiplier} draws noise, so key must be a random key, got None"
                )
            scale = as_hyperparam(self.noise_multiplier, dtype) * as_hyperparam(self.clip_norm, dtype) / size
            leaves = _add_noise(leaves, jnp.asarray(scale, dtype), jax.random.fold_in(key, NOISE_STREAM))
        return treedef.unflatten(leaves)


def _clipped_mean(
    loss_fn: LossFn, tree: Params, batch: Batch, key: Key | None, clip_norm: Scalar, loss_scale: Scalar | None
) -> tuple[jax.Array, list[jax.Array], tuple[()] | None]:
    """The mean loss, the leaves of the gradient, and ``()`` if the loss has an aux or effects, else None.

    The last is an empty pytree because all results leave a region of automatic axes as pytrees of arrays.
    """
    found = differentiate_examples(loss_fn, tree, batch, key, loss_scale)
    count = jnp.maximum(jnp.sum(found.where_b), 1).astype(found.norms_b.dtype)
    bound = as_hyperparam(clip_norm, found.norms_b.dtype)
    finite_b = jnp.isfinite(found.norms_b)
    norms_b = jnp.where(finite_b, found.norms_b, 0)
    leaves = found.weighted_sum(bound / jnp.maximum(norms_b, bound) / count, found.where_b & finite_b)
    if loss_scale is not None:
        overflow = jnp.where(jnp.all(finite_b) | (jnp.asarray(loss_scale) <= 1), 0, jnp.inf)
        leaves = [(_wide(leaf) / as_hyperparam(loss_scale, _wide(leaf).dtype) + overflow) for leaf in leaves]
        leaves = [leaf.astype(like.dtype) for leaf, like in zip(leaves, found.leaves, strict=True)]
    loss = jnp.sum(select(found.where_b, found.losses_b)) / count.astype(found.losses_b.dtype)
    return loss, leaves, () if found.has_more else None


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(compute_dtype(array.dtype))


def _add_noise(leaves: list[jax.Array], scale: jax.Array, key: Key) -> list[jax.Array]:
    """Add normal noise of that standard deviation, to the real and the imaginary part of a complex leaf."""
    parts = [2 if jnp.iscomplexobj(leaf) else 1 for leaf in leaves]
    ends = list(accumulate(leaf.size * part for leaf, part in zip(leaves, parts, strict=True)))
    # One draw for all leaves: each separate draw takes about a second to compile.
    flat = scale * jax.random.normal(key, (ends[-1] if ends else 0,), scale.dtype)

    def add(leaf, part, end):
        noise = flat[end - part * leaf.size : end].reshape(part, *leaf.shape)
        noise = jax.lax.complex(*noise) if part == 2 else noise[0]
        return (leaf.astype(compute_dtype(leaf.dtype)) + noise).astype(leaf.dtype)

    return list(map(add, leaves, parts, ends))


__all__ = ["ClippedGradient", "clipped_value_and_grad"]
