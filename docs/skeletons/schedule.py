"""Skeleton of a new schedule: copy it to a file in ``nnlearn/schedules/`` and rename it. It runs without changes."""

import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.settings import comparable
from nnlearn.types import Scalar, Schedule


@comparable  # equal settings give equal schedules
def skeleton_schedule(init_value: Scalar, half_life: Scalar) -> Schedule:
    r"""<One line> (<authors> <year>).

    .. math:: f(t) = f_0 / 2^{t / h}

    Args:
      init_value: value at step 0, >= 0.
      half_life: number of steps in which the value halves, > 0.

    Returns:
      A function from steps (an integer or an integer array) to float32 values of the same shape.

    Raises:
      ValueError: if a value is out of range.

    >>> schedule = skeleton_schedule(1.0, half_life=10)
    >>> schedule(jnp.array([0, 10, 20]))
    Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    check_number("init_value", init_value, low=0.0)
    check_number("half_life", half_life, low=0.0, low_open=True)

    def schedule(count):
        # No Python branch on a value: every argument may be a tracer of jit, vmap or grad.
        return init_value * jnp.exp2(-jnp.asarray(count, jnp.float32) / half_life)

    return schedule


# Tests: an entry in the table of ``tests/test_schedules.py``. Then export the name in both ``__init__.py`` files.
