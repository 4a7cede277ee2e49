"""Contrastive losses on a batch of embeddings: pull matching examples together and push others apart.

All compare every pair of examples, so they need memory for ``batch**2`` values. Examples that ``where`` leaves out are
neither positives nor negatives of any other. Embeddings are scaled to length 1; zero vectors stay zero.
"""

import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.losses.arguments import as_boolean, as_floating, as_real, check_same_shape, widen
from nnlearn.losses.binary import sigmoid_binary_cross_entropy
from nnlearn.losses.cosine import unit
from nnlearn.losses.softmax import exclude, normalize_logits
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam, safe_divide
from nnlearn.types import ArrayLike, Scalar


def _check_embeddings(name: str, embeddings: ArrayLike) -> jax.Array:
    array = as_floating(name, embeddings)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [batch, dim], got {array.shape}; pass {name}.reshape(batch, dim)")
    return array


def _check_temperature(temperature: Scalar) -> None:
    check_number("temperature", temperature, low=0.0, high=math.inf, low_open=True, high_open=True)


def _keep(where: ArrayLike | None, batch: int) -> jax.Array:
    """The mask of the examples that count, shape ``[batch]``."""
    if where is None:
        return jnp.ones(batch, bool)
    mask = as_boolean(where)
    if mask.shape != (batch,):
        raise ValueError(f"where must have shape ({batch},), one entry per example, got {mask.shape}")
    return mask


def _directions(vectors: jax.Array, keep: jax.Array | None = None, epsilon: float = 0.0) -> jax.Array:
    """Vectors scaled to length 1; zero vectors and those not kept become 0."""
    if keep is not None:
        vectors = jnp.where(keep[:, None], vectors, 0)
    return unit(vectors, epsilon, (vectors.ndim - 1,))


def _products(first: jax.Array, second: jax.Array) -> jax.Array:
    """Inner products of all pairs, ``[a, dim]`` and ``[b, dim]`` to ``[a, b]``.

    At full precision: by default accelerators multiply with 8 or 11 bits, and a temperature of 0.01 turns an error of
    0.001 into 0.1.
    """
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def _prepare_pairs(queries, keys, where) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit vectors of queries and keys, both ``[batch, dim]``, and the mask of examples."""
    queries, keys = _check_embeddings("queries", queries), _check_embeddings("keys", keys)
    check_same_shape(("queries", "keys"), queries, keys)
    queries, keys = widen(queries, keys)
    keep = _keep(where, queries.shape[0])
    return _directions(queries, keep), _directions(keys, keep), keep


def _prepare_labelled(embeddings, labels, where, epsilon=False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosine similarities of all pairs, and masks of pairs with equal and with different labels, ``[batch, batch]``."""
    vectors, labels = _check_embeddings("embeddings", embeddings), as_real("labels", labels)
    batch = vectors.shape[0]
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), one per embedding, got {labels.shape}")
    (vectors,) = widen(vectors)
    keep = _keep(where, batch)
    units = _directions(vectors, keep, float(jnp.finfo(vectors.dtype).eps) if epsilon else 0.0)
    both = keep[:, None] & keep[None, :]
    same = labels[:, None] == labels[None, :]
    return _products(units, units), both & same & ~jnp.eye(batch, dtype=bool), both & ~same


def _mean(values: jax.Array, keep: jax.Array) -> jax.Array:
    """The mean of the values kept, 0 if there are none."""
    return safe_divide(jnp.sum(jnp.where(keep, values, 0)), jnp.sum(keep).astype(values.dtype))


def _choice_loss(logits: jax.Array, include: jax.Array, right: jax.Array) -> jax.Array:
    """Cross-entropy of each row over the included columns; ``right`` is the logit of its positive, ``[batch]``."""
    rows = normalize_logits(exclude(logits, include), (1,))
    return jnp.squeeze(rows.log_total, 1) - (right - jnp.squeeze(rows.largest, 1))


