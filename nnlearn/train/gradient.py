"""The gradient of a batch: whole, in microbatches one after the other, or in parts over devices.

Whatever the parts, the result is that of the whole batch: each part weighs by what counts in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import NUMERIC, check_count
from nnlearn.data import MaskedBatch
from nnlearn.packing import Packed, unpack
from nnlearn.sharding_axes import beside, deal_rows
from nnlearn.train.calls import asks_for, check_takes, hand
from nnlearn.tree import compute_dtype, global_norm, path_name, safe_divide
from nnlearn.types import Batch, Grads, Key, LossFn, Params, PyTree, Scalar


class Outcome(NamedTuple):
    """What a batch says about the parameters; ``value_fn`` is its loss at others.

    ``part_squares`` are the squared norms of the gradients of the microbatches, None where there is only one.
    """

    loss: jax.Array
    aux: PyTree
    model_state: PyTree
    grads: Grads
    part_squares: jax.Array | None
    value_fn: Callable[[Params], jax.Array]


def make_gradient(
    loss_fn: LossFn,
    *,
    axis_name: str | tuple[str, ...] | None,
    microbatches: int,
    batch_weight: Callable[[Batch], Scalar] | None,
    value_and_grad: Callable | None,
) -> Callable[..., Outcome]:
    """``gradient(stored, batch, key, model_state, scale, hparams) -> Outcome``; its arguments are ``make_step``'s.

    ``scale`` multiplies the loss while it is differentiated and divides the gradient after, for dynamic loss scaling;
    None leaves both alone.
    """
    check_takes(loss_fn, "loss_fn", "params, batch, key", "hparams", "model_state")
    check_count("microbatches", microbatches)
    if value_and_grad is not None and (microbatches > 1 or axis_name is not None):
        raise ValueError("value_and_grad takes the whole batch: it goes with neither microbatches nor axis_name")
    carries_state = asks_for(loss_fn, "model_state")
    whole = axis_name is None and microbatches == 1

    def summed_loss(params, batch, key, model_state, scale, hparams):
        """Loss, aux and state of a part times its weight, summed over devices, as is the weight, and other state."""
        batch, weight = (batch, 1) if whole else _weigh(batch, batch_weight)
        if not whole:
            params = jax.tree.map(lambda leaf: _constant_where(weight == 0, leaf), params)
        result = hand(loss_fn, unpack(params), batch, key, model_state=model_state, hparams=hparams)
        loss, aux, new_state = _parts_of(result, carries_state)
        means, firsts = _new_leaves(new_state, model_state)
        sums = (loss, aux, means, weight)
        if not whole:
            sums = jax.tree.map(lambda leaf: _weighted(leaf, weight), (loss, aux, means, jnp.float32(1)))
        # Summed inside of the derivative: under shard_map the gradient of replicated parameters is summed over devices
        # by the transpose already, and the mean taken outside then changes nothing.
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            firsts = jax.tree.map(lambda leaf: _of_first_device(leaf, axis_name), firsts)
        loss = sums[0]
        return loss if scale is None else loss * scale.astype(loss.dtype), (*sums, firsts)

    def gradient(stored, batch, key, model_state, scale, hparams) -> Outcome:
        stored = beside(batch, stored)

        def on_part(params, part, part_key):
            return summed_loss(params, part, part_key, model_state, scale, hparams)

        differentiate, part_squares = jax.value_and_grad(on_part, has_aux=True), None
        if value_and_grad is not None:
            own = value_and_grad(lambda params, part, part_key: hand(loss_fn, params, part, part_key, hparams=hparams))
            (loss, aux), grads = own(stored, batch, key)
            sums = (loss, aux, [], 1, [])
        elif microbatches == 1:
            (_, sums), grads = differentiate(stored, batch, key)
        else:
            parts = _split(batch, microbatches, key)
            sums, grads, part_squares = _accumulate(differentiate, stored, parts)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        loss, aux, means, weight, firsts = sums
        if not whole:
            loss, aux, means, grads = jax.tree.map(lambda total: safe_divide(total, weight), (loss, aux, means, grads))
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, stored)
        if scale is not None:  # not in float16, where what the scaling has saved would be lost again
            grads = jax.tree.map(lambda grad: grad.astype(compute_dtype(grad.dtype)) / scale, grads)
            part_squares = None if part_squares is None else part_squares / jnp.square(scale)

        def value_fn(params):
            if microbatches == 1:
                _, (total, _, _, weight, _) = on_part(params, batch, key)
                return total if whole else safe_divide(total, weight)
            _, (totals, _, _, weights, _) = jax.lax.map(lambda part: on_part(params, *part), parts)
            return safe_divide(jnp.sum(totals), jnp.sum(weights))

        new_state = _joined(means, firsts, model_state, None if whole else weight == 0)
        return Outcome(loss, aux, new_state, grads, part_squares, value_fn)

    return gradient


def _parts_of(result: Any, carries_state: bool) -> tuple[jax.Array, PyTree, PyTree]:
    """Loss, aux and model state out of what ``loss_fn`` returned."""
    expected = "(loss, aux, model_state)" if carries_state else "a real scalar, or (loss, aux)"
    if carries_state:
        if not isinstance(result, tuple) or len(result) != 3:
            kind = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise TypeError(f"loss_fn takes model_state, so it must return {expected}; got {kind}")
        loss, aux, model_state = result
    else:
        loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        model_state = None
    if not isinstance(loss, NUMERIC):
        raise TypeError(f"loss_fn must return {expected}, with a real scalar loss; got {type(loss).__name__}")
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            f"loss_fn must return {expected}, with a real scalar loss; got "
            f"{jnp.result_type(loss).name} of shape {jnp.shape(loss)}: take the mean over the batch"
        )
    return loss, aux, model_state


def _new_leaves(new: PyTree, old: PyTree) -> tuple[list, list]:
    """The leaves of the model's new state: those that parts of a batch average, and those that the first part decides.

    Counts, flags and random keys have no mean. What is the old leaf itself is in neither list, but None: an array that
    the model only keeps stays as it is, infinities and all.
    """
    if old is None:
        return [], []
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"loss_fn must return a model_state like the one it was given, {jax.tree.structure(old)}; got "
            f"{jax.tree.structure(new)}"
        )
    means, firsts = [], []
    for (path, leaf), before in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        if jnp.shape(leaf) != jnp.shape(before):
            raise ValueError(
                f"loss_fn must return a model_state like the one it was given, but {path_name(path)!r} has shape "
                f"{jnp.shape(leaf)}, and had {jnp.shape(before)}"
            )
        averaged = jnp.issubdtype(jnp.result_type(before), jnp.inexact)
        means.append(leaf if averaged and leaf is not before else None)
        firsts.append(leaf if not averaged and leaf is not before else None)
    return means, firsts


def _joined(means: list, firsts: list, old: PyTree, nothing: jax.Array | None) -> PyTree:
    """The model's new state in the dtypes of the old one: a step may not change what the next one is compiled for.

    Where the parts of a batch hold ``nothing`` that counts, it is the old one: there is no mean to take.
    """
    leaves, treedef = jax.tree.flatten(old)
    if not means:  # nothing is new
        return old

    def cast(mean, first, before):
        leaf = mean if first is None else first
        if leaf is None:
            return before
        leaf = leaf if _is_key(before) else jnp.asarray(leaf).astype(before.dtype)
        return leaf if nothing is None else jnp.where(nothing, before, leaf)

    return treedef.unflatten([cast(*row) for row in zip(means, firsts, leaves, strict=True)])


def _is_key(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _of_first_device(leaf, axis_name: str | tuple[str, ...]) -> jax.Array:
    """The first device's value on all, for what cannot be averaged: integers, booleans and keys."""
    bits = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    numbers = bits.astype(jnp.int32) if bits.dtype == bool else bits
    first = jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == 0, numbers, 0), axis_name).astype(bits.dtype)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else first


