"""Metrics that Python computes at the checks of a host-driven run, such as scikit-learn's or those of sampled text."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.types import PyTree


class HostMetrics:
    """Calls the user's function and makes arrays of what it returns.

    >>> HostMetrics(lambda state: {"size": len(state)})([1, 2])
    {'size': Array(2., dtype=float32)}
    >>> HostMetrics(lambda state: {"size": None})([1, 2])
    Traceback (most recent call last):
    TypeError: host_metrics must return a dict of numbers, but 'size' is None
    """

    def __init__(self, function: Callable[[PyTree], Mapping[str, Any]] | None):
        self.function = function
        self.names: list[str] | None = None  # those of the first call

    def __bool__(self) -> bool:
        return self.function is not None

    def __call__(self, state: PyTree) -> dict[str, jax.Array]:
        """The metrics of a state, as scalars.

        Raises:
          TypeError: the function returns no dict of numbers.
          ValueError: it returns other names than before.
        """
        if self.function is None:
            return {}
        found = self.function(state)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise TypeError(f"host_metrics must return a dict of numbers by name, got {type(found).__name__}")
        numbers = {name: jnp.asarray(_number(name, value)) for name, value in found.items()}
        self.names = sorted(numbers) if self.names is None else self.names
        if sorted(numbers) != self.names:
            raise ValueError(
                f"host_metrics must return the same names at every check: {self.names} before, now {sorted(numbers)}"
            )
        return numbers


def _number(name: str, value: Any) -> np.ndarray:
    """One real number, in the dtype that JAX has for Python's floats."""
    array = None if isinstance(value, str | bytes) or value is None else np.asarray(value)
    if array is None or array.shape != () or array.dtype.kind not in "biufV":
        what = repr(value) if array is None or array.dtype.kind == "O" else f"of shape {array.shape}, {array.dtype}"
        raise TypeError(f"host_metrics must return a dict of numbers, but {name!r} is {what}")
    return array.astype(np.float64).astype(jax.dtypes.canonicalize_dtype(np.float64))


__all__ = ["HostMetrics"]
