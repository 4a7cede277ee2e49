"""Search spaces: dicts of numbers and axes, and the settings drawn from them.

``{"rate": log_uniform(1e-4, 1e-1), "b1": choice(0.8, 0.9), "decay": 0.01}`` varies two hyper-parameters and fixes the
third.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import numpy as np

from nnlearn.checks import check_count, check_number

Setting = dict[str, Any]
Method = Literal["grid", "random", "quasi"]
METHODS = ("grid", "random", "quasi")


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval, uniform in value or in logarithm; made by ``uniform`` and ``log_uniform``."""

    low: float
    high: float
    log: bool = False

    def at(self, unit: Any, xp: Any = np) -> Any:
        """Map [0, 1) to the interval, elementwise; ``xp`` is NumPy or ``jax.numpy``."""
        if self.log:  # as exponents, because high / low may overflow
            return xp.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        return self.low + unit * (self.high - self.low)

    def __str__(self) -> str:
        return f"{'log_uniform' if self.log else 'uniform'}({self.low}, {self.high})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A finite set of numbers; made by ``choice``."""

    values: tuple[float, ...]

    def at(self, unit: Any, xp: Any = np) -> Any:
        """Map [0, 1) to the numbers, elementwise; each number has an equal share."""
        values = xp.asarray(self.values)
        return values[xp.clip(xp.floor(unit * len(self.values)), 0, len(self.values) - 1).astype(int)]

    def __str__(self) -> str:
        return f"choice({', '.join(map(str, self.values))})"


Axis = Interval | Choice


def uniform(low: float, high: float) -> Interval:
    """An axis that is uniform between ``low`` and ``high``.

    Args:
      low, high: finite numbers, low < high.

    Raises:
      ValueError: if ``low`` is not below ``high``, or one of them is not finite.

    >>> float(uniform(0.0, 10.0).at(0.25))
    2.5
    """
    _check_bounds("uniform", low, high)
    return Interval(float(low), float(high))


def log_uniform(low: float, high: float) -> Interval:
    """An axis whose logarithm is uniform: every decade between ``low`` and ``high`` is equally likely.

    Args:
      low, high: finite numbers, 0 < low < high.

    Raises:
      ValueError: if ``low`` is not positive or not below ``high``, or one of them is not finite.

    >>> float(log_uniform(1e-4, 1.0).at(0.5))
    0.01
    """
    _check_bounds("log_uniform", low, high)
    if low <= 0:
        raise ValueError(f"log_uniform needs 0 < low, because zero has no logarithm, got low={low}; use uniform")
    return Interval(float(low), float(high), log=True)


def choice(*values: Any) -> Choice:
    """An axis of given numbers: ``"grid"`` combines each with all other axes, the other methods draw from them.

    Args:
      *values: at least one number, or one array or list of them, without duplicates; they become floats unless all
        are ints.

    Raises:
      ValueError: if there is no number, or a duplicate.

    >>> choice(16, 32, 64).at(np.array([0.0, 0.5, 0.9])).tolist()
    [16, 32, 64]
    """
    if len(values) == 1 and np.ndim(values[0]) == 1:
        values = tuple(np.asarray(values[0]).tolist())
    if not values:
        raise ValueError("choice needs at least one number, choice(0.1, 0.2)")
    for value in values:
        check_number("a value of choice", value)
    plain: list[Any] = [
        value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value for value in values
    ]
    if not all(isinstance(value, int) for value in plain):
        plain = [float(value) for value in plain]
    if len(set(plain)) < len(plain):
        raise ValueError(f"choice holds a number twice: {tuple(plain)}")
    return Choice(tuple(plain))