def _weigh(batch: Batch, batch_weight: Callable[[Batch], Scalar] | None) -> tuple[Batch, jax.Array]:
    """A part of a batch and how much it counts among others: 1, or the examples of a ``MaskedBatch`` that count.

    Where none do, the loss sees them all, so that its mean is not 0 / 0, and the weight of 0 takes it out again. What
    is not finite among them is 0: NaN would come back in derivatives with respect to other things than parameters.
    """
    if batch_weight is not None:
        return batch, jnp.asarray(batch_weight(batch), jnp.float32)
    if not isinstance(batch, MaskedBatch):
        return batch, jnp.ones([])
    count = jnp.sum(batch.where)
    none = count == 0

    def shown(leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.where(none & ~jnp.isfinite(leaf), 0, leaf) if inexact else leaf

    return MaskedBatch(jax.tree.map(shown, batch.examples), batch.where | none), count.astype(jnp.float32)


def _constant_where(condition: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf, with derivative 0 where the condition holds: 0 times a derivative would be NaN where that is.

    The program that is compiled has no trace of it but in the derivative.
    """
    return jnp.where(condition, jax.lax.stop_gradient(leaf), leaf)


def _weighted(leaf, weight: jax.Array) -> jax.Array:
    """``weight * leaf``, and 0 where the weight is 0, whatever the leaf is."""
    return jnp.where(weight == 0, 0, weight * leaf)


def _split(batch: Batch, parts: int, key: Key) -> tuple[Batch, Key]:
    """Equal parts of a batch, stacked along a new leading axis, and a key for each.

    Example ``i`` is in part ``i % parts``: of a batch that is divided among devices, each part has examples on all of
    them. A ``MaskedBatch`` that cannot be cut equally is filled up with examples that do not count.
    """
    missing = -len(batch.where) % parts if isinstance(batch, MaskedBatch) else 0
    if missing:
        again = np.arange(missing) % len(batch.where)
        examples = jax.tree.map(lambda leaf: deal_rows(leaf, parts, lambda rows: rows[again]), batch.examples)
        where = deal_rows(batch.where, parts, lambda _: jnp.zeros(missing, bool))
        return MaskedBatch(examples, where), jax.random.split(key, parts)

    def split_leaf(path, leaf):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"batch leaf {path_name(path)!r} of shape {jnp.shape(leaf)} cannot be split into microbatches={parts} "
                "equal parts: make its first axis a multiple of it, or give a MaskedBatch, which is filled up"
            )
        return deal_rows(leaf, parts)

    return jax.tree.map_with_path(split_leaf, batch), jax.random.split(key, parts)


def _accumulate(differentiate, params: Params | Packed, parts: tuple[Batch, Key]):
    """Results and gradients, summed over the parts of a batch one after the other, and the parts' squared norms."""

    def add(sums, part):
        (_, results), grads = differentiate(params, *part)
        *_, weight, _ = results
        square = jnp.square(safe_divide(global_norm(grads), weight))
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads), (results, square)

    start = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=compute_dtype(param.dtype)), params)
    grads, (results, squares) = jax.lax.scan(add, start, parts)
    *sums, firsts = results
    sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
    return (*sums, jax.tree.map(lambda leaf: leaf[0], firsts)), grads, squares


__all__ = ["Outcome", "make_gradient"]
