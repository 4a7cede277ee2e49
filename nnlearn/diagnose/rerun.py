"""A run again, with a log of every step and snapshots of the state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose.plan import Plan, on_host
from nnlearn.diagnose.subject import Subject
from nnlearn.train.loop import Run
from nnlearn.train.state import TrainState
from nnlearn.tree import path_name
from nnlearn.types import Key, Params, PyTree

SNAPSHOT_BYTES = 256 << 20  # of all snapshots together


class Record(NamedTuple):
    """A run that was watched.

    Attributes:
      loss, grad_norm, update_norm: of every step, shape (steps,); the norms are NaN if the run has a step of its own.
      rate: the recorded learning rate of every step, or None.
      skipped: whether the optimizer skipped the step, or None.
      at: the steps before which the snapshots were taken, shape (times,); the last one is the end of the run.
      states: the snapshots, stacked along a leading axis, as NumPy arrays and without the key.
      key: the random key of the steps.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    update_norm: np.ndarray
    rate: np.ndarray | None
    skipped: np.ndarray | None
    at: np.ndarray
    states: TrainState
    key: Key

    @property
    def last(self) -> TrainState:
        """The state at the end of the run, without its key."""
        return jax.tree.map(lambda leaf: leaf[-1], self.states)

    @property
    def first(self) -> TrainState:
        """The state at the start of the run, without its key."""
        return jax.tree.map(lambda leaf: leaf[0], self.states)


def rerun(subject: Subject, plan: Plan, start: Run, times: np.ndarray | None = None) -> Record:
    """Run a subject again and take snapshots of its state.

    Args:
      subject: the run.
      plan: its batches.
      start: the run before its first step.
      times: increasing steps to take snapshots at; None for the start, some early ones, and some until the end.
    """
    step, key = jax.jit(subject.step()), start.state.key
    times = snapshot_times(subject.steps, start.state) if times is None else times

    @jax.jit
    def program(state, rows, examples, keys):
        def one(at, carry):
            state, log = carry
            batch = plan.batch(jax.tree.map(lambda leaf: leaf[at], rows), examples)
            state, info = step(state._replace(key=key), batch, key=subject.as_key(keys[at]))
            log = jax.tree.map(lambda buffer, value: buffer.at[at].set(value), log, _logged(info))
            return state._replace(key=None), log

        def segment(carry, span):
            carry = jax.lax.fori_loop(span[0], span[1], one, carry)
            return carry, carry[0]

        first = plan.batch(jax.tree.map(lambda leaf: leaf[0], rows), examples)
        shapes = jax.eval_shape(lambda: _logged(step(state, first, key=key)[1]))
        log = jax.tree.map(lambda value: jnp.zeros(subject.steps, value.dtype), shapes)
        spans = jnp.array([np.concatenate([[0], times[:-1]]), times]).T
        (_, log), states = jax.lax.scan(segment, (state._replace(key=None), log), spans)
        return log, states

    log, states = program(start.state, plan.rows, plan.examples, subject.keys)
    log = {name: np.asarray(value) for name, value in log.items()}
    nothing = np.full(subject.steps, np.nan)
    return Record(
        loss=log["loss"].astype(np.float64),
        grad_norm=log.get("grad_norm", nothing),
        update_norm=log.get("update_norm", nothing),
        rate=log.get("rate"),
        skipped=log.get("skipped"),
        at=times,
        states=on_host(states),
        key=key,
    )


def _logged(info: Any) -> dict[str, jax.Array]:
    rate = info.learning_rate
    log = {
        "loss": info.loss,
        "grad_norm": info.grad_norm,
        "update_norm": info.update_norm,
        "rate": rate if rate is None or jnp.ndim(rate) == 0 else jnp.max(rate),
        "skipped": info.skipped,
    }
    return {name: jnp.asarray(value) for name, value in log.items() if value is not None}


def snapshot_times(steps: int, state: PyTree) -> np.ndarray:
    """The steps to take snapshots at: the start, powers of two, and evenly until the end."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.stored)) * 3
    early = [each for each in (1, 2, 4, 16) if each < max(steps // 6, 3)]
    count = 6 if (6 + len(early)) * size <= SNAPSHOT_BYTES else 2
    late = np.linspace(0, steps, count + 1).round().astype(int)
    return np.unique(np.concatenate([late, early if count == 6 else []]).astype(int))


def leaf_names(params: Params) -> tuple[str, ...]:
    """The names of the leaves of a tree of parameters."""
    return tuple(path_name(path) or "params" for path, _ in jax.tree.leaves_with_path(params))


__all__ = ["Record", "leaf_names", "rerun", "snapshot_times"]
