"""What a run recorded, as one type: to slice, to tabulate, to save, to draw."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra
from nnlearn.files import replacing
from nnlearn.packing import unpack
from nnlearn.train.state import TrainState
from nnlearn.train.step import Info
from nnlearn.tree import path_name

ALL_STEPS = "all steps"  # what ended a run that no rule has stopped
FORMAT = "nnlearn trace 2"
BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)  # a flipped bit may also say that it is encrypted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The record of a run, or of many: under ``vmap`` every array has the axes of the runs in front.

    Attributes:
      step: steps made when each record was taken, shape (..., records).
      info: ``Info``, stacked over the records.
      check_step: steps made at each check, shape (..., checks).
      metrics: by name, their values at the checks, shape (..., checks): ``train_loss``, the mean over the steps since
        the check before that were not skipped, and what ``evaluate`` returned.
      stop_step: steps made in all, shape (...). What lies beyond it in a run that has stopped is infinite, or 0 where
        the numbers are integers; ``made`` tells which records those are. It is not NaN, so that ``jax_debug_nans``
        raises only at what went wrong.
      reason: which rule has stopped the run, counted from 1; 0 if none did. ``stopped_by`` says it in words.
      best_step: the check whose state the run has ended with, and that state's ``step``; None where no rule keeps one.
      rules: the names of the rules.
      leaves: the names of the parameters, in the order of ``info.leaf_grad_norms``; empty where that is not recorded.
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

    @property
    def loss(self) -> jax.Array:
        """The loss of each recorded step's batch, shape (..., records)."""
        return self.info.loss

    @property
    def runs(self) -> tuple[int, ...]:
        """The shape of the runs: ``()`` for one, ``(64, 4)`` for a grid."""
        return jnp.shape(self.stop_step)

    @property
    def made(self) -> jax.Array:
        """Booleans of the records' shape (..., records): False beyond the end of a run that has stopped.

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
        """What ended each run: a rule's name, or ``"all steps"``."""
        names = np.array([ALL_STEPS, *self.rules], dtype=object)[np.asarray(self.reason)]
        return names if self.runs else str(names)

    def run(self, *index: int) -> "Trace":
        """One run out of many, or those of an index with fewer numbers than there are axes.

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
        """What was recorded at the steps from ``steps.start`` to before ``steps.stop``, as ``trace[100:200]``."""
        if not isinstance(steps, slice) or steps.step is not None:
            raise TypeError(f"a trace is sliced by steps, trace[100:200], got {steps!r}; for one of many runs: run(3)")

        first = -np.inf if steps.start is None else steps.start
        end = np.inf if steps.stop is None else steps.stop

        def cut(tree, step):
            row = np.asarray(step)[(0,) * len(self.runs)]  # the steps are the same in all runs
            kept = np.flatnonzero((first <= row) & (row < end))
            return jax.tree.map(lambda leaf: jnp.take(leaf, kept, axis=len(self.runs)), tree)

        step, info = cut((self.step, self.info), self.step)
        check_step, metrics = cut((self.check_step, self.metrics), self.check_step)
        return dataclasses.replace(self, step=step, info=info, check_step=check_step, metrics=metrics)

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table: one row for each run and record, with what was checked at that step, else NaN.

        Columns are ``run_0``, ``run_1`` ... (the axes of the runs), ``step``, all scalars of ``info``, the norm of each
        parameter's gradient (``leaf_grad_norms/<name>``), each of several learning rates (``learning_rate/0``), and all
        metrics. A metric that has the name of a column before it, as ``loss`` has, is ``check/loss``.
        Rows beyond the end of a run are left out.
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

    def to_pandas(self):
        """``columns`` as a ``pandas.DataFrame``.

        Raises:
          ImportError: pandas is not installed.
        """
        return import_extra("pandas", "to_pandas", "pandas").DataFrame(self.columns())

    def save(self, path: str | Path) -> None:
        """Write the trace to one ``.npz`` file, checksums included; the file is complete or not there."""
        leaves = jax.tree.leaves_with_path(self)
        arrays = {f"leaf_{at}": _as_native(np.asarray(leaf)) for at, (_, leaf) in enumerate(leaves)}
        header = {"format": FORMAT, "rules": self.rules, "leaves": self.leaves}
        header["paths"] = [_words(path) for path, _ in leaves]
        header["dtypes"] = [jnp.result_type(leaf).name for _, leaf in leaves]
        with replacing(path, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read what ``save`` wrote; what ``loss_fn`` returned as aux comes back as nested dicts.

        Raises:
          ValueError: the file is damaged, or no trace; nothing in it can run code.
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
            info = Info(**{name: None for name in Info._fields} | tree.pop("info", {}))
            static = {"rules": tuple(header["rules"]), "leaves": tuple(header.get("leaves", ()))}
            return cls(info=info, **static, **{"metrics": {}} | tree)
        except (OSError, KeyError, TypeError, ValueError, EOFError, NotImplementedError, *BAD_ARCHIVE) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{str(path)!r} is no trace that can be read: {error}") from error

    def plot(self, path: str | Path | None = None):
        """Draw the loss over the steps and every metric over the checks, a line for each run.

        Args:
          path: where to save the picture; None to leave that to you.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from nnlearn.figures.trace import draw_trace

        return draw_trace(self.step, self.loss, self.check_step, self.metrics, self.stop_step, path)