def list_settings(
    space: Setting, samples: int | None = None, method: Method = "grid", *, seed: int = 0
) -> list[Setting]:
    """List the settings to try.

    Args:
      space: by name, an axis (``uniform``, ``log_uniform`` or ``choice``), or a value that all settings share.
      samples: the number of settings to draw; not with ``"grid"``.
      method: ``"grid"`` for all combinations of choices, the last name varying fastest; ``"random"`` for independent
        draws; ``"quasi"`` for a scrambled Sobol sequence, whose draws cover the space evenly.
      seed: seed of the draws.

    Returns:
      A list of dicts of Python numbers with the names of ``space``, in its order.

    Raises:
      ValueError: if ``space`` has no axis, if ``"grid"`` meets an interval, or if ``samples`` does not fit the method.

    Source: Bergstra & Bengio 2012, "Random Search for Hyper-Parameter Optimization"; Owen 1998, "Scrambling Sobol' and
    Niederreiter-Xing Points".

    >>> list_settings({"rate": choice(0.1, 0.2), "decay": 0.0})
    [{'rate': 0.1, 'decay': 0.0}, {'rate': 0.2, 'decay': 0.0}]
    >>> len(list_settings({"rate": log_uniform(1e-4, 1e-1)}, 10, "random"))
    10
    """
    axes = axes_of(space)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "grid":
        if samples is not None:
            raise ValueError("a grid has as many settings as combinations: leave samples out, or give method='random'")
        columns = _combinations(axes)
    elif samples is None:
        raise ValueError(f"method={method!r} needs samples, the number of settings to draw")
    else:
        unit_sa = _unit_samples(check_count("samples", samples), len(axes), method, seed)
        columns = {name: axis.at(unit_sa[:, at]).tolist() for at, (name, axis) in enumerate(axes.items())}
    return [{**space, **dict(zip(axes, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def axes_of(space: Setting) -> dict[str, Axis]:
    """The axes of a space, by name.

    Raises:
      TypeError: if ``space`` is not a dict, or holds a list in place of an axis.
      ValueError: if it has no axis.
    """
    if not isinstance(space, dict):
        raise TypeError(f"space must be a dict of axes and numbers, got {type(space).__name__}")
    for name, value in space.items():
        if isinstance(value, list | tuple | range | set):
            values = ", ".join(map(repr, value))
            raise TypeError(f"space[{name!r}] is a {type(value).__name__}: to try each value, give choice({values})")
    axes = {name: value for name, value in space.items() if isinstance(value, Axis)}
    if not axes:
        raise ValueError(
            f"space has no settings to try: of {sorted(space)} none is uniform(...), log_uniform(...) or choice(...). "
            "To try each number of an array, give choice(*array.tolist())"
        )
    return axes


def _check_bounds(name: str, low: Any, high: Any) -> None:
    for bound, value in (("low", low), ("high", high)):
        check_number(f"{name}: {bound}", value, low_open=True, high_open=True)
    if not low < high:
        raise ValueError(f"{name} needs low < high, got low={low}, high={high}")


def _combinations(axes: dict[str, Axis]) -> dict[str, tuple[float, ...]]:
    lists = []
    for name, axis in axes.items():
        if isinstance(axis, Interval):
            raise ValueError(
                f"{name!r} is {axis}, which has no list of values: give choice(...), or method='random' and samples"
            )
        lists.append(axis.values)
    return dict(zip(axes, zip(*itertools.product(*lists), strict=True), strict=True))


def _unit_samples(samples: int, dimensions: int, method: str, seed: int) -> np.ndarray:
    """Samples in [0, 1), shape (samples, dimensions)."""
    if method == "random":
        return np.random.default_rng(seed).random((samples, dimensions))
    from scipy.stats import qmc  # imported here because it takes two seconds; jax depends on scipy

    # Only powers of two are balanced, so this draws the next one and keeps the first samples.
    sobol = qmc.Sobol(dimensions, scramble=True, seed=np.random.default_rng(seed))  # pyright: ignore[reportCallIssue]
    return sobol.random_base2(math.ceil(math.log2(samples)))[:samples]


__all__ = ["Axis", "Choice", "Interval", "Setting", "axes_of", "choice", "list_settings", "log_uniform", "uniform"]
