"""Schedules along a cosine wave: a decay over half a period, and a periodic wave."""

import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.schedules.arithmetic import (
    alike,
    as_values,
    check_positive_steps,
    check_value,
    fractions,
    half_wave,
    mix,
    positive_steps,
    safe_power,
    steps_since,
    whole_periods,
)
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


@comparable
def cosine_decay_schedule(
    init_value: Scalar, decay_steps: Scalar, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Schedule:
    """Cosine decay: down half a cosine wave, then constant.

    With ``x = min(count / decay_steps, 1)``::

        value = init_value * (alpha + (1 - alpha) * ((1 + cos(pi * x)) / 2) ** exponent)

    Args:
      init_value: the value at step 0.
      decay_steps: the length of the decay in steps, > 0. A traced length of 0 or less gives the last value.
      alpha: the last value, as a fraction of ``init_value``.
      exponent: the exponent of the wave, >= 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``decay_steps`` is not positive, ``exponent`` is negative, or a number is not finite.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.

    >>> print(cosine_decay_schedule(1.0, decay_steps=4)(jnp.arange(0, 7, 2)))
    [1.  0.5 0.  0. ]
    """
    check_value("init_value", init_value)
    check_positive_steps("decay_steps", decay_steps)
    check_value("alpha", alpha)
    check_number("exponent", exponent, low=0, high_open=True, cure="the value would be infinite at the end")

    def schedule(count):
        start, fraction, power = as_values(init_value, alpha, exponent)
        _, left = fractions(steps_since(count), decay_steps, start.dtype)
        shape = safe_power(half_wave(left), power)
        return mix(start, start * fraction, 1 - shape, shape)

    return schedule


@comparable
def cosine_annealing_schedule(init_value: Scalar, decay_steps: Scalar, end_value: Scalar = 0.0) -> Schedule:
    """Periodic cosine wave: down until step ``decay_steps``, up until ``2 * decay_steps``, and so on.

    ::

        value = end_value + (init_value - end_value) * (1 + cos(pi * count / decay_steps)) / 2

    This is PyTorch's ``CosineAnnealingLR`` with its base rate as ``init_value``, ``T_max`` as ``decay_steps`` and
    ``eta_min`` as ``end_value``. ``cosine_decay_schedule`` stays at the lowest value, and
    ``cosine_annealing_warm_restarts_schedule`` jumps back to the highest.

    Args:
      init_value: the value at step 0, the top of the wave.
      decay_steps: half the period in steps, > 0. A traced length of 0 or less gives ``end_value`` at every step.
      end_value: the value at the bottom of the wave.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``decay_steps`` is not positive, or a number is not finite.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.

    >>> print(cosine_annealing_schedule(1.0, decay_steps=4)(jnp.arange(0, 9, 2)))
    [1.  0.5 0.  0.5 1. ]
    """
    check_value("init_value", init_value)
    check_positive_steps("decay_steps", decay_steps)
    check_value("end_value", end_value)

    def schedule(count):
        start, end = as_values(init_value, end_value)
        real, steps = positive_steps(decay_steps)
        done, steps = alike(steps_since(count), steps)
        halves = whole_periods(done, steps)
        gone, left = fractions(done - halves * steps, steps, start.dtype)
        falls = halves % 2 == 0
        down, up = jnp.where(falls, gone, left), jnp.where(falls, left, gone)
        return jnp.where(real, mix(start, end, half_wave(down), half_wave(up)), end)

    return schedule
