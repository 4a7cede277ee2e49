"""The outcome of a sweep: a tidy table, the best setting with its standard error, figures and files."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra
from nnlearn.figures.page.record import RunRecord
from nnlearn.sweeps.space import Setting
from nnlearn.sweeps.store import Store, jsonable, read_batches, read_header
from nnlearn.train.columns import metric_column
from nnlearn.train.records import run_records, write_records
from nnlearn.train.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

HEADER = ("settings", "varied", "logarithmic", "statics", "seeds", "steps", "full", "metric", "mode", "programs")
SHOWN = 10  # settings that ``print`` shows


class Score(NamedTuple):
    """The score of one setting over its seeds.

    Attributes:
      setting: the hyper-parameters, as ``train`` takes them.
      static: the static choices; empty if the sweep has none.
      mean: mean of the metric over the seeds with a finite value; NaN if there is none.
      standard_error: standard error of that mean, from the sample standard deviation; NaN for fewer than two seeds.
      failed: number of seeds whose metric is not finite.
      seeds: number of seeds that have run.
    """

    setting: Setting
    static: dict[str, Any]
    mean: float
    standard_error: float
    failed: int
    seeds: int

    def __repr__(self) -> str:
        numbers = f"mean={self.mean:.4g}, standard_error={self.standard_error:.2g}"
        shown = f"setting={{{_in_words(self.setting)}}}, static={{{_in_words(self.static)}}}, {numbers}"
        return f"Score({shown}, failed={self.failed}, seeds={self.seeds})"

    def line(self, names: Sequence[str]) -> str:
        """The score and the named hyper-parameters in one line."""
        error = "" if np.isnan(self.standard_error) else f" +- {self.standard_error:.2g}"
        failed = f" ({self.failed} of {self.seeds} failed)" if self.failed else ""
        chosen = self.static | {name: self.setting[name] for name in names}
        return f"{self.mean:.4g}{error}{failed}  {_in_words(chosen)}"


def _in_words(values: Mapping[str, Any]) -> str:
    """Hyper-parameters in four digits.

    >>> _in_words({"rate": 0.123456789, "layers": 2, "shape": (2, 2)})
    'rate: 0.1235, layers: 2, shape: (2, 2)'
    """
    plain = {
        name: value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
        for name, value in values.items()
    }
    return ", ".join(
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in plain.items()
    )


class Execution(NamedTuple):
    """How a sweep was run.

    Attributes:
      width: runs in a batch, padding included.
      batches: number of batches that were run, without those read from a folder.
      bytes: memory that one batch takes on a device, measured from the compiled program.
      limit: bytes that were available for it.
      workers: number of batches that ran concurrently.
      devices: number of devices that shared each batch.
      trace_seconds, compile_seconds, seconds: time to trace, time to compile, and total time.
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Results:
    """The runs of a sweep: one for every static choice, setting and seed. ``print`` shows the best settings.

    Attributes:
      settings: the hyper-parameters of each setting.
      varied: the names of the hyper-parameters that vary.
      logarithmic: the names among them that are drawn uniformly in their logarithm.
      statics: the static choices; one empty dict if the sweep has none.
      seeds: the seeds of each setting.
      steps: steps of a whole run, for each static choice.
      full: whether the traces hold all records, or only those at the checks.
      metric: the metric that ``best`` compares.
      mode: whether a small ("min") or a large ("max") metric is better.
      traces: for each static choice a trace with runs (settings, seeds), or None before its first batch is finished.
        An unfinished run has ``stop_step`` 0.
      programs: for each static choice JAX's version and a hash of what ``train`` computes; empty if unknown.
      execution: how the sweep was run; None if the results were read from files.
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
    execution: Execution | None = None

    def __repr__(self) -> str:
        done = self.done
        runs = f"{done.sum()} of {done.size}" if not done.all() else f"{done.size}"
        return f"Results({runs} runs: {len(self.settings)} settings, {len(self.seeds)} seeds, varied {self.varied})"

    def __str__(self) -> str:
        ranking = self.ranking()
        lines = [repr(self), f"by {self.metric}, the {'lowest' if self.mode == 'min' else 'highest'} first:"]
        lines += [f"  {score.line(self.varied)}" for score in ranking[:SHOWN]]
        more = len(ranking) - SHOWN
        return "\n".join([*lines, *([f"  and {more} more: ranking(), to_pandas()"] if more > 0 else [])])

    @property
    def done(self) -> np.ndarray:
        """Booleans of shape (statics, settings, seeds): which runs are finished."""
        return self._of_each(lambda trace: np.asarray(trace.stop_step) > 0, False)

    def values(self, metric: str) -> np.ndarray:
        """A metric at the end of each run, shape (statics, settings, seeds); NaN for an unfinished run.

        This is the value at the run's last check, or at its best check if a rule keeps the best parameters.
        """
        return self._of_each(lambda trace: _at_end(trace, metric), np.nan, metric)

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each finished run.

        The columns are the static choices (as text if they are not scalars), the hyper-parameters that vary, ``seed``,
        every metric at the end of the run (``check/<metric>`` if another column has that name), ``best_<metric>`` (the
        best value of the sweep's metric at any check), ``stop_step`` and ``stopped_by``.
        """
        table = self._hparam_columns()
        table["seed"] = _spread(self.seeds, 2, self._shape)
        for name in dict.fromkeys(name for trace in self.traces if trace is not None for name in trace.metrics):
            table[metric_column(name, table)] = self.values(name)
        best_of = np.fmin if self.mode == "min" else np.fmax

        def best_value(trace: Trace) -> np.ndarray:
            made = np.asarray(trace.check_step) <= np.asarray(trace.stop_step)[..., None]
            values = np.where(made, np.asarray(trace.metrics[self.metric], float), np.nan)
            return best_of.reduce(values, axis=-1, initial=np.nan)

        table[f"best_{self.metric}"] = self._of_each(best_value, np.nan, self.metric)
        table["stop_step"] = self._of_each(lambda trace: np.asarray(trace.stop_step), 0)
        table["stopped_by"] = self._of_each(lambda trace: np.asarray(trace.stopped_by), "")
        done = self.done
        return {name: column[done] for name, column in table.items()}

    def to_pandas(self) -> "DataFrame":
        """``columns`` as a ``pandas.DataFrame``.

        Raises:
          ImportError: if pandas is not installed.
        """
        return import_extra("pandas", "to_pandas", "pandas").DataFrame(self.columns())

    def ranking(self) -> list[Score]:
        """All settings that have run, the best first, ordered by the number of failed seeds, then by the mean metric.

        Failed seeds come first because the mean over the remaining seeds would favour a setting that loses its worst
        seed.
        """
        values, done = self.values(self.metric), self.done
        scores = [
            _score(setting, static, values[at, index][done[at, index]])
            for at, static in enumerate(self.statics)
            for index, setting in enumerate(self.settings)
            if done[at, index].any()
        ]
        sign = 1 if self.mode == "min" else -1

        def place(score: Score) -> tuple[int, float]:
            missing = len(self.seeds) - score.seeds
            return score.failed + missing, np.inf if np.isnan(score.mean) else sign * score.mean

        return sorted(scores, key=place)

    def best(self) -> Score:
        """The best setting, see ``ranking``.

        Raises:
          ValueError: if no run ended with a finite metric.
        """
        ranking = self.ranking()
        if not ranking or np.isnan(ranking[0].mean):
            raise ValueError(f"no run of this sweep ended with a finite {self.metric!r}")
        return ranking[0]

    def run(self, setting: int, seed: int = 0, static: int = 0) -> Trace:
        """The trace of one run, by its indices into ``settings``, ``seeds`` and ``statics``.

        Raises:
          ValueError: if the run is not finished.
        """
        trace = self.traces[static]
        if trace is None or not self.done[static, setting, seed]:
            raise ValueError(f"the run of setting {setting} and seed {seed} is not finished")
        return trace.run(setting, seed)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the metric against each hyper-parameter: one panel for each, one dot for each run.

        Args:
          path: file for the figure; None to write none.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: if matplotlib is not installed.
          ValueError: if no run ended with a finite metric.
        """
        from nnlearn.figures.sweep import draw_sweep

        best, done, columns = self.best(), self.done, self._hparam_columns()
        at = next(at for at, static in enumerate(self.statics) if static is best.static)
        index = next(index for index, setting in enumerate(self.settings) if setting is best.setting)
        return draw_sweep(
            {name: column[done] for name, column in columns.items()},
            self.values(self.metric)[done],
            best={name: column[at, index, 0] for name, column in columns.items()},
            best_score=best.mean,
            metric=self.metric,
            logarithmic=self.logarithmic,
            path=path,
        )

    def report(self, path: str | Path, *, title: str | None = None, diagnosis: Any = None) -> Path:
        """Write a page that can be read in any browser, or a figure for a paper, as ``Trace.report`` does.

        Besides the curves, with a band over the seeds of each setting, the page shows the metric against each
        hyper-parameter, parallel coordinates, and a table of the settings.

        Args:
          path: an ``.html`` file for the page, or a ``.pdf``, ``.svg`` or ``.png`` file for the figure.
          title: the heading; the file's name by default.
          diagnosis: a ``nnlearn.diagnose.Report``, whose findings come first.

        Returns:
          The path.

        Raises:
          ValueError: if the suffix is unknown, or no run is finished.
          ImportError: if a figure is drawn without matplotlib.
        """
        facts = {"sweep": f"{len(self.settings)} settings, {len(self.seeds)} seeds"}
        if self.execution is not None:
            facts["sweep"] += f", {self.execution.seconds:.1f} s with compilation"
        return write_records(
            path,
            self.records(Path(path).stem),
            title=title or Path(path).stem,
            diagnosis=diagnosis,
            metric=self.metric,
            mode=self.mode,
            logarithmic=self.logarithmic,
            facts=facts,
        )

    def records(self, name: str = "sweep") -> list[RunRecord]:
        """The finished runs as plain arrays, for pages and figures."""
        found: list[RunRecord] = []
        for at, (static, trace) in enumerate(zip(self.statics, self.traces, strict=True)):
            if trace is None:
                continue
            labels = {key: _spread([value] * len(self.settings), 0, self._shape[1:]) for key, value in static.items()}
            for key in self.settings[0]:
                labels[key] = _spread([setting[key] for setting in self.settings], 0, self._shape[1:])
            labels["seed"] = _spread(self.seeds, 1, self._shape[1:])
            done = self.done[at].ravel()
            found += [run for run, is_done in zip(run_records(trace, name, labels), done, strict=True) if is_done]
        return found

    def save(self, folder: str | Path) -> None:
        """Write the results to a folder, in the format of ``sweep(..., folder=...)``.

        Raises:
          ValueError: if the folder holds another sweep, or another process is using it.
        """
        with Store(folder, self.header()) as store:
            for at, trace in enumerate(self.traces):
                if trace is not None:
                    store.write(at, 0, 0, trace)

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read the results of ``save`` or ``sweep(..., folder=...)``, finished or not.

        Raises:
          ValueError: if the folder holds no sweep, or a damaged one.
        """
        header = read_header(folder)
        facts: dict[str, Any] = {name: header[name] for name in HEADER if name in header}
        facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        shape = (len(facts["settings"]), len(facts["seeds"]))
        traces: list[Trace | None] = [None] * len(facts["statics"])
        for at, setting, seed, batch in read_batches(folder):
            traces[at] = fill(traces[at], batch, setting, seed, shape)
        return cls(**facts, traces=tuple(traces))

    def header(self) -> dict[str, Any]:
        """A description, in JSON types, that distinguishes this sweep from others."""
        return jsonable({name: getattr(self, name) for name in HEADER})

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self.statics), len(self.settings), len(self.seeds)

    def _hparam_columns(self) -> dict[str, np.ndarray]:
        """By name the static choices and the hyper-parameters that vary, shape (statics, settings, seeds)."""
        table = {name: _spread([static[name] for static in self.statics], 0, self._shape) for name in self.statics[0]}
        return table | {
            name: _spread([setting[name] for setting in self.settings], 1, self._shape) for name in self.varied
        }

    def _of_each(self, function: Callable[[Trace], np.ndarray], missing: Any, metric: str | None = None) -> np.ndarray:
        """An array of shape (statics, settings, seeds), with ``missing`` for runs unfinished or without ``metric``."""
        parts = []
        for trace in self.traces:
            if trace is None or (metric is not None and metric not in trace.metrics):
                parts.append(np.full(self._shape[1:], missing))
            else:
                parts.append(np.where(np.asarray(trace.stop_step) > 0, function(trace), missing))
        return np.stack(parts)


