"""What every transformation with per-parameter state shares: trees, dtypes and storage, written once.

A method is a *kernel*: one pure function on arrays. ``from_kernel`` runs it on each leaf, in float32 or better, keeps
its running arrays in the dtype asked for, and counts steps where the method needs them.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import safe_increment, with_extra_args_support

from nnlearn.packing import is_packed, map_stacks, pack_like, unpack
from nnlearn.settings import comparable
from nnlearn.tree import as_hyperparam, compute_dtype, map_unzip, real_dtype, safe_divide, widest
from nnlearn.types import (
    DTypeLike,
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Params,
    PyTree,
    Scalar,
    Updates,
)


class Slot(NamedTuple):
    """How one running array, such as Adam's first moment, starts and is stored.

    Attributes:
      fill: the value it starts from.
      dtype: what it is stored in; None for the parameter's dtype, float32 at least.
      real: whether it is real when the parameter is complex, as a mean of squared magnitudes is.
    """

    fill: Scalar = 0.0
    dtype: DTypeLike | None = None
    real: bool = False

    def start(self, params: Params) -> PyTree:
        """The slot's first value for each parameter."""

        def start_leaf(param):
            dtype = compute_dtype(jnp.result_type(param)) if self.dtype is None else jnp.dtype(self.dtype)
            if not self.real and jnp.issubdtype(jnp.result_type(param), jnp.complexfloating):
                dtype = widest(dtype, jnp.complex64)  # never drop an imaginary part
            dtype = real_dtype(dtype) if self.real else dtype
            return jnp.full_like(param, self.fill, dtype=dtype)

        return jax.tree.map(start_leaf, params)


def bias_correction(decay: Scalar, count: jax.Array) -> jax.Array:
    r"""What an average started at zero has seen of its weights after ``count`` steps: :math:`1 - \beta^t`.

    As optax works it out, from :math:`\beta` in float32: for a decay of 0.999999 it is 1 % off. ``weight_seen`` is not.
    """
    return 1 - power(decay, count)


def one_minus(decay: Scalar) -> Scalar:
    """``1 - decay`` in the decay's own precision, float32 at least."""
    if isinstance(decay, bool | int | float):
        return 1.0 - decay
    decay = jnp.asarray(decay)
    return 1 - decay.astype(compute_dtype(decay.dtype))


