"""Schedules with a linear warm-up, followed by a constant, a decay, or both."""

import jax.numpy as jnp
from jax import Array

from nnlearn.checks import check_number
from nnlearn.schedules.arithmetic import (
    alike,
    as_steps,
    as_values,
    check_steps,
    check_value,
    fractions,
    half_wave,
    is_before,
    known_or,
    mix,
    safe_power,
    steps_since,
)
from nnlearn.schedules.basic import exponential_decay, linear_schedule
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


def _warm_up(done: Array, init: Array, peak: Array, warmup_steps: Scalar, later: Array) -> Array:
    """A line from ``init`` to ``peak`` over the first ``warmup_steps``, then the value ``later``."""
    rise = mix(init, peak, *fractions(done, warmup_steps, peak.dtype))
    return jnp.where(is_before(done, warmup_steps), rise, later)


@comparable
def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: Scalar) -> Schedule:
    """Linear warm-up, then constant.

    ::

        value = init_value + (peak_value - init_value) * min(count / warmup_steps, 1)

    Args:
      init_value: the value at step 0.
      peak_value: the value from step ``warmup_steps`` on.
      warmup_steps: the length of the warm-up in steps. With 0 the value stays at ``init_value``, as in optax. For no
        warm-up use ``constant_schedule``.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``warmup_steps`` is negative, or a number is not finite.

    >>> print(warmup_constant_schedule(0.0, 1.0, warmup_steps=2)(jnp.arange(5)))
    [0.  0.5 1.  1.  1. ]
    """
    check_value("init_value", init_value)
    check_value("peak_value", peak_value)
    check_steps("warmup_steps", warmup_steps)
    return linear_schedule(init_value, peak_value, warmup_steps)


@comparable
def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: Scalar,
    decay_steps: Scalar,
    end_value: Scalar = 0.0,
    exponent: Scalar = 1.0,
) -> Schedule:
    """Linear warm-up, cosine decay, then constant.

    With ``x = min((count - warmup_steps) / (decay_steps - warmup_steps), 1)``::

        value = init_value + (peak_value - init_value) * count / warmup_steps                      before warmup_steps
        value = end_value + (peak_value - end_value) * ((1 + cos(pi * x)) / 2) ** exponent         from there on

    Args:
      init_value: the value at step 0.
      peak_value: the value at step ``warmup_steps``; if it is 0, all later values are 0 too.
      warmup_steps: the length of the warm-up in steps; with 0 the decay begins at step 0.
      decay_steps: the length of warm-up *and* decay in steps, > ``warmup_steps``.
      end_value: the value from step ``decay_steps`` on.
      exponent: the exponent of the wave, >= 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``decay_steps`` is not above ``warmup_steps``, a number of steps or ``exponent`` is negative, or a
        number is not finite.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.

    >>> print(warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=2, decay_steps=4)(jnp.arange(6)))
    [0.  0.5 1.  0.5 0.  0. ]
    """
    check_value("init_value", init_value)
    check_value("peak_value", peak_value)
    check_steps("warmup_steps", warmup_steps)
    check_number(
        "decay_steps",
        decay_steps,
        low=known_or(warmup_steps, 0.0),
        low_open=True,
        high_open=True,
        cure="it counts the warm-up too, so it must exceed warmup_steps",
    )
    check_value("end_value", end_value)
    check_number("exponent", exponent, low=0, high_open=True, cure="the value would be infinite at the end")

    def schedule(count):
        init, peak, end, power = as_values(init_value, peak_value, end_value, exponent)
        end = jnp.where(peak == 0, 0, end)
        done, (warmup, last) = steps_since(count), alike(warmup_steps, decay_steps)
        _, left = fractions(steps_since(done, warmup_steps), last - warmup, peak.dtype)
        shape = safe_power(half_wave(left), power)
        return _warm_up(done, init, peak, warmup_steps, mix(peak, end, 1 - shape, shape))

    return schedule


@comparable
def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: Scalar,
    transition_steps: Scalar,
    decay_rate: Scalar,
    transition_begin: Scalar = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """Linear warm-up, then exponential decay by a factor every ``transition_steps`` steps.

    With ``x = max(count - warmup_steps - transition_begin, 0) / transition_steps``::

        value = init_value + (peak_value - init_value) * count / warmup_steps      before warmup_steps
        value = peak_value * decay_rate ** x                                       from there on

    Args:
      init_value: the value at step 0.
      peak_value: the value at step ``warmup_steps``.
      warmup_steps: the length of the warm-up in steps; with 0 the decay begins at step 0.
      transition_steps: the number of steps for one factor; if it is 0 or less, the value stays at the peak.
      decay_rate: the factor, >= 0; if it is 0, the value stays at the peak.
      transition_begin: the number of steps between the warm-up and the decay; a negative one is treated as 0.
      staircase: whether the value changes only every ``transition_steps`` steps.
      end_value: a lower bound of the value if ``decay_rate`` < 1, else an upper bound; None for no bound.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``warmup_steps`` or ``decay_rate`` is negative, or a number is not finite.

    >>> schedule = warmup_exponential_decay_schedule(0.0, 1.0, warmup_steps=2, transition_steps=1, decay_rate=0.5)
    >>> print(schedule(jnp.arange(5)))
    [0.   0.5  1.   0.5  0.25]
    """
    check_value("init_value", init_value)
    check_value("peak_value", peak_value)
    check_steps("warmup_steps", warmup_steps)
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)

    def schedule(count):
        decayed = decay(steps_since(count, warmup_steps))
        init, peak, decayed = as_values(init_value, peak_value, decayed)
        return _warm_up(steps_since(count), init, peak, warmup_steps, decayed)

    return schedule


