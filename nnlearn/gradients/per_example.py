"""The gradients of single examples, or only their norms or moments.

The gradient of an example is that of the loss on a batch that holds only this example, with its own random key.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnlearn.data import MaskedBatch
from nnlearn.gradients.examples import (
    as_differentiable,
    batch_of_one,
    differentiate_examples,
    loss_and_aux,
    select,
    split_examples,
)
from nnlearn.packing import unpack
from nnlearn.sharding.axes import along_first_axes, automatic
from nnlearn.types import Batch, Grads, Key, LossFn, Params

Tree = TypeVar("Tree")


def per_example_grads(loss_fn: LossFn, params: Tree, batch: Batch, key: Key | None = None) -> Tree:
    """The gradient of every example, ``g_b = d loss_fn(params, batch[b : b + 1], key_b) / d params``.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; the mean over a batch.
      params: the parameters, as a tree or ``Packed``.
      batch: a pytree of arrays of shape (batch_size, ...), or a ``MaskedBatch`` of them.
      key: a random key; example b gets ``jax.random.split(key, batch_size)[b]``. None if the loss draws nothing.

    Returns:
      A tree like ``params``, each leaf of shape (batch_size, *leaf.shape). The gradient of an example that is masked
      out is zero.

    Raises:
      TypeError: if a parameter is not floating or complex, or the loss is not a real scalar.
      ValueError: if the arrays of ``batch`` have no common leading axis.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 1.0])}
    >>> per_example_grads(loss_fn, jnp.zeros(2), batch).tolist()
    [[-2.0, 0.0], [0.0, -4.0]]
    """
    return _by_example(_grads, batch, loss_fn, params, batch, key)


def _grads(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> Grads:
    examples, where_b, keys_b = split_examples(batch, key)
    params = as_differentiable(params, examples)

    def loss_of(params, example, key):
        return loss_and_aux(loss_fn, unpack(params), batch_of_one(batch, example), key)[0]

    grads = jax.vmap(jax.grad(loss_of), in_axes=(None, 0, 0))(params, examples, keys_b)
    if not isinstance(batch, MaskedBatch):
        return grads
    return jax.tree.map(lambda grad_b: select(where_b, grad_b), grads)


def _by_example(function: Callable[..., Any], batch: Batch, *arguments: Any) -> Any:
    """``function(*arguments)``, whose results have a leading axis of examples, sharded as that of the batch is.

    JAX refuses to map a gather or a reshape over an axis that is sharded over Explicit mesh axes.
    """
    return automatic(function, *arguments, spec=lambda result: along_first_axes(batch, result)[:1])


def per_example_norms(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None = None) -> jax.Array:
    """The Euclidean norm of every example's gradient, in about the time of one gradient of the whole batch.

    A weight that the loss uses once, in a matrix product ``y = x W``, has the gradient ``x^T delta`` with
    ``delta = d loss / d y``. Its norm needs neither a sum over the batch nor the gradient itself::

        |g|^2 = |x|^2 |delta|^2                                         if x and delta are vectors
        |g|^2 = sum_{t, u} (x_t . x_u) (delta_t . delta_u)              if they are sequences

    The gradients of all other parameters (biases, scales, embeddings, convolutions, weights that are used twice, or
    inside a scan or a function with a custom derivative) are computed for each example and take batch_size times the
    memory of the parameter.

    Args:
      loss_fn, params, batch, key: as in ``per_example_grads``.

    Returns:
      ``norms_b`` of shape (batch_size,), in float32 or better; 0 for an example that is masked out.

    Raises:
      TypeError: if a parameter is not floating or complex, or the loss is not a real scalar.
      ValueError: if the arrays of ``batch`` have no common leading axis.

    Source: Goodfellow 2015, arXiv:1510.01799; for sequences Li et al. 2022, arXiv:2110.05679; for when the gradient
    itself is cheaper, Bu et al. 2022, arXiv:2205.10683.

    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 1.0])}
    >>> per_example_norms(loss_fn, jnp.zeros(2), batch).tolist()
    [2.0, 4.0]
    """
    return _by_example(_norms, batch, loss_fn, unpack(params), batch, key)


def _norms(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> jax.Array:
    return differentiate_examples(loss_fn, params, batch, key).norms_b


def gradient_moments(
    loss_fn: LossFn, params: Params, batch: Batch, key: Key | None = None
) -> tuple[Grads, jax.Array, jax.Array]:
    """The sum of the examples' gradients, the sum of their squared norms, and the count of examples, in one pass.

    Args:
      loss_fn, params, batch, key: as in ``per_example_grads``.

    >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    >>> gradient_moments(lambda params, batch, key: jnp.mean(batch @ params), jnp.ones(2), batch)
    (Array([3., 5.], dtype=float32), Array(26., dtype=float32), Array(2., dtype=float32))
    """
    return automatic(_moments, loss_fn, as_differentiable(unpack(params), batch), batch, key)


def _moments(loss_fn: LossFn, tree: Params, batch: Batch, key: Key | None) -> tuple[Grads, jax.Array, jax.Array]:
    found = differentiate_examples(loss_fn, tree, batch, key)
    leaves = found.weighted_sum(jnp.ones_like(found.norms_b), found.where_b)
    count = jnp.sum(found.where_b).astype(jnp.float32)
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), jnp.sum(jnp.square(found.norms_b)), count


__all__ = ["gradient_moments", "per_example_grads", "per_example_norms"]
