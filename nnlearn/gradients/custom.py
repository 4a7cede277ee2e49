"""The contract of a gradient that the user takes: ``value_and_grad(f)(params, batch, key) -> ((loss, aux), grads)``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.calls import check_takes
from nnlearn.checks import NUMERIC
from nnlearn.packing import Packed, unpack
from nnlearn.tree import path_name
from nnlearn.types import Batch, Grads, Params, PyTree, Scalar

CONTRACT = "value_and_grad(loss_fn)(params, batch, key) must return ((loss, aux), grads), or (loss, grads)"


def check_value_and_grad(
    value_and_grad: Any, *, in_parts: bool, batch_weight: Callable[[Batch], Scalar] | None
) -> None:
    """Raise unless ``value_and_grad`` turns a loss into a function, and one that goes with ``batch_weight``."""
    check_takes(value_and_grad, "value_and_grad", "loss_fn")

    def loss_fn(params, batch, key):
        raise RuntimeError("value_and_grad(loss_fn) called the loss before it was given parameters and a batch")

    own = value_and_grad(loss_fn)
    check_takes(own, "value_and_grad(loss_fn)", "params, batch, key", "loss_scale")
    if in_parts and batch_weight is not None and hasattr(own, "finish"):
        raise ValueError(
            "batch_weight does not go with this value_and_grad over microbatches or axis_name: it weighs every example "
            "the same, so leave batch_weight out"
        )


def parts_of_gradient(result: Any, params: Params) -> tuple[jax.Array, PyTree, Grads]:
    """Loss, aux and gradient out of what the user's function returned."""
    if not isinstance(result, tuple) or len(result) != 2:
        kind = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"{CONTRACT}; got {kind}")
    value, grads = result
    loss, aux = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(loss, NUMERIC) or jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        kind = f"shape {jnp.shape(loss)}" if isinstance(loss, NUMERIC) else type(loss).__name__
        raise TypeError(f"{CONTRACT}, with a real scalar loss; got {kind}")
    if jax.tree.structure(grads) != jax.tree.structure(params):
        raise ValueError(
            f"{CONTRACT}, with grads like params, {jax.tree.structure(params)}; got {jax.tree.structure(grads)}"
        )
    for (path, leaf), grad in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(grads), strict=True):
        if jnp.shape(grad) != jnp.shape(leaf):
            raise ValueError(
                f"{CONTRACT}, with grads like params, but {path_name(path)!r} has shape {jnp.shape(grad)}, and the "
                f"parameter {jnp.shape(leaf)}"
            )
        if jnp.iscomplexobj(grad) and not jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{CONTRACT}, with grads like params, but {path_name(path)!r} is complex: take its real part"
            )
    return loss, aux, grads


def stored_like(grads: Grads, stored: Params | Packed) -> Grads:
    """Gradients of a tree laid out as the parameters are stored."""
    if jax.tree.structure(grads) == jax.tree.structure(stored):
        return grads
    tree, to_stored = jax.vjp(unpack, stored)
    return to_stored(jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, tree))[0]


__all__ = ["check_value_and_grad", "parts_of_gradient", "stored_like"]
