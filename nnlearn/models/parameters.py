"""Parameters of layers: draw, look up and count them."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nnlearn.models.named import Initializer
from nnlearn.tree import as_hyperparam, compute_dtype, path_name
from nnlearn.types import DTypeLike, Key, Params, Scalar

EMBEDDING_INIT: Initializer = jax.nn.initializers.normal(0.02)


def draw_parameter(make: Initializer, key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """The initial value of a parameter.

    >>> draw_parameter(jax.nn.initializers.ones, jax.random.key(0), (2,), jnp.bfloat16)
    Array([1, 1], dtype=bfloat16)
    """
    # Drawn in float32: bfloat16 has too few random bits for a smooth distribution, and no QR decomposition.
    return make(key, shape, compute_dtype(dtype)).astype(dtype)


def scaled_initializer(make: Initializer, factor: Scalar) -> Initializer:
    """An initialiser that multiplies the values of another by ``factor``.

    >>> from nnlearn.models import initializer
    >>> scaled_initializer(initializer("ones"), 0.5)(jax.random.key(0), (2,), jnp.float32)
    Array([0.5, 0.5], dtype=float32)
    """
    return lambda key, shape, dtype: as_hyperparam(factor, dtype) * make(key, shape, dtype)


def parameter(layer: str, params: Params, name: str, shape: tuple[int, ...]) -> jax.Array:
    """``params[name]`` as an array.

    Raises:
      ValueError: if it is missing, or its shape differs from the layer's.
    """
    if not isinstance(params, Mapping) or name not in params:
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(f"{layer} needs a parameter {name!r}, got {paths}; make its params with init(key)")
    value = jnp.asarray(params[name])
    if value.shape != shape:
        if value.shape[1:] == shape:
            cure = "for a stack of networks use jax.vmap(model.apply, in_axes=(0, None))"
        else:
            cure = "these are the params of another model"
        raise ValueError(f"{layer} expects {name!r} of shape {shape}, got {value.shape}; {cure}")
    return value


def parameter_count(params: Params) -> int:
    """Count the scalars in a tree of parameters.

    Args:
      params: a pytree of arrays, of Python numbers or of ``jax.ShapeDtypeStruct`` (as from ``jax.eval_shape``).

    Returns:
      The number of scalars, a Python int.

    >>> from nnlearn.models import mlp
    >>> parameter_count(jax.eval_shape(mlp((784, 100, 10)).init, jax.random.key(0)))
    79510
    """
    return sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(params))
