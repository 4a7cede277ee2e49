"""One training step as a pure function: ``state, info = step(state, batch)``."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from optax import ScaleByBacktrackingLinesearchState, apply_updates, with_extra_args_support

from nnlearn.gradients.batch import make_gradient
from nnlearn.gradients.noise_scale import NoiseScale
from nnlearn.packing import leaf_norms
from nnlearn.programs.in_place import apply_gradients
from nnlearn.train.explain import accepted, check_state, explaining_batch, explaining_update
from nnlearn.train.noise_of_step import make_noise_of
from nnlearn.train.state import TrainState
from nnlearn.transforms.hyperparams import is_injected
from nnlearn.transforms.loss_scale import current_loss_scale
from nnlearn.transforms.skipping import hold, skip_whole, was_skipped
from nnlearn.tree import global_norm, widest
from nnlearn.types import (
    Batch,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Grads,
    Key,
    LossFn,
    OptState,
    Params,
    PyTree,
    Scalar,
    Updates,
)

RECORDABLE = {"grad_norm", "update_norm", "leaf_grad_norms", "noise_scale"}


class Info(NamedTuple):
    """What a person may want to look at; the same structure at every step.

    Attributes:
      loss: of this batch, before the update.
      grad_norm: Euclidean norm of the gradient, before the optimizer sees it; infinite or NaN if the gradient is. This
        and the other norms are None where ``make_step`` was not asked to record them.
      update_norm: Euclidean norm of the update.
      learning_rate: the rate that made the update, as the optimizer's state records it, times the scale of
        ``optax.contrib.reduce_on_plateau`` where that is chained to it; a vector if the state holds several rates, in
        its order, and None if it holds none, as those of optax's own optimizers do.
      aux: what ``loss_fn`` returned beside the loss, or None.
      leaf_grad_norms: Euclidean norm of each leaf's gradient, shape (leaves,), in the tree's order; their names are
        ``Trace.leaves``.
      noise_scale: how much the gradients of examples scatter, see ``noise_scale_from_examples``.
      skipped: whether the optimizer skipped the step, see ``was_skipped``; None if nothing in it skips steps. The loss
        and the norms are those of the batch all the same.
    """

    loss: jax.Array
    grad_norm: jax.Array | None
    update_norm: jax.Array | None
    learning_rate: jax.Array | None
    aux: PyTree
    leaf_grad_norms: jax.Array | None = None
    noise_scale: NoiseScale | None = None
    skipped: jax.Array | None = None


class Step(Protocol):
    """A training step, ``step(state, batch) -> (state, info)``.

    ``key`` replaces the random key of this step, which is otherwise derived from ``state.key`` and ``state.step``.
    """

    def __call__(self, state: TrainState, batch: Batch, *, key: Key | None = None) -> tuple[TrainState, Info]: ...


AnyStep = TypeVar("AnyStep", bound=Callable[..., Any])


def make_step(
    loss_fn: LossFn,
    tx: GradientTransformation,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    microbatches: int = 1,
    packed: bool | None = None,
    record: Collection[str] = ("grad_norm",),
    batch_weight: Callable[[Batch], Scalar] | None = None,
    value_and_grad: Callable[[LossFn], Callable[..., Any]] | None = None,
    hparams: PyTree = None,
) -> Step:
    """A training step: gradient, optimizer, update.

    The step is a pure function, to be compiled (``jit_step`` also donates the state), scanned, vmapped over states, or
    run on many devices under ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` with an ``axis_name``.

    A step that a guard in ``tx`` skips, such as ``apply_if_finite``, is skipped whole: parameters, model state,
    averages, schedules and whatever else the optimizer carries outside of the guard stay as they were, and
    ``info.skipped`` is True. Only ``state.step``, which counts batches, and the guards' own counts go on. One guard
    anywhere in ``tx`` is enough, in one part of a ``partition`` too; see ``was_skipped`` for what guards are.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; ``loss`` a real scalar, the mean over the
        batch, ``aux`` a pytree of arrays. With an argument named ``model_state`` it is given the state's, and
        returns ``(loss, aux, model_state)``; with one named ``hparams`` it is given those.
      tx: an optimizer, nnlearn's or optax's. It is also handed ``value``, ``grad`` and ``value_fn``, which line
        searches and plateau rules ask for; all three are the whole batch's. The gradient of a complex parameter is the
        direction of steepest ascent, as PyTorch's is, which is the conjugate of ``jax.grad``; ``jax.grad(value_fn)``
        stays JAX's.
      axis_name: the mapped axis or axes over which each device sees its own part of the batch and all hold the same
        state. Loss, gradient and aux are averaged over it, and each part draws its own random numbers. Parts weigh the
        same, so give each as many examples; parts of a ``MaskedBatch`` weigh by the examples that count.
      microbatches: split the batch into so many parts and accumulate their gradients one after the other, for the
        memory of one part. A real inner loop: the optimizer runs once, under ``vmap`` too. The result is the whole
        batch's, for a ``MaskedBatch`` with any mask and of any length. Example ``i`` is in part ``i % microbatches``:
        of a sharded batch every part has examples on all devices.
      packed: True or False insist on a state with packed parameters, or without, see ``init_state``; None takes either.
        ``loss_fn`` sees the tree, whichever it is.
      record: what ``info`` holds, out of ``grad_norm``, ``update_norm``, ``leaf_grad_norms`` and ``noise_scale``; the
        others are None. A norm costs a pass over the gradient; ``update_norm`` costs several, as the update is not
        written out otherwise. The noise scale comes from the microbatches of all devices where there are some, and else
        from the norms of all examples' gradients, which may cost as much as the gradient again; beside
        ``value_and_grad`` always from the examples' own gradients, not from what that makes of them.
      batch_weight: how much a part of a batch counts beside the others, a scalar function of it, where ``loss_fn``
        takes its mean over something else than examples, such as the tokens that are not padding.
      value_and_grad: another way to take the gradient, such as ``clipped_value_and_grad``:
        ``value_and_grad(f)(params, batch, key) -> ((loss, aux), grads)``, or ``(loss, grads)``, by JAX's convention for
        complex parameters. ``params`` and ``grads`` are trees, also where the state is packed. ``f(params, batch,
        key)`` returns what ``loss_fn`` returns; if that takes ``model_state``, ``(loss, aux)`` where ``aux`` holds the
        new state, and has to be returned. With ``microbatches`` or ``axis_name`` it is called on each part, and the
        results are averaged as losses are, unless the function has two more as attributes: then
        ``over_part(params, batch, key)`` is called on each part, and ``finish(grads, count, key) -> grads`` once, on
        the average over the ``count`` examples of all parts, with a key that all devices share. The scale of
        ``dynamic_loss_scale`` is not applied, because a clipped gradient, for one, does not grow
        with the loss; a function with an argument ``loss_scale`` is given it, and returns the gradient unscaled.
      hparams: what a ``loss_fn`` that asks for ``hparams`` is given.

    Returns:
      ``step(state, batch) -> (state, info)``.

    Raises:
      TypeError: ``loss_fn`` or ``value_and_grad`` does not take or return what it should.
      ValueError: the state is packed, or not, against ``packed``; the batch cannot be split into ``microbatches`` equal
        parts; or ``batch_weight`` is given with parts of a batch and a ``value_and_grad`` that weighs every example the
        same.

    >>> import nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] * params - batch["y"]) ** 2)
    >>> tx = nnlearn.sgd(0.1)
    >>> step = make_step(loss_fn, tx)
    >>> state, info = step(nnlearn.init_state(jnp.array(0.5), tx), {"x": jnp.array([2.0]), "y": jnp.array([3.0])})
    >>> state.params, info.loss, info.grad_norm
    (Array(1.3, dtype=float32), Array(4., dtype=float32), Array(8., dtype=float32))
    """
    check_record(record)
    gradient = make_gradient(
        loss_fn,
        axis_name=axis_name,
        microbatches=microbatches,
        batch_weight=batch_weight,
        value_and_grad=value_and_grad,
    )
    noise_of = make_noise_of(loss_fn, axis_name, microbatches, clean=value_and_grad is None)
    takes = with_extra_args_support(tx).update
    whole_tx = skip_whole(tx)

    def step(state: TrainState, batch: Batch, *, key: Key | None = None) -> tuple[TrainState, Info]:
        check_state(state, loss_fn, packed)
        key = step_key(state.key, state.step) if key is None else key
        scale = current_loss_scale(state.opt_state)
        with explaining_batch(batch):
            seen = gradient(state.stored, batch, key, state.model_state, scale, hparams)
        offered = {"value": seen.loss, "grad": _slope_of(seen.grads, state.opt_state), "value_fn": seen.value_fn}
        with explaining_update(whole_tx, state.opt_state, state.stored):
            new = _updated(whole_tx, state, seen.grads, accepted(takes, offered), "update_norm" in record)
        skipped = was_skipped(whole_tx, state.opt_state, new.opt_state)
        info = Info(
            seen.loss,
            global_norm(seen.grads) if "grad_norm" in record else None,
            global_norm(new.updates) if "update_norm" in record else None,
            recorded_learning_rate(new.opt_state),
            seen.aux,
            leaf_norms(seen.grads) if "leaf_grad_norms" in record else None,
            noise_of(state, batch, key, seen, scale, hparams) if "noise_scale" in record else None,
            skipped,
        )
        model_state = hold(skipped, state.model_state, seen.model_state)
        return TrainState(state.step + 1, new.stored, new.opt_state, state.key, model_state), info

    return step


class _Updated(NamedTuple):
    stored: Params
    opt_state: OptState
    updates: Updates  # None where nothing needs them, because writing them out costs memory and time


def _updated(
    tx: GradientTransformationExtraArgs, state: TrainState, grads: Grads, extra: dict[str, Any], with_updates: bool
) -> _Updated:
    """The parameters and the optimizer state after an update."""
    if not with_updates:
        stored, opt_state = apply_gradients(tx, state.stored, grads, state.opt_state, **extra)
        return _Updated(stored, opt_state, None)
    updates, opt_state = tx.update(grads, state.opt_state, state.stored, **extra)
    with jax.numpy_dtype_promotion("standard"):  # an update may be wider than its parameter
        return _Updated(apply_updates(state.stored, updates), opt_state, updates)


def _slope_of(grads: Grads, opt_state: OptState) -> Grads:
    """The gradient as a line search reads it: optax's backtracking takes that of JAX, and its zoom the conjugate."""

    def is_search(node):
        return isinstance(node, ScaleByBacktrackingLinesearchState)

    if not any(map(jnp.iscomplexobj, jax.tree.leaves(grads))):
        return grads
    found = any(map(is_search, jax.tree.leaves(opt_state, is_leaf=is_search)))
    return jax.tree.map(jnp.conj, grads) if found else grads


def check_record(record: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``record`` names what ``Info`` may hold.

    >>> check_record(["norm"])
    Traceback (most recent call last):
    ValueError: record must be a collection of names out of [...], got ['norm']
    """
    if isinstance(record, str) or set(record) - RECORDABLE:
        raise ValueError(f"record must be a collection of names out of {sorted(RECORDABLE)}, got {record!r}")


def step_key(key: Key, step: Scalar) -> Key:
    """The key of one step's random numbers.

    >>> step_key(jax.random.key(0), 3) == jax.random.fold_in(jax.random.key(0), 3)
    Array(True, dtype=bool)
    """
    return jax.random.fold_in(key, step)


def counted_loss(info: Info) -> jax.Array:
    """The loss of steps, 0 where they were skipped: what a mean over the steps that were made adds up.

    >>> nothing = jnp.zeros(2)
    >>> counted_loss(Info(jnp.array([1.0, jnp.nan]), None, None, nothing, None, skipped=jnp.array([False, True])))
    Array([1., 0.], dtype=float32)
    """
    skipped = getattr(info, "skipped", None)  # a step that make_step did not make may lack it
    return info.loss if skipped is None else jnp.where(skipped, jnp.zeros_like(info.loss), info.loss)


def count_skipped(info: Info) -> jax.Array | int:
    """How many steps were skipped, int32; the number 0 if nothing skips steps.

    >>> count_skipped(Info(jnp.ones(2), None, None, jnp.ones(2), None))
    0
    """
    skipped = getattr(info, "skipped", None)
    return 0 if skipped is None else jnp.sum(skipped, dtype=jnp.int32)


def jit_step(step: AnyStep) -> AnyStep:
    """Compile a step and donate its state: the new state takes the old one's memory, and the old is gone.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> step = jit_step(make_step(lambda params, batch, key: jnp.sum((params - batch) ** 2), tx))
    >>> state, info = step(nnlearn.init_state(jnp.zeros(1), tx), jnp.ones(1))
    >>> state.params
    Array([1.], dtype=float32)
    """
    return cast(AnyStep, jax.jit(step, donate_argnums=0))


def recorded_learning_rate(state: OptState) -> jax.Array | None:
    """The learning rate that an optimizer's state records, or None; see ``Info.learning_rate``.

    >>> import nnlearn
    >>> recorded_learning_rate(nnlearn.adam(0.1).init(jnp.zeros(1)))
    Array(0.1, dtype=float32)
    """
    rates, _ = _rates_and_scale(state)
    if len(rates) < 2:
        return rates[0] if rates else None
    dtype = widest(*(rate.dtype for rate in rates))
    return jnp.concatenate([jnp.atleast_1d(rate).astype(dtype) for rate in rates])


def _rates_and_scale(node: PyTree) -> tuple[list[jax.Array], Scalar]:
    """The rates below a node of an optimizer's state, and what the plateau rules there multiply earlier updates by."""
    if isinstance(node, optax.contrib.ReduceLROnPlateauState):
        return [], node.scale
    if is_injected(node) and "learning_rate" in node.hyperparams:
        _, scale = _rates_and_scale(node.inner_state)
        return [_times(jnp.asarray(node.hyperparams["learning_rate"]), scale)], scale
    if hasattr(node, "learning_rate"):
        return [jnp.asarray(node.learning_rate)], 1
    if isinstance(node, optax.transforms.PartitionState):  # a rule in one part leaves the others alone
        return [rate for part in node.inner_states.values() for rate in _rates_and_scale(part)[0]], 1
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    if len(children) == 1 and children[0] is node:
        return [], 1
    rates, scale = [], 1
    for child in children:  # in the order in which a chain applies them
        found, factor = _rates_and_scale(child)
        rates = [*(_times(rate, factor) for rate in rates), *found]
        scale = scale if isinstance(factor, int) else _times(jnp.asarray(factor), scale)
    return rates, scale


def _times(rate: jax.Array, factor: Scalar) -> jax.Array:
    return rate if isinstance(factor, int) else rate * jnp.asarray(factor).astype(rate.dtype)


__all__ = [
    "Info",
    "check_record",
    "count_skipped",
    "counted_loss",
    "jit_step",
    "make_step",
    "recorded_learning_rate",
    "step_key",
]
