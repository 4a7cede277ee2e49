"""Binary losses from one logit: cross-entropy and focal loss.

Both are written in terms of ``s = |x|`` and of ``c``, the label weight of the class that the logit votes against, so
that nothing cancels. Their derivatives are explicit: each is one elementwise expression that compiles to one pass,
while automatic differentiation of the focal loss would store many arrays of the logits' size.
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
    """Sign and magnitude of the logit, and the label weights against and for that sign.

    Unlike ``jnp.sign`` and ``jnp.abs``, all four have the correct one-sided derivative at 0, where networks that are
    initialised to zeros start.
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
    """The loss with 0 in place of the ``0 * inf`` of an infinite correct logit.

    As the last operation it also keeps XLA on CPUs from splitting the expression to fuse its end into a sum.
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
    """``log u``, with ``u`` the probability of the wrong class; ``m`` in ``u = m s(size)``; and where ``u`` is
    replaced by its limit ``exp(-size)``. All are finite where ``size`` is."""
    small = jnp.exp(-size)
    # Beyond 60, exp(-size) may be subnormal; where the label fully agrees, the logarithm is -size.
    far = (against == 0) & (size > 60)
    mixed = jnp.where(far, 1, against + agreeing * small)
    return jnp.where(far, -size, jnp.log(mixed)) - jnp.log1p(small), mixed, far


@jax.custom_jvp
def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, whose derivative does not square the denominator, which may be as small as 1e-30."""
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
        pull = gamma * (against - agreeing) * (entropy * ratio)  # bounded product first, as gamma H may overflow
        return sign * weight * (against - small * likely + pull)

    def along_labels():
        return sign * weight * (gamma * (small - 1) * jnp.where(far, 1, _quotient(entropy, mixed)) - size)

    tangent = _along(tangents[0], along_logits) + _along(tangents[1], along_labels)
    return _focal(*primals), tangent + _along(tangents[2], lambda: weight * log_wrong * entropy)


_focal.defjvp(_focal_jvp, symbolic_zeros=True)


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Binary cross-entropy, ``-y log s(x) - (1 - y) log(1 - s(x))`` with ``s`` the sigmoid.

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
    """Focal loss: binary cross-entropy that down-weights well-classified examples.

    ``a (1 - p)**gamma H(x, y)``, where ``H`` is the binary cross-entropy, ``p = y s(x) + (1 - y)(1 - s(x))`` the
    probability of the correct class, and ``a = alpha y + (1 - alpha)(1 - y)``.

    Args:
      logits: ``x``, log-odds, floating-point, of any shape ``[...]``.
      labels: ``y``, 0 or 1 or a probability, real, of the same shape or a scalar.
      alpha: the weight of label 1, in [0, 1], label 0 having ``1 - alpha``; None weighs both 1.
      gamma: how strongly easy examples are down-weighted, finite and >= 0; 0 is plain cross-entropy.

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
