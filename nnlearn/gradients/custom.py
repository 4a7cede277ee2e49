"""The contract of a custom gradient: ``value_and_grad(f)(params, batch, key) -> ((loss, aux), grads)``."""

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
    """Check that ``value_and_grad`` returns a gradient function for a loss.

    Raises:
      TypeError: if ``value_and_grad``, or the function that it returns, takes other arguments.
      ValueError: if that function weights every example the same, and ``batch_weight`` is given.
    """
    check_takes(value_and_grad, "value_and_grad", "loss_fn")

    def loss_fn(params, batch, key):
        raise RuntimeError("value_and_grad(loss_fn) called the loss before it had parameters and a batch")

    custom = value_and_grad(loss_fn)
    check_takes(custom, "value_and_grad(loss_fn)", "params, batch, key", "loss_scale")
    if in_parts and batch_weight is not None and hasattr(custom, "finish"):
        raise ValueError(
            "batch_weight cannot be combined with this value_and_grad over microbatches or axis_name, because it "
            "weights every example the same: leave batch_weight out"
        )


def parts_of_gradient(result: Any, params: Params) -> tuple[Any, PyTree, Grads]:
    """Loss, aux and gradient from the result of the user's function.

    Raises:
      TypeError: if the result has another form, or a gradient is complex and its parameter is not.
      ValueError: if the gradient has another structure or shape than ``params``.
    """
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
    """Gradients of a tree in the layout of the stored parameters."""
    if jax.tree.structure(grads) == jax.tree.structure(stored):
        return grads
    tree, to_stored = jax.vjp(unpack, stored)
    return to_stored(jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, tree))[0]


__all__ = ["check_value_and_grad", "parts_of_gradient", "stored_like"]
