"""Bounds on updates: by element, by layer, by the whole gradient, or relative to the weights."""

import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.plumbing import from_leaf_kernel
from nnlearn.transforms.wrapping import from_map
from nnlearn.tree import (
    array_norm,
    as_hyperparam,
    clip_parts,
    compute_dtype,
    finite_part,
    real_dtype,
    safe_divide,
    scaled_norm,
)
from nnlearn.types import GradientTransformationExtraArgs, Scalar, Updates


@comparable
def clip(max_delta: Scalar) -> GradientTransformationExtraArgs:
    """Clip every element to [-max_delta, max_delta]; of a complex element, each part.

    Args:
      max_delta: the bound, >= 0.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``max_delta`` is negative or NaN.

    >>> tx = clip(1.0)
    >>> tx.update(jnp.array([0.5, -3.0]), tx.init(jnp.zeros(2)))[0]
    Array([ 0.5, -1. ], dtype=float32)
    """
    check_number("max_delta", max_delta, low=0.0)
    return from_leaf_kernel(lambda update, *, limit: clip_parts(update, limit), {"limit": max_delta})


def _shorten(updates: list[jax.Array], norm: jax.Array, scale: jax.Array, longest: Scalar) -> list[jax.Array]:
    """The arrays times ``longest / (norm / scale)`` where that is below 1, infinite entries as the largest number."""
    long = ~((norm / scale < longest) | (longest == jnp.inf))
    # Numbers for all: a division at every element would make XLA write the clipped gradient out and read it back. Two,
    # because their product may leave the dtype.
    scale, factor = jnp.where(long, scale, 1), jnp.where(long, safe_divide(longest, norm), 1)

    def shorten(update):
        wide = update.astype(compute_dtype(update.dtype, norm.dtype))
        dtype = real_dtype(wide.dtype)
        limit = jnp.where(long, float(jnp.finfo(dtype).max) * scale.astype(dtype), jnp.inf)
        return (clip_parts(wide, limit, scale.astype(dtype)) * factor.astype(dtype)).astype(update.dtype)

    return list(map(shorten, updates))


def _block_rms_kernel(update, *, threshold):
    norm, scale = scaled_norm([update], bounded=True)
    return _shorten([update], norm / math.sqrt(max(update.size, 1)), scale, threshold)[0]


@comparable
def clip_by_block_rms(threshold: Scalar) -> GradientTransformationExtraArgs:
    """Scale down each leaf whose root mean square is over ``threshold`` (Shazeer & Stern 2018, arXiv:1804.04235).

    Args:
      threshold: the largest root mean square allowed, > 0.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``threshold`` is not above 0.

    >>> tx = clip_by_block_rms(1.0)
    >>> tx.update(jnp.array([2.0, -2.0]), tx.init(jnp.zeros(2)))[0]
    Array([ 1., -1.], dtype=float32)
    """
    check_number("threshold", threshold, low=0.0, low_open=True)
    return from_leaf_kernel(_block_rms_kernel, {"threshold": threshold}, whole_leaf=True)


def clip_tree_by_global_norm(updates: Updates, max_norm: Scalar) -> Updates:
    r"""Scale a whole tree down to norm ``max_norm`` if it is longer (Pascanu et al. 2013, arXiv:1211.5063).

    .. math:: g \leftarrow g \min(1, c / \|g\|)

    An infinite entry counts as the largest finite number of float32 (or of its dtype, if that is wider): clipping
    gives the direction in the limit, and not ``inf / inf``. NaN stays NaN.
    """
    leaves, treedef = jax.tree.flatten(updates)
    leaves = list(map(jnp.asarray, leaves))
    norm, scale = scaled_norm(leaves, bounded=True)
    return treedef.unflatten(_shorten(leaves, norm, scale, as_hyperparam(max_norm, norm.dtype)))


