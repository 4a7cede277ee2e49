"""One training step as a pure function: ``state, info = step(state, batch)``."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from optax import ScaleByBacktrackingLinesearchState, apply_updates, with_extra_args_support

from nnlearn.gradients.batch import make_gradient
from nnlearn.gradients.noise_scale import NoiseScale
from nnlearn.gradients.over_mesh import over_mesh
from nnlearn.packing import leaf_norms
from nnlearn.programs.in_place import apply_gradients
from nnlearn.train.explain import accepted, check_state, explaining_batch, explaining_update
from nnlearn.train.noise_of_step import make_noise_of
from nnlearn.train.state import TrainState
from nnlearn.transforms.hyperparams import is_injected
from nnlearn.transforms.loss_scale import current_loss_scale
from nnlearn.transforms.monitor import LayerStats, current_layers
from nnlearn.transforms.skipping import hold, skip_whole, was_skipped
from nnlearn.tree import global_norm, widest
from nnlearn.types import (
    Batch,
    DTypeLike,
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
    """Values of a step for people to look at, with the same structure at every step.

    Attributes:
      loss: the loss of this batch, before the update.
      grad_norm: Euclidean norm of the gradient before the optimizer changes it; infinite or NaN if the gradient is.
        This and the other norms are None unless ``make_step`` records them.
      update_norm: Euclidean norm of the update.
      learning_rate: the learning rate of the update, as recorded in the optimizer's state, times the scale of
        ``optax.contrib.reduce_on_plateau`` if that is chained to it. A vector if the state contains several rates, in
        their order there, and None if it contains none, as in optax's own optimizers.
      aux: the auxiliary output of ``loss_fn``, or None.
      leaf_grad_norms: Euclidean norm of each leaf's gradient, shape (leaves,), in the tree's order. Their names are
        in ``Trace.leaves``.
      noise_scale: the variability of the examples' gradients, see ``noise_scale_from_examples``.
      skipped: whether the optimizer skipped the step, see ``was_skipped``, or ``RollBack`` undid it; None if nothing
        skips steps. The loss and the norms of a skipped step are those of its batch.
      layers: statistics of each parameter leaf, if ``monitor_layers`` is around the optimizer, or None.
    """

    loss: jax.Array
    grad_norm: jax.Array | None
    update_norm: jax.Array | None
    learning_rate: jax.Array | None
    aux: PyTree
    leaf_grad_norms: jax.Array | None = None
    noise_scale: NoiseScale | None = None
    skipped: jax.Array | None = None
    layers: LayerStats | None = None


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
    mesh: Mesh | None = None,
    reduce_dtype: DTypeLike | None = None,
) -> Step:
    """A training step: gradient, optimizer, update.

    The step is a pure function that can be compiled (``jit_step`` also donates the state), scanned, vmapped over
    states, or run on many devices under ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap`` with an ``axis_name``.

    A guard in ``tx``, such as ``apply_if_finite``, skips whole steps: parameters, model state, averages, schedules and
    everything else in the optimizer's state outside of the guard do not change, and ``info.skipped`` is True. Only
    ``state.step``, which counts batches, and the guards' own counts advance. One guard anywhere in ``tx`` is enough,
    even in one part of a ``partition``. ``was_skipped`` lists the guards.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> loss`` or ``(loss, aux)``; ``loss`` is a real scalar, the mean over
        the batch, ``aux`` a pytree of arrays. With an argument ``model_state`` it receives that of the state and
        returns ``(loss, aux, model_state)``. With an argument ``hparams`` it receives the ``hparams`` below.
      tx: an nnlearn or optax optimizer. It also receives ``value``, ``grad`` and ``value_fn`` of the whole batch, which
        line searches and plateau rules take. The gradient of a complex parameter is the direction of steepest ascent,
        as in PyTorch, which is the conjugate of ``jax.grad``. ``jax.grad(value_fn)`` follows JAX.
      axis_name: the mapped axis or axes. Along them each device has its own part of the batch, and all devices have the
        same state. Loss, gradient and aux are averaged over the axes. Each part draws different random numbers. Parts
        have equal weights, so they should have equally many examples. Parts of a ``MaskedBatch`` are weighted by their
        examples that count.
      microbatches: the number of parts into which the batch is split. Their gradients are accumulated sequentially, in
        the memory of one part. This is an inner loop: the optimizer runs once, also under ``vmap``. The result is that
        of the whole batch, for a ``MaskedBatch`` with any mask and of any length. Example ``i`` is in part
        ``i % microbatches``, so every part of a sharded batch has examples on all devices.
      packed: True requires a state with packed parameters, False one without, None accepts both; see ``init_state``.
        ``loss_fn`` receives the tree in either case.
      record: names of the values to record in ``info``: ``grad_norm``, ``update_norm``, ``leaf_grad_norms`` and
        ``noise_scale``. The others are None. A norm costs a pass over the gradient. ``update_norm`` costs several,
        because the update is not written to memory otherwise. The noise scale is estimated from the microbatches of all
        devices if there are several, and otherwise from the norms of all examples' gradients, which can cost as much as
        the gradient again. With ``value_and_grad`` it is always estimated from the examples' plain gradients.
      batch_weight: the weight of a part of a batch, a scalar function of it, if ``loss_fn`` takes its mean over
        something other than examples, such as the tokens that are not padding.
      value_and_grad: a custom way to compute the gradient, such as ``clipped_value_and_grad``:
        ``value_and_grad(f)(params, batch, key) -> ((loss, aux), grads)``, or ``(loss, grads)``, with JAX's convention
        for complex parameters. ``params`` and ``grads`` are trees even if the state is packed. ``f(params, batch,
        key)`` returns what ``loss_fn`` returns. If that takes ``model_state``, ``f`` returns ``(loss, aux)`` with the
        new state inside ``aux``, and this ``aux`` must be returned. With ``microbatches`` or ``axis_name`` the function
        is called on each part and the results are averaged like losses, unless it has two functions as attributes:
        ``over_part(params, batch, key)`` is then called on each part, and ``finish(grads, count, key) -> grads`` once,
        on the average over the ``count`` examples of all parts, with a key that all devices share. The scale of
        ``dynamic_loss_scale`` is not applied, because a clipped gradient, for example, does not grow with the loss. A
        function with an argument ``loss_scale`` receives the scale and returns the unscaled gradient.
      hparams: the ``hparams`` of ``loss_fn``.
      mesh: with ``axis_name``, an axis or axes of this mesh: the step takes whole arrays, and the gradient runs in
        ``jax.shard_map`` over these axes. The devices then communicate once for each leaf or packed buffer, whatever
        ``microbatches`` is. The state may be sharded in any way; parameters are gathered over these axes for the
        gradient. Without ``axis_name`` XLA decides what the devices gather: parameters or activations.
      reduce_dtype: with ``axis_name``, the dtype in which gradients are summed over the devices, such as
        ``jnp.bfloat16`` to send half of the bytes; None for their own.

    Returns:
      ``step(state, batch) -> (state, info)``.

    Raises:
      TypeError: if ``loss_fn`` or ``value_and_grad`` takes or returns something else.
      ValueError: if the state contradicts ``packed``; the batch cannot be split into ``microbatches`` equal parts; or
        ``batch_weight`` is given together with parts of a batch and a ``value_and_grad`` that weights all examples
        equally.

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
    _check_mesh(mesh, axis_name, reduce_dtype, record)
    gradient = make_gradient(
        loss_fn,
        axis_name=axis_name,
        microbatches=microbatches,
        batch_weight=batch_weight,
        value_and_grad=value_and_grad,
        reduce_dtype=reduce_dtype,
    )
    if mesh is not None and axis_name is not None:
        gradient = over_mesh(gradient, mesh, axis_name)
    noise_of = make_noise_of(loss_fn, axis_name, microbatches, clean=value_and_grad is None)
    tx_update = with_extra_args_support(tx).update
    whole_tx = skip_whole(tx)

    def step(state: TrainState, batch: Batch, *, key: Key | None = None) -> tuple[TrainState, Info]:
        check_state(state, loss_fn, packed)
        key = step_key(state.key, state.step) if key is None else key
        scale = current_loss_scale(state.opt_state)
        with explaining_batch(batch):
            outcome = gradient(state.stored, batch, key, state.model_state, scale, hparams)
        offered = {
            "value": outcome.loss,
            "grad": _slope_of(outcome.grads, state.opt_state),
            "value_fn": outcome.value_fn,
        }
        with explaining_update(whole_tx, state.opt_state, state.stored):
            new = _updated(whole_tx, state, outcome.grads, accepted(tx_update, offered), "update_norm" in record)
        skipped = was_skipped(whole_tx, state.opt_state, new.opt_state)
        info = Info(
            outcome.loss,
            global_norm(outcome.grads) if "grad_norm" in record else None,
            global_norm(new.updates) if "update_norm" in record else None,
            recorded_learning_rate(new.opt_state),
            outcome.aux,
            leaf_norms(outcome.grads) if "leaf_grad_norms" in record else None,
            noise_of(state, batch, key, outcome, scale, hparams) if "noise_scale" in record else None,
            skipped,
            current_layers(new.opt_state),
        )
        model_state = hold(skipped, state.model_state, outcome.model_state)
        return TrainState(state.step + 1, new.stored, new.opt_state, state.key, model_state), info

    return step


