"""The gradient of a batch: whole, in microbatches one after another, or in parts over devices.

The result does not depend on the parts: each part is weighted by the examples that count in it.
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
from nnlearn.gradients.devices import AxisName, device_key, equal_on_all, is_key, of_first_device, varying
from nnlearn.packing import Packed, unpack
from nnlearn.sharding.axes import beside, deal_rows
from nnlearn.sums import long_sum
from nnlearn.tree import compute_dtype, global_norm, path_name, safe_divide
from nnlearn.types import Batch, DTypeLike, Grads, Key, LossFn, Params, PyTree, Scalar


class Outcome(NamedTuple):
    """The loss of a batch and its gradient.

    All fields are those of the whole batch and equal on all devices, except ``part_squares`` and ``part_counts``.

    Attributes:
      loss: the mean loss.
      aux: what ``loss_fn`` returned beside the loss.
      model_state: the model's new state.
      grads: the direction of steepest ascent; for a complex parameter, the conjugate of ``jax.grad``.
      part_squares: squared norms of the gradients of this device's microbatches; None without microbatches.
      part_counts: number of examples that count in each of them; None without microbatches.
      value_fn: the loss of this batch as a function of the parameters.
    """

    loss: jax.Array
    aux: PyTree
    model_state: PyTree
    grads: Grads
    part_squares: jax.Array | None
    part_counts: jax.Array | None
    value_fn: Callable[[Params], jax.Array]


class _StateLeaves(NamedTuple):
    """Leaves of the model's new state, None where a leaf is in the other list or unchanged.

    Attributes:
      means: floating leaves, averaged over the parts of a batch.
      firsts: counts, flags and random keys, which have no mean: the first part's are kept.
    """

    means: list[Any]
    firsts: list[Any]


class _AuxAndState(NamedTuple):
    """The aux of the loss that a custom ``value_and_grad`` differentiates, if the model has a state."""

    aux: PyTree
    means: list[Any]
    firsts: list[Any]


class _Sums(NamedTuple):
    """What one part of a batch adds to the whole.

    Attributes:
      loss, aux, state.means: times ``weight``.
      weight: the weight of the part in the mean over the batch; the int 1 if the batch has one part.
      example_count: number of examples that count.
    """

    loss: jax.Array
    aux: PyTree
    state: _StateLeaves
    weight: Any
    example_count: jax.Array


class _PartFunctions(NamedTuple):
    """The functions that run on each part of a batch.

    Attributes:
      evaluate: ``(params, part, key) -> sums``.
      differentiate: ``(params, part, key) -> (sums, grads)``.
      custom: the user's gradient function, or None where JAX differentiates.
    """

    evaluate: Callable[..., _Sums]
    differentiate: Callable[..., tuple[_Sums, Grads]]
    custom: Any = None


class _Accumulated(NamedTuple):
    """Sums and gradients over the microbatches; ``squares`` and ``counts`` as in ``Outcome``."""

    sums: _Sums
    grads: Grads
    squares: jax.Array | None = None
    counts: jax.Array | None = None


def make_gradient(
    loss_fn: LossFn,
    *,
    axis_name: AxisName | None,
    microbatches: int,
    batch_weight: Callable[[Batch], Scalar] | None,
    value_and_grad: Callable[..., Any] | None,
    reduce_dtype: DTypeLike | None = None,
) -> Callable[..., Outcome]:
    """``gradient(stored, batch, key, model_state, scale, hparams) -> Outcome``; the arguments are ``make_step``'s.

    ``key`` is the same on all devices. ``scale`` multiplies the loss before differentiation and divides the gradient
    afterwards, for dynamic loss scaling; None disables it.
    """
    check_takes(loss_fn, "loss_fn", "params, batch, key", "hparams", "model_state")
    check_count("microbatches", microbatches)
    whole = axis_name is None and microbatches == 1
    if value_and_grad is not None:
        check_value_and_grad(value_and_grad, in_parts=not whole, batch_weight=batch_weight)

    def weigh(part):
        return (part, 1) if whole else _weigh(part, batch_weight)

    def gradient(stored, batch, key, model_state, scale, hparams) -> Outcome:
        stored, model_state, hparams = equal_on_all((beside(batch, stored), model_state, hparams), axis_name)
        if value_and_grad is None:
            evaluate, differentiate, custom = _plain(loss_fn, weigh, model_state, scale, hparams)
        else:
            evaluate, differentiate, custom = _custom(
                value_and_grad, loss_fn, weigh, model_state, scale, hparams, whole
            )
        params = stored if custom is None else unpack(stored)
        params = jax.tree.map(lambda leaf: varying(leaf, axis_name), params)
        local_key = device_key(key, axis_name)
        parts = None if microbatches == 1 else split_batch(batch, microbatches, local_key)
        if parts is None:
            sums, grads, squares, counts = _Accumulated(*differentiate(params, batch, local_key))
        else:
            sums, grads, squares, counts = _accumulate(differentiate, params, parts, axis_name)
        if axis_name is not None:
            sums, grads = _sum_over_devices(sums, grads, axis_name, reduce_dtype)
        loss, aux, state = sums.loss, sums.aux, sums.state
        if not whole:
            totals = loss, aux, state.means, grads
            loss, aux, means, grads = jax.tree.map(lambda total: safe_divide(total, sums.weight), totals)
            state = state._replace(means=means)
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)
        if custom is not None:
            if not whole and hasattr(custom, "finish"):
                grads = custom.finish(grads, sums.example_count, key)
            grads = stored_like(grads, stored)
        elif scale is not None:  # not in float16, which would lose again what the scaling has saved
            grads = jax.tree.map(lambda grad: grad.astype(compute_dtype(grad.dtype)) / scale, grads)
            squares = None if squares is None else squares / jnp.square(scale)

        def value_fn(params):
            params = equal_on_all(params, axis_name)
            if parts is None:
                found = evaluate(params, batch, local_key)
                total, weight = found.loss, found.weight
            else:
                found = jax.lax.map(lambda part: evaluate(params, *part), parts)
                total, weight = long_sum(found.loss), long_sum(found.weight)
            if axis_name is not None:
                total, weight = jax.lax.psum((total, weight), axis_name)
            return total if whole else safe_divide(total, weight)

        # The only place that conjugates: sums, clipping and custom gradients follow JAX's convention.
        grads = jax.tree.map(lambda grad: jnp.conj(grad) if jnp.iscomplexobj(grad) else grad, grads)
        new_state = _new_model_state(state, model_state, None if whole else sums.weight == 0)
        return Outcome(loss, aux, new_state, grads, squares, counts, value_fn)

    return gradient


def _plain(loss_fn: LossFn, weigh: Callable, model_state: PyTree, scale: Any, hparams: PyTree) -> _PartFunctions:
    """Differentiate ``loss_fn`` by JAX."""
    carries_state = asks_for(loss_fn, "model_state")

    def scaled_loss(params, part, key):
        count, (part, weight) = _count(part), weigh(part)
        params = _constant_where_empty(params, weight)
        result = hand(loss_fn, unpack(params), part, key, model_state=model_state, hparams=hparams)
        loss, aux, new_state = _parts_of(result, carries_state)
        sums = _weighted_sums(loss, aux, _new_leaves(new_state, model_state), weight, count)
        return sums.loss if scale is None else sums.loss * scale.astype(sums.loss.dtype), sums

    def differentiate(params, part, key):
        (_, sums), grads = jax.value_and_grad(scaled_loss, has_aux=True)(params, part, key)
        return sums, grads

    return _PartFunctions(lambda *part: scaled_loss(*part)[1], differentiate)


def _custom(
    value_and_grad: Callable,
    loss_fn: LossFn,
    weigh: Callable,
    model_state: PyTree,
    scale: Any,
    hparams: PyTree,
    whole: bool,
) -> _PartFunctions:
    """Differentiate ``loss_fn`` by the user's function."""
    carries_state = asks_for(loss_fn, "model_state")

    def loss_with(model_state, hparams, params, batch, key):
        result = hand(loss_fn, params, batch, key, model_state=model_state, hparams=hparams)
        if not carries_state:
            return result
        loss, aux, new_state = _parts_of(result, carries_state)
        return loss, _AuxAndState(aux, *_new_leaves(new_state, model_state))

    # Pass the arrays as arguments: a region of automatic axes cannot capture arrays of an Explicit mesh.
    custom = value_and_grad(jax.tree_util.Partial(loss_with, model_state, hparams))
    run = custom if whole else getattr(custom, "over_part", custom)
    extra = {} if scale is None or not asks_for(run, "loss_scale") else {"loss_scale": scale}

    def differentiate(params, part, key):
        count, (part, weight) = _count(part), weigh(part)
        params = _constant_where_empty(unpack(params), weight)
        loss, aux, grads = parts_of_gradient(run(params, part, key, **extra), params)
        if carries_state and not (isinstance(aux, tuple) and len(aux) == 3):
            raise TypeError(
                "value_and_grad must return the aux of the loss that it was given, because loss_fn takes model_state "
                f"and aux holds the new one; got {type(aux).__name__}"
            )
        both = _AuxAndState(*aux) if carries_state else _AuxAndState(aux, [], [])
        sums = _weighted_sums(loss, both.aux, _StateLeaves(both.means, both.firsts), weight, count)
        return sums, _weighted_tree(grads, weight)

    return _PartFunctions(lambda *part: differentiate(*part)[0], differentiate, custom)


