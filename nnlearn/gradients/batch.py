"""The gradient of a batch: whole, in microbatches one after the other, or in parts over devices.

Whatever the parts, the result is that of the whole batch: each part weighs by what counts in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.calls import asks_for, check_takes, hand
from nnlearn.checks import NUMERIC, check_count
from nnlearn.data import MaskedBatch
from nnlearn.gradients.custom import check_value_and_grad, parts_of_gradient, stored_like
from nnlearn.gradients.devices import device_key, equal_on_all, is_key, of_first_device, varying
from nnlearn.packing import Packed, unpack
from nnlearn.sharding.axes import beside, deal_rows
from nnlearn.sums import long_sum
from nnlearn.tree import compute_dtype, global_norm, path_name, safe_divide
from nnlearn.types import Batch, Grads, Key, LossFn, Params, PyTree, Scalar


class Outcome(NamedTuple):
    """What a batch says about the parameters; ``value_fn`` is its loss at others.

    ``grads`` points uphill: of a complex parameter it is the conjugate of ``jax.grad``. ``part_squares`` and
    ``part_counts`` are the squared norms of the gradients of this device's microbatches, and the examples that count in
    each; None where there is only one. All else is the whole batch's, and the same on all devices.
    """

    loss: jax.Array
    aux: PyTree
    model_state: PyTree
    grads: Grads
    part_squares: jax.Array | None
    part_counts: jax.Array | None
    value_fn: Callable[[Params], jax.Array]


class _Sums(NamedTuple):
    """What a part of a batch adds to the whole: loss, aux and state times its weight; and the state it may decide."""

    loss: jax.Array
    aux: PyTree
    means: list
    firsts: list
    weight: Any
    count: Any


def make_gradient(
    loss_fn: LossFn,
    *,
    axis_name: str | tuple[str, ...] | None,
    microbatches: int,
    batch_weight: Callable[[Batch], Scalar] | None,
    value_and_grad: Callable | None,
) -> Callable[..., Outcome]:
    """``gradient(stored, batch, key, model_state, scale, hparams) -> Outcome``; its arguments are ``make_step``'s.

    ``key`` is the same on all devices. ``scale`` multiplies the loss while it is differentiated and divides the
    gradient after, for dynamic loss scaling; None leaves both alone.
    """
    check_takes(loss_fn, "loss_fn", "params, batch, key", "hparams", "model_state")
    check_count("microbatches", microbatches)
    whole = axis_name is None and microbatches == 1
    if value_and_grad is not None:
        check_value_and_grad(value_and_grad, in_parts=not whole, batch_weight=batch_weight)

    def weigh(part):
        return (part, 1) if whole else _weigh(part, batch_weight)

    def gradient(stored, batch, key, model_state, scale, hparams) -> Outcome:
        own = None
        stored, model_state, hparams = equal_on_all((beside(batch, stored), model_state, hparams), axis_name)
        if value_and_grad is None:
            evaluate, differentiate = _plain(loss_fn, weigh, model_state, scale, hparams)
        else:
            own, evaluate, differentiate = _custom(value_and_grad, loss_fn, weigh, model_state, scale, hparams, whole)
        params = jax.tree.map(lambda leaf: varying(leaf, axis_name), stored if own is None else unpack(stored))
        local_key, squares, counts = device_key(key, axis_name), None, None
        if microbatches == 1:
            sums, grads = differentiate(params, batch, local_key)
        else:
            parts = split_batch(batch, microbatches, local_key)
            sums, grads, squares, counts = _accumulate(differentiate, params, parts, axis_name)
        if axis_name is not None:
            firsts = jax.tree.map(lambda leaf: of_first_device(leaf, axis_name), sums.firsts)
            sums, grads = jax.lax.psum((sums._replace(firsts=[]), grads), axis_name)
            sums = sums._replace(firsts=firsts)
        loss, aux, means, firsts, weight, count = sums
        if not whole:
            loss, aux, means, grads = jax.tree.map(lambda total: safe_divide(total, weight), (loss, aux, means, grads))
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)
        if own is not None:
            grads = own.finish(grads, count, key) if not whole and hasattr(own, "finish") else grads
            grads = stored_like(grads, stored)
        elif scale is not None:  # not in float16, where what the scaling has saved would be lost again
            grads = jax.tree.map(lambda grad: grad.astype(compute_dtype(grad.dtype)) / scale, grads)
            squares = None if squares is None else squares / jnp.square(scale)

        def value_fn(params):
            params = equal_on_all(params, axis_name)
            if microbatches == 1:
                found = evaluate(params, batch, local_key)
                total, weight = found.loss, found.weight
            else:
                found = jax.lax.map(lambda part: evaluate(params, *part), parts)
                total, weight = long_sum(found.loss), long_sum(found.weight)
            if axis_name is not None:
                total, weight = jax.lax.psum((total, weight), axis_name)
            return total if whole else safe_divide(total, weight)

        # The one place where a complex gradient is turned uphill: sums, clipping and custom gradients are JAX's way.
        grads = jax.tree.map(lambda grad: jnp.conj(grad) if jnp.iscomplexobj(grad) else grad, grads)
        new_state = _joined(means, firsts, model_state, None if whole else weight == 0)
        return Outcome(loss, aux, new_state, grads, squares, counts, value_fn)

    return gradient


def _plain(loss_fn, weigh, model_state, scale, hparams) -> tuple[Callable, Callable]:
    """``evaluate(params, part, key) -> sums`` and ``differentiate(params, part, key) -> (sums, grads)`` by JAX."""
    carries_state = asks_for(loss_fn, "model_state")

    def scaled_loss(params, part, key):
        count, (part, weight) = _count(part), weigh(part)
        params = _constant_where_empty(params, weight)
        result = hand(loss_fn, unpack(params), part, key, model_state=model_state, hparams=hparams)
        loss, aux, new_state = _parts_of(result, carries_state)
        sums = _weighted_sums(loss, aux, *_new_leaves(new_state, model_state), weight, count)
        return sums.loss if scale is None else sums.loss * scale.astype(sums.loss.dtype), sums

    def differentiate(params, part, key):
        (_, sums), grads = jax.value_and_grad(scaled_loss, has_aux=True)(params, part, key)
        return sums, grads

    return lambda *part: scaled_loss(*part)[1], differentiate


def _custom(value_and_grad, loss_fn, weigh, model_state, scale, hparams, whole: bool):
    """The user's function, and ``evaluate`` and ``differentiate`` of ``_plain`` by it."""
    carries_state = asks_for(loss_fn, "model_state")

    def loss_with(model_state, hparams, params, batch, key):
        result = hand(loss_fn, params, batch, key, model_state=model_state, hparams=hparams)
        if not carries_state:
            return result
        loss, aux, new_state = _parts_of(result, carries_state)
        return loss, (aux, *_new_leaves(new_state, model_state))

    # arrays as arguments, because those of an explicit mesh may not be captured in a region of automatic axes
    own = value_and_grad(jax.tree_util.Partial(loss_with, model_state, hparams))
    run = own if whole else getattr(own, "over_part", own)
    extra = {} if scale is None or not asks_for(run, "loss_scale") else {"loss_scale": scale}

    def differentiate(params, part, key):
        count, (part, weight) = _count(part), weigh(part)
        params = _constant_where_empty(unpack(params), weight)
        loss, aux, grads = parts_of_gradient(run(params, part, key, **extra), params)
        if carries_state and not (isinstance(aux, tuple) and len(aux) == 3):
            raise TypeError(
                "value_and_grad must return the aux of the loss that it was given, as loss_fn takes model_state and "
                f"aux holds the new one; got {type(aux).__name__}"
            )
        aux, means, firsts = aux if carries_state else (aux, [], [])
        return _weighted_sums(loss, aux, means, firsts, weight, count), _weighted_tree(grads, weight)

    return own, lambda *part: differentiate(*part)[0], differentiate


