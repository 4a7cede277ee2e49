"""How good outputs are: accuracy for classes, the explained share of the variance for values."""

from typing import Any

import numpy as np

from nnlearn.diagnose.probes import said_yes


def quality(outputs: Any, targets: Any) -> float:
    """Accuracy, or R squared, at most 1; NaN if outputs and targets do not match, 0 if an output is not finite.

    >>> quality(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
    0.5
    >>> quality(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    -1.0
    """
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets)
    if not np.all(np.isfinite(outputs)):
        return 0.0
    scored = outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape and outputs.shape[-1] > 1
    if targets.dtype.kind in "iub" and scored:
        return float(np.mean(np.argmax(outputs, -1) == targets))
    if outputs.size != targets.size:
        return float("nan")
    outputs, targets = outputs.reshape(len(targets), -1), targets.reshape(len(targets), -1).astype(np.float64)
    if targets.shape[1] > 1 and np.all((targets == 0) | (targets == 1)) and np.all(targets.sum(1) == 1):
        return float(np.mean(np.argmax(outputs, 1) == np.argmax(targets, 1)))
    if np.all((targets == 0) | (targets == 1)):
        return _balanced(said_yes(outputs), targets.reshape(-1) > 0.5)
    spread = np.mean((targets - targets.mean(0)) ** 2)
    return float(1 - np.mean((outputs - targets) ** 2) / spread) if spread > 0 else float("nan")


def _balanced(said: np.ndarray, true: np.ndarray) -> float:
    sides = [np.mean(said[side] == true[side]) for side in (true, ~true) if np.any(side)]
    return float(np.mean(sides))


__all__ = ["quality"]
