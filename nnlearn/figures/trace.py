"""The figure of one or more runs: their loss and their metrics over the steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnlearn.figures.style import PALETTE, new_figure, save_figure, scale_log
from nnlearn.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_trace(
    step: ArrayLike,
    loss: ArrayLike,
    check_step: ArrayLike,
    metrics: Mapping[str, ArrayLike],
    stop_step: ArrayLike,
    path: str | Path | None = None,
) -> "Figure":
    """Draw one panel for the loss and one for each metric, with a line for each run.

    Args:
      step, loss: the step and the loss of each record, shape (..., records).
      check_step: the step of each check, shape (..., checks).
      metrics: by name, the values at the checks, shape (..., checks).
      stop_step: the last step of each run, shape (...); later values are left out.
      path: file for the figure; None to write none.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    panels = [("loss of each batch", step, loss)]
    panels += [(name, check_step, values) for name, values in metrics.items() if name != "train_loss"]
    figure = new_figure(5 * len(panels), 4)
    ends = np.asarray(stop_step).reshape(-1, 1)
    for axes, (name, steps, values) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        lines = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
        at = np.broadcast_to(np.asarray(steps).reshape(-1, lines.shape[-1]), lines.shape)
        lines = np.where((at <= ends) & np.isfinite(lines), lines, np.nan)
        for index, (line, where) in enumerate(zip(lines, at, strict=True)):
            color = PALETTE[index % len(PALETTE)]
            axes.plot(where, line, color=color, linewidth=1, alpha=max(0.15, 1 / len(lines) ** 0.5))
        axes.set(title=name, xlabel="step", ylabel=name)
        if name == panels[0][0] and np.nanmin(lines, initial=np.inf) > 0:
            scale_log(axes)
    if path is not None:
        save_figure(figure, path, dpi=150)
    return figure


__all__ = ["draw_trace"]
