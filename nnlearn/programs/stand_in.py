"""An unknown loss, for tracing optimizers that evaluate the loss or its gradient.

A concrete loss has too much structure: the gradient of a sum is the same for every element, which hides differences
between transformations. The operations here have shapes and derivatives but no values. The gradient is an unknown
function of all leaves, and so is the product of the second derivative with a vector.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad

from nnlearn.packing import unpack
from nnlearn.tree import compute_dtype
from nnlearn.types import Params


def unknown_loss(like: Params) -> Callable[[Params], jax.Array]:
    """Return a scalar function of parameters that can be traced and differentiated twice, but not run.

    Args:
      like: the parameters as a tree of arrays or ``jax.ShapeDtypeStruct``. The function also takes them packed.

    Raises:
      ValueError: when called, if the parameters have another structure or other shapes.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> jax.eval_shape(jax.grad(unknown_loss(params)), params)["b"].shape
    (3,)
    """
    treedef, shapes = jax.tree.structure(like), list(map(jnp.shape, jax.tree.leaves(like)))

    def value_fn(params):
        leaves, given = jax.tree.flatten(unpack(params))
        if given != treedef or list(map(jnp.shape, leaves)) != shapes:
            raise ValueError(f"value_fn takes the parameters, got {jax.tree.map(jnp.shape, params)}")
        return _value_p.bind(*map(jnp.asarray, leaves))

    return value_fn


def _value_of(*leaves):
    return ShapedArray((), jnp.dtype(jnp.float32))


def _gradient_of(*leaves):
    return [leaf.update(weak_type=False) for leaf in leaves]


def _value_jvp(leaves, tangents):
    value, gradient = _value_p.bind(*leaves), _gradient_p.bind(*leaves)
    slope = jnp.zeros([], jnp.float32)
    for one, tangent in zip(gradient, tangents, strict=True):
        if not isinstance(tangent, ad.Zero):
            wide = compute_dtype(one.dtype)
            slope += jnp.sum(jnp.real(one.astype(wide) * tangent.astype(wide))).astype(jnp.float32)
    return value, slope


def _gradient_jvp(leaves, tangents):
    gradient = _gradient_p.bind(*leaves)
    return gradient, _curvature_p.bind(*leaves, *map(ad.instantiate_zeros, tangents))


def _curvature_transpose(cotangents, *arguments):
    """The second derivative is symmetric, so its product with a vector is its own transpose."""
    leaves = arguments[: len(arguments) // 2]
    return [None] * len(leaves) + _curvature_p.bind(*leaves, *map(ad.instantiate_zeros, cotangents))


_value_p = Primitive("unknown_loss")
_value_p.def_abstract_eval(_value_of)
ad.primitive_jvps[_value_p] = _value_jvp

_gradient_p = Primitive("unknown_gradient")
_gradient_p.multiple_results = True
_gradient_p.def_abstract_eval(_gradient_of)
ad.primitive_jvps[_gradient_p] = _gradient_jvp

_curvature_p = Primitive("unknown_curvature")
_curvature_p.multiple_results = True
_curvature_p.def_abstract_eval(lambda *arguments: _gradient_of(*arguments[: len(arguments) // 2]))
ad.primitive_transposes[_curvature_p] = _curvature_transpose

__all__ = ["unknown_loss"]
