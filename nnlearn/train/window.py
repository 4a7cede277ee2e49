"""Accumulation windows of ``MultiSteps`` that the end of a run interrupts: warnings, and a function to apply them."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import MultiStepsState, apply_updates

from nnlearn.checks import known
from nnlearn.train.state import TrainState
from nnlearn.transforms.skipping import closure_variables, skip_whole
from nnlearn.types import GradientTransformation, OptState

CURE = (
    "Make the number of steps a multiple of every_k_schedule, continue from the state, or apply them with "
    "nnlearn.apply_accumulated(tx, state)"
)
MOST = 1_000_000  # the longest run, in steps, for which a schedule of k is evaluated


def apply_accumulated(tx: GradientTransformation, state: TrainState) -> TrainState:
    """Apply the gradients of an accumulation window that the end of a run has interrupted.

    Runs the optimizer in ``MultiSteps`` once on the accumulated gradients (the mean or sum of the mini-steps) and
    resets the window. If no window is open, nothing changes. Other transformations of a chain receive zero
    gradients. ``state.step`` does not change. This is a pure function and can be compiled.

    Args:
      tx: the optimizer of the run, with nnlearn's ``MultiSteps`` over all parameters.
      state: the last state of the run.

    Raises:
      ValueError: if ``tx`` contains no nnlearn ``MultiSteps``, or one that accumulates only a part of the parameters.

    >>> import nnlearn
    >>> tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), 4)
    >>> step = nnlearn.make_step(lambda params, batch, key: params * batch, tx)
    >>> state, _ = step(nnlearn.init_state(jnp.zeros(()), tx), -2.0)
    >>> state.params, apply_accumulated(tx, state).params
    (Array(0., dtype=float32), Array(2., dtype=float32))
    """
    windows = _windows(state.opt_state)
    if not windows or not list(closure_variables(tx.update, "use_grad_mean")):  # optax's has no such variable
        raise ValueError("apply_accumulated needs an optimizer with nnlearn.MultiSteps, and its state")
    gathered = sum(jnp.size(leaf) for leaf in jax.tree.leaves(windows[0].acc_grads))
    if len(windows) > 1 or gathered != sum(jnp.size(leaf) for leaf in jax.tree.leaves(state.stored)):
        raise ValueError(
            "apply_accumulated needs one MultiSteps over all parameters: the optimizer of the others would make a step "
            "without a gradient. Put MultiSteps around the partition"
        )
    nothing = jax.tree.map(jnp.zeros_like, state.stored)
    updates, opt_state = skip_whole(tx).update(nothing, state.opt_state, state.stored, close_window=True)
    return state._replace(stored=apply_updates(state.stored, updates), opt_state=opt_state)


def warn_of_open_window(opt_state: OptState) -> None:
    """Warn if a run has ended inside a window. ``fit`` calls this with the last state."""
    for window in _windows(opt_state):
        left = int(np.max(window.mini_step))
        if left:
            made = int(np.max(window.gradient_step))
            warnings.warn(
                f"the run ended inside an accumulation window: the gradients of its last {left} mini-steps are in "
                f"opt_state and have not changed the parameters (MultiSteps has made {made} optimizer steps). {CURE}",
                stacklevel=3,
            )


def warn_of_last_window(tx: GradientTransformation, steps: int) -> None:
    """Warn if a run of ``steps`` steps will end inside a window, if this is known before it starts.

    >>> import nnlearn
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warn_of_last_window(nnlearn.MultiSteps(nnlearn.sgd(0.1), 4), 6)
    >>> len(caught)
    1
    """
    for every_k in closure_variables(tx.update, "every_k_schedule"):
        left = _left(every_k, steps)
        if left:
            warnings.warn(
                f"a run of {steps} steps ends inside an accumulation window: MultiSteps does not apply the gradients "
                f"of the last {left} mini-steps. {CURE}",
                stacklevel=4,
            )


def _windows(opt_state: OptState) -> list[MultiStepsState]:
    def is_window(node):
        return isinstance(node, MultiStepsState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_window) if is_window(node)]


def _left(every_k: Any, steps: int) -> int:
    """Mini-steps left in the last window; 0 if k is traced, or a schedule that cannot be evaluated."""
    if known(every_k):
        return steps % int(every_k)
    if not callable(every_k) or steps > MOST:
        return 0
    try:
        with jax.ensure_compile_time_eval():
            ends = np.cumsum(np.asarray(jax.vmap(every_k)(jnp.arange(steps))))
    except Exception:  # a fault in the schedule is reported by the run itself
        return 0
    return steps - int(np.max(ends, where=ends <= steps, initial=0))


__all__ = ["apply_accumulated", "warn_of_last_window", "warn_of_open_window"]
