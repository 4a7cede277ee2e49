"""What every model is made with: the factory mark, and the checks that give shape faults a name and a cure."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from nnlearn.settings import comparable
from nnlearn.tree import path_name
from nnlearn.types import Model, Params, StatefulModel

Factory = TypeVar("Factory", bound=Callable[..., Model | StatefulModel])


def model_factory(factory: Factory) -> Factory:
    """Mark a factory of models, so that equal settings give equal models.

    Two models that compare equal share one compiled program, and a model can be a static argument of ``jax.jit``.

    >>> from nnlearn.models import dense
    >>> dense(2, 3) == dense(2, 3), dense(2, 3) == dense(2, 4)
    (True, False)
    >>> dense(2, 3).init
    dense(inputs=2, outputs=3).init
    """
    return comparable(factory)


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters holds; shapes alone (``jax.eval_shape``) are enough.

    Args:
      params: a pytree of arrays, of numbers or of ``jax.ShapeDtypeStruct``.

    Returns:
      The number of scalars, a Python int.

    >>> from nnlearn.models import mlp
    >>> parameter_count(jax.eval_shape(mlp((784, 100, 10)).init, jax.random.key(0)))
    79510
    """
    return sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(params))


def check_features(layer: str, features: int, inputs: jax.Array) -> None:
    """Raise ``ValueError`` unless the last axis of ``inputs`` has the length that the layer was made for."""
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


def parameter(layer: str, params: Params, name: str, shape: tuple[int, ...]) -> jax.Array:
    """``params[name]`` as an array.

    Raises:
      ValueError: there is none, or its shape is not the one that the layer makes.
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


def where_or_all(where: jax.Array | None, shape: tuple[int, ...], name: str = "where") -> jax.Array:
    """A mask of that shape, checked; None is one that keeps all.

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
