"""Losses for yes or no, from one logit: binary cross-entropy and its focal form.

Both are written in the logit's size ``s = |x|`` and in ``c``, the label's weight on the side that the logit disagrees
with: then nothing cancels. Their derivatives are written out, because each is then one elementwise expression that
compiles to one pass; derived step by step, the focal loss keeps many arrays of the logits' size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.losses.arguments import prepare_pair
from nnlearn.tree import as_hyperparam
from nnlearn.types import ArrayLike, Scalar


def _sides(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The logit's sign and size, and the labels' weight against and for that sign.

    Not ``jnp.sign`` and ``jnp.abs``: at 0 all four follow the right branch of a smooth whole, so that its derivatives
    are right there too, where weights that start at 0 begin.
    """
    positive = logits >= 0
    return (
        jnp.where(positive, 1, -1).astype(logits.dtype),
        jnp.where(positive, logits, -logits),
        jnp.where(positive, 1 - labels, labels),
        jnp.where(positive, labels, 1 - labels),
    )


def _along(tangent: Any, derivative: Callable[[], jax.Array]) -> Any:
    """One term of a directional derivative; 0, not ``0 * inf``, along an argument that is not differentiated."""
    return 0.0 if isinstance(tangent, SymbolicZero) else derivative() * tangent


def _certain_is_free(against: jax.Array, size: jax.Array, loss: jax.Array) -> jax.Array:
    """A loss without the ``0 * inf`` of an infinite logit that is right.

    Coming last, the choice also keeps XLA on CPUs from tearing the expression apart to merge its end into a sum.
    """
    return jnp.where((against == 0) & (size == jnp.inf), 0, loss)


@jax.custom_jvp
def _binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    _, size, against, _ = _sides(logits, labels)
    return _certain_is_free(against, size, jnp.log1p(jnp.exp(-size)) + size * against)


def _binary_cross_entropy_jvp(primals, tangents):
    logits, labels = primals
    sign, size, against, _ = _sides(logits, labels)
    small = jnp.exp(-size)
    along_logits = _along(tangents[0], lambda: sign * (against - small / (1 + small)))
    return _binary_cross_entropy(logits, labels), along_logits + _along(tangents[1], lambda: -logits)


_binary_cross_entropy.defjvp(_binary_cross_entropy_jvp, symbolic_zeros=True)


