"""Hyper-parameters that live in the optimizer's state: to read, set, schedule and ``vmap`` over."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import InjectHyperparamsState, InjectStatefulHyperparamsState, with_extra_args_support
from optax.schedules import StatefulSchedule

from nnlearn.checks import NUMERIC, check_dtype
from nnlearn.settings import bind, copied, frozen, remember
from nnlearn.transforms.averages import increment
from nnlearn.tree import path_name
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, OptState, Scalar

STATES = (InjectHyperparamsState, InjectStatefulHyperparamsState)


def inject_hyperparams(
    inner_factory: Callable[..., Any],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: DTypeLike | None = None,
) -> Callable[..., GradientTransformationExtraArgs]:
    """Move the numeric arguments of an optimizer factory into the optimizer's state.

    Every number, array and schedule among the arguments becomes an entry of ``state.hyperparams``, a float32 scalar
    whatever the parameters are. All schedules read the one counter ``state.count``, and a number gives the same state
    as a schedule does, so one may be swapped for the other between checkpoints.

    Args:
      inner_factory: a function that returns a transformation, nnlearn's, optax's or your own.
      static_args: names of arguments that must stay Python values, because the factory branches on them. Booleans,
        strings, None, and arguments called ``mask`` or ``..._mask`` always do; any other function is a schedule. What
        the factory takes as ``**others`` counts like its named arguments; ``*rates`` as ``rates[0]`` and so on.
      hyperparam_dtype: the dtype of floating hyper-parameters; None for float32, or float64 where x64 is on.

    Returns:
      A function with the arguments of ``inner_factory``; the transformation it makes has
      ``InjectStatefulHyperparamsState(count, hyperparams, hyperparams_states, inner_state)``.

    Raises:
      ValueError: ``static_args`` names an argument that the factory does not have, or a function taken for a schedule
        does not return a number.

    >>> import nnlearn
    >>> tx = inject_hyperparams(nnlearn.adam)(learning_rate=0.1)
    >>> state = set_hyperparams(tx.init(jnp.zeros(1)), learning_rate=0.5)
    >>> update, state = tx.update(jnp.array([2.0]), state)
    >>> update, state.hyperparams["learning_rate"]
    (Array([-0.5], dtype=float32), Array(0.5, dtype=float32))
    """
    names = frozenset([static_args] if isinstance(static_args, str) else static_args)
    parameters = inspect.signature(inner_factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if (unknown := names - set(parameters)) and not takes_any:
        raise ValueError(f"static_args names {sorted(unknown)}, but the arguments are {sorted(parameters)}")
    return _Injected(inner_factory, names, check_dtype("hyperparam_dtype", hyperparam_dtype))


class _Injected:
    """What ``inject_hyperparams`` returns: a factory; two of one inner factory are equal."""

    def __init__(self, inner_factory, static_args: frozenset[str], hyperparam_dtype):
        functools.update_wrapper(self, inner_factory)
        self._arguments = copied((inner_factory, static_args, hyperparam_dtype))
        self._identity = frozen(self._arguments)

    def __call__(self, *args, **kwargs):
        inner_factory, static_args, hyperparam_dtype = self._arguments
        bound = bind(inspect.signature(inner_factory), args, kwargs)
        every = inspect.BoundArguments(bound.signature, dict(bound.arguments))
        every.apply_defaults()
        split = _split_arguments(_flat(every), static_args)

        def build(values):
            arguments = _nested(every, values)
            return inner_factory(*arguments.args, **arguments.kwargs)

        return remember(self, bound, _with_state(build, *split, hyperparam_dtype))

    def __eq__(self, other) -> bool:
        return isinstance(other, _Injected) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self):
        return inject_hyperparams, self._arguments


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name: those of ``**others`` by their own, those of ``*rates`` as ``rates[0]``."""
    flat = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat |= {f"{name}[{index}]": part for index, part in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _nested(like: inspect.BoundArguments, values: dict[str, Any]) -> inspect.BoundArguments:
    """The reverse of ``_flat``, with new values of the same names."""
    arguments = {}
    for name, old in like.arguments.items():
        kind = like.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments[name] = {part: values[part] for part in old}
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = tuple(values[f"{name}[{index}]"] for index in range(len(old)))
        else:
            arguments[name] = values[name]
    return inspect.BoundArguments(like.signature, arguments)


def _split_arguments(arguments: dict[str, Any], static_args: frozenset[str]):
    """Arguments as schedules with a state of their own, schedules, numbers, and the rest."""
    stateful, schedules, numbers, rest = {}, {}, {}, {}
    for name, value in arguments.items():
        is_mask = name == "mask" or name.endswith("_mask")  # a function from parameters, not from steps
        if name in static_args or is_mask or isinstance(value, bool | np.bool_):
            rest[name] = value
        elif isinstance(value, StatefulSchedule):
            stateful[name] = value
        elif isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
            numbers[name] = value
        elif callable(value) and not isinstance(value, type):
            schedules[name] = value
        else:
            rest[name] = value
    return stateful, schedules, numbers, rest


def _with_state(inner, stateful, schedules, numbers, rest, hyperparam_dtype):
    def as_entry(name, value):
        if not isinstance(value, NUMERIC):
            raise ValueError(
                f"{name} was taken for a schedule, but returned {type(value).__name__}, no number; if it is none, "
                f"pass static_args={name!r}"
            )
        value = float(value) if isinstance(value, int) else value  # so that 1 may be set to 0.5
        value = jnp.array(value, copy=True)  # never the caller's array, which a donated state would delete
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return value.astype(hyperparam_dtype or jax.dtypes.canonicalize_dtype(float))

    def scheduled(count, states, extra_args):
        values = {name: as_entry(name, schedule(count)) for name, schedule in schedules.items()}
        return values | {name: as_entry(name, s(states[name], **extra_args)) for name, s in stateful.items()}

    def build(hyperparams):
        return with_extra_args_support(inner({**rest, **hyperparams}))

    def init(params):
        count = jnp.zeros([], jnp.int32)
        states = {name: schedule.init() for name, schedule in stateful.items()}
        hyperparams: dict[str, Any] = {name: as_entry(name, value) for name, value in numbers.items()}
        hyperparams |= scheduled(count, states, {})
        return InjectStatefulHyperparamsState(count, hyperparams, states, build(hyperparams).init(params))

    def update(updates, state, params=None, **extra_args):
        hyperparams: dict[str, Any] = dict(state.hyperparams) | scheduled(
            state.count, state.hyperparams_states, extra_args
        )
        hyperparams = {name: as_entry(name, value) for name, value in hyperparams.items()}
        states = {name: s.update(state.hyperparams_states[name], **extra_args) for name, s in stateful.items()}
        updates, inner_state = build(hyperparams).update(updates, state.inner_state, params, **extra_args)
        return updates, InjectStatefulHyperparamsState(increment(state.count), hyperparams, states, inner_state)

    return GradientTransformationExtraArgs(init, update)


def is_injected(node) -> bool:
    """Whether a node of an optimizer's state holds hyper-parameters, nnlearn's or optax's."""
    return isinstance(node, STATES)


def _injected_states(state: OptState, path: tuple = ()) -> list[tuple[tuple, Any]]:
    """All hyper-parameter states and their paths, outer ones first."""
    found = []
    for place, node in jax.tree.leaves_with_path(state, is_leaf=is_injected):
        if is_injected(node):
            here = (*path, *place)
            inner = (*here, jax.tree_util.GetAttrKey("inner_state"))
            found += [(here, node), *_injected_states(node.inner_state, inner)]
    return found


def _entries(state: OptState) -> dict[str, list[tuple[tuple, jax.Array]]]:
    """By name, every hyper-parameter of a state: the path of the state that holds it, and its value."""
    entries: dict[str, list] = {}
    for path, node in _injected_states(state):
        for name, value in node.hyperparams.items():
            entries.setdefault(name, []).append((path, value))
    return entries


def _labels(paths: list[tuple]) -> list[str]:
    """What tells paths apart: their labels and positions, ``a`` or ``1/a``; if need be, the names of fields too."""

    def is_field(key):
        return isinstance(key, jax.tree_util.GetAttrKey)

    short = [path_name([key for key in path if not is_field(key)]) for path in paths]
    return short if len(set(short)) == len(short) else [path_name(path) for path in paths]


def get_hyperparams(state: OptState) -> dict[str, jax.Array]:
    """The hyper-parameters that live in an optimizer's state, wherever they are nested.

    Returns:
      A dict from name to scalar; empty if there are none. A name that several states have is preceded by the label or
      position of each, as in ``"decoder/learning_rate"`` under ``partition`` or ``"1/learning_rate"`` in a chain.

    >>> import nnlearn
    >>> tx = nnlearn.inject_hyperparams(nnlearn.sgd)(learning_rate=0.1)
    >>> get_hyperparams(nnlearn.chain(nnlearn.clip(1.0), tx).init(jnp.zeros(1)))
    {'learning_rate': Array(0.1, dtype=float32)}
    """
    found = {}
    for name, held in _entries(state).items():
        paths, values = zip(*held, strict=True)
        names = [name] if len(held) == 1 else [f"{label}/{name}" for label in _labels(list(paths))]
        found |= dict(zip(names, values, strict=True))
    return found


def set_hyperparams(state: OptState, **values: Scalar) -> OptState:
    """A state with new hyper-parameters; dtypes stay, so nothing is compiled anew.

    An entry that a schedule drives is overwritten by it at the next update.

    Args:
      state: the state of a transformation made with ``inject_hyperparams``, or of one that holds such.
      **values: new values by name; numbers, arrays or tracers. Where several states have the name, all are set; a
        name of ``get_hyperparams``, as in ``**{"decoder/learning_rate": 0.1}``, sets one.

    Returns:
      A new state of the same structure and dtypes.

    Raises:
      ValueError: no state has a hyper-parameter of that name (the message lists the names there are), or the value is
        no scalar.

    >>> import nnlearn
    >>> tx = nnlearn.inject_hyperparams(nnlearn.sgd)(learning_rate=0.1)
    >>> rates = jnp.array([0.1, 0.2, 0.3])
    >>> states = jax.vmap(lambda rate: set_hyperparams(tx.init(jnp.zeros(1)), learning_rate=rate))(rates)
    >>> jax.vmap(tx.update, in_axes=(None, 0))(jnp.ones(1), states)[0].ravel()
    Array([-0.1, -0.2, -0.3], dtype=float32)
    """
    known = get_hyperparams(state)
    everywhere = {name: held[0][1] for name, held in _entries(state).items()}
    if unknown := sorted(set(values) - set(known) - set(everywhere)):
        where = f"its hyper-parameters are {sorted(known)}" if known else "wrap the optimizer with inject_hyperparams"
        raise ValueError(f"the state has no hyper-parameter {unknown[0]!r}; {where}")

    for name, value in values.items():
        old = known[name] if name in known else everywhere[name]
        if jnp.shape(value) not in ((), jnp.shape(old)):
            raise ValueError(
                f"{name} has shape {jnp.shape(old)} in the state, got {jnp.shape(value)}; to try several, "
                "jax.vmap over set_hyperparams"
            )

        if not jnp.can_cast(jnp.result_type(value), jnp.result_type(old), "same_kind"):
            raise ValueError(f"{name} is {jnp.result_type(old).name} in the state, which cannot hold {value}")

    chosen = {}  # by the path of the state and the name, what get_hyperparams calls it
    for name, held in _entries(state).items():
        for label, (path, _) in zip(_labels([path for path, _ in held]), held, strict=True):
            chosen[path, name] = f"{label}/{name}"

    def set_in(tree, path):
        def replace(place, node):
            if not is_injected(node):
                return node
            here = (*path, *place)
            new = dict(node.hyperparams)
            for name, old in new.items():
                value = values.get(chosen[here, name], values.get(name))
                new[name] = old if value is None else jnp.full_like(old, value)
            inner = set_in(node.inner_state, (*here, jax.tree_util.GetAttrKey("inner_state")))
            return node._replace(hyperparams=new, inner_state=inner)

        return jax.tree.map_with_path(replace, tree, is_leaf=is_injected)

    return set_in(state, ())


__all__ = ["get_hyperparams", "inject_hyperparams", "set_hyperparams"]
