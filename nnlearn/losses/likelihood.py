"""Losses of predicted distributions: quantiles, negative log-likelihoods, and the evidence lower bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_nonnegative, check_number, known
from nnlearn.losses.arguments import (
    Axis,
    as_floating,
    as_real,
    as_weights,
    check_same_shape,
    mask_over,
    normalize_axes,
    prepare_pair,
    weighted_mean,
    widen,
)
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def quantile_loss(
    predictions: ArrayLike, targets: ArrayLike, quantile: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Quantile (pinball) loss, which is minimised by the quantile of the targets.

    ``max(q e, (q - 1) e)`` with ``e = target - prediction``. At ``q = 0.9`` a prediction that is too low costs nine
    times as much as one that is too high; at 0.5 the loss is half the absolute error.

    Args:
      predictions: floating-point, of any shape ``[...]``.
      targets: real, of the same shape or a scalar.
      quantile: ``q``, in [0, 1], a scalar; or shape ``[n]``, one for each entry of the predictions' last axis.
      where: booleans of the predictions' shape; entries that are False have loss 0 and no gradient, even if they are
        NaN.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is), in units of the targets.

    Raises:
      ValueError: if the shapes do not match, or ``quantile`` is out of range.
      TypeError: if the predictions are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Koenker & Bassett, *Regression quantiles*, 1978.

    >>> quantile_loss(jnp.array([1.0, 1.0]), jnp.array([3.0, 0.0]), 0.75)
    Array([1.5 , 0.25], dtype=float32)
    """
    predicted, target = prepare_pair(predictions, targets)
    quantile = quantile if isinstance(quantile, jax.Array) else np.asarray(quantile)
    shape = quantile.shape
    if shape not in ((), predicted.shape[-1:]):
        raise ValueError(f"quantile must be a scalar or have shape {predicted.shape[-1:]}, one for each entry of the "
                         f"predictions' last axis, got {shape}")  # fmt: skip
    if known(quantile) and not np.all((np.asarray(quantile) >= 0) & (np.asarray(quantile) <= 1)):
        raise ValueError(f"quantile must be in [0.0, 1.0], got {np.asarray(quantile).tolist()}; 0.9 for 90 percent")
    quantile = jnp.asarray(quantile, predicted.dtype)
    quantile = quantile.reshape((1,) * (predicted.ndim - quantile.ndim) + shape)
    mask = mask_over(where, predicted.shape, ())
    if mask is not None:
        predicted, target = jnp.where(mask, predicted, 0), jnp.where(mask, target, 0)
    error = target - predicted
    return quantile * jnp.maximum(error, 0) + (1 - quantile) * jnp.maximum(-error, 0)


@jax.custom_jvp
def _raise_to(value: jax.Array, low: jax.Array) -> jax.Array:
    """``max(value, low)`` with the derivative of ``value`` everywhere, so that values below ``low`` can recover."""
    return jnp.maximum(value, low)


@_raise_to.defjvp
def _raise_to_jvp(primals, tangents):
    value, low = primals
    return _raise_to(value, low), tangents[0] + jnp.where(value < low, tangents[1], 0)


