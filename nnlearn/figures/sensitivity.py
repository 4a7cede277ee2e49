"""The picture of a sweep; matplotlib is imported when one is drawn."""

from pathlib import Path

import numpy as np

from nnlearn.figures.curves import PALETTE, require_matplotlib, scale_log

ACROSS = 4  # panels side by side


def draw_results(results, path: str | Path | None = None):
    """One panel for each hyper-parameter: a dot for each run, a cross for each that failed, a ring around the best.

    See ``Results.plot``. The line joins the medians of up to 12 parts with equally many runs.
    """
    table = results.columns()
    names = [*results.statics[0], *results.varied]
    down = -(-len(names) // ACROSS)
    across = min(len(names), ACROSS)
    figure = require_matplotlib()(figsize=(4 * across, 3.4 * down), layout="constrained")
    panels = np.ravel(figure.subplots(down, across, sharey=True, squeeze=False))
    values = table[results.metric].astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"no run of this sweep has ended with a finite {results.metric!r}: there is nothing to draw")
    best = results.best()
    for axes, name in zip(panels, names, strict=False):
        column = table[name]
        if column.dtype.kind not in "iuf":
            column = column.astype(str)
            axes.plot(column[finite], values[finite], "o", color=PALETTE[0], markersize=3, alpha=0.5)
        else:
            _draw_numbers(axes, column, values, finite, name in results.logarithmic)
        place = {**best.setting, **best.static}[name]
        axes.plot(place if column.dtype.kind in "iuf" else str(place), best.mean, "o", **RING)
        axes.set(xlabel=name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    if values[finite].min() > 0 and values[finite].max() / values[finite].min() > 30:
        scale_log(panels[0])
    for axes in panels[::across]:
        axes.set_ylabel(results.metric)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


RING = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": PALETTE[1], "markeredgewidth": 1.6, "zorder": 4}


def _draw_numbers(axes, column, values, finite, logarithmic: bool) -> None:
    axes.plot(column[finite], values[finite], "o", color=PALETTE[0], markersize=3, alpha=0.5)
    if not finite.all():
        lost = column[~finite]
        axes.plot(lost, np.full(len(lost), 0.97), "x", color=PALETTE[1], transform=axes.get_xaxis_transform())
    order = np.argsort(column[finite], kind="stable")
    distinct = np.unique(column[finite])
    if len(distinct) <= 12:
        parts = [np.flatnonzero(column[finite] == value) for value in distinct]
    else:
        parts = np.array_split(order, 12)
    middle = [(np.median(column[finite][part]), np.median(values[finite][part])) for part in parts if len(part)]
    axes.plot(*np.transpose(middle), color=PALETTE[2], linewidth=1.4)
    positive = column.size and column.min() > 0
    if logarithmic or (positive and column.max() / column.min() > 50):
        axes.set_xscale("log")


__all__ = ["draw_results"]
