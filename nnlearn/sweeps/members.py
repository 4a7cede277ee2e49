"""Several runs side by side that share a key: started, advanced, selected and compared inside a program."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.sweeps.space import Setting
from nnlearn.train import Run, Train, TrainState
from nnlearn.train.trace import Trace
from nnlearn.types import Key, PyTree


class Runs(NamedTuple):
    """Runs side by side.

    Attributes:
      own: the parts that depend on the hyper-parameters; every array has the members' axis in front.
      shared: the parts that depend on the key alone, without that axis. If the keys had one, ``vmap`` would draw
        every batch again for each member.
    """

    own: PyTree
    shared: PyTree


AXES = Runs(own=0, shared=None)  # the members' axis, for vmap


def stack_settings(settings: Sequence[Setting]) -> tuple[dict[str, jax.Array], Setting]:
    """Arrays of shape (members,) for the values that differ, and the values that all settings share.

    Raises:
      ValueError: if there are fewer than two settings, or if their names differ.

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


def check_metric(metrics: Mapping[str, Any], metric: str) -> None:
    """Raise ``ValueError`` if ``metric`` is not among ``metrics``."""
    if metric not in metrics:
        raise ValueError(f"there is no metric {metric!r} to compare; there are {', '.join(sorted(metrics))}")


def start_runs(train: Train, columns: dict[str, jax.Array], fixed: Setting, key: Key) -> Runs:
    """All members before their first step."""

    def start(values: Setting) -> Runs:
        return _split(train, train.start({**fixed, **values}, key))

    return jax.vmap(start, out_axes=AXES)(columns)


def advance_runs(
    train: Train, columns: dict[str, jax.Array], fixed: Setting, runs: Runs, first: int | jax.Array, count: int
) -> tuple[Runs, Trace]:
    """Advance all members by ``count`` steps, starting at step ``first``."""

    def advance(values: Setting, runs: Runs) -> tuple[Runs, Trace]:
        run, trace = train.advance({**fixed, **values}, _join(runs), first, count)
        return _split(train, run), trace

    return jax.vmap(advance, in_axes=(0, AXES), out_axes=(AXES, 0))(columns, runs)


def take_runs(runs: Runs, index: jax.Array) -> Runs:
    """The members that ``index`` selects."""
    return runs._replace(own=jax.tree.map(lambda leaf: leaf[index], runs.own))


def take_run(runs: Runs, index: jax.Array) -> Run:
    """One member, by a scalar index."""
    return _join(take_runs(runs, index))


def last_scores(trace: Trace, metric: str, before: jax.Array) -> jax.Array:
    """Each member's metric at its last check in this trace, shape (members,).

    A member that stopped earlier keeps its score from ``before``.
    """
    check_metric(trace.metrics, metric)
    values = trace.metrics[metric].astype(jnp.float32)
    made = trace.check_step == trace.stop_step[:, None]
    now = jnp.take_along_axis(values, jnp.argmax(made, axis=1)[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(made, axis=1), now, before)


def goodness(scores: Any, mode: str, xp: Any = jnp) -> Any:
    """Map scores so that the largest is the best; non-finite scores become ``-inf``.

    >>> goodness(np.array([1.0, np.nan, 2.0]), "min", np).tolist()
    [-1.0, -inf, -2.0]
    """
    return xp.where(xp.isfinite(scores), -scores if mode == "min" else scores, -xp.inf)


def _split(train: Train, run: Run) -> Runs:
    state = run.state._asdict()
    shared = {"key": state.pop("key"), "data_key": run.data_key}
    own = {"state": state, "verdict": run.verdict}
    (own if _may_stop(train) else shared)["order"] = run.order
    return Runs(own, shared)


def _join(runs: Runs) -> Run:
    parts = {**runs.own, **runs.shared}
    state = TrainState(key=parts["key"], **parts["state"])
    return Run(state=state, data_key=parts["data_key"], order=parts["order"], verdict=parts["verdict"])


def _may_stop(train: Train) -> bool:
    """Whether a rule can stop one member before another. If not, all of them draw their batches in one order."""
    return callable(train.stop) or bool(train.stop)


__all__ = [
    "Runs",
    "advance_runs",
    "check_metric",
    "goodness",
    "last_scores",
    "stack_settings",
    "start_runs",
    "take_run",
    "take_runs",
]
