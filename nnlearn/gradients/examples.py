"""One forward and one backward pass over a batch that treats every example on its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import NUMERIC
from nnlearn.data import MaskedBatch, example_count
from nnlearn.gradients.devices import varying_like
from nnlearn.gradients.ghost import Dense, TracedLoss
from nnlearn.tree import compute_dtype, global_norm, path_name, real_dtype
from nnlearn.types import Batch, Key, LossFn, Params, PyTree, Scalar


class ExampleGradients(NamedTuple):
    """The gradients of all examples in factored form, from which norms and weighted sums are computed.

    Attributes:
      losses_b: the loss of each example.
      norms_b: the norm of each example's gradient; 0 for an example that is masked out.
      where_b: whether each example counts.
      dense: the leaves that matrix products use.
      inputs_b: the other operand of each product.
      deltas_b: the derivative of the loss with respect to the result of each product.
      grads_b: the gradients of the other leaves, by leaf index.
      leaves: all parameters.
      has_more: whether the loss returns an aux or has effects.
    """

    losses_b: jax.Array
    norms_b: jax.Array
    where_b: jax.Array
    dense: list[Dense]
    inputs_b: list[jax.Array]
    deltas_b: list[jax.Array]
    grads_b: dict[int, jax.Array]
    leaves: list[jax.Array]
    has_more: bool

    def weighted_sum(self, factors_b: jax.Array, chosen_b: jax.Array) -> list[jax.Array]:
        """The sum of factor times gradient over the chosen examples, for every leaf."""

        def weigh(array_b):
            wide = compute_dtype(array_b.dtype)
            factors = factors_b.astype(real_dtype(wide)).reshape(-1, *(1,) * (array_b.ndim - 1))
            return select(chosen_b, factors * array_b.astype(wide))

        sums = list(map(jnp.zeros_like, self.leaves))
        for index, grad_b in self.grads_b.items():
            sums[index] = jnp.sum(weigh(grad_b), axis=0).astype(grad_b.dtype)
        for dense, x_b, delta_b in zip(self.dense, self.inputs_b, self.deltas_b, strict=True):
            # Select both: 0 times a non-finite input is NaN.
            x_b, delta_b = select(chosen_b, x_b), weigh(delta_b).astype(delta_b.dtype)
            sums[dense.leaf] = dense.gradient(self.leaves[dense.leaf], x_b, delta_b)
        return sums


class _OneExample(NamedTuple):
    """The results of ``differentiate`` on one example; with a leading axis of examples under ``vmap``."""

    loss: jax.Array
    norm: jax.Array
    inputs: list[jax.Array]
    deltas: list[jax.Array]
    grads: dict[int, jax.Array]


class ExampleBatch(NamedTuple):
    """The examples of a batch, whether each counts, and a key for each."""

    examples: PyTree
    where_b: jax.Array
    keys_b: jax.Array | None


def differentiate_examples(
    loss_fn: LossFn, params: Params, batch: Batch, key: Key | None, loss_scale: Scalar | None = None
) -> ExampleGradients:
    """Differentiate the loss of every example in one pass, without the loss's effects.

    Deltas and gradients are those of ``loss_scale`` times the loss; the norms are the loss's own.
    """
    examples, where_b, keys_b = split_examples(batch, key)
    leaves, treedef = jax.tree.flatten(as_differentiable(params, examples))

    def loss_of(leaves, example, key):
        return loss_and_aux(loss_fn, treedef.unflatten(leaves), batch_of_one(batch, example), key)

    data_b = examples, keys_b
    traced = TracedLoss(loss_of, leaves, *jax.tree.map(lambda array: array[0], data_b))
    shifts = [varying_like(shift, examples) for shift in traced.shifts]

    def differentiate(data) -> _OneExample:
        def run(shifts, others):
            replaced = leaves.copy()
            for index, leaf in others.items():
                replaced[index] = leaf
            return traced.run(replaced, jax.tree.leaves(data), shifts)

        others = {index: leaves[index] for index in traced.others}
        loss, backward, inputs = jax.vjp(run, shifts, others, has_aux=True)
        factor = jnp.ones_like(loss) if loss_scale is None else jnp.asarray(loss_scale).astype(loss.dtype)
        deltas, grads = backward(varying_like(factor, examples))
        norms = [dense.norm(x, delta) for dense, x, delta in zip(traced.dense, inputs, deltas, strict=True)]
        return _OneExample(loss, global_norm([*norms, *grads.values()]), inputs, deltas, grads)

    found = jax.vmap(differentiate)(data_b)
    norms_b = select(where_b, found.norm)
    if loss_scale is not None:
        norms_b = norms_b / jnp.asarray(loss_scale).astype(norms_b.dtype)
    return ExampleGradients(
        losses_b=found.loss,
        norms_b=norms_b,
        where_b=where_b,
        dense=traced.dense,
        inputs_b=found.inputs,
        deltas_b=found.deltas,
        grads_b=found.grads,
        leaves=leaves,
        has_more=traced.has_more,
    )


def split_examples(batch: Batch, key: Key | None) -> ExampleBatch:
    """The examples of a batch as arrays.

    Raises:
      ValueError: if the arrays have no common leading axis, or ``where`` has another length.
    """
    examples, where_b = batch if isinstance(batch, MaskedBatch) else (batch, None)
    examples = jax.tree.map(jnp.asarray, examples)
    size = example_count(examples)
    where_b = jnp.ones((size,), bool) if where_b is None else jnp.asarray(where_b, bool)
    if where_b.shape != (size,):
        raise ValueError(f"where must have shape {(size,)}, one for each example, got {where_b.shape}")
    return ExampleBatch(examples, where_b, None if key is None else jax.random.split(key, size))


def batch_of_one(batch: Batch, example: PyTree) -> Batch:
    """One example as a batch like ``batch``. It counts, even if masked out, so that its mean is not 0 / 0."""
    alone = jax.tree.map(lambda array: array[None], example)
    return MaskedBatch(alone, jnp.ones((1,), bool)) if isinstance(batch, MaskedBatch) else alone


def loss_and_aux(loss_fn: LossFn, params: Params, batch: Batch, key: Key | None) -> tuple[jax.Array, PyTree]:
    """The loss as an array, and the aux or None.

    Raises:
      TypeError: if the loss is not a number.
    """
    result = loss_fn(params, batch, key)
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(loss, NUMERIC):
        raise TypeError(f"loss_fn must return a real scalar, or (loss, aux); got {type(loss).__name__}")
    return jnp.asarray(loss), aux


def as_differentiable(params: Params, examples: PyTree) -> Params:
    """The parameters as arrays that can be differentiated for each example alone.

    Raises:
      TypeError: if a parameter is not floating or complex.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(f"parameter {path_name(path)!r} is {jnp.result_type(leaf).name}, which has no gradient")
    return jax.tree.map(lambda leaf: varying_like(jnp.asarray(leaf), examples), params)


def select(chosen_b: jax.Array, array_b: jax.Array) -> jax.Array:
    """Zero the rows of examples that are not chosen, whatever they hold."""
    return jnp.where(chosen_b.reshape(-1, *(1,) * (array_b.ndim - 1)), array_b, jnp.zeros_like(array_b))


__all__ = [
    "ExampleBatch",
    "ExampleGradients",
    "as_differentiable",
    "batch_of_one",
    "differentiate_examples",
    "loss_and_aux",
    "select",
    "split_examples",
]
