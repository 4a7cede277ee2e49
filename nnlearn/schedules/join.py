"""Concatenation of schedules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_number, known
from nnlearn.schedules.arithmetic import alike, as_values, check_steps, known_or
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


def check_increasing(name: str, boundaries: Sequence[Scalar]) -> None:
    """Raise unless the boundaries are step counts >= 0 in increasing order; tracers are not checked."""
    last = 0.0
    for position, boundary in enumerate(boundaries):
        check_steps(f"{name}[{position}]", boundary)
        if known(boundary):
            check_number(f"{name}[{position}]", boundary, low=last, cure="give boundaries in increasing order")
            last = known_or(boundary, last)


@comparable
def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[Scalar] | jax.Array | np.ndarray) -> Schedule:
    """Concatenate schedules. Each counts its steps from 0.

    ::

        value = schedules[i](count - boundaries[i - 1])   for boundaries[i - 1] <= count < boundaries[i]

    A schedule is only evaluated within its piece, including the end. So a schedule that is undefined elsewhere, such as
    the square root of the remaining steps, affects neither the value nor the gradient outside of its piece.

    Args:
      schedules: at least one; functions from step counts to scalars, also those of optax.
      boundaries: the steps at which the next schedule begins, one fewer than schedules.

    Returns:
      A function of the step count, elementwise on arrays of counts if the schedules are.

    Raises:
      TypeError: a schedule cannot be called.
      ValueError: the lengths do not match, or boundaries are negative or decrease.

    >>> def rise(count):
    ...     return count / 2
    >>> print(join_schedules([rise, lambda count: 1.0], [2])(jnp.arange(4)))
    [0.  0.5 1.  1. ]
    """
    schedules, boundaries = tuple(schedules), tuple(boundaries)
    if len(schedules) == 0 or len(boundaries) != len(schedules) - 1:
        raise ValueError(
            "boundaries must be one fewer than schedules (and schedules at least one), "
            f"got {len(boundaries)} boundaries for {len(schedules)} schedules"
        )
    for position, piece in enumerate(schedules):
        if not callable(piece):
            raise TypeError(
                f"schedules[{position}] must be a function, got {piece!r}; use constant_schedule for a number"
            )
    check_increasing("boundaries", boundaries)

    def schedule(count):
        count, *starts = alike(count, 0, *boundaries)
        count = jnp.maximum(count, 0)
        pieces = []
        for position, piece in enumerate(schedules):
            inside = jnp.maximum(count - starts[position], 0)
            if position < len(boundaries):
                inside = jnp.minimum(inside, jnp.maximum(starts[position + 1] - starts[position], 0))
            pieces.append(piece(inside))
        value, *later = as_values(*pieces)
        for start, piece in zip(starts[1:], later, strict=True):
            value = jnp.where(count < start, value, piece)
        return value

    return schedule
