"""The protocol of a custom training step, for several losses, optimizers or parameter trees in one run.

``make_train(step=...)``, ``fit`` and ``make_epoch`` take any function with the interface of ``make_step``'s result::

    step(state, batch) -> (state, info)

It is a pure function that JAX can trace.

- **Arguments.** It may take ``key``, the random key of this step, as a third argument or by name, and ``hparams``, the
  hyper-parameters of the run, by name (``make_train`` only). ``make_train`` also takes a function of ``hparams`` that
  returns a step, for optimizers that depend on them.
- **state** is any pytree of arrays: a NamedTuple with two networks and two optimizer states, a dict, flax's
  ``TrainState``. The step returns it with the same structure, shapes and dtypes. If there is one set of parameters, use
  nnlearn's ``TrainState``, whose ``step`` counts the steps. For any other state the run counts them separately. ``fit``
  starts this count at the ``step`` of the state, an attribute or key, or at 0 without one, and derives the random keys
  from the ``key`` of the state.
- **info** is an ``Info``, or a NamedTuple or mapping of arrays with a scalar ``loss``. Entries with the name of a field
  of ``Info`` (``grad_norm``, ``learning_rate``, ``skipped`` ...) go to that field, all others to ``info.aux``. So
  ``trace.loss`` is the loss, ``trace.info.aux["critic_loss"]`` another value, and its column in ``trace.columns()`` is
  ``aux/critic_loss``.
- **evaluate** and the metrics of rules: ``evaluate(params)`` receives ``state.params`` of a ``TrainState``, and the
  whole state otherwise. Rules can also use ``train_loss``, the mean of ``loss``, and the means of scalars in ``aux``,
  as in ``patience("aux/critic_loss", 5)``.
- **Result.** ``keep_best`` and ``patience`` keep the whole state, ``train`` and ``finish`` return it, and ``fit`` saves
  it. Between ``start``, ``advance`` and ``finish``, ``Run.state`` is a ``TrainState`` whose ``stored`` is the custom
  state.

>>> import nnlearn
>>> good, bad = nnlearn.adam(0.1), nnlearn.sgd(0.1)
>>> def init(key):
...     return {"x": 1.0, "y": 1.0, "x_opt": good.init(jnp.ones(())), "y_opt": bad.init(jnp.ones(()))}
>>> def step(state, batch):
...     x, y = state["x"], state["y"]
...     x_update, x_opt = good.update(x + y, state["x_opt"])
...     y_update, y_opt = bad.update(y - x, state["y_opt"])
...     new = {"x": x + x_update, "y": y + y_update, "x_opt": x_opt, "y_opt": y_opt}
...     return new, {"loss": x**2 + y**2, "gap": x - y}
>>> batches = nnlearn.generated(lambda key, step: step)
>>> state, trace = nnlearn.make_train(step=step, batches=batches, init=init, steps=200)({}, 0)
>>> bool(trace.loss[-1] < 0.05), trace.info.aux["gap"].shape
(True, (200,))
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.calls import asks_for, explaining_hparams
from nnlearn.train.state import TrainState
from nnlearn.train.step import Info, step_key
from nnlearn.tree import path_name
from nnlearn.types import Batch, Key, PyTree

FORMS = "(state, batch), and may take key and hparams"


class Carried(NamedTuple):
    """Replaces the optimizer state in a ``TrainState`` whose ``stored`` is a custom state."""


def carry_state(state: PyTree, key: Key | None = None) -> TrainState:
    """The carry of a loop: a ``TrainState`` itself, or a ``TrainState`` around a custom state, which counts the steps.

    Args:
      state: a pytree of arrays and Python scalars; copied unless it is a ``TrainState``.
      key: the random key of the run; None for the ``key`` of the state.

    Raises:
      TypeError: if a leaf is not an array.

    >>> carry_state({"w": 1.0, "step": 3}).step, own_state(carry_state({"w": 1.0}))
    (Array(3, dtype=int32), {'w': Array(1., dtype=float32)})
    """
    if isinstance(state, TrainState):
        return state._replace(key=key) if state.key is None else state
    for path, leaf in jax.tree.leaves_with_path(state):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"the state of a step must be a pytree of arrays, but leaf {path_name(path)!r} is a "
                f"{type(leaf).__name__}: let the step close over it"
            )
    count = _part(state, "step") if key is None else None
    count = count if count is not None and jnp.shape(count) == () else 0
    return TrainState(
        jnp.array(count, jnp.int32),
        jax.tree.map(_strong, state),
        Carried(),
        _part(state, "key") if key is None else key,
    )


def is_carried(state: TrainState) -> bool:
    """Whether a ``TrainState`` contains a custom state."""
    return isinstance(state.opt_state, Carried)


def own_state(state: TrainState) -> PyTree:
    """The state that the user's functions take, from the carry of a loop."""
    return state.stored if is_carried(state) else state


def with_own_state(carried: TrainState, state: PyTree) -> TrainState:
    """The carry of a loop with its state replaced."""
    return carried._replace(stored=state) if is_carried(carried) else state


