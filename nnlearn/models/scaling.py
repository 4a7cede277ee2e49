"""Scaling that neither overflows nor underflows, for the normalisation layers."""

import jax
import jax.numpy as jnp

from nnlearn.tree import abs_sq, as_hyperparam, clip_parts, power_of_two, safe_rsqrt
from nnlearn.types import Scalar


def unit_variance(x: jax.Array, eps: Scalar, *, centre: bool) -> jax.Array:
    """Divide ``x``, minus its mean if ``centre``, by the root of its mean square plus ``eps``, along the last axis.

    The squares of values above 1e19 or below 1e-19 leave float32, so ``x`` is first divided by about its largest value.
    An infinite entry counts as a very large finite one.
    """
    x, inverse = scale_to_one(x, eps, (-1,))
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(abs_sq(x), axis=-1, keepdims=True)
    return x * safe_rsqrt(mean_square + as_hyperparam(eps, mean_square.dtype) * inverse * inverse)


def scale_to_one(x: jax.Array, eps: Scalar, axes: tuple[int, ...], axis_name=None) -> tuple[jax.Array, jax.Array]:
    """Multiply ``x`` by a power of two that brings its largest value, or the root of ``eps``, near 1.

    The power is shared along ``axes`` and a mapped axis. Derivatives treat it as a constant.

    Returns:
      The scaled array, and the power with length 1 along ``axes``.
    """
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axes, keepdims=True, initial=0)
    size = size if axis_name is None else jax.lax.pmax(size, axis_name)
    size = jnp.maximum(size, jnp.sqrt(jax.lax.stop_gradient(jnp.asarray(eps, size.dtype))))
    inverse = 1 / power_of_two(size)
    return clip_parts(x, 4, inverse), inverse  # clips only infinities
