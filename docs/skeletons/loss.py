"""Skeleton of a new loss: copy it to a file in ``nnlearn/losses/`` and rename it. It runs without changes."""

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.tree import as_hyperparam, compute_dtype
from nnlearn.types import ArrayLike, Scalar


def skeleton_loss(predictions: ArrayLike, targets: ArrayLike, quantile: Scalar = 0.5) -> jax.Array:
    r"""<One line: the pinball loss, whose minimiser is a quantile> (<authors> <year>).

    .. math:: \ell = \max(q (y - \hat y), (q - 1) (y - \hat y))

    Args:
      predictions: :math:`\hat y`, floating, of any shape.
      targets: :math:`y`, of the same shape.
      quantile: :math:`q` in (0, 1).

    Returns:
      Losses of the same shape, not reduced, float32 or wider.

    Raises:
      ValueError: if shapes differ, or ``quantile`` is out of range.

    >>> skeleton_loss(jnp.array([1.0, 3.0]), jnp.array([2.0, 2.0]), quantile=0.9)
    Array([0.9, 0.1], dtype=float32)
    """
    check_number("quantile", quantile, low=0.0, high=1.0, low_open=True, high_open=True)
    predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
    if predictions.shape != targets.shape:  # (n,) and (n, 1) would broadcast to (n, n)
        raise ValueError(f"predictions {predictions.shape} and targets {targets.shape} must have one shape")
    wide = compute_dtype(predictions.dtype, targets.dtype)  # float32 at least
    error = targets.astype(wide) - predictions.astype(wide)
    quantile = as_hyperparam(quantile, wide)
    return jnp.maximum(quantile * error, (quantile - 1) * error)


# Tests, in ``tests/test_losses.py``: compare values and gradients with a slow NumPy version in float64, also at extreme
# inputs, and with optax and PyTorch if they have the loss. Then export the name in both ``__init__.py`` files.
