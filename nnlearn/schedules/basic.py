"""Basic schedules: constant, linear, polynomial and exponential."""

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.schedules.arithmetic import (
    as_values,
    check_value,
    fractions,
    mix,
    positive_steps,
    safe_power,
    steps_since,
    whole_periods,
)
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


@comparable
def constant_schedule(value: Scalar) -> Schedule:
    """Constant schedule: the same value at every step.

    Args:
      value: the value, in any unit.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``value`` is not finite.

    >>> print(constant_schedule(0.5)(jnp.arange(3)))
    [0.5 0.5 0.5]
    """
    check_value("value", value)

    def schedule(count):
        (held,) = as_values(value)
        return jnp.broadcast_to(held, jnp.shape(count))

    return schedule


@comparable
def polynomial_schedule(
    init_value: Scalar, end_value: Scalar, power: Scalar, transition_steps: Scalar, transition_begin: Scalar = 0
) -> Schedule:
    """Polynomial schedule: from one value to another, along a power of the remaining fraction of steps.

    With ``x = clip((count - transition_begin) / transition_steps, 0, 1)``::

        value = end_value + (init_value - end_value) * (1 - x) ** power

    Args:
      init_value: the value until ``transition_begin``.
      end_value: the value from step ``transition_begin + transition_steps`` on.
      power: the exponent, >= 0. 1 is linear; a larger one changes fast at first and slowly at the end.
      transition_steps: the length of the transition in steps; if it is 0 or less, the value stays at ``init_value``.
      transition_begin: the first step of the transition; a negative one is treated as 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``power`` is negative, or a number is not finite.

    >>> print(polynomial_schedule(1.0, 0.0, power=2, transition_steps=4)(jnp.arange(6)))
    [1.     0.5625 0.25   0.0625 0.     0.    ]
    """
    check_value("init_value", init_value)
    check_value("end_value", end_value)
    check_number("power", power, low=0, high_open=True, cure="the value would be infinite at the end")
    check_value("transition_steps", transition_steps)
    check_value("transition_begin", transition_begin)

    def schedule(count):
        start, end, exponent = as_values(init_value, end_value, power)
        moves, steps = positive_steps(transition_steps)
        _, left = fractions(steps_since(count, transition_begin), steps, start.dtype)
        shape = safe_power(left, exponent)
        return jnp.where(moves, mix(start, end, 1 - shape, shape), start)

    return schedule


@comparable
def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: Scalar, transition_begin: Scalar = 0
) -> Schedule:
    """Linear schedule from one value to another.

    With ``x = clip((count - transition_begin) / transition_steps, 0, 1)``::

        value = (1 - x) * init_value + x * end_value

    Args:
      init_value: the value until ``transition_begin``.
      end_value: the value from step ``transition_begin + transition_steps`` on.
      transition_steps: the length of the transition in steps; if it is 0 or less, the value stays at ``init_value``.
      transition_begin: the first step of the transition; a negative one is treated as 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: a number is not finite.

    >>> print(linear_schedule(1.0, 0.0, transition_steps=4)(jnp.arange(6)))
    [1.   0.75 0.5  0.25 0.   0.  ]
    """
    check_value("init_value", init_value)
    check_value("end_value", end_value)
    check_value("transition_steps", transition_steps)
    check_value("transition_begin", transition_begin)

    def schedule(count):
        start, end = as_values(init_value, end_value)
        moves, steps = positive_steps(transition_steps)
        gone, left = fractions(steps_since(count, transition_begin), steps, start.dtype)
        return jnp.where(moves, mix(start, end, gone, left), start)

    return schedule


@comparable
def exponential_decay(
    init_value: Scalar,
    transition_steps: Scalar,
    decay_rate: Scalar,
    transition_begin: Scalar = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """Exponential decay: the value is multiplied by ``decay_rate`` every ``transition_steps`` steps.

    With ``x = max(count - transition_begin, 0) / transition_steps``, rounded down if ``staircase``::

        value = init_value * decay_rate ** x

    Args:
      init_value: the value until ``transition_begin``.
      transition_steps: the number of steps for one factor; if it is 0 or less, the value stays at ``init_value``.
      decay_rate: the factor, >= 0; if it is 0, the value stays at ``init_value``.
      transition_begin: the first step of the decay; a negative one is treated as 0.
      staircase: whether the value changes only every ``transition_steps`` steps.
      end_value: a lower bound of the value if ``decay_rate`` < 1, else an upper bound; None for no bound.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``decay_rate`` is negative, or a number is not finite.

    >>> print(exponential_decay(1.0, transition_steps=2, decay_rate=0.25, end_value=0.1)(jnp.arange(5)))
    [1.    0.5   0.25  0.125 0.1  ]
    """
    check_value("init_value", init_value)
    check_value("transition_steps", transition_steps)
    check_number("decay_rate", decay_rate, low=0, high_open=True, cure="powers of a negative rate are not real numbers")
    check_value("transition_begin", transition_begin)
    if end_value is not None:
        check_value("end_value", end_value)

    def schedule(count):
        start, rate, end = as_values(init_value, decay_rate, 0 if end_value is None else end_value)
        moves, steps = positive_steps(transition_steps)
        moves = moves & (rate != 0)
        rate = jnp.where(rate == 0, 1, rate)
        done = steps_since(count, transition_begin)
        if staircase:
            periods = whole_periods(done, steps).astype(rate.dtype)
        else:
            periods = done.astype(rate.dtype) / steps.astype(rate.dtype)
        # Growth can overflow, and infinity times an init_value or a derivative of 0 would be NaN.
        overflows = jnp.isinf(jax.lax.stop_gradient(rate**periods))
        largest = jnp.finfo(rate.dtype).max
        if end_value is not None:
            reached = jax.lax.stop_gradient(start * jnp.minimum(rate**periods, largest))
            bounded = jnp.where(rate < 1, reached < end, reached > end)
        else:
            bounded = jnp.zeros(jnp.shape(count), bool)
        factor = rate ** jnp.where(overflows | bounded, 0, periods)
        value = jnp.where(bounded, end, start * jnp.where(overflows, largest, factor))
        return jnp.where(moves, value, start)

    return schedule