@comparable
def warmup_stable_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: Scalar,
    stable_steps: Scalar,
    decay_steps: Scalar,
    end_value: Scalar = 0.0,
    decay: str = "linear",
) -> Schedule:
    """Warm-up, stable, decay (WSD, also called trapezoidal): linear warm-up, a long constant phase, then decay.

    The start of the decay can be chosen during training, so one long run can be decayed at several lengths. With
    ``x = min((count - warmup_steps - stable_steps) / decay_steps, 1)`` the last phase is::

        value = end_value + (peak_value - end_value) * shape
        shape = 1 - x                       if decay is "linear"
        shape = (1 + cos(pi * x)) / 2       if decay is "cosine"
        shape = 1 - sqrt(x)                 if decay is "1-sqrt"

    Args:
      init_value: the value at step 0.
      peak_value: the value of the constant phase.
      warmup_steps: the length of the warm-up in steps; 0 for none.
      stable_steps: the length of the constant phase in steps; 0 for none.
      decay_steps: the length of the decay alone in steps; with 0 the value jumps to ``end_value``.
      end_value: the value after the decay.
      decay: "linear", "cosine" or "1-sqrt". Hägele et al. found "1-sqrt" the best for language models.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: another ``decay``, a negative number of steps, or a number that is not finite.

    Source: Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies,
    2024, arXiv:2404.06395; Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
    2024, arXiv:2405.18392.

    >>> print(warmup_stable_decay_schedule(0.0, 1.0, 1, 3, 16, decay="1-sqrt")(jnp.array([0, 1, 4, 8, 13, 20])))
    [0.   1.   1.   0.5  0.25 0.  ]
    """
    if decay not in ("linear", "cosine", "1-sqrt"):
        raise ValueError(f"decay must be 'linear', 'cosine' or '1-sqrt', got {decay!r}")
    check_value("init_value", init_value)
    check_value("peak_value", peak_value)
    check_steps("warmup_steps", warmup_steps)
    check_steps("stable_steps", stable_steps)
    check_steps("decay_steps", decay_steps)
    check_value("end_value", end_value)

    def schedule(count):
        init, peak, end = as_values(init_value, peak_value, end_value)
        done = steps_since(count)
        since = steps_since(done, warmup_steps)
        gone, left = fractions(steps_since(since, stable_steps), decay_steps, peak.dtype)
        if decay == "cosine":
            gone, left = half_wave(gone), half_wave(left)
        elif decay == "1-sqrt":
            moved = gone > 0  # the root's derivative at 0 is infinite
            gone = jnp.where(moved, jnp.sqrt(jnp.where(moved, gone, 1)), 0)
            left = left / (1 + gone)  # 1 - sqrt(x), without the cancellation near the end
        held_or_falling = jnp.where(is_before(since, stable_steps), peak, mix(peak, end, gone, left))
        return _warm_up(done, init, peak, warmup_steps, held_or_falling)

    return schedule


@comparable
def inverse_square_root_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: Scalar) -> Schedule:
    """Linear warm-up, then decay with the inverse square root of the step count, as for the Transformer.

    ::

        value = init_value + (peak_value - init_value) * count / warmup_steps      before warmup_steps
        value = peak_value * sqrt(warmup_steps / count)                            from there on

    Under the root, a warm-up shorter than one step and a count of 0 are treated as 1. The schedule of the paper, which
    counts steps from 1, has ``init_value = 0`` and ``peak_value = (d_model * warmup_steps) ** -0.5``.

    Args:
      init_value: the value at step 0.
      peak_value: the value at step ``warmup_steps``.
      warmup_steps: the length of the warm-up in steps, which also sets the rate of the decay.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``warmup_steps`` is negative, or a number is not finite.

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.

    >>> print(inverse_square_root_schedule(0.0, 1.0, warmup_steps=4)(jnp.array([0, 2, 4, 16, 64])))
    [0.   0.5  1.   0.5  0.25]
    """
    check_value("init_value", init_value)
    check_value("peak_value", peak_value)
    check_steps("warmup_steps", warmup_steps)

    def schedule(count):
        init, peak = as_values(init_value, peak_value)
        done = steps_since(count)
        pace = jnp.maximum(as_steps(warmup_steps), 1).astype(peak.dtype)
        since = jnp.maximum(done, 1).astype(peak.dtype)
        return _warm_up(done, init, peak, warmup_steps, peak * jnp.sqrt(pace / since))

    return schedule
