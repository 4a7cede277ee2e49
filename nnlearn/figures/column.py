"""The figure of runs for a paper: one column wide, legible in grey, with its fonts inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnlearn.extras import import_extra
from nnlearn.figures.page.record import RunRecord, best_first, differing, group_runs, mode_of, ranking_metric
from nnlearn.figures.page.thin import grid_of, thin
from nnlearn.figures.style import new_figure, save_figure, scale_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.35, 1.75  # inches: a column of most two-column papers, and one panel
POINTS = 400
MOST_LINES = 6  # more are not told apart in grey
# Any two differ in dashes, or clearly in lightness, so that they stay apart in grey; the palette of Okabe & Ito.
LINES: tuple[tuple[str, Any], ...] = (
    ("#000000", "-"),
    ("#0072B2", (0, (5, 1.5))),
    ("#D55E00", (0, (1.2, 1.2))),
    ("#009E73", (0, (6, 1.5, 1.2, 1.5))),
    ("#CC79A7", "-"),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
)
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType inside the file, as journals ask
    "svg.fonttype": "path",  # glyphs as outlines: the same in every viewer
}


def draw_column(
    runs: Sequence[RunRecord], path: str | Path | None = None, *, metric: str | None = None, mode: str | None = None
) -> "Figure":
    """Draw the loss and the metrics of runs, one panel below the other.

    Runs that differ only in their seed are one line, their mean, with their range as a band. Of more than six such
    groups, the six with the best runs are drawn.

    Args:
      runs: at least one.
      path: a ``.pdf``, ``.svg`` or ``.png`` file; None to write none.
      metric, mode: the score that ranks runs, and whether a small or a large one is better; None as in ``page_data``.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("a figure needs at least one run")
    matplotlib = import_extra("matplotlib", "drawing", "plot")
    metric = metric or ranking_metric(runs[0].scores)
    mode = mode or mode_of(metric)
    runs = [runs[at] for at in best_first(runs, metric, mode)]
    groups = group_runs(runs)[:MOST_LINES]
    varied, _ = differing([group.config for group in groups])
    names = ["loss", *dict.fromkeys(name for run in runs for name in run.metrics if name != "train_loss")]
    names = [name for name in names if any(name in run.series for run in runs)]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(WIDTH, HEIGHT * len(names) + (0.14 * len(groups) if len(groups) > 1 else 0.1))
        panels = np.ravel(figure.subplots(len(names), 1, sharex=True, squeeze=False))
        for axes, name in zip(panels, names, strict=True):
            for group, (color, dashes) in zip(groups, LINES, strict=False):
                words = [f"{key} {_short(group.config[key])}" for key in varied if key in group.config]
                label = ", ".join(words) or group.name
                _draw(axes, [runs[at] for at in group.runs], name, color=color, linestyle=dashes, label=label)
            _scale(axes)
            axes.set_ylabel("loss of each batch" if name == "loss" else name.removeprefix("check/"))
            axes.grid(alpha=0.3, linewidth=0.4)
        panels[-1].set_xlabel("step")
        if len(groups) > 1:
            figure.legend(
                *panels[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, handlelength=2.6
            )
        if path is not None:
            save_figure(figure, path, dpi=300)
    return figure


def _draw(axes: Any, runs: Sequence[RunRecord], name: str, **style: Any) -> None:
    series = [run.series[name] for run in runs if name in run.series]
    if not series:
        return
    grid = grid_of([each.step for each in series], POINTS)
    curves = np.stack([thin(each, grid).mean for each in series])
    kept = np.isfinite(curves).any(axis=0)
    step, curves = grid.step[kept], curves[:, kept]
    axes.plot(step, np.nanmean(curves, axis=0), linewidth=1, **style)
    if len(curves) > 1:
        low, high = np.nanmin(curves, axis=0), np.nanmax(curves, axis=0)
        axes.fill_between(step, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _scale(axes: Any) -> None:
    """A logarithmic axis for curves that fall by more than a factor of 20."""
    curves = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    drawn = np.concatenate(curves) if curves else np.ones(1)
    falls = [curve[-1] < curve[0] for curve in curves if len(curve)]
    if falls and np.mean(falls) > 0.5 and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
        scale_log(axes)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


__all__ = ["draw_column"]
