"""Simple predictors of the data alone, and how good a network's outputs are: what can be learned, and what was."""

from typing import NamedTuple

import numpy as np

ROWS = 1000  # examples that predictors look at
NEIGHBOURS = 7
FREQUENT = 0.7  # share of a class from which accuracy says little
WIDEST = 512  # features; more are projected at random


class Smoother(NamedTuple):
    """A predictor that is linear in the targets: ``predictions = weights @ targets``.

    No example takes part in its own prediction.

    Attributes:
      name: ``"neighbours"`` or ``"ridge"``.
      weights: shape (queries, examples).
    """

    name: str
    weights: np.ndarray


def standard(reference: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features in units of the reference's mean and deviation; wide ones are projected at random.

    >>> a, b = standard(np.array([[0.0], [2.0]]), np.array([[4.0]]))
    >>> a.ravel(), b.ravel()
    (array([-1.,  1.]), array([3.]))
    """
    parts = [reference, *others]
    mean, deviation = reference.mean(0), reference.std(0)
    kept = deviation > 1e-12 * (1 + np.abs(mean))
    parts = [(part[:, kept] - mean[kept]) / deviation[kept] for part in parts]
    if parts[0].shape[1] > WIDEST:
        project = np.random.default_rng(0).normal(size=(parts[0].shape[1], WIDEST)) / np.sqrt(parts[0].shape[1])
        parts = [part @ project for part in parts]
    return parts


def row_keys(rows: np.ndarray) -> np.ndarray:
    """Rows as byte strings that can be compared, rounded to float32."""
    rows = np.ascontiguousarray(rows.astype(np.float32) + 0.0)
    return rows.view([("", rows.dtype)] * rows.shape[1]).reshape(-1) if rows.shape[1] < 64 else _hashes(rows)


def _hashes(rows: np.ndarray) -> np.ndarray:
    weights = np.random.default_rng(5).integers(1, 2**63, rows.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return (rows.view(np.uint32).astype(np.uint64) * weights).sum(1, dtype=np.uint64)


def shared_rows(some_rows: np.ndarray, others: np.ndarray) -> float:
    """The share of rows that also are among the others.

    >>> shared_rows(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [0.0, 0.0]]))
    0.5
    """
    return float(np.mean(np.isin(row_keys(some_rows), row_keys(others))))


def squared_distances(queries: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Shape (queries, examples)."""
    lengths = np.sum(queries**2, 1)[:, None] + np.sum(examples**2, 1)
    return np.maximum(lengths - 2 * queries @ examples.T, 0)


def neighbours(queries: np.ndarray, examples: np.ndarray, k: int = NEIGHBOURS) -> Smoother:
    """The mean of the k nearest examples; if both are the same array, without the query itself."""
    distances = squared_distances(queries, examples)
    if queries is examples:
        np.fill_diagonal(distances, np.inf)
    k = min(k, len(examples) - 1)
    near = np.argpartition(distances, k - 1, axis=1)[:, :k]
    weights = np.zeros(distances.shape)
    np.put_along_axis(weights, near, 1 / k, axis=1)
    return Smoother("neighbours", weights)


def ridge(queries: np.ndarray, examples: np.ndarray, strength: float = 1e-2) -> Smoother:
    """Ridge regression with a constant; if both are the same array, of the other half for each half."""
    if queries is not examples:
        return Smoother("ridge", _ridge_weights(queries, examples, strength))
    first = np.arange(len(examples)) % 2 == 0
    weights = np.zeros((len(examples), len(examples)))
    for fold in (first, ~first):
        weights[np.ix_(fold, ~fold)] = _ridge_weights(examples[fold], examples[~fold], strength)
    return Smoother("ridge", weights)


def _ridge_weights(queries, examples, strength):
    examples, queries = (np.concatenate([part, np.ones((len(part), 1))], 1) for part in (examples, queries))
    gram = examples @ examples.T
    return queries @ examples.T @ np.linalg.inv(gram + strength * len(gram) * np.eye(len(gram)))


def scores(predictions: np.ndarray, targets: np.ndarray, kind: str) -> float:
    """Accuracy of the largest column for classes and of each column for labels (see ``accuracy``), else the explained
    share of the variance, at least -1.

    >>> scores(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([[1, 0], [1, 0]]), "one-hot")
    0.5
    """
    if kind in ("classes", "one-hot"):
        return accuracy(np.argmax(predictions, -1), np.argmax(targets, -1))
    if kind == "labels":
        columns = zip((predictions > 0.5).T, (targets > 0.5).T, strict=True)
        return float(np.mean([accuracy(said, true) for said, true in columns]))
    total = np.sum((targets - targets.mean(0)) ** 2)
    return float(max(1 - np.sum((predictions - targets) ** 2) / total, -1.0)) if total > 0 else 0.0


