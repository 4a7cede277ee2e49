"""Metrics computed in Python at the checks of a host-driven run, such as those of scikit-learn or of sampled text."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.types import PyTree


class HostMetrics:
    """Calls the user's function and converts its results to arrays.

    >>> HostMetrics(lambda state: {"size": len(state)})([1, 2])
    {'size': Array(2., dtype=float32)}
    >>> HostMetrics(lambda state: {"size": None})([1, 2])
    Traceback (most recent call last):
    TypeError: host_metrics must return a dict of numbers, but 'size' is None
    """

    def __init__(self, function: Callable[[PyTree], Mapping[str, Any]] | None):
        self.function = function
        self.names: list[str] | None = None  # of the first call

    def __bool__(self) -> bool:
        return self.function is not None

    def __call__(self, state: PyTree) -> dict[str, jax.Array]:
        """The metrics of a state, as scalars.

        Raises:
          TypeError: if the function does not return a dict of numbers.
          ValueError: if it returns other names than before.
        """
        if self.function is None:
            return {}
        found = self.function(state)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise TypeError(f"host_metrics must return a dict of numbers by name, got {type(found).__name__}")
        metrics = {name: jnp.asarray(_scalar(name, value)) for name, value in found.items()}
        self.names = sorted(metrics) if self.names is None else self.names
        if sorted(metrics) != self.names:
            raise ValueError(
                f"host_metrics must return the same names at every check: {self.names} before, now {sorted(metrics)}"
            )
        return metrics


def _scalar(name: str, value: Any) -> np.ndarray:
    """A real scalar in JAX's default float dtype."""
    array = None if isinstance(value, str | bytes) or value is None else np.asarray(value)
    if array is None or array.shape != () or array.dtype.kind not in "biufV":
        what = repr(value) if array is None or array.dtype.kind == "O" else f"of shape {array.shape}, {array.dtype}"
        raise TypeError(f"host_metrics must return a dict of numbers, but {name!r} is {what}")
    return array.astype(np.float64).astype(jax.dtypes.canonicalize_dtype(np.float64))


__all__ = ["HostMetrics"]
