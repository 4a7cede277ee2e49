"""Which hyper-parameters to try: a dict of numbers and axes, and the settings that are drawn from it.

``{"rate": log_uniform(1e-4, 1e-1), "b1": choice(0.8, 0.9), "decay": 0.01}`` varies two and holds the third.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import numpy as np

from nnlearn.checks import check_count, check_number

Setting = dict[str, Any]
Method = Literal["grid", "random", "quasi"]
METHODS = ("grid", "random", "quasi")


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from ``low`` to ``high``, even in value or in their logarithm; made by ``uniform, log_uniform``."""

    low: float
    high: float
    log: bool = False

    def at(self, unit: Any, xp: Any = np) -> Any:
        """The value at a place in [0, 1), element by element; ``xp`` is NumPy or ``jax.numpy``."""
        if self.log:  # as exponents, because high / low may overflow
            return xp.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        return self.low + unit * (self.high - self.low)

    def __str__(self) -> str:
        return f"{'log_uniform' if self.log else 'uniform'}({self.low}, {self.high})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A few numbers; made by ``choice``."""

    values: tuple[float, ...]

    def at(self, unit: Any, xp: Any = np) -> Any:
        """The value at a place in [0, 1), element by element; all have equal shares."""
        values = xp.asarray(self.values)
        return values[xp.clip(xp.floor(unit * len(self.values)), 0, len(self.values) - 1).astype(int)]

    def __str__(self) -> str:
        return f"choice({', '.join(map(str, self.values))})"


Axis = Interval | Choice


def uniform(low: float, high: float) -> Interval:
    """All numbers from ``low`` to ``high``, alike.

    Args:
      low, high: finite numbers, low < high.

    Raises:
      ValueError: they are the wrong way round.

    >>> float(uniform(0.0, 10.0).at(0.25))
    2.5
    """
    _check_bounds("uniform", low, high)
    return Interval(float(low), float(high))


def log_uniform(low: float, high: float) -> Interval:
    """All numbers from ``low`` to ``high``, every factor of ten alike.

    Args:
      low, high: finite numbers, 0 < low < high.

    Raises:
      ValueError: they are the wrong way round, or ``low`` is not positive.

    >>> float(log_uniform(1e-4, 1.0).at(0.5))
    0.01
    """
    _check_bounds("log_uniform", low, high)
    if low <= 0:
        raise ValueError(f"log_uniform needs 0 < low, because zero has no logarithm, got low={low}; use uniform")
    return Interval(float(low), float(high), log=True)


def choice(*values: float) -> Choice:
    """A few numbers: ``"grid"`` combines each with everything else, the other methods draw from them.

    Args:
      *values: at least one number, no two alike; all ints, or they become floats.

    Raises:
      ValueError: there are none, or one stands there twice.

    >>> choice(16, 32, 64).at(np.array([0.0, 0.5, 0.9])).tolist()
    [16, 32, 64]
    """
    if not values:
        raise ValueError("choice needs at least one number, choice(0.1, 0.2)")
    for value in values:
        check_number("a value of choice", value)
    values = tuple(value.item() if hasattr(value, "item") else value for value in values)
    if not all(isinstance(value, int) for value in values):
        values = tuple(map(float, values))
    if len(set(values)) < len(values):
        raise ValueError(f"choice holds a number twice: {values}")
    return Choice(values)


def list_settings(
    space: Setting, samples: int | None = None, method: Method = "grid", *, seed: int = 0
) -> list[Setting]:
    """The settings to try.

    Args:
      space: by name, an axis (``uniform``, ``log_uniform`` or ``choice``), or anything else, which all settings share.
      samples: how many to draw; not with ``"grid"``.
      method: ``"grid"``, all combinations of choices, the last name varying fastest; ``"random"``, independent draws;
        ``"quasi"``, draws that spread evenly over the space, a scrambled Sobol sequence.
      seed: of the draws.

    Returns:
      A list of dicts of Python numbers with the names of ``space``, in its order.

    Raises:
      ValueError: ``space`` has no axis; ``"grid"`` meets an interval; ``samples`` does not go with the method.

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
        raise ValueError(f"method={method!r} needs samples, how many settings to draw")
    else:
        unit_sa = _places(check_count("samples", samples), len(axes), method, seed)
        columns = {name: axis.at(unit_sa[:, at]).tolist() for at, (name, axis) in enumerate(axes.items())}
    return [{**space, **dict(zip(axes, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def axes_of(space: Setting) -> dict[str, Axis]:
    """What varies in a space.

    Raises:
      TypeError: ``space`` is not a dict, or holds a list where it needs an axis.
      ValueError: it has no axis, and so no settings.
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


def _combinations(axes: dict[str, Axis]) -> dict[str, tuple]:
    for name, axis in axes.items():
        if isinstance(axis, Interval):
            raise ValueError(
                f"{name!r} is {axis}, which has no list of values: give choice(...), or method='random' and samples"
            )
    rows = itertools.product(*(axis.values for axis in axes.values()))
    return dict(zip(axes, zip(*rows, strict=True), strict=True))


def _places(samples: int, dimensions: int, method: str, seed: int) -> np.ndarray:
    if method == "random":
        return np.random.default_rng(seed).random((samples, dimensions))
    from scipy.stats import qmc  # jax brings scipy along; importing this part of it takes two seconds

    # A whole power of two, because only that is balanced; the first of them are as even as so few can be.
    sobol = qmc.Sobol(dimensions, scramble=True, seed=np.random.default_rng(seed))
    return sobol.random_base2(math.ceil(math.log2(samples)))[:samples]


__all__ = ["Axis", "Choice", "Interval", "Setting", "axes_of", "choice", "list_settings", "log_uniform", "uniform"]
