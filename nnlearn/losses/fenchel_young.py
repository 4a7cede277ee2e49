"""Fenchel-Young losses: a loss from any regularised maximum over predictions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_floating, as_real, check_same_shape, mask_over, widen
from nnlearn.types import ArrayLike


def make_fenchel_young_loss(max_fun: Callable[..., ArrayLike]) -> Callable[..., jax.Array]:
    """Make the loss ``max_fun(s) - s . y`` of scores ``s`` and targets ``y``; ``max_fun(s) = max_p (p . s - R(p))``.

    Its gradient is the maximising ``p`` minus ``y``. With ``logsumexp`` it is the cross-entropy; with a maximum over
    permutations or paths it trains structured predictions.

    Args:
      max_fun: a differentiable function from a vector of scores, shape ``[n]``, to a scalar.

    Returns:
      ``loss(scores, targets, *args, where=None, **kwargs)``: scores ``[..., n]``, floating-point, and targets of the
      same shape, real, to one loss per vector, shape ``[...]``, float32 (float64 if an argument is). ``where`` has the
      result's shape; entries that are False have loss 0 and no gradient, even if they are NaN. ``args`` and ``kwargs``
      are passed to ``max_fun`` unchanged, the same for every vector.

    Raises:
      ValueError: (the loss) the shapes do not match.
      TypeError: if ``max_fun`` is not a function; (the loss) the scores are not floating-point, or ``where`` is not
        boolean.

    Source: Blondel, Martins & Niculae, *Learning with Fenchel-Young losses*, 2020.

    >>> loss = make_fenchel_young_loss(jax.nn.logsumexp)
    >>> loss(jnp.array([[0.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])).round(3)
    Array([0.693, 0.127], dtype=float32)
    """
    if not callable(max_fun):
        raise TypeError(f"max_fun must be a function of a vector of scores, got {max_fun!r}")

    def fenchel_young_loss(
        scores: ArrayLike, targets: ArrayLike, *args: Any, where: ArrayLike | None = None, **kwargs: Any
    ) -> jax.Array:
        scores, targets = as_floating("scores", scores), as_real("targets", targets)
        check_same_shape(("scores", "targets"), scores, targets)
        scores, targets = widen(scores, targets)
        mask = mask_over(where, scores.shape[:-1], ())
        if mask is not None:
            column = jnp.expand_dims(mask, -1)
            scores, targets = jnp.where(column, scores, 0), jnp.where(column, targets, 0)
        largest = jnp.vectorize(lambda row: max_fun(row, *args, **kwargs), signature="(n)->()")(scores)
        loss = largest - jnp.sum(scores * targets, -1)
        return loss if mask is None else jnp.where(mask, loss, 0)

    return fenchel_young_loss
