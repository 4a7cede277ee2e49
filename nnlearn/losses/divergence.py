"""Kullback-Leibler divergences between distributions.

Predictions are log-probabilities. ``0 log 0`` is 0: a prediction of 0 (-inf) adds 0 where the target is 0, and +inf
where it is not.
"""

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import Axis, as_floating, check_same_shape, mask_over, normalize_axes, widen
from nnlearn.types import ArrayLike


def _arguments(log_predictions, targets, name, axis, where, nothing):
    """Checked arguments; masked entries are replaced by a prediction of log 1 and the target ``nothing``."""
    predicted, target = as_floating("log_predictions", log_predictions), as_floating(name, targets)
    check_same_shape(("log_predictions", name), predicted, target)
    predicted, target = widen(predicted, target)
    axes = normalize_axes(axis, predicted.ndim)
    include = mask_over(where, predicted.shape, axes)
    if include is not None:
        predicted, target = jnp.where(include, predicted, 0), jnp.where(include, target, nothing)
    return predicted, target, include, axes


def _divergence_terms(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """``t log t - t x`` with its limits where ``t`` is 0; the derivative of ``t log t`` there is 0."""
    nothing = target == 0
    crossed = jnp.where(nothing & (predicted == -jnp.inf), 0, predicted)
    return target * (jnp.log(jnp.where(nothing, 1, target)) - crossed)


def kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Kullback-Leibler divergence, ``sum_k t_k (log t_k - x_k)``.

    Args:
      log_predictions: ``x``, log-probabilities, floating-point, shape ``[..., classes]``.
      targets: ``t``, probabilities, floating-point and >= 0, of the same shape.
      axis: the axis, or axes, to sum over; None for all.
      where: booleans of the predictions' shape or of the result's; entries that are False add 0 and get no gradient.

    Returns:
      One divergence per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Kullback & Leibler, *On information and sufficiency*, 1951.

    >>> kl_divergence(jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array([0.5, 0.5, 0.0]))
    Array(0.3466, dtype=float32)
    """
    predicted, target, _, axes = _arguments(log_predictions, targets, "targets", axis, where, 0)
    return jnp.sum(_divergence_terms(predicted, target), axes)


def kl_divergence_with_log_targets(
    log_predictions: ArrayLike, log_targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Kullback-Leibler divergence with log-probabilities as targets, ``sum_k exp(u_k) (u_k - x_k)``.

    Args:
      log_predictions: ``x``, log-probabilities, floating-point, shape ``[..., classes]``.
      log_targets: ``u``, log-probabilities, floating-point, of the same shape; -inf for a probability of 0.
      axis: the axis, or axes, to sum over; None for all.
      where: booleans of the predictions' shape or of the result's; entries that are False add 0 and get no gradient.

    Returns:
      One divergence per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Kullback & Leibler, *On information and sufficiency*, 1951.

    >>> kl_divergence_with_log_targets(jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf]))
    Array(0.6931, dtype=float32)
    """
    predicted, target, _, axes = _arguments(log_predictions, log_targets, "log_targets", axis, where, -jnp.inf)
    probability = jnp.exp(target)
    nothing = probability == 0  # also where it underflows, as a prediction of -inf would give 0 * inf
    gap = jnp.where(nothing, 0, target) - jnp.where(nothing, 0, predicted)
    return jnp.sum(probability * gap, axes)


def generalized_kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Generalised Kullback-Leibler divergence, ``sum_k t_k (log t_k - x_k) - t_k + exp(x_k)``, of positive vectors.

    Each term is >= 0, and 0 only where prediction and target agree. For distributions it equals ``kl_divergence``.

    Args:
      log_predictions: ``x``, logarithms, floating-point, shape ``[..., classes]``.
      targets: ``t``, floating-point and >= 0, of the same shape.
      axis: the axis, or axes, to sum over; None for all.
      where: booleans of the predictions' shape or of the result's; entries that are False add 0 and get no gradient.

    Returns:
      One divergence per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, section 3.1.5.

    >>> generalized_kl_divergence(jnp.log(jnp.array([1.0, 2.0])), jnp.array([1.0, 1.0]))
    Array(0.3069, dtype=float32)
    """
    predicted, target, include, axes = _arguments(log_predictions, targets, "targets", axis, where, 0)
    surplus = jnp.exp(predicted) - target
    if include is not None:
        surplus = jnp.where(include, surplus, 0)
    return jnp.sum(_divergence_terms(predicted, target) + surplus, axes)


def convex_kl_divergence(
    log_predictions: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> jax.Array:
    """An alias of ``generalized_kl_divergence``, its name in optax before 0.2.4.

    Args:
      log_predictions: logarithms, floating-point, shape ``[..., classes]``.
      targets: floating-point and >= 0, of the same shape.
      axis: the axis, or axes, to sum over; None for all.
      where: booleans of the predictions' shape or of the result's; entries that are False add 0 and get no gradient.

    Returns:
      One divergence per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, section 3.1.5.

    >>> convex_kl_divergence(jnp.log(jnp.array([1.0, 2.0])), jnp.array([1.0, 1.0]))
    Array(0.3069, dtype=float32)
    """
    return generalized_kl_divergence(log_predictions, targets, axis, where)
