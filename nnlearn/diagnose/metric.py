"""The run's own metric, at snapshots and at the end of variants."""

from typing import Any

import jax
import numpy as np

from nnlearn.diagnose.subject import Subject
from nnlearn.train.verdict import measure

SMALL = 0.02


def measured(subject: Subject, states: Any) -> np.ndarray:
    """The metric of each of some stacked states, signed so that larger is better; NaN if it is not known.

    Args:
      subject: the run, whose ``evaluate`` returns the metric.
      states: ``TrainState``s, stacked along a leading axis.
    """
    count = len(jax.tree.leaves(states)[0])
    evaluate, name = subject.train.evaluate, subject.metric
    if evaluate is None or name is None:
        return np.full(count, np.nan)
    sign = 1 if subject.mode == "max" else -1

    def one(state):
        return measure(evaluate, state, hparams=subject.hparams)[name]

    try:
        values = jax.jit(lambda states: jax.lax.map(one, states))(states)
    except Exception:  # a metric of another name, or one that needs a state with a key
        return np.full(count, np.nan)
    return sign * np.asarray(values, np.float64)


def unmoved(metrics: np.ndarray) -> bool:
    """Whether a known metric ends less than a tenth above its first value.

    >>> unmoved(np.array([0.5, 0.53])), unmoved(np.array([0.5, 0.9])), unmoved(np.array([np.nan, np.nan]))
    (True, False, False)
    """
    first, last = float(metrics[0]), float(metrics[-1])
    return bool(np.isfinite(first) and last < first + 0.1 * abs(first))


def tolerance(*values: float) -> float:
    """By how much metrics must differ to say something: ``SMALL``, times the largest of them if it is above 1.

    >>> tolerance(0.5, 0.9), tolerance(-200.0, -150.0)
    (0.02, 4.0)
    """
    largest = max((abs(each) for each in values if np.isfinite(each)), default=1.0)
    return SMALL * max(largest, 1.0)


__all__ = ["measured", "tolerance", "unmoved"]
