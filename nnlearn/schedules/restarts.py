"""Cosine decays with warm restarts."""

from collections.abc import Iterable, Mapping

import jax
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
    steps_since,
    whole_periods,
)
from nnlearn.schedules.join import join_schedules
from nnlearn.schedules.warmup import warmup_cosine_decay_schedule
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


@comparable
def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Scalar]]) -> Schedule:
    """SGDR: consecutive cycles of warm-up and cosine decay, each with its own settings.

    Args:
      cosine_kwargs: the arguments of ``warmup_cosine_decay_schedule`` for each cycle, where ``decay_steps`` is the
        length of the whole cycle in steps. The value stays at the end value of the last cycle.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: there is no cycle, or a cycle's settings are bad.
      TypeError: a cycle lacks a setting, or has an unknown one.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.

    >>> cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 3}
    >>> print(sgdr_schedule([cycle, {**cycle, "peak_value": 0.5}])(jnp.arange(8)))
    [0.   1.   0.5  0.   0.5  0.25 0.   0.  ]
    """
    cycles = list(cosine_kwargs)
    if not cycles:
        raise ValueError("cosine_kwargs must hold at least one cycle's arguments, got none")
    schedules = [warmup_cosine_decay_schedule(**cycle) for cycle in cycles]
    boundaries, ends_at = [], 0
    for cycle in cycles[:-1]:
        ends_at = ends_at + cycle["decay_steps"]
        boundaries.append(ends_at)
    return join_schedules(schedules, boundaries)


def _geometric(ratio: jax.Array, terms: jax.Array) -> jax.Array:
    """``1 + ratio + ... + ratio ** (terms - 1)``: exact for whole ratios, accurate for ratios near 1, differentiable.

    A power computed as 242.99998 would delay a restart by one step, so the powers of whole ratios are rounded. The
    correction has no derivative.
    """
    growth = ratio - 1
    smooth = jnp.expm1(terms * jnp.log1p(growth))
    exact = jnp.round(ratio**terms) - 1
    correction = jnp.where(ratio == jnp.round(ratio), exact - smooth, 0)
    return (smooth + jax.lax.stop_gradient(correction)) / growth


def _cycle(done: jax.Array, first: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The start and length of the cycle that contains step ``done``, for cycles that grow by ``ratio`` > 1."""
    rough = jnp.floor(jnp.log1p(done / first * (ratio - 1)) / jnp.log1p(ratio - 1)) - 1
    index = jax.lax.stop_gradient(jnp.maximum(rough, 0))
    for _ in range(2):  # rounding can give the cycle before the right one
        index = jax.lax.stop_gradient(index + (done >= first * _geometric(ratio, index + 1)).astype(index.dtype))
    cycles = _geometric(ratio, index)
    return first * cycles, first * (1 + (ratio - 1) * cycles)


@comparable
def cosine_annealing_warm_restarts_schedule(
    init_value: Scalar, first_cycle_steps: Scalar, cycle_factor: Scalar = 1, end_value: Scalar = 0.0
) -> Schedule:
    """Cosine annealing with warm restarts: repeated cosine decays, each longer than the last by a factor.

    Cycle ``i`` begins at step ``s[i] = first_cycle_steps * (1 + cycle_factor + ... + cycle_factor ** (i - 1))``, is
    ``n[i] = first_cycle_steps * cycle_factor ** i`` steps long, and in it::

        value = end_value + (init_value - end_value) * (1 + cos(pi * (count - s[i]) / n[i])) / 2

    This is PyTorch's ``CosineAnnealingWarmRestarts`` with its base rate as ``init_value``, ``T_0`` as
    ``first_cycle_steps``, ``T_mult`` as ``cycle_factor`` (here any number >= 1) and ``eta_min`` as ``end_value``.

    Args:
      init_value: the value at the beginning of each cycle.
      first_cycle_steps: the length of the first cycle in steps, > 0. A traced length of 0 or less gives ``end_value``.
      cycle_factor: the ratio of the lengths of two consecutive cycles, >= 1.
      end_value: the value that each cycle approaches.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: ``first_cycle_steps`` is not positive, ``cycle_factor`` is below 1, or a number is not finite.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.

    >>> print(cosine_annealing_warm_restarts_schedule(1.0, first_cycle_steps=2, cycle_factor=2)(jnp.arange(7)))
    [1.         0.5        1.         0.8535534  0.5        0.14644663 1.        ]
    """
    check_value("init_value", init_value)
    check_positive_steps("first_cycle_steps", first_cycle_steps)
    check_number("cycle_factor", cycle_factor, low=1, high_open=True, cure="cycles cannot shrink")
    check_value("end_value", end_value)

    def schedule(count):
        start, end, factor = as_values(init_value, end_value, cycle_factor)
        real, first = positive_steps(first_cycle_steps)
        done, first = alike(steps_since(count), first)
        # Equal cycles need only an exact integer remainder. Both cases are computed, as the factor may be traced.
        even_gone, even_left = fractions(done - whole_periods(done, first) * first, first, start.dtype)
        grows = factor > 1
        since, first = done.astype(start.dtype), first.astype(start.dtype)
        begin, length = _cycle(since, first, jnp.where(grows, factor, 2))
        gone, left = fractions(jnp.maximum(since - begin, 0), length, start.dtype)
        gone, left = jnp.where(grows, gone, even_gone), jnp.where(grows, left, even_left)
        return jnp.where(real, mix(start, end, half_wave(gone), half_wave(left)), end)

    return schedule