@comparable
def clip_by_global_norm(max_norm: Scalar) -> GradientTransformationExtraArgs:
    """Scale the whole update down to Euclidean norm ``max_norm`` if it is longer, see ``clip_tree_by_global_norm``.

    The norm is summed in float32 or better, and neither overflows nor underflows. An infinite entry counts as a very
    large one, so the result is bounded by ``max_norm`` whatever comes in, NaN excepted.

    Args:
      max_norm: the longest norm allowed, >= 0.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``max_norm`` is negative or NaN.

    >>> tx = clip_by_global_norm(1.0)
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0]
    Array([0.6, 0.8], dtype=float32)
    """
    check_number("max_norm", max_norm, low=0.0)
    return from_map(lambda updates, params: clip_tree_by_global_norm(updates, max_norm))


def _unit_axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> int | tuple[int, ...]:
    """The axes over which the norm of a unit goes; see ``unitwise_norm``."""
    if axis is None:
        if jnp.squeeze(x).ndim <= 1:
            axis = tuple(range(x.ndim))
        elif x.ndim <= 3:
            axis = 0
        elif x.ndim <= 5:
            axis = tuple(range(x.ndim - 1))
        else:
            raise ValueError(f"no rule for the units of an array of shape {x.shape}; give axis, the axes to sum over")
    return axis


def unitwise_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Norms of the weights that feed each output unit, broadcast to the shape of ``x``.

    Args:
      x: a bias or scalar (one norm), a dense kernel ``(..., inputs, outputs)`` of 2 or 3 axes (over the first axis),
        or a convolution kernel of 4 or 5 axes (over all but the last).
      axis: the axes to sum over, for other layouts.

    Raises:
      ValueError: more than 5 axes, and no ``axis``.
    """
    return jnp.broadcast_to(array_norm(x, _unit_axes(x, axis)), x.shape)


@comparable
def adaptive_grad_clip(
    clipping: Scalar, eps: Scalar = 1e-3, axis: int | tuple[int, ...] | None = None
) -> GradientTransformationExtraArgs:
    r"""Clip each unit's gradient relative to its weights (AGC, Brock et al. 2021, arXiv:2102.06171, eq. 3).

    .. math:: g_i \leftarrow \lambda \frac{\max(\|w_i\|, \epsilon)}{\|g_i\|} g_i
        \text{ if } \|g_i\| \ge \lambda \max(\|w_i\|, \epsilon)

    Args:
      clipping: :math:`\lambda`, the largest ratio of gradient norm to weight norm, >= 0.
      eps: weight lower bound of both norms, >= 0.
      axis: the axes of a unit, see ``unitwise_norm``.

    Raises:
      ValueError: if ``update`` is called without parameters, or a hyper-parameter is out of range.

    >>> tx = adaptive_grad_clip(0.1)
    >>> params = jnp.array([[3.0], [4.0]])
    >>> tx.update(jnp.array([[0.0], [9.0]]), tx.init(params), params)[0].ravel()
    Array([0. , 0.5], dtype=float32)
    """
    check_nonnegative("clipping", clipping)
    check_nonnegative("eps", eps)

    def kernel(update, param, *, clipping, eps):
        axes = _unit_axes(update, axis)
        norm, scale = scaled_norm([update], axes, bounded=True)
        longest = clipping * jnp.maximum(array_norm(param, axes), eps)
        return _shorten([update], norm, scale, longest)[0]

    hyperparams = {"clipping": clipping, "eps": eps}
    return from_leaf_kernel(kernel, hyperparams, needs_params="adaptive_grad_clip", whole_leaf=True)


def _centralize_kernel(update):
    if update.ndim <= 1:
        return update
    update = finite_part(update)
    count = max(math.prod(update.shape[1:]), 1)
    return update - jnp.sum(update / count, axis=tuple(range(1, update.ndim)), keepdims=True)  # the sum stays finite


@comparable
def centralize() -> GradientTransformationExtraArgs:
    """Subtract from each row its mean over the other axes (Yong et al. 2020, arXiv:2004.01461).

    >>> tx = centralize()
    >>> tx.update(jnp.array([[1.0, 3.0]]), tx.init(jnp.zeros((1, 2))))[0]
    Array([[-1.,  1.]], dtype=float32)
    """
    return from_leaf_kernel(_centralize_kernel, {}, whole_leaf=True)


__all__ = [
    "adaptive_grad_clip",
    "centralize",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_tree_by_global_norm",
    "unitwise_norm",
]
