"""What a host-driven run records: read back from the device a few calls late, so that no step waits for it."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.stream.history import Row
from nnlearn.train.step import Info
from nnlearn.train.trace import ALL_STEPS, Trace, info_columns, metric_column
from nnlearn.types import PyTree


class _Entry(NamedTuple):
    first: int  # steps made before
    count: int
    infos: PyTree  # stacked, on the device; what lies beyond ``count`` is undefined
    metrics: dict[str, jax.Array]  # of the check after the last of these steps, if there was one


class Recorder:
    """Gathers infos and metrics in the order of steps.

    Args:
      every: record every so many steps.
      metrics: the names of what checks find.
      leaves: the names of the parameters.
      begin: called with the names of all columns before the first rows.
      writers: functions that are given rows; without any, none are made.
      watch: called with the step, loss and learning rate, or None, that were read last.
    """

    def __init__(
        self,
        every: int,
        metrics: Sequence[str],
        leaves: Sequence[str] = (),
        *,
        begin: Callable[[list[str]], None],
        writers: list[Callable[[list[Row]], None]],
        watch: Callable[[int, float, float | None], None],
    ):
        self.every, self.metrics, self.leaves = every, list(metrics), tuple(leaves)
        self.latest: dict[str, float] = {}  # what the last check found, as far as it was read
        self._begin, self._writers, self._watch = begin, writers, watch
        self._far = jax.default_backend() != "cpu"
        self._waiting: deque[_Entry] = deque()
        self._steps: list[np.ndarray] = []
        self._infos: list[PyTree] = []
        self._checks: list[tuple[int, dict[str, np.ndarray]]] = []
        self._columns: list[tuple[str, int, int | None]] | None = None
        self._metric_columns: dict[str, str] = {}  # what they are called beside those, as in ``Trace.columns``

    def add(self, first: int, count: int, infos: PyTree) -> None:
        """Take the infos of ``count`` steps; they need not have been computed yet."""
        if self._columns is None:
            self._columns = info_columns(infos, 0, self.leaves)
            names = ["step", *(name for name, _, _ in self._columns)]
            for metric in self.metrics:
                self._metric_columns[metric] = metric_column(metric, names)
                names.append(self._metric_columns[metric])
            self._begin(names)
        if self._far:
            for leaf in jax.tree.leaves(infos):
                leaf.copy_to_host_async()
        self._waiting.append(_Entry(first, count, infos, {}))

    def add_check(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take what the check after the last steps has found."""
        if self._waiting:
            self._waiting[-1] = self._waiting[-1]._replace(metrics=metrics)
        else:
            self._waiting.append(_Entry(step, 0, None, metrics))

    def read(self, leave: int = 0) -> None:
        """Read everything but the latest entries, waiting for the device where need be."""
        while len(self._waiting) > leave:
            self._read_one(self._waiting.popleft())

    def _read_one(self, entry: _Entry) -> None:
        last = entry.first + entry.count
        steps = np.arange(entry.first + 1, last + 1, dtype=np.int32)
        recorded = np.flatnonzero(steps % self.every == 0)
        infos = None
        if entry.count:
            whole = jax.tree.map(np.asarray, entry.infos)
            infos = jax.tree.map(lambda leaf: leaf[recorded], whole)
            self._steps.append(steps[recorded])
            self._infos.append(infos)
            rates = whole.learning_rate
            rate = None if rates is None else float(np.mean(rates[entry.count - 1]))
            self._watch(last, float(whole.loss[entry.count - 1]), rate)
        metrics = {}
        if entry.metrics:
            found = {name: np.asarray(value) for name, value in entry.metrics.items()}
            self._checks.append((last, found))
            self.latest = metrics = {name: _plain(value) for name, value in found.items()}
        if self._writers:
            rows = self._rows(steps[recorded], infos, metrics, last)
            for write in self._writers:
                write(rows)

    def _rows(self, steps: np.ndarray, infos: PyTree, metrics: dict[str, float], last: int) -> list[Row]:
        rows: list[Row] = []
        if infos is not None:
            leaves = jax.tree.leaves(infos)
            names = ["step", *(name for name, _, _ in self._columns)]
            parts = (leaves[at] if index is None else leaves[at][:, index] for _, at, index in self._columns)
            columns = [steps.tolist(), *map(_plain, parts)]
            rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        if metrics and (not rows or rows[-1]["step"] != last):
            rows.append({"step": last})
        if metrics:
            rows[-1].update({self._metric_columns[name]: value for name, value in metrics.items()})
        return rows

    def trace(self, step: int, reason: int, best_step: jax.Array | None, rules: Sequence[str], ended_by: str) -> Trace:
        """Everything that was read, as the trace of a run that has ended after ``step``.

        Args:
          step: steps made in all.
          reason: which rule ended it, counted from 1, or 0.
          best_step: the check whose parameters it ended with, or None.
          rules: the names of the rules.
          ended_by: what ended it if it was no rule.
        """
        if reason == 0 and ended_by != ALL_STEPS:
            rules = (*rules, ended_by)
            reason = len(rules)
        # NumPy puts the pieces together: it need not compile for that
        nothing = Info(np.zeros(0, np.float32), None, None, None, None)
        infos = jax.tree.map(lambda *parts: np.concatenate(parts), *self._infos) if self._infos else nothing
        checks = [metrics for _, metrics in self._checks]
        names = checks[0] if checks else ()
        trace = Trace(
            step=np.concatenate([np.zeros(0, np.int32), *self._steps]),
            info=infos,
            check_step=np.array([at for at, _ in self._checks], np.int32),
            metrics={name: np.stack([metrics[name] for metrics in checks]) for name in names},
            stop_step=np.array(step, np.int32),
            reason=np.array(reason, np.int32),
            best_step=best_step,
            rules=tuple(rules),
            leaves=self.leaves if getattr(infos, "leaf_grad_norms", None) is not None else (),
        )
        return jax.device_put(trace)


def _plain(values: np.ndarray) -> Any:
    """Python numbers; those of bfloat16 and the like, too."""
    return values.astype(np.float64).tolist() if jnp.issubdtype(values.dtype, jnp.floating) else values.tolist()


__all__ = ["Recorder"]