def lift_step(step: Callable, hparams: PyTree = None) -> Callable[..., tuple[TrainState, Info]]:
    """A step on the carry of a loop, ``step(state, batch, key=None) -> (state, info)``, from any step of the protocol.

    Raises:
      TypeError: if the step does not return a pair, a state like its argument, and an info with a scalar loss.
    """
    key_by = _key_by(step)
    offered = {"hparams": hparams} if asks_for(step, "hparams") else {}

    def call(state: TrainState, batch: Batch, key: Key | None) -> Any:
        if key is None and key_by is not None and state.key is not None:
            key = step_key(state.key, state.step)
        if key is None and key_by in ("place", "name"):
            raise TypeError("step takes a key, but the state has none: add a random key to it as 'key'")
        if key_by == "place":
            return step(own_state(state), batch, key, **offered)
        if key_by is not None and key is not None:
            return step(own_state(state), batch, key=key, **offered)
        return step(own_state(state), batch, **offered)

    def lifted(state: TrainState, batch: Batch, key: Key | None = None) -> tuple[TrainState, Info]:
        result = call(state, batch, key)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step must return (state, info), got {type(result).__name__}")
        own, info = result
        check_like(own, own_state(state), "the state that step returns", "the one that it was given")
        new = with_own_state(state, own)
        counted = new.step is not state.step
        return (new if counted else new._replace(step=state.step + 1)), as_info(info)

    lifted.__name__ = getattr(step, "__name__", "step")
    return lifted


def check_step(step: Any, *, factory: bool) -> None:
    """Raise ``TypeError`` if ``step`` is not a step or, with ``factory``, a function of ``hparams``.

    >>> check_step(lambda state: state, factory=False)
    Traceback (most recent call last):
    TypeError: step must take (state, batch), and may take key and hparams, but its arguments are (state)
    """
    if not callable(step):
        raise TypeError(f"step must be a function of {FORMS}; got {step!r}")
    if takes_batch(step) or (factory and _binds(step, ("hparams",))):
        return
    other_form = "; or (hparams), to return such a step" if factory else ""
    raise TypeError(f"step must take {FORMS}{other_form}, but its arguments are {inspect.signature(step)}")


def made_step(step: Callable, hparams: PyTree) -> Callable:
    """The step itself, or the one that a function of ``hparams`` returns.

    Raises:
      TypeError: if the function does not return a step.
    """
    if takes_batch(step):
        return step
    with explaining_hparams("step", hparams):
        made = step(hparams)
    if not callable(made) or not takes_batch(made):
        raise TypeError(f"step(hparams) must return a function of {FORMS}; it returned {made!r}")
    return made


def takes_batch(step: Callable) -> bool:
    """Whether a function takes a state and a batch, and apart from them only ``key`` and ``hparams``.

    >>> takes_batch(lambda state, batch, key: None), takes_batch(lambda hparams: None)
    (True, False)
    """
    return _binds(step, ("state", "batch")) or _binds(step, ("state", "batch", "key"))


def as_info(info: Any) -> Info:
    """Convert the info of a step to ``Info``: entries with the name of a field go there, all others to ``aux``.

    Raises:
      TypeError: if it is not an ``Info``, NamedTuple or mapping, or has no scalar loss.

    >>> as_info({"loss": 1.0, "critic_loss": 2.0}).aux
    {'critic_loss': Array(2., dtype=float32, weak_type=True)}
    """
    if isinstance(info, Info):
        return info
    entries = info._asdict() if hasattr(info, "_asdict") else info
    if not isinstance(entries, Mapping) or "loss" not in entries:
        said = sorted(entries) if isinstance(entries, Mapping) else type(info).__name__
        raise TypeError(f"the info of a step must be a NamedTuple or dict with a loss, {{'loss': loss}}; got {said}")
    if jnp.shape(entries["loss"]) != ():
        raise TypeError(
            f"the loss in a step's info must be a scalar, got shape {jnp.shape(entries['loss'])}: average it"
        )
    entries = {name: jax.tree.map(jnp.asarray, value) for name, value in entries.items()}
    known = {name: entries.pop(name, None) for name in Info._fields if name != "aux"}
    aux = entries if set(entries) - {"aux"} else entries.get("aux")
    return Info(aux=aux, **known)


def check_like(new: PyTree, old: PyTree, name: str, other: str) -> None:
    """Raise ``TypeError`` if two trees differ in structure or in the shape or dtype of a leaf."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            f"{name} must have the structure of {other}: got {jax.tree.structure(new)}, not {jax.tree.structure(old)}"
        )
    for (path, leaf), before in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        found, expected = (f"{jnp.result_type(part)}{list(jnp.shape(part))}" for part in (leaf, before))
        if found != expected:
            raise TypeError(f"{name} must be like {other}: leaf {path_name(path)!r} is {found}, not {expected}")


def _key_by(step: Callable) -> str | None:
    """How a step takes its key: by ``place``, by ``name``, optionally by name (``may``), or None if it does not."""
    try:
        parameters = inspect.signature(step).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return None
    if "key" in parameters and parameters["key"].kind != inspect.Parameter.POSITIONAL_ONLY:
        return "name" if parameters["key"].default is inspect.Parameter.empty else "may"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [parameter for parameter in parameters.values() if parameter.kind in kinds][2:3]
    needed = third and third[0].default is inspect.Parameter.empty and third[0].name != "hparams"
    return "place" if needed else None


def _binds(function: Callable, arguments: tuple[str, ...]) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return len(arguments) == 2
    named = {name: None for name in ("key", "hparams") if name in signature.parameters and name not in arguments}
    by_place = list(signature.parameters)[: len(arguments)]
    if len(arguments) > 1 and "hparams" in by_place:
        return False
    try:
        signature.bind(*arguments, **{name: None for name in named if name not in by_place})
    except TypeError:
        return False
    return True


def _part(state: PyTree, name: str) -> Any:
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def _strong(leaf: Any) -> jax.Array:
    return jnp.array(leaf, jnp.result_type(leaf), copy=True)


__all__ = [
    "as_info",
    "carry_state",
    "check_like",
    "check_step",
    "is_carried",
    "lift_step",
    "made_step",
    "own_state",
    "takes_batch",
    "with_own_state",
]
