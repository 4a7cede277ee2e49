"""The picture: loss per epoch at the best learning rate, and how much that rate matters."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnlearn.figures.curves import PALETTE, require_matplotlib, scale_log

STYLES = {
    "nnlearn": {"linestyle": "-", "linewidth": 4.0, "alpha": 0.45},
    "optax": {"linestyle": (0, (4, 2)), "linewidth": 1.4, "zorder": 3},
}


def draw_comparison(
    path: Path, results: Any, rates: Sequence[float], best_index: Callable[[Any], int], title: str
) -> None:
    """Write three panels: training loss, validation loss, and final validation loss over learning rates.

    Of each optimizer, nnlearn's runs are a wide pale line and optax's dark dashes of the same colour: dashes on a line
    are two libraries that agree. Losses are means over seeds with a band of one standard deviation; over learning rates
    they are medians with the range of the seeds, because single runs part there, and a cross at the top marks a rate at
    which a seed diverged.

    Args:
      path: the file to write.
      results: curves by optimizer and library, see ``nnlearn.compare.runs.Curves``.
      rates: the learning rates that were compared.
      best_index: gives the index of the best of ``rates`` from an optimizer's curves.
      title: the title of the figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = require_matplotlib()(figsize=(15, 4.6), layout="constrained")
    train_axes, validation_axes, rate_axes = figure.subplots(1, 3)
    for index, (optimizer, libraries) in enumerate(results.items()):
        for library, curves in libraries.items():
            style = STYLES[library] | {"color": PALETTE[index % len(PALETTE)], "label": f"{optimizer}, {library}"}
            best = best_index(curves)
            epochs = np.arange(1, curves.train_sre.shape[-1] + 1)
            _mean_and_sd(train_axes, epochs, curves.train_sre[:, best], style)
            _mean_and_sd(validation_axes, epochs, curves.validation_sre[:, best], style)
            _median_and_range(rate_axes, rates, curves, style)
    for axes, title in ((train_axes, "training loss"), (validation_axes, "validation loss")):
        axes.set(title=f"{title}, at the best learning rate", xlabel="epoch", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
    rate_axes.set(title="validation loss after the last epoch", xlabel="learning rate", ylabel="loss", xscale="log")
    rate_axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    for axes in (train_axes, validation_axes, rate_axes):
        axes.grid(alpha=0.3)
        _scale_losses(axes)
    figure.legend(*train_axes.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _line_and_band(axes, x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray, style: dict) -> None:
    axes.plot(x, middle, **style)
    if style["linestyle"] == "-":  # one band for both libraries
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _scale_losses(axes) -> None:
    """A logarithmic axis if there is a number to show on it, else a word in its place."""
    shown = np.concatenate([line.get_ydata() for line in axes.get_lines() if line.get_linestyle() != "None"])
    if np.any(np.isfinite(shown) & (shown > 0)):
        scale_log(axes)
    else:
        axes.text(0.5, 0.5, "every run diverged", transform=axes.transAxes, horizontalalignment="center")


def _mean_and_sd(axes, x: np.ndarray, values_se: np.ndarray, style: dict) -> None:
    values_se = np.where(np.isfinite(values_se), values_se, np.nan).astype(np.float64)
    mean, sd = values_se.mean(axis=0), values_se.std(axis=0)
    _line_and_band(axes, x, mean, np.maximum(mean - sd, values_se.min(axis=0)), mean + sd, style)


def _median_and_range(axes, learning_rates: Sequence[float], curves: Any, style: dict) -> None:
    order = np.argsort(learning_rates)
    losses_sr = curves.validation_sre[:, order, -1].astype(np.float64)
    diverged_r = ~np.isfinite(losses_sr).all(axis=0)
    losses_sr = np.where(diverged_r, np.nan, losses_sr)  # a gap, not a number, where a seed diverged
    rates = np.asarray(learning_rates)[order]
    middle, low, high = np.median(losses_sr, axis=0), losses_sr.min(axis=0), losses_sr.max(axis=0)
    _line_and_band(axes, rates, middle, low, high, style | {"marker": "."})
    for rate in rates[diverged_r]:
        axes.plot(rate, 0.97, "x", color=style["color"], transform=axes.get_xaxis_transform(), zorder=4)
