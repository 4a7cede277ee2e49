"""The records of a host-driven run, read back from the device a few calls late, so that no step waits for them."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.stream.history import History, Row
from nnlearn.stream.rollback import FaultFinder, with_skipped
from nnlearn.train.columns import info_columns, metric_column
from nnlearn.train.step import Info
from nnlearn.train.stopping import Metrics
from nnlearn.train.trace import ALL_STEPS, Trace
from nnlearn.tree import path_name
from nnlearn.types import PyTree

Writer = Callable[[list[Row]], None]


class _Entry(NamedTuple):
    """Steps whose infos have not been read back.

    Attributes:
      first: steps made before.
      steps: number of steps.
      infos: stacked, on the device; undefined beyond ``steps``.
      metrics: of the check after the last of these steps, if there was one.
    """

    first: int
    steps: int
    infos: PyTree
    metrics: Metrics


class Recorder:
    """Collects infos and metrics in the order of steps.

    Args:
      every: record every ``every`` steps.
      metrics: the names of the metrics of checks.
      leaves: the names of the parameters.
      open_writers: called before the first rows with the names of all columns, and with the rows of the checkpoint that
        is resumed, or None; returns a history or None, and other functions that take rows.
      watch: called with the step, loss and learning rate (or None) that were read last.
      finder: looks for faults in the records, or None.
    """

    def __init__(
        self,
        every: int,
        metrics: Sequence[str],
        leaves: Sequence[str] = (),
        *,
        open_writers: Callable[[list[str], Iterator[Row] | None], tuple[History | None, list[Writer]]],
        watch: Callable[[int, float, float | None], None],
        finder: FaultFinder | None = None,
    ):
        self.every, self.metrics, self.leaves = every, list(metrics), tuple(leaves)
        self.latest: dict[str, float] = {}  # metrics of the latest check that was read
        self._open_writers, self._watch, self._finder = open_writers, watch, finder
        self._history: History | None = None
        self._writers: list[Writer] = []
        self._is_resumed = False
        self._far = jax.default_backend() != "cpu"
        self._waiting: deque[_Entry] = deque()
        self._steps: list[np.ndarray] = []
        self._infos: list[PyTree] = []
        self._checks: list[tuple[int, dict[str, np.ndarray]]] = []
        self._columns: list[tuple[str, int, int | None]] | None = None
        self._metric_columns: dict[str, str] = {}  # the metrics' column names, as in ``Trace.columns``

    def add(self, first: int, steps: int, infos: PyTree) -> None:
        """Add the infos of some steps; they need not have been computed yet."""
        if self._finder is not None:
            infos = with_skipped(infos)
        if self._columns is None:
            self._columns = info_columns(infos, 0, self.leaves)
            names = ["step", *(name for name, _, _ in self._columns)]
            for metric in self.metrics:
                self._metric_columns[metric] = metric_column(metric, names)
                names.append(self._metric_columns[metric])
            if self._infos:  # from a checkpoint, with dicts for classes
                self._infos = [_with_types_of(infos, self._infos[0])]
            saved = self._saved_rows() if self._is_resumed else None
            self._history, self._writers = self._open_writers(names, saved)
            if self._history is not None:
                self._writers.insert(0, self._history.write)
        if self._far:
            for leaf in jax.tree.leaves(infos):
                if isinstance(leaf, jax.Array):
                    leaf.copy_to_host_async()
        self._waiting.append(_Entry(first, steps, infos, {}))

    def add_check(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of a check after the last steps."""
        if self._waiting:
            self._waiting[-1] = self._waiting[-1]._replace(metrics=metrics)
        else:
            self._waiting.append(_Entry(step, 0, None, metrics))

    def read(self, leave: int = 0) -> None:
        """Read all entries except the latest ``leave``, waiting for the device if necessary."""
        while len(self._waiting) > leave:
            self._read_one(self._waiting.popleft())

    def _read_one(self, entry: _Entry) -> None:
        last = entry.first + entry.steps
        steps = np.arange(entry.first + 1, last + 1, dtype=np.int32)
        recorded = np.flatnonzero(steps % self.every == 0)
        infos = None
        if entry.steps:
            whole = jax.tree.map(np.asarray, entry.infos)
            infos = jax.tree.map(lambda leaf: leaf[recorded], whole)
            self._steps.append(steps[recorded])
            self._infos.append(infos)
            if self._finder is not None:
                self._finder.add(steps[recorded], infos)
            rates = whole.learning_rate
            rate = None if rates is None else float(np.mean(rates[entry.steps - 1]))
            self._watch(last, float(whole.loss[entry.steps - 1]), rate)
        metrics = {}
        if entry.metrics:
            found = {name: np.asarray(value) for name, value in entry.metrics.items()}
            self._checks.append((last, found))
            self.latest = metrics = {name: _plain(value) for name, value in found.items()}
        if self._writers:
            rows = self._rows(steps[recorded], infos, metrics, last)
            for write in self._writers:
                write(rows)

    def _rows(self, steps: np.ndarray, infos: PyTree, metrics: dict[str, float], last: float) -> list[Row]:
        rows: list[Row] = []
        info_parts = self._columns or []
        if infos is not None:
            leaves = jax.tree.leaves(infos)
            names = ["step", *(name for name, _, _ in info_parts)]
            parts = (leaves[at] if index is None else leaves[at][:, index] for _, at, index in info_parts)
            columns = [steps.tolist(), *map(_plain, parts)]
            rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        if metrics and (not rows or rows[-1]["step"] != last):
            rows.append({"step": last})
        if metrics:
            rows[-1].update({self._metric_columns[name]: value for name, value in metrics.items()})
        return rows

    def _saved_rows(self) -> Iterator[Row]:
        """The rows of all records, from check to check."""
        records, begin = self.records(), 0
        steps, infos = records["step"], records["info"]
        for last, found in [*self._checks, (math.inf, {})]:
            end = int(np.searchsorted(steps, last, side="right"))
            part = jax.tree.map(lambda leaf: leaf[begin:end], infos)  # noqa: B023
            metrics = {name: _plain(value) for name, value in found.items()}
            yield from self._rows(steps[begin:end], part, metrics, last)
            begin = end

    def records(self) -> dict[str, Any]:
        """Everything that was read, in NumPy, for a checkpoint."""
        checks = [metrics for _, metrics in self._checks]
        names = checks[0] if checks else ()
        return {
            "step": np.concatenate([np.zeros(0, np.int32), *self._steps]),
            "info": jax.tree.map(lambda *parts: np.concatenate(parts), *self._infos) if self._infos else None,
            "check_step": np.array([at for at, _ in self._checks], np.int32),
            "metrics": {name: np.stack([metrics[name] for metrics in checks]) for name in names},
        }

    def restore(self, records: dict[str, Any]) -> None:
        """Begin with the records of a checkpoint; dicts stand for the classes of ``aux``."""
        self._is_resumed = True
        if self._finder is not None:
            self._finder.restart(None if records["info"] is None else with_skipped(Info(**records["info"])))
        if records["info"] is not None:
            self._steps, self._infos = [records["step"]], [Info(**records["info"])]
        metrics = records["metrics"]
        for at, step in enumerate(records["check_step"].tolist()):
            self._checks.append((step, {name: values[at] for name, values in metrics.items()}))

    def undo(self, after: int) -> None:
        """Mark the steps after ``after`` as skipped, in the history too."""
        pairs = zip(self._steps, self._infos, strict=True)
        self._infos = [infos._replace(skipped=infos.skipped | (steps > after)) for steps, infos in pairs]
        if self._finder is not None:
            self._finder.restart(self.records()["info"])
        if self._history is not None:
            self._history.rewrite(self._saved_rows())

    def trace(
        self,
        step: int,
        reason: int,
        best_step: jax.Array | None,
        rules: Sequence[str],
        ended_by: str,
        rollbacks: Sequence[tuple[int, int]] = (),
    ) -> Trace:
        """All records that were read, as the trace of a run that has ended after ``step``.

        Args:
          step: steps made in all.
          reason: index of the rule that ended it, counted from 1, or 0.
          best_step: the check whose state is the result, or None.
          rules: the names of the rules.
          ended_by: what ended the run if no rule did.
          rollbacks: the stretches that were undone.
        """
        if reason == 0 and ended_by != ALL_STEPS:
            rules = (*rules, ended_by)
            reason = len(rules)
        # In NumPy, which needs no compilation to concatenate.
        records = self.records()
        infos = _no_info() if records["info"] is None else records["info"]
        arrays: dict[str, Any] = records | {
            "info": infos,
            "stop_step": np.array(step, np.int32),
            "reason": np.array(reason, np.int32),
            "best_step": best_step,
        }
        by_leaf = any(getattr(infos, name, None) is not None for name in ("leaf_grad_norms", "layers"))
        leaves = self.leaves if by_leaf else ()
        return Trace(**jax.device_put(arrays), rules=tuple(rules), leaves=leaves, rollbacks=tuple(rollbacks))


def _with_types_of(like: PyTree, saved: PyTree) -> PyTree:
    """The saved leaves in a tree with the types of ``like``; they are found by their paths."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(saved)}
    return jax.tree.map_with_path(lambda path, _: leaves[path_name(path)], like)


def _no_info() -> Info:
    return Info(jax.device_put(np.zeros(0, np.float32)), None, None, None, None)


def _plain(values: np.ndarray) -> Any:
    """Python scalars, from bfloat16 and similar dtypes too."""
    return values.astype(np.float64).tolist() if jnp.issubdtype(values.dtype, jnp.floating) else values.tolist()


__all__ = ["Recorder", "Writer"]