def weight_seen(decay: Scalar, count: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t` to float32's precision for any decay, from ``1 - decay`` in the decay's own precision."""
    if isinstance(decay, bool | int | float):
        log_decay = jnp.asarray(math.log1p(-one_minus(decay)) if decay > 0 else -math.inf, float)
    else:
        log_decay = jnp.log1p(-one_minus(decay))
    counted = jnp.maximum(count, 1).astype(log_decay.dtype)
    return jnp.where(count == 0, 0, -jnp.expm1(counted * log_decay))


def step_towards(average: jax.Array, value: jax.Array, weight: Scalar) -> jax.Array:
    """``average + weight * (value - average)``: for any ``weight``, a constant is its own average, to the bit.

    ``(1 - weight) * average + weight * value`` is not that if both factors are rounded. An infinite average stays.
    """
    return jnp.where(jnp.isfinite(average), average + weight * (value - average), average)


def average_with_mean(average: jax.Array, value: jax.Array, *, decay, seen, seen_before) -> tuple[jax.Array, jax.Array]:
    """One step of an average that started at zero, and its bias-corrected mean: ``(average, mean)``.

    The step is taken from the mean, which is as large as the values, so that a small ``1 - decay`` is not rounded away.

    Args:
      average, value: arrays of one shape.
      decay: the decay rate.
      seen, seen_before: ``weight_seen`` of this step and of the last one.
    """
    first = step_towards(average, value, 1 - decay)
    # Products with scalars: XLA divides arrays of one number and of many in two ways, which packing would show.
    before = average * safe_divide(1, seen_before)
    # Keeping mean * seen rounds the mean. Where only that parts it from the value it is the value, or it would drift.
    near = jnp.abs(value - before) <= 4 * jnp.finfo(before.dtype).eps * jnp.abs(value)
    mean = step_towards(jnp.where(near, value, before), value, (1 - decay) / seen)
    begun = seen_before > 0
    return jnp.where(begun, mean * seen, first), jnp.where(begun, mean, first * (1 / seen))


def corrections(count: jax.Array, *, decay: Scalar, **_) -> dict[str, jax.Array]:
    """``seen`` and ``seen_before`` of ``average_with_mean``."""
    return {"seen": weight_seen(decay, count), "seen_before": weight_seen(decay, count - 1)}


def power(base: Scalar, count: jax.Array) -> jax.Array:
    """``base ** count``, a number to an integer power, without mixing dtypes, which strict promotion refuses."""
    base = jnp.asarray(base)
    return jax.lax.pow(base.astype(compute_dtype(base.dtype)), count)


def from_kernel(
    kernel: Callable[..., tuple],
    state_type: type,
    slots: dict[str, Slot],
    hyperparams: Mapping[str, Scalar],
    per_step: Callable[..., dict[str, jax.Array]] | None = None,
) -> GradientTransformationExtraArgs:
    """A gradient transformation from a kernel on arrays.

    Args:
      kernel: ``kernel(gradient, *slot_values, **scalars) -> (update, *new_slot_values)`` on one leaf's arrays, all in
        one precision; ``scalars`` are the hyper-parameters and what ``per_step`` returned.
      state_type: a NamedTuple with a field for each slot, and ``count`` if the method counts its steps.
      slots: the running arrays, by field name.
      hyperparams: numbers, arrays or tracers; never cast to a parameter's dtype.
      per_step: ``per_step(count, **hyperparams)`` works out once a step what all leaves share, such as bias
        corrections; ``count`` is 1 at the first step.

    Returns:
      A transformation whose updates keep the dtype of the gradients, and whose state keeps its dtypes and structure.

    >>> from optax import TraceState
    >>> def heavy_ball(g, trace, *, decay):
    ...     trace = g + decay * trace
    ...     return trace, trace
    >>> tx = from_kernel(heavy_ball, TraceState, slots={"trace": Slot()}, hyperparams={"decay": 0.5})
    >>> update, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([1.0]), state)[0]
    Array([1.5], dtype=float32)
    """
    counted = "count" in state_type._fields
    hyperparams = {name: as_hyperparam(value, jnp.result_type(value)) for name, value in hyperparams.items()}

    def init(params):
        fields = {name: slot.start(params) for name, slot in slots.items()}
        return state_type(**fields, **({"count": jnp.zeros([], jnp.int32)} if counted else {}))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        if getattr(state, "_fields", ()) != state_type._fields:
            raise ValueError(
                f"state must be the {state_type.__name__} that init or the last update returned, got "
                f"{type(state).__name__}: it is not of this transformation"
            )
        count = safe_increment(state.count) if counted else None
        scalars = hyperparams | (per_step(count, **hyperparams) if per_step else {})

        def update_leaf(gradient, *stored):
            gradient = jnp.asarray(gradient)
            wide = compute_dtype(gradient.dtype, *map(jnp.result_type, stored))
            arrays = [
                array.astype(wide if jnp.iscomplexobj(array) else real_dtype(wide))
                for array in map(jnp.asarray, stored)
            ]
            local = {name: as_hyperparam(value, wide) for name, value in scalars.items()}
            change, *kept = kernel(gradient.astype(wide), *arrays, **local)
            return (
                change.astype(gradient.dtype),
                *(new.astype(old.dtype) for new, old in zip(kept, stored, strict=True)),
            )

        names = ("updates", *(f"state.{name}" for name in slots))
        values = [getattr(state, name) for name in slots]
        change, *kept = map_unzip(update_leaf, 1 + len(slots), names, updates, *values)
        fields = dict(zip(slots, kept, strict=True)) | ({"count": count} if counted else {})
        return change, state_type(**fields)

    return GradientTransformationExtraArgs(init, update)


def from_map(function: Callable[..., Updates], needs_params: str = "") -> GradientTransformationExtraArgs:
    """A stateless transformation from ``function(updates, params) -> updates``.

    Args:
      function: works on whole trees.
      needs_params: the transformation's name if it cannot do without parameters.
    """

    def init(params):
        del params
        return EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if needs_params:
            require_params(params, needs_params)
        return function(updates, params), state

    return GradientTransformationExtraArgs(init, update)


def from_leaf_kernel(
    kernel: Callable[..., jax.Array],
    hyperparams: Mapping[str, Scalar],
    needs_params: str = "",
    whole_leaf: bool = False,
) -> GradientTransformationExtraArgs:
    """A stateless transformation from ``kernel(update, **hyperparams)`` on arrays of one leaf.

    With ``needs_params`` the kernel is called ``kernel(update, param, **hyperparams)``. Arithmetic is in float32 or
    better, and each update keeps its dtype. ``whole_leaf`` says that a number's update depends on others of its leaf:
    packed parameters are then taken in stacks of equal leaves.
    """

    def on_leaf(update, *param):
        update = jnp.asarray(update)
        wide = compute_dtype(update.dtype)
        local = {name: as_hyperparam(value, wide) for name, value in hyperparams.items()}
        arrays = [jnp.asarray(array).astype(wide) for array in param]
        return (kernel(update.astype(wide), *arrays, **local).astype(update.dtype),)

    def on_tree(updates, params):
        trees = (updates, params) if needs_params else (updates,)
        if whole_leaf and is_packed(updates):
            return map_stacks(jax.vmap(lambda *leaves: on_leaf(*leaves)[0]), *trees)
        return map_unzip(on_leaf, 1, ("updates", "params"), *trees)[0]

    return from_map(on_tree, needs_params)


@comparable
def by_leaf(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Let a transformation see the leaves of packed parameters, one by one, as if they were not packed.

    Elementwise transformations do not need it: they run on the buffers. One that works with whole leaves, such as a
    trust ratio, does, unless it is nnlearn's, which knows what to do. It pays for every leaf again, in time to compile
    and to run, so put it around that link of a chain alone. On parameters that are not packed it changes nothing.

    Args:
      inner: any transformation, nnlearn's or optax's. Its state holds leaves.

    >>> import nnlearn, optax
    >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3])}
    >>> tx, packed = by_leaf(optax.scale_by_trust_ratio()), nnlearn.pack(params)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, packed), tx.init(packed), packed)
    >>> updates["b"]
    Array([0.3], dtype=float32)
    """
    inner = with_extra_args_support(inner)

    def init(params):
        return inner.init(unpack(params))

    def update(updates, state, params=None, **extra_args):
        change, state = inner.update(unpack(updates), state, unpack(params), **unpack(extra_args))
        return pack_like(updates.layout, change) if is_packed(updates) else change, state

    return GradientTransformationExtraArgs(init, update)


def require_params(params: Params | None, name: str) -> None:
    """Raise if ``update`` was called without the parameters that the transformation ``name`` needs."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")


def run_or_hold(
    go: jax.Array,
    inner: GradientTransformationExtraArgs,
    updates: Updates,
    inner_state: PyTree,
    params: Params | None,
    extra_args: dict,
) -> tuple[Updates, PyTree]:
    """Run ``inner`` where ``go`` holds; else return zero updates and the state as it was.

    A real conditional: the branch not taken costs nothing. The state keeps its dtypes even if ``inner`` would widen
    them.
    """

    def run():
        change, new_state = inner.update(updates, inner_state, params, **extra_args)
        return change, jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), new_state, inner_state)

    # eval_shape sees the dtypes that come out, which need not be those that go in; what goes in has the sharding
    held = jax.tree.map(lambda out, like: jnp.zeros_like(like, dtype=out.dtype), jax.eval_shape(run)[0], updates)
    return jax.lax.cond(go, run, lambda: (held, inner_state))
