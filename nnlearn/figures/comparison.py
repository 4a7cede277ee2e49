"""The figure of a comparison: loss per epoch at the best learning rate, and loss against the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nnlearn.figures.style import PALETTE, new_figure, save_figure, scale_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "nnlearn": {"linestyle": "-", "linewidth": 4.0, "alpha": 0.45},
    "optax": {"linestyle": (0, (4, 2)), "linewidth": 1.4, "zorder": 3},
}


class Entry(NamedTuple):
    """The losses of one optimizer of one library; ``s`` seeds, ``r`` learning rates, ``e`` epochs.

    Attributes:
      optimizer, library: the names.
      train_sre: training losses.
      validation_sre: validation losses.
      best: index of the best learning rate.
    """

    optimizer: str
    library: str
    train_sre: np.ndarray
    validation_sre: np.ndarray
    best: int


def draw_comparison(
    entries: Sequence[Entry],
    rates: Sequence[float],
    title: str,
    path: str | Path | None = None,
    *,
    loss: str = "validation loss",
    unit: str = "epoch",
) -> "Figure":
    """Draw three panels: training loss, validation loss, and final validation loss against the learning rate.

    For each optimizer, nnlearn's runs are a wide pale line and optax's runs are dark dashes of the same colour: where
    the dashes lie on the line, the two libraries agree. Losses are means over seeds with a band of one standard
    deviation. Against the learning rate they are medians with the range over the seeds, because single runs differ
    there; a cross at the top marks a rate at which a seed diverged.

    Args:
      entries: the losses, the libraries of one optimizer next to each other.
      rates: the learning rates.
      title: the title of the figure.
      path: file for the figure; None to write none.
      loss: the name of the validation losses.
      unit: what a point of a curve is.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    figure = new_figure(15, 4.6)
    train_axes, validation_axes, rate_axes = figure.subplots(1, 3)
    optimizers = list(dict.fromkeys(entry.optimizer for entry in entries))
    for entry in entries:
        color = PALETTE[optimizers.index(entry.optimizer) % len(PALETTE)]
        style = STYLES[entry.library] | {"color": color, "label": f"{entry.optimizer}, {entry.library}"}
        epochs = np.arange(1, entry.train_sre.shape[-1] + 1)
        _mean_and_sd(train_axes, epochs, entry.train_sre[:, entry.best], style)
        _mean_and_sd(validation_axes, epochs, entry.validation_sre[:, entry.best], style)
        _median_and_range(rate_axes, np.asarray(rates), entry.validation_sre[:, :, -1], style)
    for axes, name in ((train_axes, "training loss"), (validation_axes, loss)):
        axes.set(title=f"{name}, at the best learning rate", xlabel=unit, ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
    rate_axes.set(title=f"{loss} after the last {unit}", xlabel="learning rate", ylabel="loss", xscale="log")
    rate_axes.xaxis.set_minor_formatter("")  # next to each other they overlap
    rate_axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    for axes in (train_axes, validation_axes, rate_axes):
        axes.grid(alpha=0.3)
        _scale_losses(axes)
    figure.legend(*train_axes.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    if path is not None:
        save_figure(figure, path, dpi=110)
    return figure


def _line_and_band(
    axes: "Axes", x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray, style: dict[str, Any]
) -> None:
    axes.plot(x, middle, **style)
    if style["linestyle"] == "-":  # one band for both libraries
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _scale_losses(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, or write a note if there is nothing to show on it."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    shown = np.concatenate([np.asarray(line.get_ydata()) for line in lines])
    if np.any(np.isfinite(shown) & (shown > 0)):
        scale_log(axes)
    else:
        axes.text(0.5, 0.5, "every run diverged", transform=axes.transAxes, horizontalalignment="center")


def _mean_and_sd(axes: "Axes", x: np.ndarray, values_se: np.ndarray, style: dict[str, Any]) -> None:
    values_se = np.where(np.isfinite(values_se), values_se, np.nan).astype(np.float64)
    mean, sd = values_se.mean(axis=0), values_se.std(axis=0)
    _line_and_band(axes, x, mean, np.maximum(mean - sd, values_se.min(axis=0)), mean + sd, style)


def _median_and_range(axes: "Axes", rates: np.ndarray, losses_sr: np.ndarray, style: dict[str, Any]) -> None:
    order = np.argsort(rates)
    rates, losses_sr = rates[order], losses_sr[:, order].astype(np.float64)
    diverged_r = ~np.isfinite(losses_sr).all(axis=0)
    losses_sr = np.where(diverged_r, np.nan, losses_sr)  # a gap in the line where a seed diverged
    middle, low, high = np.median(losses_sr, axis=0), losses_sr.min(axis=0), losses_sr.max(axis=0)
    _line_and_band(axes, rates, middle, low, high, style | {"marker": "."})
    for rate in rates[diverged_r]:
        axes.plot(rate, 0.97, "x", color=style["color"], transform=axes.get_xaxis_transform(), zorder=4)


__all__ = ["Entry", "draw_comparison"]
