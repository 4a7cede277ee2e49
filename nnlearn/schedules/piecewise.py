"""Piecewise schedules: constant, linear or cosine between given points, and the one-cycle policies."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from nnlearn.checks import check_number, known
from nnlearn.schedules.arithmetic import (
    alike,
    as_steps,
    as_values,
    check_positive_steps,
    check_value,
    fractions,
    half_wave,
    is_before,
    known_or,
    mix,
    steps_since,
)
from nnlearn.schedules.join import check_increasing
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule

BoundariesAndScales = Mapping[int, Scalar] | Sequence[tuple[Scalar, Scalar]] | None
"""``{step: scale}``, or pairs in increasing order of step, where steps may also be traced."""


def _sorted_pairs(boundaries_and_scales: BoundariesAndScales) -> list[tuple[Scalar, Scalar]]:
    if isinstance(boundaries_and_scales, Mapping):
        boundaries_and_scales = sorted(boundaries_and_scales.items(), key=lambda pair: pair[0])
    pairs = [(step, scale) for step, scale in boundaries_and_scales or ()]
    check_increasing("boundaries_and_scales steps", [step for step, _ in pairs])
    for step, scale in pairs:
        check_number(f"boundaries_and_scales[{step}]", scale, low=0, high_open=True, cure="scales are factors")
    return pairs


@comparable
def piecewise_constant_schedule(init_value: Scalar, boundaries_and_scales: BoundariesAndScales = None) -> Schedule:
    """Piecewise constant schedule: the value is multiplied by a factor at each boundary.

    ::

        value = init_value * product of scale over all boundaries <= count

    Args:
      init_value: the value before the first boundary.
      boundaries_and_scales: ``{step: scale}``, or pairs ``(step, scale)`` in increasing order of step; scales >= 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: a step or scale is negative, pairs are out of order, or a number is not finite.

    >>> print(piecewise_constant_schedule(1.0, {2: 0.5, 3: 0.1})(jnp.arange(5)))
    [1.   1.   0.5  0.05 0.05]
    """
    check_value("init_value", init_value)
    pairs = _sorted_pairs(boundaries_and_scales)

    def schedule(count):
        value, *scales = as_values(init_value, *(scale for _, scale in pairs))
        done = steps_since(count)
        value = jnp.broadcast_to(value, done.shape)
        for (step, _), scale in zip(pairs, scales, strict=True):
            value = value * jnp.where(is_before(done, step), 1, scale)
        return value

    return schedule


def _through_points(interpolate_type: str, count, start_value, points: Sequence[tuple[Scalar, Scalar]]):
    """Interpolate at ``count`` between (0, start_value) and all ``points``; constant after the last one."""
    level, *targets = as_values(start_value, *(target for _, target in points))
    done, start, *steps = alike(steps_since(count), 0, *(step for step, _ in points))
    value = jnp.broadcast_to(level, done.shape)
    for step, target in zip(steps, targets, strict=True):
        gone, left = fractions(steps_since(done, start), step - start, value.dtype)
        if interpolate_type == "cosine":
            gone, left = half_wave(gone), half_wave(left)
        value = jnp.where(done >= start, mix(level, target, gone, left), value)
        level, start = target, step
    return value


@comparable
def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Scalar, boundaries_and_scales: BoundariesAndScales = None
) -> Schedule:
    """Interpolated schedule: linear or half cosine waves between boundaries, each of which multiplies the value.

    With the levels ``v[0] = init_value`` and ``v[i] = v[i - 1] * scale[i]``, and between two boundaries
    ``x = (count - step[i]) / (step[i + 1] - step[i])``::

        value = v[i] + (v[i + 1] - v[i]) * x                         if linear
        value = v[i] + (v[i + 1] - v[i]) * (1 - cos(pi * x)) / 2     if cosine

    Args:
      interpolate_type: "linear" or "cosine".
      init_value: the value at step 0.
      boundaries_and_scales: ``{step: scale}``, or pairs ``(step, scale)`` in increasing order of step; scales >= 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: another ``interpolate_type``, a negative step or scale, or pairs out of order.

    >>> print(piecewise_interpolate_schedule("linear", 1.0, {2: 2.0, 4: 0.5})(jnp.arange(6)))
    [1.  1.5 2.  1.5 1.  1. ]
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(f"interpolate_type must be 'linear' or 'cosine', got {interpolate_type!r}")
    check_value("init_value", init_value)
    pairs = _sorted_pairs(boundaries_and_scales)

    def schedule(count):
        values = list(as_values(init_value, *(scale for _, scale in pairs)))
        for position in range(1, len(values)):
            values[position] = values[position - 1] * values[position]
        points = [(step, level) for (step, _), level in zip(pairs, values[1:], strict=True)]
        return _through_points(interpolate_type, count, values[0], points)

    return schedule


