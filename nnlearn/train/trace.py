"""The record of a run, which can be sliced, tabulated, saved and plotted."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra
from nnlearn.files import replacing
from nnlearn.packing import unpack
from nnlearn.train.columns import info_columns, metric_column
from nnlearn.train.state import TrainState
from nnlearn.train.step import Info
from nnlearn.tree import is_readable, path_name, sizes
from nnlearn.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ALL_STEPS = "all steps"  # ``stopped_by`` of a run that no rule has stopped
FORMAT = "nnlearn trace 2"
BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)  # a flipped bit can also mark the file as encrypted


class SkippedStep(NamedTuple):
    """A step that did not change the parameters.

    Attributes:
      step: the number of steps, this one included.
      why: ``"loss is not finite"``, ``"gradient is not finite"``, ``"spike"``, or ``"rolled back"``.
      loss: the loss of its batch.
    """

    step: int
    why: str
    loss: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Trace:
    """The record of one or many runs. Under ``vmap`` every array has the axes of the runs in front.

    Attributes:
      step: the number of steps at each record, shape (..., records).
      info: ``Info``, stacked over the records.
      check_step: the number of steps at each check, shape (..., checks).
      metrics: a dict from names to values at the checks, shape (..., checks): ``train_loss``, which is the mean over
        the steps since the previous check that were not skipped, and the results of ``evaluate``.
      stop_step: the total number of steps, shape (...). Records and metrics of a stopped run beyond this step are
        infinite, or 0 for integers; ``made`` marks the others. They are not NaN, so that ``jax_debug_nans`` only raises
        for real faults.
      reason: the index of the rule that stopped the run, counted from 1; 0 if none did. ``stopped_by`` is its name.
      best_step: the check that provided the final state, and the ``step`` of that state; None if no rule keeps one.
      rules: the names of the rules.
      leaves: the names of the parameters, in the order of ``info.leaf_grad_norms`` and ``info.layers``; empty unless
        one of them is recorded.
      rollbacks: the first and last step of each stretch that ``RollBack`` has undone.

    >>> import nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd(0.1), batches, jnp.ones(()), steps=3)
    >>> state, trace = train({}, 0)
    >>> trace
    Trace(3 steps, loss 1 -> 0.41, train_loss 0.683)
    >>> state
    TrainState(step 3, params: 1 array of 1 number, opt_state: 2 arrays of 2 numbers)
    """

    step: jax.Array
    info: Info
    check_step: jax.Array
    metrics: dict[str, jax.Array]
    stop_step: jax.Array
    reason: jax.Array
    best_step: jax.Array | None = None
    rules: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    leaves: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    rollbacks: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"static": True})

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self)
        if not all(is_readable(leaf) for leaf in leaves):  # shapes or tracers
            return f"Trace(of {sizes(leaves) if all(hasattr(leaf, 'shape') for leaf in leaves) else leaves})"
        steps = np.asarray(self.stop_step)
        if self.runs:
            facts = [f"runs {self.runs}", f"{steps.max(initial=0)} steps"]
            return f"Trace({', '.join([*facts, *self.metrics])})"
        losses = np.asarray(self.loss)[np.asarray(self.made)]
        facts = [f"{steps} steps"] + ([f"loss {losses[0]:.3g} -> {losses[-1]:.3g}"] if losses.size else [])
        facts += [] if self.stopped_by == ALL_STEPS else [f"stopped by {self.stopped_by}"]
        end = steps if self.best_step is None else np.asarray(self.best_step)
        facts += [] if self.best_step is None else [f"best step {end}"]
        checked = np.flatnonzero(np.asarray(self.check_step) <= end)
        if checked.size:
            facts += [f"{name} {np.asarray(values)[checked[-1]]:.3g}" for name, values in self.metrics.items()]
        return f"Trace({', '.join(facts)})"

    @property
    def loss(self) -> jax.Array:
        """The loss of the batch at each recorded step, shape (..., records)."""
        return self.info.loss

    @property
    def runs(self) -> tuple[int, ...]:
        """The shape of the runs: ``()`` for a single run, ``(64, 4)`` for a grid."""
        return jnp.shape(self.stop_step)

    @property
    def made(self) -> jax.Array:
        """Booleans of shape (..., records): False for records beyond the end of a stopped run.

        >>> import nnlearn
        >>> train = nnlearn.make_train(
        ...     lambda p, b, k: p**2, nnlearn.sgd(0.1), nnlearn.generated(lambda key, step: step), jnp.ones(()),
        ...     steps=3, check_every=1, stop=nnlearn.reached("train_loss", 0.7),
        ... )
        >>> trace = train({}, 0)[1]
        >>> trace.loss[trace.made]
        Array([1.  , 0.64], dtype=float32)
        """
        return self.step <= jnp.expand_dims(self.stop_step, -1)

    @property
    def stopped_by(self) -> np.ndarray | str:
        """The name of the rule that stopped each run, or ``"all steps"``."""
        names = np.array([ALL_STEPS, *self.rules], dtype=object)[np.asarray(self.reason)]
        return names if self.runs else str(names)

    def skipped_steps(self) -> list["SkippedStep"]:
        """The recorded steps of one run that were skipped or undone, and why.

        Raises:
          ValueError: if this is the trace of many runs; ``trace.run(3)`` is that of one.

        >>> import nnlearn
        >>> batches = nnlearn.generated(lambda key, step: jnp.where(step == 1, jnp.nan, 1.0))
        >>> tx = nnlearn.apply_if_finite(nnlearn.sgd(0.1), 5)
        >>> train = nnlearn.make_train(lambda p, b, k: p * b, tx, batches, jnp.ones(()), steps=3)
        >>> train({}, 0)[1].skipped_steps()
        [SkippedStep(step=2, why='loss is not finite', loss=nan)]
        """
        if self.runs:
            raise ValueError(f"this is a trace of runs {self.runs}: give one, trace.run(0).skipped_steps()")
        if self.info.skipped is None:
            return []
        norms = np.zeros_like(self.loss) if self.info.grad_norm is None else np.asarray(self.info.grad_norm)
        at = np.flatnonzero(np.asarray(self.info.skipped) & np.asarray(self.made))
        columns = (np.asarray(self.step)[at].tolist(), np.asarray(self.loss, np.float64)[at].tolist(), norms[at])
        return [SkippedStep(step, self._why(step, loss, norm), loss) for step, loss, norm in zip(*columns, strict=True)]

    def _why(self, step: int, loss: float, norm: Any) -> str:
        if not np.isfinite(loss):
            return "loss is not finite"
        if not np.isfinite(norm):
            return "gradient is not finite"
        return "rolled back" if any(first <= step <= last for first, last in self.rollbacks) else "spike"

    def run(self, *index: int) -> "Trace":
        """One of many runs, or several if there are fewer indices than axes.

        >>> import nnlearn
        >>> batches = nnlearn.generated(lambda key, step: step)
        >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd, batches, jnp.ones(()), steps=3)
        >>> _, trace = jax.vmap(train, in_axes=(0, None))(jnp.array([0.1, 0.2]), 0)
        >>> trace.runs, trace.run(1).loss
        ((2,), Array([1.    , 0.36  , 0.1296], dtype=float32))
        """
        if len(index) > len(self.runs):
            raise IndexError(f"a trace of runs {self.runs} has no run {index}")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def __getitem__(self, steps: slice) -> "Trace":
        """The records of steps ``steps.start`` to ``steps.stop - 1``, as in ``trace[100:200]``."""
        if not isinstance(steps, slice) or steps.step is not None:
            raise TypeError(f"a trace is sliced by steps, trace[100:200], got {steps!r}; for one of many runs: run(3)")

        first = -np.inf if steps.start is None else steps.start
        end = np.inf if steps.stop is None else steps.stop

        def cut(tree: Any, step: jax.Array) -> Any:
            row = np.asarray(step)[(0,) * len(self.runs)]  # the steps are the same in all runs
            kept = np.flatnonzero((first <= row) & (row < end))
            return jax.tree.map(lambda leaf: jnp.take(leaf, kept, axis=len(self.runs)), tree)

        step, info = cut((self.step, self.info), self.step)
        check_step, metrics = cut((self.check_step, self.metrics), self.check_step)
        return dataclasses.replace(self, step=step, info=info, check_step=check_step, metrics=metrics)

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each run and step that has a record or a check. Missing values are NaN.

        The columns are ``run_0``, ``run_1`` ... (the axes of the runs), ``step``, all scalars of ``info``, the norm of
        each parameter's gradient (``leaf_grad_norms/<name>``) and others like it (``layers/cosine/<name>``), each of
        several learning rates (``learning_rate/0``) and all metrics. A metric with the name of an earlier column, such
        as ``loss``, becomes ``check/loss``. Rows beyond the end of a run are omitted.
        """
        lead = len(self.runs)
        steps = np.unique(np.concatenate([np.ravel(self.step), np.ravel(self.check_step)]))
        shape = (*self.runs, len(steps))
        table = {f"run_{axis}": np.broadcast_to(_along(axis, lead, size), shape) for axis, size in enumerate(self.runs)}
        table["step"] = np.broadcast_to(steps, shape)

        def spread(values, at):
            values = np.asarray(values)
            out = np.full(shape, np.nan, np.result_type(values.dtype, np.float32))
            if values.size:
                out[..., np.searchsorted(steps, np.asarray(at).reshape(-1, at.shape[-1])[0])] = values
            return out

        leaves = jax.tree.leaves(self.info)
        for name, at, index in info_columns(self.info, lead, self.leaves):
            table[name] = spread(leaves[at] if index is None else np.asarray(leaves[at])[..., index], self.step)
        for name, leaf in self.metrics.items():
            table[metric_column(name, table)] = spread(leaf, self.check_step)
        kept = table["step"] <= np.asarray(self.stop_step)[..., None]
        return {name: column[kept] for name, column in table.items()}

    def to_pandas(self) -> "DataFrame":
        """``columns`` as a ``pandas.DataFrame``.

        Raises:
          ImportError: if pandas is not installed.
        """
        return import_extra("pandas", "to_pandas", "pandas").DataFrame(self.columns())

    def save(self, path: str | Path) -> None:
        """Write the trace to an ``.npz`` file with checksums. An interrupted write leaves no partial file."""
        leaves = jax.tree.leaves_with_path(self)
        arrays: dict[str, Any] = {f"leaf_{at}": _as_native(np.asarray(leaf)) for at, (_, leaf) in enumerate(leaves)}
        header: dict[str, Any] = {"format": FORMAT, "rules": self.rules, "leaves": self.leaves}
        header["rollbacks"] = self.rollbacks
        header["paths"] = [_words(path) for path, _ in leaves]
        header["dtypes"] = [jnp.result_type(leaf).name for _, leaf in leaves]
        with replacing(path, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a file that ``save`` wrote. Containers in ``info.aux`` become nested dicts.

        Loading runs no code from the file.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is damaged or not a trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                if header.get("format") != FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
                tree: dict[str, Any] = {}
                for at, words in enumerate(header["paths"]):
                    node = tree
                    for word in words[:-1]:
                        node = node.setdefault(word, {})
                    node[words[-1]] = jnp.asarray(file[f"leaf_{at}"].view(jnp.dtype(header["dtypes"][at])))
            fields: dict[str, Any] = {"metrics": {}} | tree
            fields["info"] = Info(**{name: None for name in Info._fields} | tree.get("info", {}))
            fields |= {"rules": tuple(header["rules"]), "leaves": tuple(header.get("leaves", ()))}
            return cls(rollbacks=tuple(map(tuple, header.get("rollbacks", ()))), **fields)
        except (OSError, KeyError, TypeError, ValueError, EOFError, NotImplementedError, *BAD_ARCHIVE) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"cannot read {str(path)!r} as a trace: {error}") from error

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot the loss over the steps and every metric over the checks, with one line for each run.

        Args:
          path: the image file to write, or None to write no file.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: if matplotlib is not installed.
        """
        from nnlearn.figures.trace import draw_trace

        return draw_trace(self.step, self.loss, self.check_step, self.metrics, self.stop_step, path)

    def report(
        self,
        path: str | Path,
        *,
        labels: Mapping[str, ArrayLike] | None = None,
        title: str | None = None,
        diagnosis: Any = None,
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> Path:
        """Write a page that can be read in any browser, or a figure for a paper.

        An ``.html`` page holds everything in one file and needs no network: the curves of loss, metrics and schedule,
        heat maps of each parameter if ``monitor_layers`` or ``leaf_grad_norms`` recorded them, the largest eigenvalue
        beside 2 / learning rate if a metric or ``aux`` is named ``sharpness``, and hardware, versions and command. A
        ``.pdf``, ``.svg`` or ``.png`` is a static figure as wide as one column of a paper.

        Args:
          path: the file, whose suffix selects page or figure.
          labels: by name, hyper-parameters of the runs: arrays that broadcast to ``runs``. Runs that differ only in
            ``seed`` are drawn as one line with a band.
          title: the heading; the file's name by default.
          diagnosis: a ``nnlearn.diagnose.Report``, whose findings come first.
          metric: the metric that ranks the runs; by default a loss of ``evaluate``, else its first metric, else the
            training loss.
          mode: whether a small ("min") or a large ("max") metric is better; by default large for names of scores, such
            as ``accuracy``, and small for all others.

        Returns:
          The path.

        Raises:
          ValueError: if a label does not fit, or the suffix is unknown.
          ImportError: if a figure is drawn without matplotlib.

        >>> import nnlearn, tempfile
        >>> batches = nnlearn.generated(lambda key, step: step)
        >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd, batches, jnp.ones(()), steps=3)
        >>> rates = jnp.array([0.1, 0.2])
        >>> _, trace = jax.vmap(train, in_axes=(0, None))(rates, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = trace.report(Path(folder) / "rates.html", labels={"rate": rates})
        ...     page.read_text()[:15]
        '<!doctype html>'
        """
        from nnlearn.train.records import run_records, write_records

        name = Path(path).stem
        records = run_records(self, name, labels)
        return write_records(path, records, title=title or name, diagnosis=diagnosis, metric=metric, mode=mode)


def _along(axis: int, lead: int, size: int) -> np.ndarray:
    return np.arange(size).reshape((1,) * axis + (size,) + (1,) * (lead - axis))


def leaf_names(state: TrainState) -> tuple[str, ...]:
    """The names of the parameters in a state, in the tree's order.

    >>> import nnlearn
    >>> leaf_names(nnlearn.init_state({"layer": {"w": jnp.ones(2)}}, nnlearn.sgd(0.1)))
    ('layer/w',)
    """
    params = jax.eval_shape(lambda stored: unpack(stored), state.stored)
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(params))


def _as_native(array: np.ndarray) -> np.ndarray:
    """The array, or its bits as integers if NumPy lacks the dtype, such as bfloat16."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _words(path: Sequence[Any]) -> list[str]:
    return [path_name((part,)) for part in path]


def join(parts: Sequence[Trace]) -> Trace:
    """Concatenate the traces of consecutive stretches of a run; traces in NumPy stay in NumPy.

    >>> import nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd, batches, jnp.ones(()), steps=4, check_every=2)
    >>> run = train.start(0.1, 0)
    >>> run, first = train.advance(0.1, run, 0, 2)
    >>> run, second = train.advance(0.1, run, 2, 2)
    >>> join([first, second]).step
    Array([1, 2, 3, 4], dtype=int32)
    """
    last, axis = parts[-1], len(parts[-1].runs)

    def along(*leaves):
        on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)  # then nothing is compiled
        return (np if on_host else jnp).concatenate(leaves, axis=axis)

    timed = [(part.step, part.info, part.check_step, part.metrics) for part in parts]
    step, info, check_step, metrics = jax.tree.map(along, *timed)
    return dataclasses.replace(last, step=step, info=info, check_step=check_step, metrics=metrics)


def _static_parts(rules: list, leaves: list, rollbacks: list) -> tuple:
    return tuple(rules), tuple(leaves), tuple(map(tuple, rollbacks))


jax.export.register_pytree_node_serialization(
    Trace,
    serialized_name="nnlearn.Trace",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda content: _static_parts(*json.loads(content)),
    from_children=lambda aux_data, children: Trace(*children, *aux_data),
)

__all__ = ["SkippedStep", "Trace", "join"]
