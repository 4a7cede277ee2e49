"""Learning-to-rank losses, from scores of the items of a list along the last axis.

``reduce_fn`` reduces the losses of all lists to a scalar, as in optax. The mean is over lists that contribute, and 0 if
there are none.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.losses.arguments import as_floating, as_real, as_weights, check_same_shape, mask_over, weighted_mean, widen
from nnlearn.losses.softmax import exclude, mass_loss, normalize_logits
from nnlearn.tree import as_hyperparam, safe_divide
from nnlearn.types import ArrayLike, Scalar

ReduceFn = Callable[..., jax.Array] | None


def _prepare_lists(
    name, scores, labels, where, weights
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Scores, labels, mask and weights, all ``[..., items]``; masked entries are 0."""
    scores, labels = as_floating(name, scores), as_real("labels", labels)
    if scores.ndim == 0:
        raise ValueError(f"{name} must have an axis of items, shape [..., items], got a scalar")
    check_same_shape((name, "labels"), scores, labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        scores, labels = widen(scores, labels)
    else:  # float32 would not distinguish large integers
        (scores,) = widen(scores)
    mask = mask_over(where, scores.shape, (scores.ndim - 1,))
    mask = None if mask is None else jnp.broadcast_to(mask, scores.shape)
    if weights is not None:
        weights = as_real("weights", weights).astype(scores.dtype)
        check_same_shape((name, "weights"), scores, weights)
    if mask is not None:
        scores, labels = jnp.where(mask, scores, 0), jnp.where(mask, labels, 0)
        weights = None if weights is None else jnp.where(mask, weights, 0)
    if weights is not None:
        as_weights("weights", weights)
    return scores, labels, mask, weights


def _reduce(losses: jax.Array, counted: jax.Array | None, reduce_fn: ReduceFn) -> jax.Array:
    if reduce_fn is None:
        return losses
    if reduce_fn is jnp.mean:  # 0 if no list counts
        return weighted_mean(losses, None, counted)
    return reduce_fn(losses, where=counted)


def ranking_softmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: ReduceFn = jnp.mean,
) -> jax.Array:
    """Softmax ranking loss (ListNet), ``-sum_i y_i log p_i`` with ``p`` the softmax of the scores.

    Args:
      logits: scores, floating-point, shape ``[..., items]``.
      labels: ``y``, relevance, real and >= 0, of the same shape.
      where: booleans of the logits' shape (which items exist) or of that without the items (which lists count); entries
        that are False are ignored, even if they are NaN.
      weights: each item's label is multiplied by its weight, real and >= 0, of the logits' shape.
      reduce_fn: called with the losses of all lists and, as ``where=``, the mask of lists with an item: ``jnp.mean`` or
        ``jnp.sum``; None for the losses themselves.

    Returns:
      A scalar in nats, or shape ``[...]`` for None, float32 (float64 if an argument is). The mean of no lists is 0.

    Raises:
      ValueError: if the shapes do not match, or a weight is negative.
      TypeError: if the logits are not floating-point, labels or weights are complex, or ``where`` is not boolean.

    Source: Cao et al., *Learning to rank: from pairwise approach to listwise approach*, 2007.

    >>> ranking_softmax_loss(jnp.array([2.0, 1.0, 3.0]), jnp.array([1.0, 0.0, 0.0])).round(3)
    Array(1.408, dtype=float32)
    """
    logits, labels, mask, weights = _prepare_lists("logits", logits, labels, where, weights)
    axes = (logits.ndim - 1,)
    labels = labels.astype(logits.dtype)
    losses = mass_loss(
        normalize_logits(exclude(logits, mask), axes), labels if weights is None else labels * weights, axes
    )
    return _reduce(losses, None if mask is None else jnp.any(mask, -1), reduce_fn)


def pairwise_logistic_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: ReduceFn = jnp.mean,
) -> jax.Array:
    """Pairwise logistic loss (RankNet): cross-entropy of the order of each pair of items of different relevance.

    A list's loss is the mean of ``log(1 + exp(s_j - s_i))`` over its pairs with ``y_i > y_j``. It needs memory for
    ``items**2`` values.

    Args:
      scores: ``s``, floating-point, shape ``[..., items]``.
      labels: ``y``, relevance, real, of the same shape; only their order counts.
      where: booleans of the scores' shape (which items exist) or of that without the items (which lists count); entries
        that are False are ignored, even if they are NaN.
      weights: real and >= 0, of the scores' shape; a pair has the weight of its more relevant item.
      reduce_fn: called with the losses of all lists and, as ``where=``, the mask of lists with a pair: ``jnp.mean`` or
        ``jnp.sum``; None for the losses themselves.

    Returns:
      A scalar in nats, or shape ``[...]`` for None, float32 (float64 if an argument is); 0 for a list without pairs and
      for the mean of no lists.

    Raises:
      ValueError: if the shapes do not match, or a weight is negative.
      TypeError: if the scores are not floating-point, labels or weights are complex, or ``where`` is not boolean.

    Source: Burges et al., *Learning to rank using gradient descent*, 2005.

    >>> pairwise_logistic_loss(jnp.array([2.0, 1.0, 3.0]), jnp.array([1, 0, 0])).round(3)
    Array(0.813, dtype=float32)
    """
    scores, labels, mask, weights = _prepare_lists("scores", scores, labels, where, weights)
    pairs = labels[..., :, None] > labels[..., None, :]
    if mask is not None:
        pairs = pairs & mask[..., :, None] & mask[..., None, :]
    weight = jnp.where(pairs, 1 if weights is None else weights[..., :, None], 0).astype(scores.dtype)
    gaps = jnp.where(pairs, scores[..., None, :] - scores[..., :, None], 0)
    costs = weight * jax.nn.softplus(gaps)
    losses = safe_divide(jnp.sum(costs, (-2, -1)), jnp.sum(weight, (-2, -1)))
    return _reduce(losses, jnp.any(pairs, (-2, -1)), reduce_fn)