@automatic_axes(like="queries")
def info_nce_loss(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: Scalar = 0.07,
    negatives: ArrayLike | None = None,
    symmetric: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """InfoNCE: cross-entropy of identifying each query's own key in the batch by cosine similarity.

    The mean over ``i`` of ``-log(exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T))``, all vectors at length 1.

    Args:
      queries: ``q``, floating-point, shape ``[batch, dim]``.
      keys: ``k``, floating-point, of the same shape; key ``i`` belongs to query ``i``.
      temperature: ``T``, finite and > 0; may be trained.
      negatives: keys that belong to no query, such as a memory bank, shape ``[negatives, dim]``. If given, they replace
        the other keys of the batch as negatives.
      symmetric: whether to also identify queries from keys and average both losses, as in CLIP.
      where: booleans, shape ``[batch]``; examples that are False are left out as queries and as keys, even if they are
        NaN.

    Returns:
      A scalar in nats, float32 (float64 if an argument is); 0 when no example is kept.

    Raises:
      ValueError: if the shapes do not match, ``temperature`` is out of range, or ``symmetric`` and ``negatives`` are
        both given.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: van den Oord, Li & Vinyals, *Representation learning with contrastive predictive coding*, 2018; symmetric:
    Radford et al., *Learning transferable visual models from natural language supervision*, 2021; negatives: He et al.,
    *Momentum contrast for unsupervised visual representation learning*, 2020.

    >>> queries, keys = jnp.eye(3), jnp.eye(3)
    >>> info_nce_loss(queries, keys, temperature=0.5)
    Array(0.2395, dtype=float32)
    >>> info_nce_loss(queries, keys[::-1], temperature=0.5).round(2)
    Array(1.57, dtype=float32)
    """
    _check_temperature(temperature)
    if symmetric and negatives is not None:
        raise ValueError("symmetric needs the keys of the batch as negatives; leave one of symmetric, negatives out")
    if negatives is not None:
        negatives = _check_embeddings("negatives", negatives)
        queries, keys, negatives = widen(as_floating("queries", queries), as_floating("keys", keys), negatives)
    queries, keys, keep = _prepare_pairs(queries, keys, where)
    inverse = 1 / as_hyperparam(temperature, queries.dtype)
    if negatives is None:
        logits = _products(queries, keys) * inverse
        right = jnp.diagonal(logits)
        loss = _choice_loss(logits, keep[None, :], right)
        if symmetric:
            loss = 0.5 * (loss + _choice_loss(logits.T, keep[None, :], right))
    else:
        if negatives.shape[1] != queries.shape[1]:
            raise ValueError(f"negatives must have shape [negatives, {queries.shape[1]}], got {negatives.shape}")
        right = jnp.sum(queries * keys, 1) * inverse
        logits = jnp.concatenate([right[:, None], _products(queries, _directions(negatives)) * inverse], 1)
        loss = _choice_loss(logits, jnp.ones((1, 1), bool), right)
    return _mean(loss, keep)


@automatic_axes(like="embeddings")
def ntxent(
    embeddings: ArrayLike, labels: ArrayLike, temperature: Scalar = 0.07, *, where: ArrayLike | None = None
) -> jax.Array:
    """NT-Xent, normalised temperature-scaled cross-entropy: each positive pair against all examples of other labels.

    The mean of ``-log(exp(s_ij / T) / (exp(s_ij / T) + sum_k exp(s_ik / T)))`` over all pairs ``i != j`` of equal
    label, with ``k`` over the examples of other labels and ``s`` the cosine similarity.

    Args:
      embeddings: floating-point, shape ``[batch, dim]``.
      labels: real, shape ``[batch]``; two examples with equal labels are a positive pair.
      temperature: ``T``, finite and > 0; may be trained.
      where: booleans, shape ``[batch]``; examples that are False are left out of all pairs, even if they are NaN.

    Returns:
      A scalar in nats, float32 (float64 if the embeddings are); 0 when no two examples share a label.

    Raises:
      ValueError: if the shapes do not match, or ``temperature`` is out of range.
      TypeError: if the embeddings are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Chen et al., *A simple framework for contrastive learning of visual representations*, 2020.

    >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> ntxent(embeddings, jnp.array([0, 0, 1, 1]), temperature=0.5)
    Array(0.2899, dtype=float32)
    """
    _check_temperature(temperature)
    # Short vectors count less, with optax's epsilon.
    similarity, positive, negative = _prepare_labelled(embeddings, labels, where, epsilon=True)
    logits = similarity / as_hyperparam(temperature, similarity.dtype)
    rows = normalize_logits(exclude(logits, negative), (1,))
    gaps = rows.largest - logits + rows.log_total
    costs = jnp.where(positive & jnp.any(negative, 1, keepdims=True), jax.nn.softplus(gaps), 0)
    return safe_divide(jnp.sum(costs), jnp.sum(positive).astype(costs.dtype))


@automatic_axes(like="embeddings")
def supervised_contrastive_loss(
    embeddings: ArrayLike, labels: ArrayLike, *, temperature: Scalar = 0.07, where: ArrayLike | None = None
) -> jax.Array:
    """Supervised contrastive loss: cross-entropy of identifying the examples of the same label among all others.

    The mean over examples ``i`` with a positive of ``-mean_j log(exp(s_ij / T) / sum_{a != i} exp(s_ia / T))``, with
    ``j`` over the positives of ``i`` (others of its label) and ``s`` the cosine similarity.

    Args:
      embeddings: floating-point, shape ``[batch, dim]``.
      labels: real, shape ``[batch]``.
      temperature: ``T``, finite and > 0; may be trained.
      where: booleans, shape ``[batch]``; examples that are False are left out of all pairs, even if they are NaN.

    Returns:
      A scalar in nats, float32 (float64 if the embeddings are); 0 when no two examples share a label.

    Raises:
      ValueError: if the shapes do not match, or ``temperature`` is out of range.
      TypeError: if the embeddings are not floating-point, the labels are complex, or ``where`` is not boolean.

    Source: Khosla et al., *Supervised contrastive learning*, 2020, equation 2.

    >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> supervised_contrastive_loss(embeddings, jnp.array([0, 0, 1, 1]), temperature=0.5)
    Array(0.2899, dtype=float32)
    """
    _check_temperature(temperature)
    similarity, positive, negative = _prepare_labelled(embeddings, labels, where)
    logits = similarity / as_hyperparam(temperature, similarity.dtype)
    rows = normalize_logits(exclude(logits, positive | negative), (1,))
    costs = jnp.where(positive, rows.log_total + (rows.largest - logits), 0)
    positives = jnp.sum(positive, 1)
    return _mean(safe_divide(jnp.sum(costs, 1), positives.astype(costs.dtype)), positives > 0)


@automatic_axes(like="queries")
def sigmoid_pair_loss(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    logit_scale: Scalar = 10.0,
    logit_bias: Scalar = -10.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Sigmoid pair loss, as in SigLIP: binary cross-entropy of whether each query and key belong together.

    ``1 / batch sum_i sum_j log(1 + exp(-z_ij (t q_i . k_j + b)))`` with ``z_ij`` 1 where ``i = j`` and else -1, all
    vectors at length 1.

    Args:
      queries: ``q``, floating-point, shape ``[batch, dim]``.
      keys: ``k``, floating-point, of the same shape; key ``i`` belongs to query ``i``.
      logit_scale: ``t``, finite and > 0, the inverse temperature; usually its logarithm is trained.
      logit_bias: ``b``, finite; starts at -10 because nearly all pairs are negative, and is usually trained.
      where: booleans, shape ``[batch]``; examples that are False are left out as queries and as keys, even if they are
        NaN.

    Returns:
      A scalar in nats, the sum over all pairs divided by the number of examples kept, float32 (float64 if an argument
      is); 0 when no example is kept.

    Raises:
      ValueError: if the shapes do not match, or an argument is out of range.
      TypeError: if an argument is not floating-point, or ``where`` is not boolean.

    Source: Zhai et al., *Sigmoid loss for language image pre-training*, 2023.

    >>> sigmoid_pair_loss(jnp.eye(2), jnp.eye(2), logit_scale=10.0, logit_bias=-5.0)
    Array(0.0134, dtype=float32)
    """
    check_number("logit_scale", logit_scale, low=0.0, high=math.inf, low_open=True, high_open=True)
    check_number("logit_bias", logit_bias, low=-math.inf, high=math.inf, low_open=True, high_open=True)
    queries, keys, keep = _prepare_pairs(queries, keys, where)
    scale, bias = as_hyperparam(logit_scale, queries.dtype), as_hyperparam(logit_bias, queries.dtype)
    costs = sigmoid_binary_cross_entropy(
        _products(queries, keys) * scale + bias, jnp.eye(keep.shape[0], dtype=queries.dtype)
    )
    return _mean(jnp.sum(jnp.where(keep[None, :], costs, 0), 1), keep)
