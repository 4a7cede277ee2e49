"""Long curves as fewer points, which keep every spike: the lowest, the highest and the mean value of each interval."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nnlearn.figures.page.record import Series


class Thinned(NamedTuple):
    """A curve over a grid of steps; NaN where it has no finite value.

    Attributes:
      mean, low, high: shape (points,). Where the grid has every step, the three are equal.
      bad: the first step whose value is not finite, or None.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bad: int | None


class Grid(NamedTuple):
    """Points that several curves share.

    Attributes:
      step: the step at which each point is drawn.
      edges: the first step of each interval; None if every point is one step.
    """

    step: np.ndarray
    edges: np.ndarray | None


def grid_of(steps: Sequence[np.ndarray], points: int) -> Grid:
    """At most ``points`` points for curves with these steps.

    >>> grid_of([np.arange(1, 7)], 3)
    Grid(step=array([1, 3, 5]), edges=array([1, 3, 5]))
    """
    every = np.unique(np.concatenate([np.asarray(each).ravel() for each in steps] or [np.zeros(0, int)]))
    if len(every) <= points:
        return Grid(every, None)
    first, last = int(every[0]), int(every[-1])
    edges = np.unique(np.linspace(first, last + 1, points, endpoint=False).astype(np.int64))
    return Grid(edges, edges)


def thin(series: Series, grid: Grid) -> Thinned:
    """A curve on a grid.

    >>> thin(Series(np.arange(1, 7), np.array([0, 1, 9, 2, np.nan, 3])), Grid(np.array([1, 3, 5]), np.array([1, 3, 5])))
    Thinned(mean=array([0.5, 5.5, 3. ]), low=array([0., 2., 3.]), high=array([1., 9., 3.]), bad=5)
    """
    step, value = np.asarray(series.step), np.asarray(series.value, np.float64)
    finite = np.isfinite(value)
    bad = None if finite.all() else int(step[np.argmin(finite)])
    step, value = step[finite], value[finite]
    mean, low, high = (np.full(len(grid.step), np.nan) for _ in range(3))
    if len(step):
        points = grid.step if grid.edges is None else grid.edges
        at = np.searchsorted(points, step, "right") - 1
        begins = np.flatnonzero(np.diff(at, prepend=-1))
        where, counts = at[begins], np.diff(begins, append=len(at))
        mean[where] = np.add.reduceat(value, begins) / counts
        low[where], high[where] = np.minimum.reduceat(value, begins), np.maximum.reduceat(value, begins)
    return Thinned(mean, low, high, bad)


def encode(values: np.ndarray) -> str:
    """Numbers as base64 of little-endian float32; values beyond its range become its largest.

    >>> encode(np.array([1.0]))
    'AACAPw=='
    """
    limit = float(np.finfo(np.float32).max)
    return base64.b64encode(np.clip(np.asarray(values, np.float64), -limit, limit).astype("<f4").tobytes()).decode()


__all__ = ["Grid", "Thinned", "encode", "grid_of", "thin"]