def _whole_step(fraction: Any, steps: Any):
    """``fraction * steps`` rounded down, in double precision if both are concrete, else in the tracers' precision."""
    if known(fraction) and known(steps):
        return int(float(fraction) * float(steps))
    (fraction,) = as_values(fraction)
    return jnp.floor(fraction * as_steps(steps).astype(fraction.dtype))


def _check_onecycle(transition_steps, peak_value, pct_start, div_factor, final_div_factor) -> None:
    check_positive_steps("transition_steps", transition_steps)
    check_value("peak_value", peak_value)
    check_number("pct_start", pct_start, low=0, high=1)
    for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        check_number(name, value, low=0, low_open=True, high_open=True)


@comparable
def linear_onecycle_schedule(
    transition_steps: Scalar,
    peak_value: Scalar,
    pct_start: Scalar = 0.3,
    pct_final: Scalar = 0.85,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """Linear one-cycle policy: up to the peak, down to the initial value, and down to almost 0.

    The value is linear between the points::

        (0, peak_value / div_factor)
        (floor(pct_start * transition_steps), peak_value)
        (floor(pct_final * transition_steps), peak_value / div_factor)
        (transition_steps, peak_value / (div_factor * final_div_factor))

    Args:
      transition_steps: the length of the whole cycle in steps, > 0.
      peak_value: the highest value.
      pct_start: the fraction of the steps at which the peak is reached, in [0, 1].
      pct_final: the fraction of the steps at which the value returns to the initial one, in [pct_start, 1].
      div_factor: the ratio of the peak to the initial value, > 0.
      final_div_factor: the ratio of the initial value to the last, > 0.

    If a fraction or the number of steps is a float32 tracer, rounding can move the end of a phase by one step compared
    with Python numbers. A phase of less than one step is skipped.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: a number is outside its range.

    Source: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2017,
    arXiv:1708.07120.

    >>> schedule = linear_onecycle_schedule(8, 1.0, pct_start=0.25, pct_final=0.5, div_factor=4.0, final_div_factor=8.0)
    >>> print(schedule(jnp.arange(0, 9, 2)))
    [0.25     1.       0.25     0.140625 0.03125 ]
    """
    _check_onecycle(transition_steps, peak_value, pct_start, div_factor, final_div_factor)
    check_number(
        "pct_final",
        pct_final,
        low=known_or(pct_start, 0.0),
        high=1,
        cure="it comes after pct_start",
    )

    def schedule(count):
        peak, div, final_div = as_values(peak_value, div_factor, final_div_factor)
        first = peak / div
        points = [
            (_whole_step(pct_start, transition_steps), peak),
            (_whole_step(pct_final, transition_steps), first),
            (transition_steps, first / final_div),
        ]
        return _through_points("linear", count, first, points)

    return schedule


@comparable
def cosine_onecycle_schedule(
    transition_steps: Scalar,
    peak_value: Scalar,
    pct_start: Scalar = 0.3,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """Cosine one-cycle policy: up half a cosine wave to the peak, and down half a wave to almost 0.

    The value follows half cosine waves between the points::

        (0, peak_value / div_factor)
        (floor(pct_start * transition_steps), peak_value)
        (floor(transition_steps), peak_value / (div_factor * final_div_factor))

    PyTorch's ``OneCycleLR`` with ``n`` steps is this schedule with ``transition_steps = n - 1`` and the peak at step
    ``pct_start * n - 1``.

    Args:
      transition_steps: the length of the whole cycle in steps, > 0.
      peak_value: the highest value.
      pct_start: the fraction of the steps at which the peak is reached, in [0, 1], rounded as in
        ``linear_onecycle_schedule``.
      div_factor: the ratio of the peak to the initial value, > 0.
      final_div_factor: the ratio of the initial value to the last, > 0.

    Returns:
      A function of the step count, elementwise on arrays of counts.

    Raises:
      ValueError: a number is outside its range.

    Source: Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2017,
    arXiv:1708.07120.

    >>> schedule = cosine_onecycle_schedule(8, 1.0, pct_start=0.25, div_factor=4.0, final_div_factor=8.0)
    >>> print(schedule(jnp.array([0, 1, 2, 5, 8])))
    [0.25     0.625    1.       0.515625 0.03125 ]
    """
    _check_onecycle(transition_steps, peak_value, pct_start, div_factor, final_div_factor)

    def schedule(count):
        peak, div, final_div = as_values(peak_value, div_factor, final_div_factor)
        first = peak / div
        points = [
            (_whole_step(pct_start, transition_steps), peak),
            (_whole_step(1, transition_steps), first / final_div),
        ]
        return _through_points("cosine", count, first, points)

    return schedule