def _weighted_sums(loss: Any, aux: PyTree, state: _StateLeaves, weight: Any, count: jax.Array) -> _Sums:
    loss, aux, means = _weighted_tree((loss, aux, state.means), weight)
    return _Sums(loss, aux, state._replace(means=means), weight, count)


def _weighted_tree(tree: PyTree, weight: Any) -> PyTree:
    """Every leaf times the weight; the tree itself for the int 1, the weight of a batch in one part."""
    return tree if isinstance(weight, int) else jax.tree.map(lambda leaf: _weighted(leaf, weight), tree)


def _sum_over_devices(sums: _Sums, grads: Grads, axis_name: AxisName, dtype: DTypeLike | None) -> tuple[_Sums, Grads]:
    firsts = jax.tree.map(lambda leaf: of_first_device(leaf, axis_name), sums.state.firsts)
    summed = sums._replace(state=sums.state._replace(firsts=[]))
    sent = grads if dtype is None else jax.tree.map(lambda grad: grad.astype(dtype), grads)
    summed, sent = jax.lax.psum((summed, sent), axis_name)
    grads = jax.tree.map(lambda total, grad: total.astype(grad.dtype), sent, grads)
    return summed._replace(state=summed.state._replace(firsts=firsts)), grads


def _count(batch: Batch) -> jax.Array:
    """Number of examples of a part that count, float32; 1 for a batch without arrays."""
    if isinstance(batch, MaskedBatch):
        return jnp.sum(batch.where).astype(jnp.float32)
    shapes = map(jnp.shape, jax.tree.leaves(batch))
    return jnp.float32(next((shape[0] for shape in shapes if shape), 1))