def _wrongness(size: jax.Array, against: jax.Array, agreeing: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``log u``, the logarithm of the probability of the wrong answer; and ``m`` in ``u = m s(size)`` with where to use
    its limit ``exp(-size)`` instead. All are finite where the size is."""
    small = jnp.exp(-size)
    # exp(-60) is still a float32 of full precision. Beyond, where all weight agrees, the logarithm is -size.
    far = (against == 0) & (size > 60)
    mixed = jnp.where(far, 1, against + agreeing * small)
    return jnp.where(far, -size, jnp.log(mixed)) - jnp.log1p(small), mixed, far


@jax.custom_jvp
def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator`` whose derivative does not square the denominator, which may be as small as 1e-30."""
    return numerator / denominator


@_quotient.defjvp
def _quotient_jvp(primals, tangents):
    ratio = _quotient(*primals)
    return ratio, _quotient(tangents[0] - ratio * tangents[1], primals[1])


@jax.custom_jvp
def _focal(logits: jax.Array, labels: jax.Array, gamma: jax.Array) -> jax.Array:
    _, size, against, agreeing = _sides(logits, labels)
    log_wrong, _, _ = _wrongness(jnp.minimum(size, jnp.finfo(size.dtype).max), against, agreeing)
    loss = jnp.exp(gamma * log_wrong) * (jnp.log1p(jnp.exp(-size)) + size * against)
    return _certain_is_free(against, size, loss)


def _focal_jvp(primals, tangents):
    """With ``u`` the probability of the wrong answer, ``H`` the cross-entropy and ``p = s(x)``:

    ``d/dx = u**gamma (p - y + gamma H (1 - 2 y) p (1 - p) / u)``, ``d/dy = u**gamma (-x + gamma H (1 - 2 p) / u)`` and
    ``d/dgamma = u**gamma log(u) H``.
    """
    logits, labels, gamma = primals
    sign, size, against, agreeing = _sides(logits, labels)
    size = jnp.minimum(size, jnp.finfo(size.dtype).max)
    log_wrong, mixed, far = _wrongness(size, against, agreeing)
    small = jnp.exp(-size)
    likely = 1 / (1 + small)
    entropy = jnp.log1p(small) + size * against
    weight = jnp.exp(gamma * log_wrong)

    def along_logits():
        ratio = likely * jnp.where(far, 1, _quotient(small, mixed))  # p (1 - p) / u
        pull = gamma * (against - agreeing) * (entropy * ratio)  # the bounded product first: gamma H may overflow
        return sign * weight * (against - small * likely + pull)

    def along_labels():
        return sign * weight * (gamma * (small - 1) * jnp.where(far, 1, _quotient(entropy, mixed)) - size)

    tangent = _along(tangents[0], along_logits) + _along(tangents[1], along_labels)
    return _focal(*primals), tangent + _along(tangents[2], lambda: weight * log_wrong * entropy)


_focal.defjvp(_focal_jvp, symbolic_zeros=True)


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Cross-entropy of the sigmoid of each logit, ``-y log s(x) - (1 - y) log(1 - s(x))`` with ``s`` the sigmoid.

    Args:
      logits: ``x``, log-odds, floating-point, of any shape ``[...]``; up to +-inf, with loss 0 if right and inf if
        wrong.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ.
      TypeError: if the logits are not floating-point, or the labels are complex.

    Source: Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 6.2.2.2.

    >>> sigmoid_binary_cross_entropy(jnp.array([0.0, 1e4, -1e4]), jnp.array([1, 1, 1]))
    Array([6.931472e-01, 0.000000e+00, 1.000000e+04], dtype=float32)
    """
    logits, labels = prepare_pair(logits, labels, ("logits", "labels"))
    return _binary_cross_entropy(logits, labels)


def sigmoid_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: Scalar | None = None, gamma: Scalar = 2.0
) -> jax.Array:
    """Binary cross-entropy that counts examples the less the better they are classified.

    ``a (1 - p)**gamma H(x, y)``, where ``H`` is the binary cross-entropy, ``p = y s(x) + (1 - y)(1 - s(x))`` the
    probability of the right answer, and ``a = alpha y + (1 - alpha)(1 - y)``.

    Args:
      logits: ``x``, log-odds, floating-point, of any shape ``[...]``.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.
      alpha: the weight of label 1, in [0, 1], label 0 having ``1 - alpha``; None weighs both 1.
      gamma: how fast easy examples lose weight, finite and >= 0; 0 is plain cross-entropy.

    Returns:
      One loss per element in nats, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes differ, or ``alpha`` or ``gamma`` is out of range.
      TypeError: if the logits are not floating-point, or the labels are complex.

    Source: Lin et al., *Focal loss for dense object detection*, 2017.

    >>> sigmoid_focal_loss(jnp.array([0.0, 3.0]), jnp.array([1, 1]), gamma=2.0)
    Array([0.1733, 0.0001], dtype=float32)
    """
    if alpha is not None:
        check_number("alpha", alpha, low=0.0, high=1.0)
    check_nonnegative("gamma", gamma)
    logits, labels = prepare_pair(logits, labels, ("logits", "labels"))
    loss = _focal(logits, labels, jnp.asarray(gamma, logits.dtype))
    if alpha is None:
        return loss
    alpha = as_hyperparam(alpha, logits.dtype)
    return (alpha * labels + (1 - alpha) * (1 - labels)) * loss
