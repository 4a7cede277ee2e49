"""One training step as a pure function: ``state, info = step(state, batch)``."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import apply_updates, with_extra_args_support

from nnlearn.checks import NUMERIC, as_key
from nnlearn.data import MaskedBatch
from nnlearn.packing import Packed, is_packed, leaf_norms, make_layout, pack, unpack, worth_packing
from nnlearn.train.packable import packing_difference
from nnlearn.transforms.hyperparams import is_injected
from nnlearn.tree import compute_dtype, global_norm, path_name
from nnlearn.types import Batch, GradientTransformation, Key, LossFn, OptState, Params, PyTree

STEP_STREAM = 0x5E7  # an arbitrary constant: it sets the steps' random numbers apart from the caller's own
RECORDABLE = {"grad_norm", "update_norm", "leaf_grad_norms"}
Step = Callable[["TrainState", Batch], tuple["TrainState", "Info"]]


class TrainState(NamedTuple):
    """What the next step needs, and nothing else.

    Attributes:
      step: steps made so far, int32.
      stored: the parameters as training keeps them: the tree itself, or ``Packed``; ``params`` is the tree of either.
      opt_state: the optimizer's state.
      key: the run's random key, derived from the one given to ``init_state``; step t uses
        ``jax.random.fold_in(key, t)``, so a restored run draws the same numbers.
    """

    step: jax.Array
    stored: Params | Packed
    opt_state: OptState
    key: Key

    @property
    def params(self) -> Params:
        """The parameters as the tree that the model takes, however they are stored."""
        return unpack(self.stored)


class Info(NamedTuple):
    """What a person may want to look at; the same structure at every step.

    Attributes:
      loss: of this batch, before the update.
      grad_norm: Euclidean norm of the gradient, before the optimizer sees it; infinite or NaN if the gradient is. This
        and the other norms are None where ``make_step`` was not asked to record them.
      update_norm: Euclidean norm of the update.
      learning_rate: the rate that made the update, as the optimizer's state records it; a vector if it holds several,
        in the state's order, and NaN if it holds none.
      aux: what ``loss_fn`` returned beside the loss, or None.
      leaf_grad_norms: Euclidean norm of each leaf's gradient, shape (leaves,), in the tree's order.
    """

    loss: jax.Array
    grad_norm: jax.Array | None
    update_norm: jax.Array | None
    learning_rate: jax.Array
    aux: PyTree
    leaf_grad_norms: jax.Array | None = None


def init_state(
    params: Params,
    tx: GradientTransformation,
    key: Key | int = 0,
    *,
    packed: bool | None = None,
    labels: PyTree | Callable[[Params], PyTree] = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the parameters, as a tree or ``Packed``; they are copied, so that a step which donates its state leaves
        yours alone.
      tx: an optimizer, nnlearn's or optax's.
      key: a random key, or an integer seed for one. The state keeps a key of its own derived from it, so that yours may
        also shuffle the batches without the two ever drawing the same numbers.
      packed: whether training keeps the parameters in a few large buffers, see ``pack``; the trajectory is the same.
        None packs where that was measured to pay, see ``worth_packing``, if ``tx`` gives the same updates.
      labels: leaves to keep in buffers of their own, see ``pack``. An optimizer whose mask parts leaves of one dtype
        needs them: the mask itself will do.

    Raises:
      TypeError: a parameter is not floating or complex, and so cannot be trained.
      ValueError: ``packed`` is True, and ``tx`` would update packed parameters differently.

    >>> import nnlearn
    >>> state = init_state({"w": jnp.zeros(2)}, nnlearn.sgd(0.1), key=0)
    >>> int(state.step), state.params
    (0, {'w': Array([0., 0.], dtype=float32)})
    >>> init_state({"w": jnp.zeros(2), "b": jnp.zeros(1)}, nnlearn.sgd(0.1), packed=True).stored
    Packed(2 leaves: float32[3])
    """
    if is_packed(params):
        packed = True if packed is None else packed
        labels = params.layout.labels if labels is None else labels
    params = unpack(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"parameter {path_name(path)!r} is {jnp.result_type(leaf).name}, which has no gradient; "
                "make it floating, or keep it out of params"
            )
    key = jax.random.fold_in(as_key(key), STEP_STREAM)
    # Copies, because a donated buffer is gone: it may not be the caller's or the optimizer's, nor stand in two places.
    # Strong dtypes, because a weak one would turn strong at the first update, and compile the step anew.
    stored = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), params)
    if _decide_packing(packed, params, tx, labels):
        stored = pack(stored, labels)
    opt_state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tx.init(stored))
    return TrainState(jnp.zeros([], jnp.int32), stored, opt_state, key)


