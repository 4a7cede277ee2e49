"""Clear errors for steps that fail.

States and batches are inspected after an error only, so a step that works pays nothing for this.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nnlearn.calls import asks_for
from nnlearn.data import MaskedBatch
from nnlearn.packing import is_packed
from nnlearn.train.state import TrainState
from nnlearn.tree import path_name
from nnlearn.types import Batch, GradientTransformation, LossFn, OptState, Params

CURE = (
    "The batch is a MaskedBatch(examples, where): if the loss expects bare examples, write `examples, where = batch` "
    "and pass where to the loss, which then excludes the padding; or make full batches of bare examples, "
    "shuffled(..., remainder='drop')"
)
METRICS_CURE = (
    "The batch is a MaskedBatch(examples, where), whatever the batches of the training are: write "
    "`examples, where = batch`, and take means with where=where, which exclude the padding"
)
OFFERED = "value, grad and value_fn"


def check_state(state: Any, loss_fn: LossFn, packed: bool | None) -> None:
    """Raise if a step cannot start from ``state``.

    Raises:
      TypeError: if it is not a ``TrainState``.
      ValueError: if its parameters are packed, or not, against ``packed``, or it lacks the model state of ``loss_fn``.

    >>> check_state({"w": 1.0}, lambda params, batch, key: 0.0, None)
    Traceback (most recent call last):
    TypeError: a step takes a TrainState and a batch, step(state, batch), got dict as state: make one with ...
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            f"a step takes a TrainState and a batch, step(state, batch), got {type(state).__name__} as state: make one "
            "with nnlearn.init_state(params, tx)"
        )
    if packed is not None and packed != is_packed(state.stored):
        raise ValueError(
            f"the step was made with packed={packed}, but the state's parameters are "
            f"{'not ' if packed else ''}packed: make it with init_state(..., packed={packed})"
        )
    if state.model_state is None and asks_for(loss_fn, "model_state"):
        raise ValueError(
            "loss_fn takes model_state, but the state has none: give init_state(params, tx, model_state=...). The "
            "init of a model with running statistics returns both, (params, model_state)"
        )


def accepted(update: Callable, offered: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments in ``offered`` that the ``update`` of a transformation takes.

    >>> accepted(lambda updates, state, params=None, *, value: updates, {"value": 1, "grad": 2})
    {'value': 1}
    """
    try:
        parameters = inspect.signature(update).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return offered
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    return {name: value for name, value in offered.items() if name in {parameter.name for parameter in parameters}}


@contextlib.contextmanager
def explaining_update(tx: GradientTransformation, opt_state: OptState, params: Params) -> Iterator[None]:
    """Replace an error of ``tx.update`` by a ``ValueError`` if another optimizer made the state."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        fault = state_difference(tx, opt_state, params)
        if fault:
            raise ValueError(
                f"the optimizer state is not one of this optimizer: {fault}. Make it with init_state(params, tx) or "
                "tx.init(params), with the same tx as the step"
            ) from error
        if "unexpected keyword argument" in str(error):
            error.add_note(
                f"a step passes {OFFERED} to the optimizer; add **extra_args to the update of your transformation"
            )
        raise


def state_difference(tx: GradientTransformation, opt_state: OptState, params: Params) -> str:
    """Where the structure of a state differs from that of ``tx.init(params)``; empty if it does not.

    >>> import nnlearn, jax.numpy as jnp
    >>> state_difference(nnlearn.sgd(0.1), nnlearn.adam(0.1).init(jnp.zeros(1)), jnp.zeros(1))
    "at '0' it is a ScaleByAdamState, where the optimizer has an EmptyState"
    """
    try:
        expected = jax.eval_shape(tx.init, params)
    except Exception:  # then the fault is not in the state
        return ""
    return _difference((), opt_state, expected)


def _difference(path: tuple, found: Any, expected: Any) -> str:
    """The first place from the root where the containers of two trees differ."""
    if jax.tree.structure(found) == jax.tree.structure(expected):
        return ""
    (parts, others) = (_children(tree) for tree in (found, expected))
    if type(found) is type(expected) and [key for key, _ in parts] == [key for key, _ in others]:
        for (key, part), (_, other) in zip(parts, others, strict=True):
            if fault := _difference((*path, key), part, other):
                return fault
    one, other = _described(found, parts), _described(expected, others)
    return f"at {path_name(path)!r} it is {one}, where the optimizer has {other}"


def _children(tree: Any) -> list[tuple[Any, Any]]:
    children = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(path[0], child) for path, child in children if path]


def _described(tree: Any, parts: list) -> str:
    name = type(tree).__name__
    if name == "ShapeDtypeStruct":
        name = "array"
    article = "an" if name[0].upper() in "AEIO" else "a"
    return f"{article} {name}" + (f" of {len(parts)} parts" if type(tree) in (tuple, list, dict) else "")


@contextlib.contextmanager
def explaining_batch(batch: Batch, cure: str = CURE) -> Iterator[None]:
    """Explain ``MaskedBatch`` in an error of a function that expects a bare batch."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        explained = cure in str(error) or getattr(error, "__notes__", ())
        if not isinstance(batch, MaskedBatch) or type(error).__module__ != "builtins" or explained:
            raise
        raise type(error)(f"{error}. {cure}") from error


__all__ = ["accepted", "check_state", "explaining_batch", "explaining_update", "state_difference"]