def _weighted_sums(loss, aux, means, firsts, weight, count) -> _Sums:
    loss, aux, means = _weighted_tree((loss, aux, means), weight)
    return _Sums(loss, aux, means, firsts, weight, count)


def _weighted_tree(tree: PyTree, weight) -> PyTree:
    """Every leaf times the weight, which is 1 where the batch is in one part, and the tree itself then."""
    return tree if isinstance(weight, int) else jax.tree.map(lambda leaf: _weighted(leaf, weight), tree)


def _count(batch: Batch) -> jax.Array:
    """How many examples of a part count, float32; of a batch without arrays 1."""
    if isinstance(batch, MaskedBatch):
        return jnp.sum(batch.where).astype(jnp.float32)
    shapes = map(jnp.shape, jax.tree.leaves(batch))
    return jnp.float32(next((shape[0] for shape in shapes if shape), 1))


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
        leaf = leaf if is_key(before) else jnp.asarray(leaf).astype(before.dtype)
        return leaf if nothing is None else jnp.where(nothing, before, leaf)

    return treedef.unflatten([cast(*row) for row in zip(means, firsts, leaves, strict=True)])


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


def _constant_where_empty(params: Params, weight) -> Params:
    """The parameters, with derivative 0 where the weight is 0: 0 times a derivative would be NaN where that is.

    The program that is compiled has no trace of it but in the derivative.
    """
    if isinstance(weight, int):
        return params
    return jax.tree.map(lambda leaf: jnp.where(weight == 0, jax.lax.stop_gradient(leaf), leaf), params)


def _weighted(leaf, weight: jax.Array) -> jax.Array:
    """``weight * leaf``, and 0 where the weight is 0, whatever the leaf is."""
    return jnp.where(weight == 0, 0, weight * leaf)


def split_batch(batch: Batch, parts: int, key: Key) -> tuple[Batch, Key]:
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


def _accumulate(differentiate, params: Params | Packed, parts: tuple[Batch, Key], axis_name):
    """Sums and gradients, added up over the parts of a batch one by one; the parts' squared norms and counts."""

    def add(total, part):
        sums, grads = differentiate(params, *part)
        square = jnp.square(safe_divide(global_norm(grads), sums.weight))
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), total, grads), (sums, square)

    start = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=compute_dtype(param.dtype)), params)
    start = jax.tree.map(lambda zero: varying(zero, axis_name), start)
    grads, (sums, squares) = jax.lax.scan(add, start, parts)
    total = jax.tree.map(long_sum, sums._replace(firsts=[]))
    firsts = jax.tree.map(lambda leaf: leaf[0], sums.firsts)
    return total._replace(firsts=firsts), grads, squares, sums.count


__all__ = ["Outcome", "make_gradient", "split_batch"]
