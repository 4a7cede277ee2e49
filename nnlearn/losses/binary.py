"""Losses for yes or no, from one logit: binary cross-entropy and its focal form.

Both are written in ``a = |x|`` and ``c``, the label's weight on the side that the logit disagrees with: then nothing
cancels, and each is one elementwise expression that compiles, with its gradient, to one pass without temporaries.
"""

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.losses.arguments import prepare_pair
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def _sides(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logit's size, and the labels' weight against and for its sign."""
    positive = logits >= 0
    # Not jnp.abs: at 0 all three follow their right branch, so that derivatives of the smooth whole are right there.
    return (
        jnp.where(positive, logits, -logits),
        jnp.where(positive, 1 - labels, labels),
        jnp.where(positive, labels, 1 - labels),
    )


def _cross_entropy(size: jax.Array, against: jax.Array) -> jax.Array:
    certain = (against == 0) & (size == jnp.inf)  # costs 0, where 0 * inf would be NaN
    return jnp.log1p(jnp.exp(-size)) + jnp.where(certain, 0, size) * against


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Cross-entropy of the sigmoid of each logit, ``-y log s(x) - (1 - y) log(1 - s(x))`` with ``s`` the sigmoid.

    Args:
      logits: ``x``, log-odds, floating, of any shape ``[...]``; up to +-inf, which costs 0 if right and inf if wrong.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: the shapes differ.
      TypeError: the logits are not floating, or the labels complex.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.2.

    >>> sigmoid_binary_cross_entropy(jnp.array([0.0, 1e4, -1e4]), jnp.array([1, 1, 1]))
    Array([6.931472e-01, 0.000000e+00, 1.000000e+04], dtype=float32)
    """
    logits, labels = prepare_pair(logits, labels, ("logits", "labels"))
    size, against, _ = _sides(logits, labels)
    return _cross_entropy(size, against)


def sigmoid_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: Scalar | None = None, gamma: Scalar = 2.0
) -> jax.Array:
    """Binary cross-entropy that counts examples the less the better they are classified.

    ``a (1 - p)**gamma H(x, y)``, where ``H`` is the binary cross-entropy, ``p = y s(x) + (1 - y)(1 - s(x))`` the
    probability of the right answer, and ``a = alpha y + (1 - alpha)(1 - y)``.

    Args:
      logits: ``x``, log-odds, floating, of any shape ``[...]``.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.
      alpha: the weight of label 1, in [0, 1], label 0 having ``1 - alpha``; None weighs both 1.
      gamma: how fast easy examples lose weight, finite and >= 0; 0 is plain cross-entropy.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: the shapes differ, or ``alpha`` or ``gamma`` is out of range.
      TypeError: the logits are not floating, or the labels complex.

    Source: Lin et al., *Focal loss for dense object detection*, 2017.

    >>> sigmoid_focal_loss(jnp.array([0.0, 3.0]), jnp.array([1, 1]), gamma=2.0)
    Array([0.1732868, 0.00010929], dtype=float32)
    """
    if alpha is not None:
        check_number("alpha", alpha, low=0.0, high=1.0)
    check_nonnegative("gamma", gamma)
    logits, labels = prepare_pair(logits, labels, ("logits", "labels"))
    size, against, agreeing = _sides(logits, labels)
    loss = jnp.exp(as_hyperparam(gamma, logits.dtype) * _log_error(size, against, agreeing))
    loss = loss * _cross_entropy(size, against)
    if alpha is None:
        return loss
    alpha = as_hyperparam(alpha, logits.dtype)
    return (alpha * labels + (1 - alpha) * (1 - labels)) * loss


def _log_error(size: jax.Array, against: jax.Array, agreeing: jax.Array) -> jax.Array:
    """``log(1 - p)``, the logarithm of the probability of the wrong answer, finite at every logit."""
    size = jnp.minimum(size, jnp.finfo(size.dtype).max)
    small = jnp.exp(-size)
    # exp(-60) is still a full-precision float32. Beyond, where all weight agrees, the logarithm is known: -size.
    far = (against == 0) & (size > 60)
    mixed = jnp.where(far, 1, against + agreeing * small)
    return jnp.where(far, -size, jnp.log(mixed)) - jnp.log1p(small)
