"""Scaling that neither overflows nor underflows, for the normalisation layers."""

import jax
import jax.numpy as jnp

from nnlearn.tree import abs_sq, as_hyperparam, clip_parts, power_of_two, safe_rsqrt
from nnlearn.types import Scalar


def unit_variance(x: jax.Array, eps: Scalar, *, centre: bool) -> jax.Array:
    """``x``, less its mean if ``centre``, over the root of its mean square plus ``eps``, along the last axis.

    Squares of numbers over 1e19 or under 1e-19 leave float32, so ``x`` is divided by about its largest number first. An
    infinite entry counts as a very large one.
    """
    x, inverse = scale_to_one(x, eps, (-1,))
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(abs_sq(x), axis=-1, keepdims=True)
    return x * safe_rsqrt(mean_square + as_hyperparam(eps, mean_square.dtype) * inverse * inverse)


def scale_to_one(x: jax.Array, eps: Scalar, axes: tuple[int, ...], axis_name=None) -> tuple[jax.Array, jax.Array]:
    """``x`` times a power of two that brings its largest number, or the root of ``eps``, near 1; and that power.

    The power is one for all of ``axes``, which keep length 1, and of a mapped axis; derivatives take it for a constant.
    """
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axes, keepdims=True, initial=0)
    size = size if axis_name is None else jax.lax.pmax(size, axis_name)
    size = jnp.maximum(size, jnp.sqrt(jax.lax.stop_gradient(jnp.asarray(eps, size.dtype))))
    inverse = 1 / power_of_two(size)
    return clip_parts(x, 4, inverse), inverse  # cuts infinities alone
