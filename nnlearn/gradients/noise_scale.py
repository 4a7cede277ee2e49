"""The gradient noise scale: the batch size beyond which larger batches bring diminishing returns."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_number, known
from nnlearn.tree import compute_dtype
from nnlearn.types import ArrayLike, Scalar


class NoiseScale(NamedTuple):
    """How much the gradients of examples scatter.

    Attributes:
      noise: tr(Sigma), the trace of the covariance of one example's gradient.
      signal: |G|^2, the squared norm of the true gradient. The estimate may be negative if the noise dominates.
      scale: ``noise / signal``, the batch size at which both contribute equally to a step. It is a ratio of two noisy
        estimates: over several batches, average ``noise`` and ``signal`` first, then divide.
    """

    noise: jax.Array
    signal: jax.Array
    scale: jax.Array


def noise_scale_from_examples(
    norms_b: ArrayLike | Sequence[float], mean_grad_norm: ArrayLike, where: ArrayLike | Sequence[bool] | None = None
) -> NoiseScale:
    """The simple gradient noise scale from the norms of n examples' gradients and of their mean.

    With ``s`` the mean of the squared norms and ``m`` the squared norm of the mean, both estimates are unbiased::

        noise  = (s - m) / (1 - 1 / n)
        signal = (n m - s) / (n - 1)

    Args:
      norms_b: shape (batch_size,), as from ``per_example_norms``.
      mean_grad_norm: the norm of the mean of the same gradients, a scalar.
      where: booleans of shape (batch_size,), the examples that count; None for all.

    Returns:
      A ``NoiseScale`` of scalars; NaN if fewer than two examples count.

    Raises:
      ValueError: if ``norms_b`` is not a vector, or ``where`` has another shape.

    Source: McCandlish et al. 2018, arXiv:1812.06162.

    >>> noise, signal, scale = noise_scale_from_examples([1.0, 3.0], 2.0)  # two gradients, 1 and 3
    >>> float(noise), float(signal), round(float(scale), 3)
    (2.0, 3.0, 0.667)
    """
    norms_b = jnp.asarray(norms_b)
    where_b = jnp.ones(norms_b.shape, bool) if where is None else jnp.asarray(where, bool)
    if norms_b.ndim != 1 or where_b.shape != norms_b.shape:
        raise ValueError(f"norms_b and where must be vectors of one length, got {norms_b.shape} and {where_b.shape}")
    squares_b = jnp.square(norms_b.astype(compute_dtype(norms_b.dtype)))
    return _noise_scale(jnp.mean(squares_b, where=where_b), _mean_square(mean_grad_norm), 1, jnp.sum(where_b))


def noise_scale_from_batches(
    small_norm: ArrayLike | Sequence[float], big_norm: ArrayLike | Sequence[float], small_size: Scalar, big_size: Scalar
) -> NoiseScale:
    """The simple gradient noise scale from the norms of mean gradients over small and over big batches.

    With ``s`` and ``m`` the squared norms for batches of b and B examples, both estimates are unbiased::

        noise  = (s - m) / (1 / b - 1 / B)
        signal = (B m - b s) / (B - b)

    Args:
      small_norm, big_norm: the norms; an array holds one norm per batch, and their squares are averaged.
      small_size, big_size: examples in a batch, ``1 <= small_size < big_size``; may be traced.

    Returns:
      A ``NoiseScale`` of scalars.

    Raises:
      ValueError: if ``small_size`` is below 1 or not below ``big_size``.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    >>> float(noise_scale_from_batches(jnp.array([1.0, 3.0]), 2.0, 1, 2).noise)
    2.0
    """
    check_number("small_size", small_size, low=1)
    check_number("big_size", big_size, low=1)
    if known(small_size) and known(big_size) and float(np.asarray(small_size)) >= float(np.asarray(big_size)):
        raise ValueError(f"small_size must be below big_size, got {small_size} and {big_size}")
    return _noise_scale(_mean_square(small_norm), _mean_square(big_norm), small_size, big_size)


class BatchCost(NamedTuple):
    """What training to a given loss costs with a batch size, relative to the least that any batch size can reach.

    Attributes:
      steps: the factor on the number of steps; 1 for very large batches.
      examples: the factor on the number of examples; 1 for very small batches.
    """

    steps: jax.Array
    examples: jax.Array


def batch_cost(scale: Scalar, batch_size: Scalar) -> BatchCost:
    r"""What a batch size costs in steps and in examples, from the noise scale.

    .. math:: \text{steps} = 1 + \frac{\text{scale}}{B}, \qquad \text{examples} = 1 + \frac{B}{\text{scale}}

    With ``B = scale`` both are 2. Much smaller batches waste steps: 4 times the batch then takes nearly a quarter of
    the steps. Much larger ones waste examples.

    Args:
      scale: ``NoiseScale.scale``, best from averages over several batches.
      batch_size: the number of examples in a batch.

    Returns:
      A ``BatchCost``.

    Raises:
      ValueError: if ``batch_size`` is below 1.

    Source: McCandlish et al. 2018, arXiv:1812.06162.

    >>> cost = batch_cost(300.0, 100)
    >>> float(cost.steps), round(float(cost.examples), 3)
    (4.0, 1.333)
    """
    check_number("batch_size", batch_size, low=1)
    scale = jnp.maximum(jnp.asarray(scale, float), 0)
    return BatchCost(1 + scale / batch_size, jnp.asarray(1 + batch_size / scale))


def _mean_square(norms: ArrayLike | Sequence[float]) -> jax.Array:
    norms = jnp.asarray(norms)
    return jnp.mean(jnp.square(norms.astype(compute_dtype(norms.dtype))))


def _noise_scale(small_square: jax.Array, big_square: jax.Array, small_size: Scalar, big_size: Scalar) -> NoiseScale:
    dtype = compute_dtype(small_square.dtype, big_square.dtype)
    s, m, b, n = (jnp.asarray(value).astype(dtype) for value in (small_square, big_square, small_size, big_size))
    noise = (s - m) / (1 / b - 1 / n)
    signal = (n * m - b * s) / (n - b)
    return NoiseScale(noise, signal, noise / signal)


__all__ = ["BatchCost", "NoiseScale", "batch_cost", "noise_scale_from_batches", "noise_scale_from_examples"]
