"""Traces of training examples in validation examples that are not equal to them: interpolations and moved windows."""

import numpy as np

from nnlearn.diagnose.probes import squared_distances

ROWS = 200
NEIGHBOURS = 8
LEAST_COLUMNS = 4  # in fewer, points lie between others by chance
LEAST_VALUES = 1000  # with fewer different numbers, as in images, pieces are equal by chance
LONGEST = 400_000  # pieces of windows that are compared


def interpolated(train: np.ndarray, validation: np.ndarray) -> float:
    """The share of validation rows on a straight line between two near training rows, as oversampling makes them.

    >>> rows = np.cumsum(np.random.default_rng(0).normal(size=(300, 6)), 0)
    >>> between = 0.3 * rows[:50] + 0.7 * rows[1:51]
    >>> interpolated(rows[:200], rows[200:]), interpolated(rows[:200], between) > 0.9
    (0.0, True)
    """
    moving = np.ptp(train, axis=0) > 0
    train, validation = train[:, moving].astype(np.float64), validation[:ROWS, moving].astype(np.float64)
    few = sum(len(np.unique(column[:500])) < 12 for column in train.T)
    if train.shape[1] - few < LEAST_COLUMNS or len(train) < NEIGHBOURS:
        return 0.0
    near = np.argsort(squared_distances(validation, train), 1)[:, :NEIGHBOURS]
    toward = train[near] - validation[:, None]
    size = np.linalg.norm(toward, axis=2)
    toward = toward / np.maximum(size, 1e-12)[..., None]
    opposite = np.einsum("rac,rbc->rab", toward, toward).min(axis=(1, 2)) < -0.9999
    return float(np.mean(opposite & (size.min(1) > 1e-6)))


def moved_windows(train: np.ndarray, validation: np.ndarray) -> float:
    """The share of validation windows of which a piece lies at another place of a training window.

    Args:
      train, validation: windows of one or several series, shape (n, time) or (n, time, channels).

    >>> series = np.random.default_rng(0).normal(size=1000)
    >>> windows = np.lib.stride_tricks.sliding_window_view(series, 32)[::4]
    >>> moved_windows(windows[:100], windows[110:]), moved_windows(windows[::2], windows[1::2])
    (0.0, 1.0)
    """
    if train.ndim > 3 or train.shape[1] < 16 or validation.shape[1:] != train.shape[1:]:
        return 0.0
    if len(np.unique(train[:200])) < LEAST_VALUES:
        return 0.0
    length = max(6, train.shape[1] // 8)
    places = train.shape[1] - length + 1
    train = train[: max(1, LONGEST // places)]
    pieces = _pieces(train, length)
    known = np.unique(pieces.ravel())
    some = validation[:ROWS]
    ends = _pieces(some, length)[:, [0, -1]]
    varied = np.stack([_varied(some[:, :length]), _varied(some[:, -length:])], 1)
    at_home = np.stack([np.isin(ends[:, 0], pieces[:, 0]), np.isin(ends[:, 1], pieces[:, -1])], 1)
    return float(np.mean(np.any(np.isin(ends, known) & varied & ~at_home, axis=1)))


def _pieces(windows: np.ndarray, length: int) -> np.ndarray:
    """A number for each piece of each window, shape (n, places), equal for equal pieces."""
    bits = np.ascontiguousarray(windows.astype(np.float32) + 0.0).view(np.uint32).astype(np.uint64)
    bits = bits.reshape(*windows.shape[:2], -1)
    factors = np.random.default_rng(6).integers(1, 2**63, (length, bits.shape[2]), dtype=np.uint64)
    places = windows.shape[1] - length + 1
    with np.errstate(over="ignore"):
        return np.asarray(sum((bits[:, at : at + places] * factors[at]).sum(2) for at in range(length)))


def _varied(pieces: np.ndarray) -> np.ndarray:
    """Whether each piece has several values: silence is equal everywhere."""
    return np.array([len(np.unique(piece)) > 4 for piece in pieces])


__all__ = ["interpolated", "moved_windows"]
