"""Colours and axes that all figures share. Matplotlib is imported when a figure is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnlearn.extras import import_extra
from nnlearn.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe & Ito 2008, "Color Universal Design", which colour-blind readers can distinguish, without its
# yellow, which is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def require_matplotlib() -> "type[Figure]":
    """The class ``matplotlib.figure.Figure``.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    return import_extra("matplotlib.figure", "drawing", "plot").Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    return require_matplotlib()(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: str | Path, dpi: int) -> None:
    """Write a figure to an image file, which replaces ``path`` when it is complete.

    Raises:
      ValueError: if matplotlib does not know the format that the name ends with.
    """
    path = Path(path) if Path(path).suffix else Path(path).with_suffix(".png")
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=dpi, format=path.suffix[1:])


def scale_log(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with plain tick labels: 2.55, not 2.55 x 10^0."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    major: Any = "{x:.4g}"
    minor: Any = major if high < 10 * low else ""  # an axis shorter than a decade may have no major tick
    axes.yaxis.set_major_formatter(major)
    axes.yaxis.set_minor_formatter(minor)


__all__ = ["PALETTE", "new_figure", "require_matplotlib", "save_figure", "scale_log"]