def _parts_of(result: Any, carries_state: bool) -> tuple[Any, PyTree, PyTree]:
    """Loss, aux and model state from the result of ``loss_fn``."""
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


def _new_leaves(new: PyTree, old: PyTree) -> _StateLeaves:
    """The leaves of the model's new state, by how the parts of a batch are combined.

    A leaf that is the old one itself is in neither list: an array that the model only keeps is not averaged, so
    infinities in it do no harm.
    """
    if old is None:
        return _StateLeaves([], [])
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
    return _StateLeaves(means, firsts)


def _new_model_state(new: _StateLeaves, old: PyTree, empty: jax.Array | None) -> PyTree:
    """The model's new state in the dtypes of the old one, so that the next step needs no other program.

    Args:
      new: the leaves, combined over the parts.
      old: the state before.
      empty: whether no example counts, so that there is no mean and the old state stays; None if that cannot be.
    """
    leaves, treedef = jax.tree.flatten(old)
    if not new.means:  # the model has no state
        return old

    def cast(mean, first, before):
        leaf = mean if first is None else first
        if leaf is None:
            return before
        leaf = leaf if is_key(before) else jnp.asarray(leaf).astype(before.dtype)
        return leaf if empty is None else jnp.where(empty, before, leaf)

    return treedef.unflatten([cast(*row) for row in zip(new.means, new.firsts, leaves, strict=True)])


