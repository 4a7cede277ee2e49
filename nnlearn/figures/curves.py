"""Pictures of traces; matplotlib is imported when one is drawn."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra

# Okabe & Ito 2008, "Color Universal Design", without the yellow that is pale on white: told apart by colour-blind eyes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def require_matplotlib():
    """``matplotlib.figure.Figure``.

    Raises:
      ImportError: it is not installed.
    """
    return import_extra("matplotlib.figure", "drawing", "plot").Figure


def draw_trace(trace, path: str | Path | None = None):
    """One panel for the loss and one for each metric, a line for each run; see ``Trace.plot``."""
    panels = [("loss of each batch", trace.step, trace.loss)]
    panels += [(name, trace.check_step, values) for name, values in trace.metrics.items() if name != "train_loss"]
    figure = require_matplotlib()(figsize=(5 * len(panels), 4), layout="constrained")
    ends = np.asarray(trace.stop_step).reshape(-1, 1)
    for axes, (name, steps, values) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        lines = np.asarray(values, np.float64).reshape(-1, jnp.shape(values)[-1])
        at = np.broadcast_to(np.asarray(steps).reshape(-1, lines.shape[-1]), lines.shape)
        lines = np.where((at <= ends) & np.isfinite(lines), lines, np.nan)
        for number, (line, where) in enumerate(zip(lines, at, strict=True)):
            color = PALETTE[number % len(PALETTE)]
            axes.plot(where, line, color=color, linewidth=1, alpha=max(0.15, 1 / len(lines) ** 0.5))
        axes.set(title=name, xlabel="step", ylabel=name)
        if name == panels[0][0] and np.nanmin(lines, initial=np.inf) > 0:
            scale_log(axes)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def scale_log(axes) -> None:
    """A logarithmic vertical axis whose ticks are plain numbers, 2.55 and not 2.55 x 10^0."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}" if high < 10 * low else "")  # ticks in between, where decades are too few


__all__ = ["PALETTE", "draw_trace", "require_matplotlib", "scale_log"]
