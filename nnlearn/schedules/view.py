"""Values of schedules as an array, and as a plot."""

from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.types import Schedule


def preview(schedule: Schedule, steps: int) -> jax.Array:
    """The values of a schedule at steps 0 to ``steps - 1``, computed in one call.

    Args:
      schedule: a function from a step count to a scalar, also one of optax.
      steps: the number of values, a Python integer >= 0.

    Returns:
      A float32 array of shape ``(steps,)``, in the unit of the schedule.

    Raises:
      ValueError: ``steps`` is not an integer >= 0.

    >>> print(preview(lambda step: 0.5**step, 4))
    [1.    0.5   0.25  0.125]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, as it is a shape, got {steps!r}")

    def value_at(step):
        return jnp.asarray(schedule(step), dtype=jnp.float32)

    return jax.vmap(value_at)(jnp.arange(steps, dtype=jnp.int32))


def plot(schedule: Schedule, steps: int, ax: Any = None, **line_settings: Any) -> Any:
    """Plot the values of a schedule against the step.

    Args:
      schedule: a function from a step count to a scalar, also one of optax.
      steps: the number of steps to plot, from 0.
      ax: matplotlib axes to draw on; None for a new figure.
      **line_settings: passed to ``ax.plot``, such as ``label`` or ``color``.

    Returns:
      The axes; their figure is ``ax.figure``.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: ``steps`` is not an integer >= 0.

    >>> from nnlearn.schedules import cosine_decay_schedule
    >>> axes = plot(cosine_decay_schedule(0.1, 100), 100)
    >>> axes.get_xlabel()
    'step'
    """
    values = preview(schedule, steps)
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError('plot needs matplotlib: pip install "nnlearn[plot]"') from error
        _, ax = pyplot.subplots()
    ax.plot(range(steps), jax.device_get(values), **line_settings)
    ax.set_xlabel("step")
    ax.set_ylabel("value")
    return ax
