"""Checks and conversions of the arrays that a model is applied to."""

import math

import jax
import jax.numpy as jnp


def to_floating(inputs) -> jax.Array:
    """``inputs`` as a floating-point array; integers and booleans become float32."""
    x = jnp.asarray(inputs)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def along_last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Add leading axes of length 1 to ``vector``, so that it broadcasts against ``like`` without rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def check_features(layer: str, features: int, inputs: jax.Array) -> None:
    """Raise ``ValueError`` if the length of the last axis of ``inputs`` is not ``features``."""
    shape = inputs.shape
    if shape and shape[-1] == features:
        return
    if len(shape) > 2 and math.prod(shape[1:]) == features:
        cure = "flatten each example with x.reshape(len(x), -1)"
    elif shape and math.prod(shape) == features:
        cure = "flatten the example with x.reshape(-1)"
    elif shape:
        cure = f"give inputs of shape (..., {features}), or make the layer for {shape[-1]} features"
    else:
        cure = f"give inputs of shape (..., {features})"
    raise ValueError(f"{layer} expects inputs whose last axis is {features}, got shape {shape}; {cure}")


def where_or_all(where: jax.Array | None, shape: tuple[int, ...], name: str = "where") -> jax.Array:
    """Check the dtype and shape of a mask; None gives a mask that is True everywhere.

    >>> where_or_all(None, (2,))
    Array([ True,  True], dtype=bool)
    """
    if where is None:
        return jnp.ones(shape, bool)
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(f"{name} must be boolean, got {where.dtype.name} of shape {where.shape}; pass {name} != 0")
    if where.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {where.shape}")
    return where