def _along(axis: int, lead: int, size: int) -> np.ndarray:
    return np.arange(size).reshape((1,) * axis + (size,) + (1,) * (lead - axis))


def info_columns(info: Any, lead: int, leaves: Sequence[str]) -> list[tuple[str, int, int | None]]:
    """The columns that records make: each one's name, its leaf of ``info``, and its place in that, or None for all.

    Args:
      info: ``Info`` whose leaves have the axes of the runs, and that of the records, in front.
      lead: how many axes of runs there are.
      leaves: the names of the parameters.

    >>> info = Info(np.ones(3), None, None, np.ones((3, 2)), None, np.ones((3, 1)))
    >>> [name for name, _, _ in info_columns(info, 0, ["w"])]
    ['loss', 'learning_rate/0', 'learning_rate/1', 'leaf_grad_norms/w']
    """
    columns: list[tuple[str, int, int | None]] = []
    for at, (path, leaf) in enumerate(jax.tree.leaves_with_path(info)):
        name, axes = path_name(path), np.ndim(leaf) - lead - 1
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            continue
        if axes == 0:
            columns.append((name, at, None))
        elif axes == 1 and name in ("leaf_grad_norms", "learning_rate"):
            parts = leaves if name == "leaf_grad_norms" and leaves else range(leaf.shape[-1])
            columns += [(f"{name}/{part}", at, index) for index, part in enumerate(parts)]
    return columns


def leaf_names(state: TrainState) -> tuple[str, ...]:
    """The names of a state's parameters, in the tree's order.

    >>> import nnlearn
    >>> leaf_names(nnlearn.init_state({"layer": {"w": jnp.ones(2)}}, nnlearn.sgd(0.1)))
    ('layer/w',)
    """
    params = jax.eval_shape(lambda stored: unpack(stored), state.stored)
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(params))


def metric_column(metric: str, taken: Collection[str]) -> str:
    """The column of a metric in a table that has some columns: a metric may be called as one of them is.

    >>> metric_column("accuracy", ["step", "loss"]), metric_column("loss", ["step", "loss"])
    ('accuracy', 'check/loss')
    """
    while metric in taken:
        metric = f"check/{metric}"
    return metric


def _as_native(array: np.ndarray) -> np.ndarray:
    """The array, or its bits where NumPy has no such numbers, as bfloat16."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _words(path: Sequence[Any]) -> list[str]:
    return [path_name((part,)) for part in path]


def join(parts: Sequence[Trace]) -> Trace:
    """The traces of a run's stretches as one, in their order; how it ended is the last one's.

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
        return jnp.concatenate(leaves, axis=axis)

    timed = [(part.step, part.info, part.check_step, part.metrics) for part in parts]
    step, info, check_step, metrics = jax.tree.map(along, *timed)
    return dataclasses.replace(last, step=step, info=info, check_step=check_step, metrics=metrics)


jax.export.register_pytree_node_serialization(
    Trace,
    serialized_name="nnlearn.Trace",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda content: tuple(map(tuple, json.loads(content))),
    from_children=lambda static, children: Trace(*children, *static),
)

__all__ = ["Trace", "join"]