def _weigh(batch: Batch, batch_weight: Callable[[Batch], Scalar] | None) -> tuple[Batch, jax.Array]:
    """A part of a batch and its weight: 1, or the number of examples of a ``MaskedBatch`` that count.

    If none count, the loss sees them all, so that its mean is not 0 / 0, and the weight 0 removes it again. Their
    non-finite values are set to 0: a NaN would reach derivatives with respect to arguments other than the parameters.
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


def _constant_where_empty(params: Params, weight: Any) -> Params:
    """The parameters, with derivative 0 if the weight is 0: 0 times a NaN derivative would be NaN.

    The forward program is unchanged: only the derivative has an extra operation.
    """
    if isinstance(weight, int):
        return params
    return jax.tree.map(lambda leaf: jnp.where(weight == 0, jax.lax.stop_gradient(leaf), leaf), params)


def _weighted(leaf, weight: jax.Array) -> jax.Array:
    """``weight * leaf``, and 0 if the weight is 0, even for NaN."""
    return jnp.where(weight == 0, 0, weight * leaf)


def split_batch(batch: Batch, parts: int, key: Key) -> tuple[Batch, Key]:
    """Equal parts of a batch, stacked along a new leading axis, and a key for each.

    Example ``i`` is in part ``i % parts``, so that every part of a sharded batch has examples on all devices. A
    ``MaskedBatch`` that cannot be divided equally is padded with examples that do not count.
    """
    if isinstance(batch, MaskedBatch):
        where = jnp.asarray(batch.where)
        missing = -len(where) % parts
        if missing:
            again = np.arange(missing) % len(where)
            examples = jax.tree.map(lambda leaf: deal_rows(leaf, parts, lambda rows: rows[again]), batch.examples)
            where = deal_rows(where, parts, lambda _: jnp.zeros(missing, bool))
            return MaskedBatch(examples, where), jax.random.split(key, parts)

    def split_leaf(path, leaf):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"batch leaf {path_name(path)!r} of shape {jnp.shape(leaf)} cannot be split into microbatches={parts} "
                "equal parts: make its first axis a multiple of it, or give a MaskedBatch, which is padded"
            )
        return deal_rows(leaf, parts)

    return jax.tree.map_with_path(split_leaf, batch), jax.random.split(key, parts)


def _accumulate(
    differentiate: Callable[..., tuple[_Sums, Grads]],
    params: Params | Packed,
    parts: tuple[Batch, Key],
    axis_name: AxisName | None,
) -> _Accumulated:
    """Add up sums and gradients over the parts of a batch, in a loop."""

    def add(total, part):
        sums, grads = differentiate(params, *part)
        square = jnp.square(safe_divide(global_norm(grads), sums.weight))
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), total, grads), (sums, square)

    start = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=compute_dtype(param.dtype)), params)
    start = jax.tree.map(lambda zero: varying(zero, axis_name), start)
    grads, (sums, squares) = jax.lax.scan(add, start, parts)
    firsts = jax.tree.map(lambda leaf: leaf[0], sums.state.firsts)
    total = jax.tree.map(long_sum, sums._replace(state=sums.state._replace(firsts=[])))
    return _Accumulated(total._replace(state=total.state._replace(firsts=firsts)), grads, squares, sums.example_count)


__all__ = ["Outcome", "make_gradient", "split_batch"]
