"""Checks of arguments, while a function is built or traced.

A concrete value (a Python number, a NumPy or JAX array) is checked. A tracer passes, because nothing in nnlearn may
branch on a value.
"""

import math
import operator
from collections.abc import Collection
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnlearn.types import DTypeLike, Scalar

NUMERIC = int | float | np.generic | np.ndarray | jax.Array


def near(name: str, names: Collection[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, if one is near.

    >>> near("adma", ["adam", "sgd"]), near("x", ["adam", "sgd"])
    ("; did you mean 'adam'?", '')
    """
    import difflib

    found = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def known(value: Any) -> bool:
    """Whether ``value`` is a number with a concrete value.

    >>> known(0.1), known("a"), jax.jit(lambda x: known(x))(0.1)
    (True, False, Array(False, dtype=bool))
    """
    return isinstance(value, NUMERIC) and not isinstance(value, Tracer)


def check_number(
    name: str,
    value: Scalar,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    cure: str = "",
) -> None:
    """Check that ``value`` is a real scalar in the interval from ``low`` to ``high``.

    Args:
      name: the argument's name, for the message.
      value: a number, a 0-d array or a tracer, of which only the shape is checked.
      low, high: the ends of the interval; ``low_open`` and ``high_open`` exclude an end.
      cure: what the caller should do instead, for the message.

    Raises:
      TypeError: if ``value`` is not a number.
      ValueError: if ``value`` is not a scalar, is NaN, or lies outside the interval.

    >>> check_number("b2", 1.0, low=0.0, high=1.0, high_open=True)
    Traceback (most recent call last):
    ValueError: b2 must be in [0.0, 1.0), got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, NUMERIC):
        raise TypeError(f"{name} must be a number, a 0-d array or a tracer, got {value!r} ({type(value).__name__})")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {jnp.shape(value)}; to try several, jax.vmap over them"
        )
    if not known(value):
        return
    number = float(value)
    too_low = number <= low if low_open else number < low
    too_high = number >= high if high_open else number > high
    if math.isnan(number) or too_low or too_high:
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {number}" + (f"; {cure}" if cure else ""))


def check_decay(name: str, value: Scalar) -> None:
    """Check that ``value``, the decay rate of a moving average, is in [0, 1)."""
    check_number(name, value, low=0.0, high=1.0, high_open=True)


def check_nonnegative(name: str, value: Scalar) -> None:
    """Check that ``value`` is a finite number >= 0."""
    check_number(name, value, low=0.0, high=math.inf, high_open=True)


def as_key(key: Any) -> jax.Array:
    """Return a random key, from a key or an integer seed of any type.

    A floating-point array is a seed that ``inject_hyperparams`` holds with the other numbers.
    """
    if jnp.ndim(key) == 0 and isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jnp.floating):
        key = key.astype(jnp.int32)
    is_seed = jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer)
    return jax.random.key(key) if is_seed else key


def check_count(name: str, value: Any, at_least: int = 1) -> int:
    """Return ``value`` as a Python int >= ``at_least``: a count that determines an array's shape.

    Raises:
      TypeError: if it is not an integer, or is traced.
      ValueError: if it is too low.

    >>> check_count("batch_size", 0)
    Traceback (most recent call last):
    ValueError: batch_size must be an int >= 1, got 0
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} decides an array's shape, so it must be a Python int, not a traced value")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})") from error
    if isinstance(value, bool) or number < at_least:
        raise ValueError(f"{name} must be an int >= {at_least}, got {value!r}")
    return number


@overload
def check_dtype(name: str, dtype: None) -> None: ...
@overload
def check_dtype(name: str, dtype: DTypeLike) -> jnp.dtype: ...
@overload
def check_dtype(name: str, dtype: DTypeLike | None) -> jnp.dtype | None: ...
def check_dtype(name: str, dtype: DTypeLike | None) -> jnp.dtype | None:
    """Return the canonical form of ``dtype`` (float64 is float32 unless x64 is enabled), or None for None.

    Raises:
      TypeError: if ``dtype`` is not a floating or complex type.
    """
    if dtype is None:
        return None
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} must be a dtype such as jnp.bfloat16, got {dtype!r}") from error
    if not jnp.issubdtype(canonical, jnp.inexact):
        raise TypeError(f"{name} must be a floating or complex dtype, got {canonical.name}")
    return canonical