def _normalize_suffixes(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``logsumexp`` over each suffix of the items, split into the largest score and the logarithm of the rest.

    Unsplit, it would lose the digits of small scores after large ones.
    """

    def join(first, second):
        largest = jnp.maximum(first[0], second[0])
        return largest, sum(total * jnp.exp(part - largest) for part, total in (first, second))

    fixed = jax.lax.stop_gradient(scores)
    parts = fixed, jnp.exp(scores - fixed)
    largest, totals = jax.lax.associative_scan(join, parts, reverse=True, axis=scores.ndim - 1)
    return largest, jnp.log(totals)


def list_mle_loss(
    scores: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, reduce_fn: ReduceFn = jnp.mean
) -> jax.Array:
    """ListMLE loss: negative log-likelihood of the correct order under the Plackett-Luce model.

    ``sum_i (log sum_{j >= i} exp(s_j) - s_i)``, with items in order of decreasing relevance. Items of equal relevance
    keep their order in the list.

    Args:
      scores: ``s``, floating-point, shape ``[..., items]``.
      labels: relevance, real, of the same shape; only their order counts.
      where: booleans of the scores' shape (which items exist) or of that without the items (which lists count); entries
        that are False are ignored, even if they are NaN.
      reduce_fn: called with the losses of all lists and, as ``where=``, the mask of lists with an item: ``jnp.mean`` or
        ``jnp.sum``; None for the losses themselves.

    Returns:
      A scalar in nats, or shape ``[...]`` for None, float32 (float64 if an argument is). The mean of no lists is 0.

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if the scores are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Xia et al., *Listwise approach to learning to rank: theory and algorithm*, 2008.

    >>> list_mle_loss(jnp.array([2.0, 1.0, 3.0]), jnp.array([2, 0, 1])).round(3)
    Array(1.535, dtype=float32)
    """
    scores, labels, mask, _ = _prepare_lists("scores", scores, labels, where, None)
    order = jnp.argsort(labels, -1, stable=True, descending=True)
    if mask is not None:
        # Masked items go last, where they change no sum, with a large finite negative score, as inf - inf is NaN.
        last = jnp.argsort(~jnp.take_along_axis(mask, order, -1), -1, stable=True)
        order = jnp.take_along_axis(order, last, -1)
        scores = jnp.where(mask, scores, 0.1 * float(jnp.finfo(scores.dtype).min))
    scores = jnp.take_along_axis(scores, order, -1)
    largest, log_totals = _normalize_suffixes(scores)
    costs = log_totals + (largest - scores)
    if mask is not None:
        costs = jnp.where(jnp.take_along_axis(mask, order, -1), costs, 0)
    return _reduce(jnp.sum(costs, -1), None if mask is None else jnp.any(mask, -1), reduce_fn)


def margin_ranking_loss(
    first: ArrayLike,
    second: ArrayLike,
    targets: ArrayLike,
    *,
    margin: Scalar = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Margin ranking loss, ``max(0, margin - t (first - second))``.

    Args:
      first: scores, floating-point, of any shape ``[...]``.
      second: scores, floating-point, of the same shape.
      targets: ``t``, 1 where ``first`` should be the larger, -1 where ``second``; real, of the same shape or a scalar.
      margin: finite, in units of the scores.
      where: booleans of the scores' shape; entries that are False have loss 0 and no gradient, even if they are NaN.

    Returns:
      One loss per element, shape ``[...]``, float32 (float64 if an argument is).

    Raises:
      ValueError: if the shapes do not match, or ``margin`` is not finite.
      TypeError: if the scores are not floating-point, the targets are complex, or ``where`` is not boolean.

    Source: Herbrich, Graepel & Obermayer, *Large margin rank boundaries for ordinal regression*, 2000.

    >>> margin_ranking_loss(jnp.array([2.0, 2.0]), jnp.array([1.5, 0.0]), 1, margin=1.0)
    Array([0.5, 0. ], dtype=float32)
    """
    check_number("margin", margin, low=-math.inf, high=math.inf, low_open=True, high_open=True)
    first, second, targets = as_floating("first", first), as_floating("second", second), as_real("targets", targets)
    check_same_shape(("first", "second"), first, second)
    check_same_shape(("first", "targets"), first, targets, scalar=True)
    first, second, targets = widen(first, second, jnp.broadcast_to(targets, first.shape))
    mask = mask_over(where, first.shape, ())
    if mask is not None:
        first, second, targets = (jnp.where(mask, array, 0) for array in (first, second, targets))
    loss = jnp.maximum(as_hyperparam(margin, first.dtype) - targets * (first - second), 0)
    return loss if mask is None else jnp.where(mask, loss, 0)
