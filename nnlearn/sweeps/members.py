"""Several runs side by side that share a key: started, advanced, picked from and compared inside a program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.sweeps.space import Setting
from nnlearn.train import Run, Train, TrainState
from nnlearn.train.trace import Trace
from nnlearn.types import Key


def stack_settings(settings: Sequence[Setting]) -> tuple[dict[str, jax.Array], Setting]:
    """The values that differ as arrays of shape (members,), and those that do not as they are.

    Raises:
      ValueError: there are fewer than two settings, or they have other names.

    >>> stack_settings([{"rate": 0.1, "decay": 0}, {"rate": 0.2, "decay": 0}])
    ({'rate': Array([0.1, 0.2], dtype=float32)}, {'decay': 0})
    """
    if len(settings) < 2:
        raise ValueError(f"there must be at least two settings to compare, got {len(settings)}")
    names = settings[0].keys()
    for setting in settings:
        if setting.keys() != names:
            raise ValueError(f"all settings must have the same names, got {sorted(names)} and {sorted(setting)}")
    columns, fixed = {}, {}
    for name, first in settings[0].items():
        values = [setting[name] for setting in settings]
        if all(value is first or (np.ndim(value) == 0 and value == first) for value in values):
            fixed[name] = first
        else:
            columns[name] = jnp.asarray(values)
    return columns, fixed


def check_metric(metrics: dict[str, Any], metric: str) -> None:
    """Raise ``ValueError`` unless there is such a metric."""
    if metric not in metrics:
        there_are = ", ".join(sorted(metrics))
        raise ValueError(f"there is no metric {metric!r} to judge by; there are {there_are}")


def start_runs(train: Train, columns: dict[str, jax.Array], fixed: Setting, key: Key) -> Run:
    """All members before their first step."""

    def start(values):
        return train.start({**fixed, **values}, key)

    return jax.vmap(start, out_axes=_axes(train))(columns)


def advance_runs(
    train: Train, columns: dict[str, jax.Array], fixed: Setting, runs: Run, first: int | jax.Array, count: int
) -> tuple[Run, Trace]:
    """``count`` steps of all members, from step ``first`` on."""

    def advance(values, run):
        return train.advance({**fixed, **values}, run, first, count)

    axes = _axes(train)
    return jax.vmap(advance, in_axes=(0, axes), out_axes=(axes, 0))(columns, runs)


def take_runs(train: Train, runs: Run, index: jax.Array) -> Run:
    """The members of an index, or one member; what they share stays as it is."""
    key, data_key, order = runs.state.key, runs.data_key, runs.order
    if not _shares_order(train):
        order = jax.tree.map(lambda leaf: leaf[index], order)
    own = runs._replace(state=runs.state._replace(key=None), data_key=None, order=None)
    own = jax.tree.map(lambda leaf: leaf[index], own)
    return own._replace(state=own.state._replace(key=key), data_key=data_key, order=order)


def last_scores(trace: Trace, metric: str, before: jax.Array) -> jax.Array:
    """Each member's metric at the last check that it has made, shape (members,).

    A member that had stopped before this stretch keeps the score that it had.
    """
    check_metric(trace.metrics, metric)
    values = trace.metrics[metric].astype(jnp.float32)
    made = trace.check_step == trace.stop_step[:, None]
    now = jnp.take_along_axis(values, jnp.argmax(made, axis=1)[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(made, axis=1), now, before)


def goodness(scores: Any, mode: str, xp: Any = jnp) -> Any:
    """Scores turned so that the largest is the best, and what is not finite the worst.

    >>> goodness(np.array([1.0, np.nan, 2.0]), "min", np).tolist()
    [-1.0, -inf, -2.0]
    """
    return xp.where(xp.isfinite(scores), -scores if mode == "min" else scores, -xp.inf)


def _shares_order(train: Train) -> bool:
    """Without a rule that may stop one member and not another, all draw their batches in one order."""
    return not (callable(train.stop) or train.stop)


def _axes(train: Train) -> Run:
    """Where the members' axis is: what depends on the key alone has none, or every batch would be there many times."""
    state = TrainState(step=0, stored=0, opt_state=0, key=None, model_state=0)
    order = None if _shares_order(train) else 0
    return Run(state=state, data_key=None, order=order, verdict=0)


__all__ = [
    "advance_runs",
    "check_metric",
    "goodness",
    "last_scores",
    "stack_settings",
    "start_runs",
    "take_runs",
]
