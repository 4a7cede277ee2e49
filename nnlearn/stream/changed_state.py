"""A state that a callback returns, checked and placed on the devices of the state before."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.train.custom_step import check_like
from nnlearn.train.state import TrainState
from nnlearn.tree import path_name
from nnlearn.types import PyTree

CURE = "use event.state.with_params(params), or event.state._replace(...) with leaves of the same shapes and dtypes"


def changed_state(answer: Any, state: PyTree) -> PyTree | None:
    """The state to continue with, from the result of a callback; None if the result is not a state.

    Args:
      answer: the result of a callback of ``fit``.
      state: the state that the callback was given.

    Returns:
      Copies that the next step can donate, on the devices of ``state``.

    Raises:
      TypeError: if the structure of the state is different, or a leaf has another shape or dtype.
      ValueError: if its ``step`` is different, or its memory is gone.

    >>> changed_state(True, {"w": jnp.zeros(1)}), changed_state({"w": np.ones(1, np.float32)}, {"w": jnp.zeros(1)})
    (None, {'w': Array([1.], dtype=float32)})
    """
    if answer is state:
        return state
    if not _is_state(answer, state):
        return None
    if jax.tree.structure(answer) == jax.tree.structure(state):
        answer = jax.tree.map(_as_array, answer, state)
    try:
        check_like(answer, state, "the state that a callback returns", "event.state")
    except TypeError as error:
        raise TypeError(f"{error}; {CURE}") from None
    for path, leaf in jax.tree.leaves_with_path(answer):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"the state that a callback returns has lost the memory of leaf {path_name(path)!r} to a later step: "
                "keep a copy, jax.device_get(event.state)"
            )
    if isinstance(state, TrainState) and answer.step is not state.step and int(answer.step) != int(state.step):
        raise ValueError(
            f"a callback returned a state of step {int(answer.step)} at step {int(state.step)}: the run counts its "
            "steps itself, so return old._replace(step=event.state.step)"
        )
    return jax.tree.map(_placed, answer, state)


def _is_state(answer: Any, state: PyTree) -> bool:
    """Whether a callback's result is a state, and not a flag that ends the run."""
    if isinstance(state, jax.Array):  # the whole state is one array: a flag differs in shape or dtype
        return (
            isinstance(answer, jax.Array | np.ndarray)
            and jnp.shape(answer) == state.shape
            and (jnp.result_type(answer) == state.dtype)
        )
    if isinstance(answer, TrainState) and not isinstance(state, TrainState):
        raise TypeError(f"a callback returned a TrainState, but this run's state is a {type(state).__name__}")
    return type(answer) is type(state)


def _as_array(leaf: Any, old: jax.Array) -> Any:
    """Cast a Python number to the dtype of the old leaf."""
    return jnp.asarray(leaf, old.dtype) if isinstance(leaf, bool | int | float | complex) else leaf


def _placed(leaf: Any, old: jax.Array) -> jax.Array:
    """A copy of a leaf with the sharding of the old one."""
    if leaf is old:
        return old
    new = jnp.array(leaf, old.dtype, copy=True)
    if getattr(old, "committed", False) and new.sharding != old.sharding:
        new = jax.device_put(new, old.sharding)
    return new


__all__ = ["changed_state"]