def _decide_packing(packed: bool | None, params: Params, tx: GradientTransformation, labels) -> bool:
    if packed not in (True, False, None):
        raise ValueError(f"packed must be True, False or None, got {packed!r}")
    if packed is False or (packed is None and not worth_packing(params)):
        return False
    if packed is None and any(buffer.sharding is not None for buffer in make_layout(params, labels).buffers):
        return False  # the check below does not know of buffers cut over devices
    difference = packing_difference(tx, params, labels)
    if packed and difference:
        raise ValueError(
            f"packed=True, but this optimizer would update packed parameters differently: {difference}. "
            "Give labels that keep apart what it treats apart, put by_leaf around the transformation that works with "
            "whole leaves, or leave packed=None"
        )
    return not difference


def make_step(
    loss_fn: LossFn,
    tx: GradientTransformation,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    microbatches: int = 1,
    packed: bool | None = None,
    record: Collection[str] = ("grad_norm",),
) -> Step:
    """A training step: gradient, optimizer, update.

    The step is a pure function, to be compiled (``jit_step`` also donates the state), scanned, vmapped over states, or
    run on many devices under ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` with an ``axis_name``.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; ``loss`` a real scalar, the mean over the
        batch, ``aux`` a pytree of arrays.
      tx: an optimizer, nnlearn's or optax's. It is also handed ``value``, ``grad`` and ``value_fn``, which line
        searches and plateau rules ask for.
      axis_name: the mapped axis or axes over which each device sees its own part of the batch and all hold the same
        state. Loss, gradient and aux are averaged over it, and each part draws its own random numbers. Parts weigh the
        same, so give each as many examples; parts of a ``MaskedBatch`` weigh by the examples that count.
      microbatches: split the batch into so many parts and accumulate their gradients one after the other, for the
        memory of one part. A real inner loop: the optimizer runs once, under ``vmap`` too.
      packed: True or False insist on a state with packed parameters, or without, see ``init_state``; None takes either.
        ``loss_fn`` sees the tree, whichever it is.
      record: which norms ``info`` holds, out of ``grad_norm``, ``update_norm`` and ``leaf_grad_norms``; the others are
        None. Each costs a pass over the gradient; ``update_norm`` costs several, as the update is not written out
        otherwise.

    Returns:
      ``step(state, batch) -> (state, info)``.

    Raises:
      TypeError: ``loss_fn`` does not take three arguments, or the loss is not a real scalar.
      ValueError: the state is packed, or not, against ``packed``; or the batch cannot be split into
        ``microbatches`` equal parts.

    >>> import nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] * params - batch["y"]) ** 2)
    >>> tx = nnlearn.sgd(0.1)
    >>> step = make_step(loss_fn, tx)
    >>> state, info = step(init_state(jnp.array(0.5), tx), {"x": jnp.array([2.0]), "y": jnp.array([3.0])})
    >>> state.params, info.loss, info.grad_norm
    (Array(1.3, dtype=float32), Array(4., dtype=float32), Array(8., dtype=float32))
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be an integer >= 1, got {microbatches!r}")
    if isinstance(record, str) or set(record) - RECORDABLE:
        raise ValueError(f"record must be a collection of names out of {sorted(RECORDABLE)}, got {record!r}")
    _check_signature(loss_fn)
    tx = with_extra_args_support(tx)

    whole = axis_name is None and microbatches == 1

    def summed_loss(params, batch, key):
        """Loss and aux of a part times its weight, summed over devices, and the weight so summed."""
        batch, weight = (batch, 1) if whole else _weigh(batch)
        result = loss_fn(unpack(params), batch, key)
        loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        _check_loss(loss)
        sums = (loss, aux, weight) if whole else jax.tree.map(lambda leaf: weight * leaf, (loss, aux, jnp.float32(1)))
        # Summed inside of the derivative: under shard_map the gradient of replicated parameters is summed over devices
        # by the transpose already, and the mean taken outside then changes nothing.
        loss, aux, weight = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        return loss, (aux, weight)

    differentiate = jax.value_and_grad(summed_loss, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Info]:
        if packed is not None and packed != is_packed(state.stored):
            raise ValueError(
                f"the step was made with packed={packed}, but the state's parameters are "
                f"{'not ' if packed else ''}packed: make it with init_state(..., packed={packed})"
            )
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if microbatches == 1:
            (loss, (aux, weight)), grads = differentiate(state.stored, batch, key)
        else:
            parts = _split(batch, microbatches, key)
            (loss, (aux, weight)), grads = _accumulate(differentiate, state.stored, parts)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        if not whole:
            loss, aux, grads = jax.tree.map(lambda total: total / weight, (loss, aux, grads))
            grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.stored)

        def value_fn(params):
            if microbatches == 1:
                total, (_, weight) = summed_loss(params, batch, key)
                return total / weight
            totals, (_, weights) = jax.lax.map(lambda part: summed_loss(params, *part), parts)
            return jnp.sum(totals) / jnp.sum(weights)

        updates, opt_state = tx.update(grads, state.opt_state, state.stored, value=loss, grad=grads, value_fn=value_fn)
        stored = apply_updates(state.stored, updates)
        info = Info(
            loss,
            global_norm(grads) if "grad_norm" in record else None,
            global_norm(updates) if "update_norm" in record else None,
            recorded_learning_rate(opt_state),
            aux,
            leaf_norms(grads) if "leaf_grad_norms" in record else None,
        )
        return TrainState(state.step + 1, stored, opt_state, state.key), info

    return step


def jit_step(step: Step) -> Step:
    """Compile a step and donate its state: the new state takes the old one's memory, and the old is gone.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> step = jit_step(make_step(lambda params, batch, key: jnp.sum((params - batch) ** 2), tx))
    >>> state, info = step(init_state(jnp.zeros(1), tx), jnp.ones(1))
    >>> state.params
    Array([1.], dtype=float32)
    """
    return jax.jit(step, donate_argnums=0)


def _check_signature(loss_fn: LossFn) -> None:
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # some built-in callables have none
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"loss_fn must take (params, batch, key), but its arguments are {signature}") from error


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, NUMERIC):
        raise TypeError(f"loss_fn must return a real scalar, or (loss, aux); got {type(loss).__name__}")
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(
            "loss_fn must return a real scalar, or (loss, aux); got "
            f"{jnp.result_type(loss).name} of shape {jnp.shape(loss)}: take the mean over the batch"
        )


def _weigh(batch: Batch) -> tuple[Batch, jax.Array]:
    """A part of a batch and how much it counts among others: 1, or the examples of a ``MaskedBatch`` that count.

    Where none do, the loss sees them all, so that its mean is not 0 / 0, and the weight of 0 takes it out again.
    """
    if not isinstance(batch, MaskedBatch):
        return batch, jnp.ones([])
    count = jnp.sum(batch.where)
    return batch._replace(where=batch.where | (count == 0)), count.astype(jnp.float32)


def _split(batch: Batch, parts: int, key: Key) -> tuple[Batch, Key]:
    """Equal slices of a batch, stacked along a new leading axis, and a key for each."""

    def split_leaf(path, leaf):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"batch leaf {path_name(path)!r} of shape {jnp.shape(leaf)} cannot be split into microbatches={parts} "
                "equal parts: its first axis must be a multiple of it"
            )
        return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

    return jax.tree.map_with_path(split_leaf, batch), jax.random.split(key, parts)


def _accumulate(differentiate, params: Params, parts: tuple[Batch, Key]):
    """What ``differentiate`` returns, summed over the parts of a batch, taken one after the other."""

    def add(sums, part):
        results, grads = differentiate(params, *part)
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads), results

    start = jax.tree.map(lambda param: jnp.zeros_like(param, dtype=compute_dtype(param.dtype)), params)
    grads, results = jax.lax.scan(add, start, parts)
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), results), grads


def recorded_learning_rate(state: OptState) -> jax.Array:
    """The learning rate that an optimizer's state records; see ``Info.learning_rate``.

    >>> import nnlearn
    >>> recorded_learning_rate(nnlearn.adam(0.1).init(jnp.zeros(1)))
    Array(0.1, dtype=float32)
    """

    def holds_rate(node):
        return hasattr(node, "learning_rate") or is_injected(node)

    rates = []
    for node in filter(holds_rate, jax.tree.leaves(state, is_leaf=holds_rate)):
        if is_injected(node):
            rates.append(node.hyperparams.get("learning_rate", recorded_learning_rate(node.inner_state)))
        else:
            rates.append(node.learning_rate)
    if not rates:
        return jnp.array(jnp.nan)
    return jnp.asarray(rates[0]) if len(rates) == 1 else jnp.concatenate([jnp.atleast_1d(rate) for rate in rates])


__all__ = ["Info", "TrainState", "init_state", "jit_step", "make_step", "recorded_learning_rate"]