def accuracy(said: np.ndarray, true: np.ndarray) -> float:
    """The share of right answers; the mean over classes if one class has over 70 % of the examples.

    >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0])), accuracy(np.zeros(10), np.arange(10) == 9)
    (0.6666666666666666, 0.5)
    """
    said, true = said.reshape(-1), true.reshape(-1)
    classes, inverse, counts = np.unique(true, return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.max() <= FREQUENT * len(true):
        return float(np.mean(said == true))
    return float(np.mean(np.bincount(inverse.reshape(-1), weights=said == true) / counts))


def dependence(smoother: Smoother, targets: np.ndarray) -> float:
    """The mean correlation of predictions and targets over the columns."""
    predictions = smoother.weights @ targets
    predictions, targets = predictions - predictions.mean(0), targets - targets.mean(0)
    norms = np.sqrt(np.sum(predictions**2, 0) * np.sum(targets**2, 0))
    return float(np.mean(np.sum(predictions * targets, 0) / np.where(norms > 0, norms, 1)))


def one_hot(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Shape (n, classes); a label that is no class has a row of zeros."""
    return (labels[:, None] == classes).astype(np.float64)


def area_under_curve(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of each column, at least 0.5, with ties counted half.

    Args:
      values: shape (n, features).
      positive: bool, shape (n,).

    >>> area_under_curve(np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]), np.array([False, False, True]))
    array([1. , 0.5])
    """
    ordered = np.sort(values, axis=0)
    columns = range(values.shape[1])
    left = np.stack([np.searchsorted(ordered[:, c], values[:, c], "left") for c in columns], 1)
    right = np.stack([np.searchsorted(ordered[:, c], values[:, c], "right") for c in columns], 1)
    ranks = (left + right + 1) / 2
    p, n = int(positive.sum()), int((~positive).sum())
    if p == 0 or n == 0:
        return np.full(values.shape[1], 0.5)
    area = (ranks[positive].sum(0) - p * (p + 1) / 2) / (p * n)
    return np.maximum(area, 1 - area)


def separated(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The accuracy of single outputs for two classes at the best threshold, with large ones for either class.

    >>> separated(np.array([3.0, 2.0, 1.0]), np.array([0, 0, 1]))
    1.0
    """
    values, order = np.asarray(targets).reshape(-1), np.argsort(np.asarray(outputs, np.float64).reshape(-1))
    high = (values == values.max())[order]
    right = np.cumsum(~high) + high.sum() - np.cumsum(high)  # with the threshold after each
    return float(max(right.max(), len(high) - right.min(), high.sum(), len(high) - high.sum()) / len(high))


def log_softmax(values: np.ndarray, axis: int) -> np.ndarray:
    """The logarithm of the softmax over an axis."""
    values = values - values.max(axis, keepdims=True)
    return values - np.log(np.exp(values).sum(axis, keepdims=True))


def quality(outputs: np.ndarray, targets: np.ndarray, kind: str) -> float:
    """How good the outputs of a network are: accuracy for classes, the explained share of the variance for values.

    Args:
      outputs: shape (n, ...), logits or probabilities for classes.
      targets: shape (n, ...).
      kind: as in ``Data``.

    Returns:
      A number up to 1; NaN if the outputs do not fit the targets, 0 if an output is not finite.

    >>> quality(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1]), "classes")
    1.0
    >>> quality(np.array([1.0, 3.0]), np.array([1.0, 2.0]), "values")
    -1.0
    """
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets)
    if not np.all(np.isfinite(outputs)):
        return 0.0
    if kind in ("classes", "sequence"):
        flat = targets.reshape(len(targets)) if kind == "classes" and targets.size == len(targets) else targets
        if outputs.ndim == flat.ndim + 1 and outputs.shape[:-1] == flat.shape and outputs.shape[-1] > 1:
            return accuracy(np.argmax(outputs, -1), flat)
        if kind == "classes" and outputs.size == targets.size:
            true = flat > np.min(flat)
            return accuracy(said_yes(outputs, true), true)
    elif outputs.size == targets.size:
        outputs, targets = outputs.reshape(len(targets), -1), targets.reshape(len(targets), -1)
        if kind == "labels":
            outputs = said_yes(outputs, targets > 0.5)
        return scores(outputs, targets.astype(np.float64), kind)
    return float("nan")


def said_yes(outputs: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The yes or no of outputs: above 0.5 or above 0, whichever is right more often.

    Logits and signed targets change at 0, probabilities and regressions of 0 and 1 at 0.5.

    >>> said_yes(np.array([0.1, 0.8]), np.array([False, True]))
    array([False,  True])
    """
    outputs = np.asarray(outputs, np.float64).reshape(np.shape(true))
    ways = (outputs > 0.5, outputs > 0.0)
    return max(ways, key=lambda said: float(np.mean(said == true)))


__all__ = [
    "NEIGHBOURS",
    "ROWS",
    "Smoother",
    "accuracy",
    "area_under_curve",
    "dependence",
    "neighbours",
    "one_hot",
    "quality",
    "ridge",
    "row_keys",
    "said_yes",
    "scores",
    "separated",
    "shared_rows",
    "squared_distances",
    "standard",
]
