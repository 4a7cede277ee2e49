"""Simple predictors as baselines: the most frequent class and a linear map."""

import numpy as np


def majority(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """The accuracy on ``test_labels`` of always predicting the most frequent class of ``train_labels``.

    >>> majority(np.array([0, 1, 1]), np.array([1, 0]))
    0.5
    """
    return float(np.mean(test_labels == np.argmax(np.bincount(train_labels))))


def linear_map(inputs: np.ndarray, targets: np.ndarray, others: np.ndarray, *, ridge: float = 0.0) -> np.ndarray:
    """Predictions of a linear map fitted by least squares.

    Args:
      inputs: inputs to fit, shape (n, ...); flattened, and a constant feature is added.
      targets: targets to fit, shape (n, outputs).
      others: inputs to predict from, shape (m, ...).
      ridge: penalty on the squared coefficients, per example.

    Returns:
      Predictions of shape (m, outputs).

    >>> linear_map(np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]]), np.array([[10.0]])).round(6)
    array([[21.]])
    """
    inputs, others = _with_ones(inputs), _with_ones(others)
    gram = inputs.T @ inputs + ridge * len(inputs) * np.eye(inputs.shape[1])
    return others @ np.linalg.lstsq(gram, inputs.T @ targets, rcond=None)[0]


def _with_ones(inputs: np.ndarray) -> np.ndarray:
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