def fill(total: Trace | None, batch: Trace, setting: int, seed: int, shape: tuple[int, int]) -> Trace:
    """Copy the finished runs of a batch into ``total``, in place; None stands for a new trace without finished runs."""
    batch = jax.tree.map(np.asarray, batch)

    def blank(leaf: np.ndarray) -> np.ndarray:
        return np.full(shape + leaf.shape[2:], np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0, leaf.dtype)

    filled: Trace = jax.tree.map(blank, batch) if total is None else total
    settings, seeds = np.nonzero(np.asarray(batch.stop_step) > 0)

    def put(into: np.ndarray, leaf: np.ndarray) -> None:
        into[settings + setting, seeds + seed] = leaf[settings, seeds]

    jax.tree.map(put, filled, batch)
    return filled


def _at_end(trace: Trace, name: str) -> np.ndarray:
    end = trace.stop_step if trace.best_step is None else trace.best_step
    at = np.argmax(np.asarray(trace.check_step) == np.asarray(end)[..., None], axis=-1)
    return np.take_along_axis(np.asarray(trace.metrics[name]), at[..., None], axis=-1)[..., 0].astype(np.float64)


def _score(setting: Setting, static: dict[str, Any], values: np.ndarray) -> Score:
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if finite.size else float("nan")
    error = float(finite.std(ddof=1) / finite.size**0.5) if finite.size > 1 else float("nan")
    return Score(setting, static, mean, error, int(values.size - finite.size), int(values.size))


def _spread(values: Sequence[Any], axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """The values along one axis of an array of ``shape``; as JSON text if any of them is not a scalar."""
    plain = all(np.ndim(value) == 0 and not callable(value) for value in values)
    column = np.asarray(values if plain else [json.dumps(jsonable(value)) for value in values])
    return np.broadcast_to(column.reshape([-1 if at == axis else 1 for at in range(len(shape))]), shape)


__all__ = ["Execution", "Results", "Score", "fill"]
