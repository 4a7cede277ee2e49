"""What a sweep found: a tidy table, the best setting with its standard error, pictures, files."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra
from nnlearn.sweeps import store
from nnlearn.sweeps.space import Setting
from nnlearn.train.trace import Trace, metric_column

HEADER = ("settings", "varied", "logarithmic", "statics", "seeds", "steps", "full", "metric", "mode", "programs")


class Score(NamedTuple):
    """How one setting did, over its seeds.

    Attributes:
      setting: the hyper-parameters, as ``train`` takes them.
      static: the static choices that go with them; empty where there are none.
      mean: of the metric, over the seeds that ended with a finite one; NaN without any.
      standard_error: of that mean, from the sample's standard deviation; NaN for fewer than two seeds.
      failed: seeds whose metric is not finite.
      seeds: seeds that have run.
    """

    setting: Setting
    static: dict[str, Any]
    mean: float
    standard_error: float
    failed: int
    seeds: int


class Plan(NamedTuple):
    """How a sweep was run.

    Attributes:
      width: runs in a batch, padding included.
      batches: how many were run; those that were read from a folder are not among them.
      bytes: memory that one batch takes on a device, measured from the compiled program.
      limit: the memory that it had to fit, in bytes.
      workers: batches at once.
      devices: devices that share each batch.
      trace_seconds, compile_seconds, seconds: to trace, to compile, and all in all.
    """

    width: int
    batches: int
    bytes: int
    limit: int
    workers: int
    devices: int
    trace_seconds: float
    compile_seconds: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The runs of a sweep: of every static choice, every setting, every seed.

    Attributes:
      settings: the hyper-parameters of each setting.
      varied: the names in them that vary; ``logarithmic``: those drawn evenly in their logarithm.
      statics: the static choices; one empty dict where there are none.
      seeds: the seeds that each setting ran with.
      steps: of a whole run, for each static choice.
      full: whether the traces hold all records, or those at the checks.
      metric, mode: what ``best`` goes by, and whether small or large is better.
      traces: for each static choice a trace with runs (settings, seeds), or None before its first batch is finished. A
        run that is not finished has ``stop_step`` 0.
      programs: for each static choice JAX's version and a hash of what ``train`` computes; empty if it is not known.
      plan: how it was run; None if it was read from files.
    """

    settings: tuple[Setting, ...]
    varied: tuple[str, ...]
    logarithmic: tuple[str, ...]
    statics: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    full: bool
    metric: str
    mode: Literal["min", "max"]
    traces: tuple[Trace | None, ...]
    programs: tuple[str, ...] = ()
    plan: Plan | None = None

    @property
    def done(self) -> np.ndarray:
        """Which runs are finished, shape (statics, settings, seeds)."""
        nothing = np.zeros((len(self.settings), len(self.seeds)), bool)
        return np.stack([nothing if trace is None else np.asarray(trace.stop_step) > 0 for trace in self.traces])

    def values(self, metric: str) -> np.ndarray:
        """A metric of the parameters that each run has ended with, shape (statics, settings, seeds); NaN if not done.

        That is its value at the run's last check, or at the best check where a rule keeps the best parameters.
        """
        return self._of_each(metric, _at_end)

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each finished run.

        Columns are the static choices (as text where they are no scalars), the hyper-parameters that vary, ``seed``,
        every metric at the end of the run (``check/<metric>`` where a column has its name), ``best_<metric>`` (the
        best value of the sweep's metric at any check), ``stop_step`` and ``stopped_by``.
        """
        shape = (len(self.statics), len(self.settings), len(self.seeds))
        table = {}
        for name in self.statics[0]:
            table[name] = _spread([static[name] for static in self.statics], 0, shape)
        for name in self.varied:
            table[name] = _spread([setting[name] for setting in self.settings], 1, shape)
        table["seed"] = _spread(self.seeds, 2, shape)
        for name in self._metrics():
            table[metric_column(name, table)] = self.values(name)
        best_of = np.fmin if self.mode == "min" else np.fmax

        def best_value(trace, name):
            made = np.asarray(trace.check_step) <= np.asarray(trace.stop_step)[..., None]
            values = np.where(made, np.asarray(trace.metrics[name], float), np.nan)
            return best_of.reduce(values, axis=-1, initial=np.nan)

        table[f"best_{self.metric}"] = self._of_each(self.metric, best_value)
        table["stop_step"] = self._of_each("", lambda trace, _: np.asarray(trace.stop_step), 0)
        table["stopped_by"] = self._of_each("", lambda trace, _: trace.stopped_by, "")
        done = self.done
        return {name: np.asarray(column)[done] for name, column in table.items()}

    def to_pandas(self):
        """``columns`` as a ``pandas.DataFrame``.

        Raises:
          ImportError: pandas is not installed.
        """
        return import_extra("pandas", "to_pandas", "pandas").DataFrame(self.columns())

    def ranking(self) -> list[Score]:
        """All settings that have run, the best first: by how many seeds failed, then by the mean of the metric.

        A seed that failed counts before any mean, because the mean over those that are left would praise a setting for
        losing its worst seed.
        """
        values, done = self.values(self.metric), self.done
        scores = [
            _score(setting, static, values[at, index][done[at, index]])
            for at, static in enumerate(self.statics)
            for index, setting in enumerate(self.settings)
            if done[at, index].any()
        ]
        sign = 1 if self.mode == "min" else -1
        fewest = len(self.seeds)

        def place(score):
            lost = score.failed + fewest - score.seeds
            return lost, np.inf if np.isnan(score.mean) else sign * score.mean

        return sorted(scores, key=place)

    def best(self) -> Score:
        """The best setting, see ``ranking``.

        Raises:
          ValueError: no run has ended with a finite metric.
        """
        ranking = self.ranking()
        if not ranking or np.isnan(ranking[0].mean):
            raise ValueError(f"no run of this sweep has ended with a finite {self.metric!r}")
        return ranking[0]

    def run(self, setting: int, seed: int = 0, static: int = 0) -> Trace:
        """The trace of one run, by its places in ``settings``, ``seeds`` and ``statics``.

        Raises:
          ValueError: it is not finished.
        """
        if not self.done[static, setting, seed]:
            raise ValueError(f"the run of setting {setting} and seed {seed} is not finished")
        return self.traces[static].run(setting, seed)

    def plot(self, path: str | Path | None = None):
        """Draw how much each hyper-parameter matters: a panel for each, a dot for each run.

        Args:
          path: where to save the picture; None to leave that to you.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from nnlearn.figures.sensitivity import draw_results

        return draw_results(self, path)

    def save(self, folder: str | Path) -> None:
        """Write the results to a folder, as ``sweep(..., folder=...)`` does.

        Raises:
          ValueError: the folder holds another sweep, or another process is using it.
        """
        with store.Store(folder, self.header()) as keep:
            for at, trace in enumerate(self.traces):
                if trace is not None:
                    keep.write(at, 0, 0, trace)

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read what ``save`` or ``sweep(..., folder=...)`` has written, be it finished or not.

        Raises:
          ValueError: it is no sweep, or damaged.
        """
        header = store.read_header(folder)
        facts = {name: header[name] for name in HEADER if name in header}
        facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        shape = (len(facts["settings"]), len(facts["seeds"]))
        traces: list[Trace | None] = [None] * len(facts["statics"])
        for at, setting, seed, batch in store.read_batches(folder):
            traces[at] = fill(traces[at], batch, setting, seed, shape)
        return cls(**facts, traces=tuple(traces))

    def header(self) -> dict[str, Any]:
        """What tells this sweep from others, as JSON can hold it."""
        return store.jsonable({name: getattr(self, name) for name in HEADER})

    def _metrics(self) -> list[str]:
        return list(dict.fromkeys(name for trace in self.traces if trace is not None for name in trace.metrics))

    def _of_each(self, name, function, missing=np.nan):
        shape = (len(self.settings), len(self.seeds))
        parts = []
        for trace in self.traces:
            absent = trace is None or (name and name not in trace.metrics)
            part = np.full(shape, missing) if absent else np.asarray(function(trace, name))
            hidden = isinstance(missing, float) and not absent
            parts.append(np.where(np.asarray(trace.stop_step) > 0, part, missing) if hidden else part)
        return np.stack(parts)


def fill(total: Trace | None, batch: Trace, setting: int, seed: int, shape: tuple[int, int]) -> Trace:
    """Put the finished runs of a batch in their places; into new memory, all not finished, where ``total`` is None."""
    batch = jax.tree.map(np.asarray, batch)

    def blank(leaf):
        return np.full(shape + leaf.shape[2:], np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0, leaf.dtype)

    total = jax.tree.map(blank, batch) if total is None else total
    settings, seeds = np.nonzero(batch.stop_step > 0)

    def put(into, leaf):
        into[settings + setting, seeds + seed] = leaf[settings, seeds]

    jax.tree.map(put, total, batch)
    return total


def _at_end(trace: Trace, name: str) -> np.ndarray:
    end = trace.stop_step if trace.best_step is None else trace.best_step
    at = np.argmax(np.asarray(trace.check_step) == np.asarray(end)[..., None], axis=-1)
    return np.take_along_axis(np.asarray(trace.metrics[name]), at[..., None], axis=-1)[..., 0].astype(np.float64)


def _score(setting: Setting, static: dict, values: np.ndarray) -> Score:
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if finite.size else float("nan")
    error = float(finite.std(ddof=1) / finite.size**0.5) if finite.size > 1 else float("nan")
    return Score(setting, static, mean, error, int(values.size - finite.size), int(values.size))


def _spread(values: Any, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    plain = all(np.ndim(value) == 0 and not callable(value) for value in values)
    column = np.asarray(values if plain else [json.dumps(store.jsonable(value)) for value in values])
    return np.broadcast_to(column.reshape([-1 if at == axis else 1 for at in range(len(shape))]), shape)


__all__ = ["Plan", "Results", "Score", "fill"]
