"""The runs of a trace as plain arrays, for pages and figures."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nnlearn.figures.column import draw_column
from nnlearn.figures.page import Layers, Page, RunRecord, Series, write_page
from nnlearn.machine import provenance
from nnlearn.train.columns import info_columns, metric_column
from nnlearn.types import ArrayLike

FIGURES = (".pdf", ".svg", ".png")
MONITORED = ("update_ratio", "grad_norm", "param_norm", "cosine", "signal_to_noise", "zero", "nonfinite")


def run_records(trace: Any, name: str = "run", labels: Mapping[str, ArrayLike] | None = None) -> list[RunRecord]:
    """One record for each run of a trace.

    Args:
      trace: of one or many runs.
      name: of the runs.
      labels: by name, what distinguishes the runs: arrays that broadcast to the shape of the runs. None for their
        indices, ``run_0``, ``run_1`` and so on.

    Raises:
      ValueError: if a label does not broadcast to the shape of the runs.
    """
    trace = jax.tree.map(np.asarray, trace)
    shape = trace.runs
    if labels is None:
        labels = {f"run_{axis}": index for axis, index in enumerate(np.indices(shape))}
    columns: dict[str, np.ndarray] = {}
    for label, values in labels.items():
        try:
            columns[label] = np.broadcast_to(np.asarray(values), shape)
        except ValueError as error:
            raise ValueError(f"label {label!r} of shape {np.shape(values)} does not fit runs {shape}") from error
    records = []
    for index in np.ndindex(*shape):
        config = {label: _plain(column[index]) for label, column in columns.items()}
        records.append(_record(jax.tree.map(lambda leaf, at=index: leaf[at], trace), name, config))
    return records


def write_records(
    path: str | Path,
    records: Sequence[RunRecord],
    *,
    title: str,
    diagnosis: Any = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    logarithmic: Collection[str] = (),
    facts: Mapping[str, Any] | None = None,
    samples: Mapping[str, str] | None = None,
) -> Path:
    """Write a page (``.html``) or a static figure (``.pdf``, ``.svg``, ``.png``) of runs, and return its path.

    Args:
      path: the file.
      records: the runs.
      title, metric, mode, logarithmic, samples: as in ``Page``.
      diagnosis: a ``nnlearn.diagnose.Report``, or None.
      facts: what to say first about how the runs were made.

    Raises:
      ValueError: if the suffix is another one.
      ImportError: if a figure is drawn without matplotlib.
    """
    suffix = Path(path).suffix
    if suffix not in (".html", *FIGURES):
        raise ValueError(f"a report ends with .html, {', '.join(FIGURES)}; got {str(path)!r}")
    if suffix in FIGURES:
        draw_column(records, path, metric=metric, mode=mode)
        return Path(path)
    page = Page(
        title,
        findings=None if diagnosis is None else json.loads(diagnosis.to_json())["findings"],
        facts={**(facts or {}), **provenance()},
        samples=samples or {},
        metric=metric,
        mode=mode,
        logarithmic=logarithmic,
    )
    return write_page(path, records, page)


def _record(trace: Any, name: str, config: dict[str, Any]) -> RunRecord:
    made, checked = trace.step <= trace.stop_step, trace.check_step <= trace.stop_step
    leaves, step, series = jax.tree.leaves(trace.info), trace.step[made], {}
    for column, at, index in info_columns(trace.info, 0, trace.leaves):
        if not column.startswith(("layers/", "leaf_grad_norms")):
            values = leaves[at] if index is None else leaves[at][..., index]
            series[column] = Series(step, np.asarray(values[made], np.float64))
    metrics, scores = [], {}
    end = trace.stop_step if trace.best_step is None else trace.best_step
    for metric, values in trace.metrics.items():
        metrics.append(metric_column(metric, series))
        series[metrics[-1]] = Series(trace.check_step[checked], np.asarray(values[checked], np.float64))
        scores[metric] = float(values[np.argmax(trace.check_step == end)]) if len(values) else np.nan
    return RunRecord(
        name,
        {column: each for column, each in series.items() if len(each.step)},
        metrics=tuple(metrics),
        config=config,
        scores=_in_order(scores) or {"loss": float(trace.loss[made][-1]) if made.any() else np.nan},
        layers=_layers(trace, made),
        steps=int(trace.stop_step),
        stopped_by=str(trace.stopped_by),
    )


def _in_order(scores: dict[str, float]) -> dict[str, float]:
    """The metrics of ``evaluate`` first, as they measure success better than the training loss."""
    return {name: scores[name] for name in sorted(scores, key=lambda name: name == "train_loss")}


def _layers(trace: Any, made: np.ndarray) -> Layers | None:
    found: dict[str, np.ndarray] = {}
    if trace.info.layers is not None:  # a dict if it was read from a file
        layers = trace.info.layers if isinstance(trace.info.layers, dict) else trace.info.layers._asdict()
        found = {name: layers[name][made] for name in MONITORED if name in layers}
        if not np.any(found.get("nonfinite", 1)):
            del found["nonfinite"]
    elif trace.info.leaf_grad_norms is not None:
        found = {"grad_norm": trace.info.leaf_grad_norms[made]}
    if not found or not made.any():
        return None
    count = next(iter(found.values())).shape[-1]
    return Layers(trace.step[made], trace.leaves or tuple(f"parameter {at}" for at in range(count)), found)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


__all__ = ["run_records", "write_records"]
