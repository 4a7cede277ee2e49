"""The figure of a sweep: its metric against each hyper-parameter."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnlearn.figures.style import PALETTE, new_figure, save_figure, scale_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 4  # panels in a row
PARTS = 12  # points of the line of medians
RING: dict[str, Any] = {
    "markersize": 11,
    "markerfacecolor": "none",
    "markeredgecolor": PALETTE[1],
    "markeredgewidth": 1.6,
    "zorder": 4,
}


def draw_sweep(
    hparams: Mapping[str, np.ndarray],
    scores: np.ndarray,
    *,
    best: Mapping[str, Any],
    best_score: float,
    metric: str,
    logarithmic: Collection[str] = (),
    path: str | Path | None = None,
) -> "Figure":
    """Draw one panel for each hyper-parameter: a dot for each run, a cross for each failed run, a ring for the best.

    A line joins the medians of up to 12 groups with equal numbers of runs.

    Args:
      hparams: by name, the values of the runs, shape (runs,).
      scores: the metric of the runs, shape (runs,); a run with a non-finite metric has failed.
      best: by name, the best value.
      best_score: the metric of the best setting.
      metric: the name of the metric.
      logarithmic: the hyper-parameters to draw on a logarithmic axis.
      path: file for the figure; None to write none.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    rows = -(-len(hparams) // ACROSS)
    across = min(len(hparams), ACROSS)
    figure = new_figure(4 * across, 3.4 * rows)
    panels = np.ravel(figure.subplots(rows, across, sharey=True, squeeze=False))
    scores = scores.astype(np.float64)
    finite = np.isfinite(scores)
    for axes, (name, column) in zip(panels, hparams.items(), strict=False):
        is_number = column.dtype.kind in "iuf"
        if is_number:
            _draw_numbers(axes, column, scores, finite, name in logarithmic)
        else:
            _draw_dots(axes, column.astype(str), scores, finite)
        axes.plot(best[name] if is_number else str(best[name]), best_score, "o", **RING)
        axes.set(xlabel=name)
    for axes in panels[len(hparams) :]:
        axes.set_visible(False)
    if scores[finite].min() > 0 and scores[finite].max() / scores[finite].min() > 30:
        scale_log(panels[0])
    for axes in panels[::across]:
        axes.set_ylabel(metric)
    if path is not None:
        save_figure(figure, path, dpi=150)
    return figure


def _draw_dots(axes: "Axes", column: np.ndarray, scores: np.ndarray, finite: np.ndarray) -> None:
    axes.plot(column[finite], scores[finite], "o", color=PALETTE[0], markersize=3, alpha=0.5)


def _draw_numbers(axes: "Axes", column: np.ndarray, scores: np.ndarray, finite: np.ndarray, logarithmic: bool) -> None:
    _draw_dots(axes, column, scores, finite)
    if not finite.all():
        failed = column[~finite]
        axes.plot(failed, np.full(len(failed), 0.97), "x", color=PALETTE[1], transform=axes.get_xaxis_transform())
    values, heights = column[finite], scores[finite]
    distinct = np.unique(values)
    if len(distinct) <= PARTS:
        parts = [np.flatnonzero(values == value) for value in distinct]
    else:
        parts = np.array_split(np.argsort(values, kind="stable"), PARTS)
    medians = np.array([(np.median(values[part]), np.median(heights[part])) for part in parts])
    axes.plot(medians[:, 0], medians[:, 1], color=PALETTE[2], linewidth=1.4)
    if logarithmic or (column.min() > 0 and column.max() / column.min() > 50):
        axes.set_xscale("log")


__all__ = ["draw_sweep"]