def _check_mesh(mesh: Mesh | None, axis_name: Any, reduce_dtype: Any, record: Collection[str]) -> None:
    if axis_name is None and (mesh is not None or reduce_dtype is not None):
        given = "reduce_dtype" if mesh is None else "mesh"
        raise ValueError(f"{given} needs axis_name, the mesh axis of the batch: make_step(..., axis_name='data')")
    if mesh is None:
        return
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name or ():
        if name not in mesh.shape:
            raise ValueError(f"axis_name={axis_name!r} is no axis of the mesh {dict(mesh.shape)}")
    if "noise_scale" in record:
        raise ValueError("record='noise_scale' is not possible with mesh: wrap a step without mesh in shard_map")


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
    """The gradient for line searches: optax's backtracking expects that of JAX, its zoom the conjugate."""

    def is_search(node):
        return isinstance(node, ScaleByBacktrackingLinesearchState)

    if not any(map(jnp.iscomplexobj, jax.tree.leaves(grads))):
        return grads
    found = any(map(is_search, jax.tree.leaves(opt_state, is_leaf=is_search)))
    return jax.tree.map(jnp.conj, grads) if found else grads


def check_record(record: Collection[str]) -> None:
    """Raise ``ValueError`` if ``record`` is not a collection of names of recordable values.

    >>> check_record(["norm"])
    Traceback (most recent call last):
    ValueError: record must be a collection of names out of [...], got ['norm']
    """
    if isinstance(record, str) or set(record) - RECORDABLE:
        raise ValueError(f"record must be a collection of names out of {sorted(RECORDABLE)}, got {record!r}")


