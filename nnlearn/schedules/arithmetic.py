"""Arithmetic that all schedules share: exact step counts, fractions of a phase, and interpolation between two values.

Step counts stay integers where possible, because float32 cannot represent 16,777,217. The completed and the remaining
fraction of a phase are both computed from whole steps, because ``1 - 0.999`` loses digits to cancellation.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from nnlearn.checks import check_number, known
from nnlearn.tree import compute_dtype, widest
from nnlearn.types import Scalar

_INT32_MAX = 2**31 - 1


def check_value(name: str, value: Scalar) -> None:
    """Raise unless ``value`` is a finite number, or a tracer of one."""
    check_number(name, value, low=-math.inf, high=math.inf, low_open=True, high_open=True)


def check_steps(name: str, value: Scalar, *, cure: str = "") -> None:
    """Raise unless ``value`` is a finite number of steps >= 0, or a tracer of one."""
    check_number(name, value, low=0, high=math.inf, high_open=True, cure=cure)


def check_positive_steps(name: str, value: Scalar, *, cure: str = "") -> None:
    """Raise unless ``value`` is a finite number of steps > 0, or a tracer of one."""
    check_number(name, value, low=0, high=math.inf, low_open=True, high_open=True, cure=cure)


def as_values(*values: Scalar) -> tuple[Array, ...]:
    """Convert values to arrays of their widest dtype: float32 at least, and JAX's default for Python numbers.

    >>> [value.dtype.name for value in as_values(0.1, jnp.bfloat16(2.0))]
    ['float32', 'float32']
    """
    dtype = compute_dtype(widest(*values, float))  # in two calls, as Python floats do not widen float32
    return tuple(jnp.asarray(value, dtype=dtype) for value in values)


def as_steps(value) -> Array:
    """Convert step counts to a dtype whose differences neither round nor wrap around.

    Integers become int32, or int64 if they are 64 bits wide. Floats become float32 at least. A Python integer beyond
    int32 becomes a float unless 64-bit types are enabled.

    >>> as_steps(jnp.uint8(3)).dtype.name, as_steps(jnp.bfloat16(3)).dtype.name, as_steps(10**10).dtype.name
    ('int32', 'float32', 'float32')
    """
    if isinstance(value, int | np.integer):
        value = int(value) if abs(int(value)) <= _INT32_MAX else float(value)
    steps = jnp.asarray(value)
    if jnp.issubdtype(steps.dtype, jnp.floating):
        return steps.astype(widest(steps.dtype, jnp.float32))
    signed = jnp.dtype("int64" if steps.dtype.itemsize == 8 else "int32")
    if jnp.issubdtype(steps.dtype, jnp.unsignedinteger) and steps.dtype.itemsize == signed.itemsize:
        steps = jnp.minimum(steps, np.array(jnp.iinfo(signed).max, steps.dtype))
    return steps.astype(signed)


def alike(*counts) -> tuple[Array, ...]:
    """Convert step counts to their widest dtype, also under ``jax_numpy_dtype_promotion=strict``.

    >>> [count.dtype.name for count in alike(1, jnp.float32(2.0))]
    ['float32', 'float32']
    """
    counts = tuple(as_steps(count) for count in counts)
    dtype = widest(*(count.dtype for count in counts))
    return tuple(count.astype(dtype) for count in counts)


def is_before(count, step: Scalar) -> Array:
    """Whether ``count`` is below ``step``, for any dtypes."""
    count, step = alike(count, step)
    return count < step


def steps_since(count, begin: Scalar = 0) -> Array:
    """The number of steps from ``begin`` to ``count``, at least 0. Negative arguments are treated as 0."""
    count, begin = alike(count, begin)
    return jnp.maximum(jnp.maximum(count, 0) - jnp.maximum(begin, 0), 0)


def positive_steps(steps: Scalar) -> tuple[Array, Array]:
    """Whether ``steps`` is above 0, and a safe divisor: ``steps`` if it is, else 1."""
    steps = as_steps(steps)
    return steps > 0, jnp.where(steps > 0, steps, 1)


def fractions(done: Array, steps: Scalar, dtype) -> tuple[Array, Array]:
    """The completed and the remaining fraction of a phase of ``steps`` after ``done`` steps, both in [0, 1].

    A phase without steps is complete: (1, 0).

    >>> [float(fraction) for fraction in fractions(as_steps(1), 4, jnp.float32)]
    [0.25, 0.75]
    """
    done, steps = alike(done, steps)
    real, steps = positive_steps(steps)
    gone = jnp.minimum(done, steps)
    left = steps - gone
    length = steps.astype(dtype)
    # XLA replaces a division by a scalar with a product, and 41 * (1 / 41) is not 1, so the ends are set explicitly.
    gone_fraction = jnp.where(real & (left > 0), gone.astype(dtype) / length, 1)
    left_fraction = jnp.where(gone > 0, left.astype(dtype) / length, 1)
    return gone_fraction, jnp.where(real, left_fraction, 0)


def whole_periods(done: Array, steps: Array) -> Array:
    """The number of whole periods of ``steps`` (> 0) in ``done``, exact for integers of any size."""
    done, steps = alike(done, steps)
    if jnp.issubdtype(done.dtype, jnp.integer):
        return done // steps
    return jnp.floor(done / steps)


def half_wave(fraction: Array) -> Array:
    """Half a cosine wave from 0 at 0 to 1 at 1, ``(1 - cos(pi x)) / 2``.

    It is computed as a squared sine, because ``1 - cos`` loses digits to cancellation near 0.
    """
    return jnp.square(jnp.sin(0.5 * math.pi * fraction))


def known_or(value: Any, otherwise: float) -> float:
    """``value`` as a float if it is concrete, else ``otherwise``."""
    return float(value) if known(value) else otherwise


def safe_power(base: Array, exponent: Array) -> Array:
    """``base ** exponent`` for base >= 0 and exponent >= 0, with ``0 ** 0 = 1`` and finite derivatives.

    The derivative of ``base ** 0.5`` is infinite at 0. Multiplied by the zero derivative of a constant base it would be
    NaN, so the base is replaced before the power, not only the result after it.
    """
    positive = base > 0
    at_zero = jnp.where(exponent == 0, 1, 0).astype(base.dtype)
    return jnp.where(positive, jnp.where(positive, base, 1) ** exponent, at_zero)


def mix(start: Array, end: Array, gone: Array, left: Array) -> Array:
    """Interpolate, ``left * start + gone * end``: exactly ``start`` at ``gone = 0`` and ``end`` at ``left = 0``."""
    return start * left + end * gone
