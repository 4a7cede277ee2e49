"""Edit distances between label sequences (in compiled programs) and error rates of texts (in Python)."""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from nnlearn.losses.arguments import as_real, check_same_shape
from nnlearn.losses.sequences import compact
from nnlearn.sharding.axes import automatic_axes
from nnlearn.types import ArrayLike


@automatic_axes(like="predictions")
def edit_distance(
    predictions: ArrayLike, prediction_paddings: ArrayLike, targets: ArrayLike, target_paddings: ArrayLike
) -> jax.Array:
    """Levenshtein distance between label sequences: the minimum number of insertions, deletions and substitutions.

    ``d[m, n] = min(d[m-1, n] + 1, d[m, n-1] + 1, d[m-1, n-1] + (prediction_m != target_n))``.

    Args:
      predictions: integers, shape ``[batch, M]``.
      prediction_paddings: shape ``[batch, M]``: 0 where the label exists. Padding is skipped at any position.
      targets: integers, shape ``[batch, N]``.
      target_paddings: shape ``[batch, N]``, like ``prediction_paddings``.

    Returns:
      The number of edits, int32, shape ``[batch]``; if one sequence is empty, the length of the other.

    Raises:
      ValueError: if the shapes do not match.
      TypeError: if predictions or targets are not integers.

    Source: Levenshtein, *Binary codes capable of correcting deletions, insertions, and reversals*, 1966; Wagner and
    Fischer, *The string-to-string correction problem*, 1974.

    >>> edit_distance(jnp.array([[1, 2, 3]]), jnp.zeros((1, 3)), jnp.array([[1, 3, 3, 4]]), jnp.zeros((1, 4)))
    Array([2], dtype=int32)
    """
    predictions_bm, prediction_lengths_b = _compact_labels("predictions", predictions, prediction_paddings)
    targets_bn, target_lengths_b = _compact_labels("targets", targets, target_paddings)
    if len(predictions_bm) != len(targets_bn):
        raise ValueError(f"predictions {predictions_bm.shape} and targets {targets_bn.shape} must have one batch size")
    places_1n = jnp.arange(targets_bn.shape[1] + 1, dtype=jnp.int32)[None]

    def step(row_bn: jax.Array, prediction_b: jax.Array):
        differs_bn = (targets_bn != prediction_b[:, None]).astype(jnp.int32)
        best_bn = jnp.minimum(row_bn[:, 1:] + 1, row_bn[:, :-1] + differs_bn)
        best_bn = jnp.concatenate([row_bn[:, :1] + 1, best_bn], 1)
        # Insertions move along the row at a cost of 1 each: relative to n, a cumulative minimum.
        after_bn = jax.lax.cummin(best_bn - places_1n, axis=1) + places_1n
        return after_bn, after_bn

    first_bn = jnp.broadcast_to(places_1n, (len(targets_bn), places_1n.shape[1]))
    _, rows_mbn = jax.lax.scan(step, first_bn, predictions_bm.T)
    rows_mbn = jnp.concatenate([first_bn[None], rows_mbn])
    return rows_mbn[prediction_lengths_b, jnp.arange(len(targets_bn), dtype=jnp.int32), target_lengths_b]


def _compact_labels(name: str, labels: ArrayLike, paddings: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Labels moved to the front, and their number in each row."""
    labels_bn = jnp.asarray(labels)
    if not jnp.issubdtype(labels_bn.dtype, jnp.integer) or labels_bn.ndim != 2:
        kind = TypeError if labels_bn.ndim == 2 else ValueError
        raise kind(f"{name} must be integers of shape [batch, labels], got {labels_bn.dtype.name} {labels_bn.shape}")
    paddings_bn = as_real("paddings", paddings)
    check_same_shape((name, "their paddings"), labels_bn, paddings_bn)
    return compact(labels_bn, ~paddings_bn.astype(bool))


def character_error_rate(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Character error rate: edits over the number of characters of the targets, both summed over all texts.

    Args:
      predictions: the recognised texts.
      targets: the correct texts, in the same order.

    Returns:
      A float >= 0, which many insertions bring above 1. If the targets have no characters, it is 0 if the predictions
      have none either, else infinite.

    Raises:
      ValueError: if the numbers of predictions and targets differ.
      TypeError: if an argument is a single string, or contains anything but strings.

    Source: Levenshtein, *Binary codes capable of correcting deletions, insertions, and reversals*, 1966.

    >>> character_error_rate(["kitten"], ["sitting"])
    0.428...
    """
    return _error_rate(_texts("predictions", predictions), _texts("targets", targets))


def word_error_rate(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Word error rate: edits over the number of words of the targets, both summed over all texts.

    Words are separated by white space.

    Args:
      predictions: the recognised texts.
      targets: the correct texts, in the same order.

    Returns:
      A float >= 0, which many insertions bring above 1. If the targets have no words, it is 0 if the predictions have
      none either, else infinite.

    Raises:
      ValueError: if the numbers of predictions and targets differ.
      TypeError: if an argument is a single string, or contains anything but strings.

    Source: Levenshtein, *Binary codes capable of correcting deletions, insertions, and reversals*, 1966.

    >>> word_error_rate(["the cat sat", "hello"], ["the cat sat down", "hello"])
    0.2
    """
    predicted, wanted = _texts("predictions", predictions), _texts("targets", targets)
    return _error_rate([text.split() for text in predicted], [text.split() for text in wanted])


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a sequence of strings, got {texts!r}; for one text pass [text]")
    return list(texts)


def _error_rate(predictions: Sequence[Sequence[Hashable]], targets: Sequence[Sequence[Hashable]]) -> float:
    if len(predictions) != len(targets):
        raise ValueError(f"there must be one prediction for each target, got {len(predictions)} and {len(targets)}")
    edits = sum(map(_edits, predictions, targets))
    length = sum(map(len, targets))
    return edits / length if length else (float("inf") if edits else 0.0)


def _edits(prediction: Sequence[Hashable], target: Sequence[Hashable]) -> int:
    row = list(range(len(target) + 1))
    for index, item in enumerate(prediction, 1):
        diagonal, row[0] = row[0], index
        for place, wanted in enumerate(target, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (item != wanted))
    return row[-1]