def step_key(key: Key, step: Scalar) -> Key:
    """The random key of one step.

    >>> step_key(jax.random.key(0), 3) == jax.random.fold_in(jax.random.key(0), 3)
    Array(True, dtype=bool)
    """
    return jax.random.fold_in(key, step)


def counted_loss(info: Info) -> jax.Array:
    """The loss of each step, 0 for skipped steps: the terms of a mean over the other steps.

    >>> nothing = jnp.zeros(2)
    >>> counted_loss(Info(jnp.array([1.0, jnp.nan]), None, None, nothing, None, skipped=jnp.array([False, True])))
    Array([1., 0.], dtype=float32)
    """
    skipped = getattr(info, "skipped", None)  # the info of a custom step may lack it
    return info.loss if skipped is None else jnp.where(skipped, jnp.zeros_like(info.loss), info.loss)


def count_skipped(info: Info) -> jax.Array | int:
    """The number of skipped steps, int32, or the Python int 0 if nothing skips steps.

    >>> count_skipped(Info(jnp.ones(2), None, None, jnp.ones(2), None))
    0
    """
    skipped = getattr(info, "skipped", None)
    return 0 if skipped is None else jnp.sum(skipped, dtype=jnp.int32)


class Skips(NamedTuple):
    """The skipped steps since the last check.

    Attributes:
      count: how many there were, int32.
      last_made: the last step that was not skipped, int32; 0 if all were.
    """

    count: jax.Array
    last_made: jax.Array

    def plus(self, info: Info, step: jax.Array) -> "Skips":
        """With those among further steps, counted from 1."""
        skipped = getattr(info, "skipped", None)
        made = step if skipped is None else jnp.where(skipped, 0, step)
        last = jnp.maximum(self.last_made, jnp.max(made).astype(jnp.int32))
        return Skips(self.count + count_skipped(info), last)


def jit_step(step: AnyStep, *, like: PyTree = None) -> AnyStep:
    """Compile a step and donate its state: the new state reuses the memory of the old one, which becomes invalid.

    Args:
      step: a training step.
      like: the state, if it is on a mesh: each new state has its shardings. None leaves them to XLA, which may choose
        others after the first step, and then compiles again.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> step = jit_step(make_step(lambda params, batch, key: jnp.sum((params - batch) ** 2), tx))
    >>> state, info = step(nnlearn.init_state(jnp.zeros(1), tx), jnp.ones(1))
    >>> state.params
    Array([1.], dtype=float32)
    """
    if like is None:
        return cast(AnyStep, jax.jit(step, donate_argnums=0))
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return cast(AnyStep, jax.jit(step, donate_argnums=0, out_shardings=(places, None)))


def recorded_learning_rate(state: OptState) -> jax.Array | None:
    """The learning rate recorded in an optimizer's state, or None; see ``Info.learning_rate``.

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
    """The learning rates below a node of an optimizer's state, and its plateau rules' factor on earlier updates."""
    if isinstance(node, optax.contrib.ReduceLROnPlateauState):
        return [], node.scale
    if is_injected(node) and "learning_rate" in node.hyperparams:
        _, scale = _rates_and_scale(node.inner_state)
        return [_times(jnp.asarray(node.hyperparams["learning_rate"]), scale)], scale
    if hasattr(node, "learning_rate"):
        return [jnp.asarray(node.learning_rate)], 1
    if isinstance(node, optax.transforms.PartitionState):  # a rule in one part does not affect the others
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
    "Skips",
    "check_record",
    "count_skipped",
    "counted_loss",
    "jit_step",
    "make_step",
    "recorded_learning_rate",
    "step_key",
]
