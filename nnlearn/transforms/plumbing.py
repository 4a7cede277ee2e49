"""What every transformation with per-parameter state shares: trees, dtypes, counters and schedules, written once.

A method is a *kernel*: one pure function on arrays. ``from_kernel`` runs it on each leaf, in float32 or better, keeps
its running arrays in the dtype asked for, counts steps where the method needs them, and evaluates hyper-parameters that
are schedules.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.calls import asks_for
from nnlearn.packing import is_packed, map_stacks
from nnlearn.transforms.averages import increment
from nnlearn.transforms.storage import Slot, start_of
from nnlearn.transforms.whole_leaf import map_whole_leaves, numbers_of_leaves
from nnlearn.transforms.wrapping import from_map, require_params
from nnlearn.tree import as_hyperparam, compute_dtype, is_function, map_unzip, real_dtype
from nnlearn.types import (
    GradientTransformationExtraArgs,
    PyTree,
    Scalar,
)


def _field_names(state: Any) -> tuple[str, ...]:
    """The fields of a NamedTuple or dataclass, a class or an instance; () for anything else."""
    if dataclasses.is_dataclass(state):
        return tuple(field.name for field in dataclasses.fields(state))
    return tuple(getattr(state, "_fields", ()))


def _first_value(value: Any, params: PyTree) -> jax.Array:
    """The first value of a field for the whole tree; of shapes alone, zeros of its shape."""
    if not is_function(value):
        return jnp.array(value, jnp.result_type(value), copy=True)
    return start_of(lambda params: jnp.asarray(value(params)), params)


def total(function: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    """The sum of ``function(*leaves)`` over all elements of trees of one structure, in float32 or better.

    >>> total(lambda x, y: x * y, {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])})
    Array(11., dtype=float32)
    """
    result = jnp.zeros([], wide_real(trees[0]))

    def on_leaves(*row):
        row = tuple(map(jnp.asarray, row))
        wide = compute_dtype(*(array.dtype for array in row))
        return (jnp.sum(jnp.real(function(*(array.astype(wide) for array in row)))).astype(result.dtype),)

    names = ("updates", *(f"tree {number} of a sum" for number in range(2, len(trees) + 1)))
    return sum(jax.tree.leaves(map_unzip(on_leaves, 1, names, *trees)), start=result)


def wide_real(tree: PyTree) -> Any:
    """The real dtype of numbers for a whole tree: that of its widest leaf, float32 at least."""
    return real_dtype(compute_dtype(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(tree))))


def number(value: Scalar) -> Callable[[PyTree], jax.Array]:
    """A first value of ``shared``, in the precision of the parameters, float32 at least."""
    return lambda params: jnp.asarray(value, wide_real(params))


def _update_leaf(kernel, slots: Sequence[Slot], takes_setting: bool, scalars, count, setting, *arrays):
    """Run a kernel on one leaf: decode its state, compute in the widest dtype, and encode the new state.

    ``arrays`` are the gradient, the parameter where the kernel takes it, and the stored arrays.
    """
    gradient, *others = map(jnp.asarray, arrays)
    param, stored = others[: len(others) - len(slots)], others[len(others) - len(slots) :]
    wide = compute_dtype(gradient.dtype, *(array.dtype for array in stored))
    inputs = [array.astype(wide) for array in (gradient, *param)]
    inputs += [slot.storage.decode(array, wide) for slot, array in zip(slots, stored, strict=True)]
    local = {name: as_hyperparam(value, wide) for name, value in scalars.items()}
    change, *kept = kernel(setting, *inputs, **local) if takes_setting else kernel(*inputs, **local)
    encoded = [slot.storage.encode(new, old, count) for slot, new, old in zip(slots, kept, stored, strict=True)]
    return change.astype(gradient.dtype), *encoded


def from_kernel(
    kernel: Callable[..., tuple],
    state_type: type[Any],
    slots: Mapping[str, Slot],
    hyperparams: Mapping[str, Any],
    per_step: Callable[..., Mapping[str, Any]] | None = None,
    *,
    counters: Sequence[str] = ("count",),
    shared: Mapping[str, Any] | None = None,
    needs_params: str = "",
    whole_leaf: bool = False,
    stack_equal: bool = False,
    settings: Callable[[PyTree], PyTree] | None = None,
    leaf_numbers: Callable[[PyTree], Sequence[float]] | None = None,
) -> GradientTransformationExtraArgs:
    """A gradient transformation from a kernel on arrays.

    Args:
      kernel: ``kernel(gradient, *slot_values, **scalars) -> (update, *new_slot_values)`` on one leaf's arrays, all in
        one precision; ``scalars`` are the hyper-parameters, the shared values and what ``per_step`` returned. With
        ``needs_params`` the parameter follows the gradient; with ``settings`` the leaf's own comes first of all.
      state_type: a NamedTuple or dataclass with a field for each slot, shared value and counter, in any order.
      slots: the running arrays, by field name.
      hyperparams: numbers, arrays, tracers or schedules; never cast to a parameter's dtype.
      per_step: ``per_step(count, **values)`` computes once a step what all leaves share, such as bias corrections.
        ``count`` is 1 at the first step (None without a counter), ``values`` are hyper-parameters and shared values. A
        result with the name of a shared value is its next value. It is also given ``updates``, ``params``, the stored
        arrays of a slot and extra arguments of ``update`` such as ``value``, if it names them; ``total`` sums over
        whole trees.
      counters: the fields that count steps, of which those that the state has are used. The first is the ``count`` of
        ``per_step``; schedules are evaluated at the last, which is 0 at the first step.
      shared: the first values of fields that hold one array for the whole tree, or functions from the parameters to
        them.
      needs_params: the transformation's name if its kernel needs the parameter.
      whole_leaf: whether an element's update depends on others of its leaf. Packed parameters are then taken in stacks
        of equal leaves, on which the kernel runs as one batch.
      stack_equal: of a whole-leaf kernel, whether unpacked leaves of equal shape run as one batch too. It costs a copy
        of the leaves, and saves compiling and launching the kernel for each.
      settings: of a whole-leaf kernel, a function from the tree of updates (or of their shapes) to a tree with a
        hashable setting for each leaf.
      leaf_numbers: of a whole-leaf kernel, a function from that tree to a number for each leaf, which the kernel takes
        as a scalar before the slots' values. Leaves with other numbers still run as one batch.

    Returns:
      A transformation whose updates keep the dtype of the gradients, and whose state keeps its dtypes and structure.

    Raises:
      TypeError: if the fields of ``state_type`` are not those named, or a schedule has no counter to follow.

    >>> from optax import TraceState
    >>> def heavy_ball(g, trace, *, decay):
    ...     trace = g + decay * trace
    ...     return trace, trace
    >>> tx = from_kernel(heavy_ball, TraceState, slots={"trace": Slot()}, hyperparams={"decay": 0.5})
    >>> update, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([1.0]), state)[0]
    Array([1.5], dtype=float32)
    """
    fields, shared = _field_names(state_type), dict(shared or {})
    counters = [name for name in counters if name in fields]
    if set(fields) != {*slots, *shared, *counters}:
        raise TypeError(
            f"{state_type.__name__} has the fields {sorted(fields)}, but slots, shared and counters are "
            f"{sorted([*slots, *shared, *counters])}"
        )
    scheduled = {name: value for name, value in hyperparams.items() if is_function(value)}
    if scheduled and not counters:
        raise TypeError(f"{sorted(scheduled)} are schedules, but {state_type.__name__} counts no steps: give numbers")
    constant = {
        name: as_hyperparam(value, jnp.result_type(value))
        for name, value in hyperparams.items()
        if name not in scheduled
    }
    shapes = [slot.shape for slot in slots.values()]
    if any(shapes) and not whole_leaf:
        raise TypeError("arrays of other shapes than their leaves need whole_leaf=True")
    names = ("updates", *(["params"] if needs_params else []), *(["leaf_numbers"] if leaf_numbers else []))
    names += tuple(f"state.{name}" for name in slots)

    def init(params):
        parts = {name: slot.start(params) for name, slot in slots.items()}
        parts |= {name: jnp.zeros([], jnp.int32) for name in counters}  # one buffer each, so that all can be donated
        first = {name: _first_value(value, params) for name, value in shared.items()}
        return state_type(**parts, **first)

    def update(updates, state, params=None, **extra_args):
        if _field_names(state) != fields:
            raise ValueError(
                f"state must be the {state_type.__name__} that init or the last update returned, got "
                f"{type(state).__name__}: it is not of this transformation"
            )
        if needs_params:
            require_params(params, needs_params)
        counts = {name: increment(getattr(state, name)) for name in counters}
        count = counts[counters[0]] if counters else None
        held = {name: getattr(state, name) for name in shared}
        values = constant | held
        for name, schedule in scheduled.items():
            value = schedule(getattr(state, counters[-1]))
            values[name] = as_hyperparam(value, jnp.result_type(value))
        scalars = dict(values)
        if per_step:
            offered = {**extra_args, **{name: getattr(state, name) for name in slots}}
            offered |= {"updates": updates, "params": params}
            asked = {name: tree for name, tree in offered.items() if asks_for(per_step, name)}
            scalars |= per_step(count, **values, **asked)

        # a Partial, because a region of automatic axes cannot capture the scalars of an Explicit mesh
        inner = functools.partial(_update_leaf, kernel, list(slots.values()), bool(settings))
        on_leaf = jax.tree_util.Partial(inner, scalars, count)
        before = [updates, *([params] if needs_params else [])]
        given: list[Any] = [None] * len(before)
        if leaf_numbers:
            like = updates.layout.tree() if is_packed(updates) else updates
            before.append(numbers_of_leaves(updates, leaf_numbers(like)))
            given.append(lambda shape: ())
        trees = (*before, *(getattr(state, name) for name in slots))
        if whole_leaf:
            given += shapes
            results = map_whole_leaves(on_leaf, names, trees, given, [None, *shapes], settings, stack_equal)
        else:
            results = map_unzip(functools.partial(on_leaf, None), 1 + len(slots), names, *trees)
        change, *kept = results
        new_shared = {name: jnp.asarray(scalars[name], jnp.result_type(old)) for name, old in held.items()}
        return change, state_type(**dict(zip(slots, kept, strict=True)), **counts, **new_shared)

    return GradientTransformationExtraArgs(init, update)


def from_leaf_kernel(
    kernel: Callable[..., jax.Array],
    hyperparams: Mapping[str, Any],
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


__all__ = ["from_kernel", "from_leaf_kernel", "number", "total", "wide_real"]
