"""Pictures of traces; matplotlib is imported when one is drawn."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from nnlearn.extras import import_extra


def require_matplotlib():
    """``matplotlib.figure.Figure``.

    Raises:
      ImportError: it is not installed.
    """
    return import_extra("matplotlib.figure", "drawing", "plot").Figure


def draw_trace(trace, path: str | Path | None = None):
    """One panel for the loss and one for each metric, a line for each run; see ``Trace.plot``."""
    panels = [("loss", trace.step, trace.loss)]
    panels += [(name, trace.check_step, values) for name, values in trace.metrics.items() if name != "train_loss"]
    figure = require_matplotlib()(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (name, steps, values) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        lines = np.asarray(values, np.float64).reshape(-1, jnp.shape(values)[-1])
        at = np.asarray(steps).reshape(-1, lines.shape[-1])
        for line, where in zip(lines, np.broadcast_to(at, lines.shape), strict=True):
            axes.plot(where, line, linewidth=1, alpha=max(0.15, 1 / len(lines) ** 0.5))
        axes.set(xlabel="step", ylabel=name)
        if name == "loss" and np.nanmin(lines, initial=np.inf) > 0:
            axes.set_yscale("log")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


__all__ = ["draw_trace", "require_matplotlib"]