def gaussian_negative_log_likelihood(
    means: ArrayLike,
    targets: ArrayLike,
    variances: ArrayLike | None = None,
    *,
    log_variances: ArrayLike | None = None,
    full: bool = False,
    epsilon: Scalar = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Gaussian negative log-likelihood, ``(log v + (t - m)**2 / v) / 2``.

    Args:
      means: ``m``, floating-point, of any shape ``[...]``.
      targets: ``t``, real, of the same shape or a scalar.
      variances: ``v``, real and >= 0, of the same shape or a scalar.
      log_variances: ``log v`` instead of ``variances``, floating-point; unbounded, so it can be the output of a
        network.
      full: whether to add the constant ``log(2 pi) / 2``.
      epsilon: the smallest variance, finite and > 0. Smaller ones are raised to it but keep their derivative.
      where: booleans of the means' shape; entries that are False have loss 0 and no gradient, even if they are NaN.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ, a variance is negative, ``epsilon`` is out of range, or not exactly one of
        ``variances`` and ``log_variances`` is given.
      TypeError: if the means are not floating-point, another argument is complex, or ``where`` is not boolean.

    Source: Nix & Weigend, *Estimating the mean and variance of the target probability distribution*, 1994.

    >>> gaussian_negative_log_likelihood(jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).round(3)
    Array([0.5  , 1.193], dtype=float32)
    """
    check_number("epsilon", epsilon, low=0.0, high=math.inf, low_open=True, high_open=True)
    if variances is not None and log_variances is None:
        name, spread, least = "variances", as_real("variances", variances), epsilon
    elif log_variances is not None and variances is None:
        name, spread, least = "log_variances", as_floating("log_variances", log_variances), jnp.log(epsilon)
    else:
        raise ValueError("give exactly one of variances and log_variances")
    mean, target = prepare_pair(means, targets, ("means", "targets"))
    check_same_shape(("means", name), mean, spread, scalar=True)
    mean, target, spread = widen(mean, target, jnp.broadcast_to(spread, mean.shape))
    mask = mask_over(where, mean.shape, ())
    if mask is not None:
        mean, target = jnp.where(mask, mean, 0), jnp.where(mask, target, 0)
        spread = jnp.where(mask, spread, float(log_variances is None))
    if log_variances is None:
        as_weights("variances", spread)
    spread = _raise_to(spread, jnp.broadcast_to(jnp.asarray(least, spread.dtype), spread.shape))
    log_variance = jnp.log(spread) if log_variances is None else spread
    deviation = (target - mean) * (jax.lax.rsqrt(spread) if log_variances is None else jnp.exp(-0.5 * spread))
    loss = 0.5 * (log_variance + jnp.square(deviation)) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return loss if mask is None else jnp.where(mask, loss, 0)


def poisson_negative_log_likelihood(
    log_rates: ArrayLike, targets: ArrayLike, *, full: bool = False, where: ArrayLike | None = None
) -> jax.Array:
    """Poisson negative log-likelihood, ``exp(x) - t x``.

    Args:
      log_rates: ``x``, the logarithm of the expected count, floating-point, of any shape ``[...]``.
      targets: ``t``, counts, real and >= 0, of the same shape or a scalar.
      full: whether to add ``log(t!)``, which does not depend on the prediction.
      where: booleans of the rates' shape; entries that are False have loss 0 and no gradient, even if they are NaN.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ, or a target is negative.
      TypeError: if the rates are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: McCullagh & Nelder, *Generalized linear models*, 1989, chapter 6.

    >>> poisson_negative_log_likelihood(jnp.log(jnp.array([2.0, 2.0])), jnp.array([0, 3])).round(3)
    Array([ 2.   , -0.079], dtype=float32)
    """
    log_rates, counts = prepare_pair(log_rates, targets, ("log_rates", "targets"))
    mask = mask_over(where, log_rates.shape, ())
    if mask is not None:
        log_rates, counts = jnp.where(mask, log_rates, 0), jnp.where(mask, counts, 0)
    as_weights("targets", counts)
    # A count of 0 at a rate of 0 has loss 0, not the NaN of 0 * -inf.
    certain = (counts == 0) & (log_rates == -jnp.inf)
    loss = jnp.exp(log_rates) - counts * jnp.where(certain, 0, log_rates)
    loss = loss + jax.lax.lgamma(counts + 1) if full else loss
    return loss if mask is None else jnp.where(mask, loss, 0)


@jax.custom_jvp
def _excess(x: jax.Array) -> jax.Array:
    """``exp(x) - 1 - x`` >= 0; near 0, where the terms cancel, by its series."""
    near = jnp.abs(x) < 0.25
    small = jnp.where(near, x, 0)
    series = jnp.full_like(x, 1 / math.factorial(12))
    for power in range(11, 1, -1):
        series = series * small + 1 / math.factorial(power)
    return jnp.where(near, jnp.square(small) * series, jnp.expm1(x) - x)


@_excess.defjvp
def _excess_jvp(primals, tangents):
    (x,), (change,) = primals, tangents
    return _excess(x), jnp.expm1(x) * change


def gaussian_kl_divergence(
    means: ArrayLike,
    log_variances: ArrayLike,
    prior_means: ArrayLike | None = None,
    prior_log_variances: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence between normal distributions with diagonal covariance.

    ``sum_k (exp(d_k) - 1 - d_k + (m_k - n_k)**2 / exp(w_k)) / 2`` with ``d = v - w``. It is never below 0.

    Args:
      means: ``m``, floating-point, shape ``[..., dim]``.
      log_variances: ``v``, floating-point, of the same shape.
      prior_means: ``n``, of the same shape or a scalar; None for 0.
      prior_log_variances: ``w``, of the same shape or a scalar; None for 0, a variance of 1.
      axis: the axis, or axes, to sum over; None for all.
      where: booleans of the means' shape or of the result's; entries that are False add 0 and get no gradient, even if
        they are NaN.

    Returns:
      One divergence per example in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Kingma & Welling, *Auto-encoding variational Bayes*, 2014, appendix B.

    >>> gaussian_kl_divergence(jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 1.0]])).round(3)
    Array([0.   , 0.859], dtype=float32)
    """
    mean, log_variance = as_floating("means", means), as_floating("log_variances", log_variances)
    check_same_shape(("means", "log_variances"), mean, log_variance)
    arrays = [mean, log_variance]
    for name, prior in (("prior_means", prior_means), ("prior_log_variances", prior_log_variances)):
        prior = as_real(name, 0 if prior is None else prior)
        check_same_shape(("means", name), mean, prior, scalar=True)
        arrays.append(jnp.broadcast_to(prior, mean.shape))
    axes = normalize_axes(axis, mean.ndim)
    mask = mask_over(where, mean.shape, axes)
    arrays = widen(*arrays)
    mean, log_variance, prior_mean, prior_log_variance = (
        array if mask is None else jnp.where(mask, array, 0) for array in arrays
    )
    difference = mean - prior_mean
    agree = difference == 0  # also where the prior's variance underflows, as 0 * inf would be NaN
    deviation = jnp.where(agree, 0, difference) * jnp.exp(-0.5 * jnp.where(agree, 0, prior_log_variance))
    return 0.5 * jnp.sum(_excess(log_variance - prior_log_variance) + jnp.square(deviation), axes)


def negative_evidence_lower_bound(
    reconstruction_losses: ArrayLike,
    divergences: ArrayLike,
    *,
    beta: Scalar = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Negative evidence lower bound of a variational auto-encoder, the mean of ``reconstruction + beta * divergence``.

    Args:
      reconstruction_losses: negative log-likelihood of each example given its code, summed over its elements,
        floating-point, of any shape ``[...]``; from ``sigmoid_binary_cross_entropy`` or
        ``gaussian_negative_log_likelihood``.
      divergences: of each example's code from the prior, floating-point, of the same shape; from
        ``gaussian_kl_divergence``.
      beta: weight of the divergence, finite and >= 0; at 1 the loss bounds the negative log-likelihood from above.
      where: booleans of the losses' shape; examples that are False are left out, even if they are NaN.

    Returns:
      A scalar in nats, float32 (float64 if an argument is); 0 when no example is kept.

    Raises:
      ValueError: if the shapes differ, or ``beta`` is out of range.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Kingma & Welling, *Auto-encoding variational Bayes*, 2014; ``beta``: Higgins et al., *beta-VAE*, 2017.

    >>> negative_evidence_lower_bound(jnp.array([3.0, 5.0]), jnp.array([1.0, 2.0]), beta=2.0)
    Array(7., dtype=float32)
    """
    check_nonnegative("beta", beta)
    losses = as_floating("reconstruction_losses", reconstruction_losses)
    divergence = as_floating("divergences", divergences)
    check_same_shape(("reconstruction_losses", "divergences"), losses, divergence)
    losses, divergence = widen(losses, divergence)
    mask = mask_over(where, losses.shape, ())
    if mask is not None:
        losses, divergence = jnp.where(mask, losses, 0), jnp.where(mask, divergence, 0)
    return weighted_mean(losses + as_hyperparam(beta, losses.dtype) * divergence, None, mask)
