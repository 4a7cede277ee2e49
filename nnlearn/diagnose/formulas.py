"""Losses that a program may compute from outputs and targets, right and wrong ones."""

import numpy as np

from nnlearn.diagnose.probes import log_softmax, one_hot


def class_formulas(outputs: np.ndarray, labels: np.ndarray, squashed: bool) -> dict[str, float]:
    """Losses that a program may compute from outputs of shape (n, classes), which may always lie between 0 and 1."""
    rows = np.arange(len(labels))

    def entropy(logits, axis=-1):
        return float(-np.mean(log_softmax(logits, axis)[rows, labels]))

    formulas = {
        "right": entropy(outputs),
        "softmax over the batch": entropy(outputs, 0),
        "softmax twice": entropy(np.exp(log_softmax(outputs, -1))),
        "sigmoid before softmax": entropy(1 / (1 + np.exp(-outputs))),
    }
    if squashed and np.allclose(outputs.sum(-1), 1, atol=1e-3):
        likelihood = float(-np.mean(np.log(np.maximum(outputs[rows, labels], 1e-30))))
        formulas |= {"softmax twice": formulas["right"], "right": likelihood}
    elif squashed:
        formulas |= {"sigmoid before softmax": formulas["right"], "right": np.nan}
    return formulas


def binary_formulas(outputs: np.ndarray, labels: np.ndarray, squashed: bool) -> dict[str, float]:
    """Losses that a program may compute from one output per example and labels 0 and 1."""

    def entropy(logits):
        return float(np.mean(np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))))

    formulas = {"right": entropy(outputs), "sigmoid twice": entropy(1 / (1 + np.exp(-outputs)))}
    if squashed:
        ones, zeros = _logarithms(outputs, True)
        formulas |= {"sigmoid twice": formulas["right"], "right": float(-np.mean(labels * ones + (1 - labels) * zeros))}
    return formulas


def wrong_signs(outputs: np.ndarray, labels: np.ndarray, squashed: bool) -> dict[str, float]:
    """Cross-entropies of one output per example and labels 0 and 1, with wrong signs.

    >>> {name: round(each, 3) for name, each in wrong_signs(np.array([0.5, 0.5]), np.array([0, 1]), True).items()}
    {'the wrong sign': -0.693, 'the sign of one term wrong': 0.0, 'the sign of the other term wrong': 0.0}
    """
    ones, zeros = _logarithms(outputs, squashed)
    first, second = labels * ones, (1 - labels) * zeros
    return {
        "the wrong sign": float(np.mean(first + second)),
        "the sign of one term wrong": float(np.mean(second - first)),
        "the sign of the other term wrong": float(np.mean(first - second)),
    }


def _logarithms(outputs: np.ndarray, squashed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The logarithms of the probabilities of 1 and of 0."""
    if squashed:
        kept = np.clip(outputs, 1e-7, 1 - 1e-7)
        return np.log(kept), np.log(1 - kept)
    return -np.logaddexp(0, -outputs), -np.logaddexp(0, outputs)


def wrong_entropies(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Wrong cross-entropies of these outputs; empty if the targets are not classes that fit them."""
    squashed = bool(outputs.min() >= 0 and outputs.max() <= 1)
    if outputs.size == len(outputs) == targets.size:
        labels = targets.reshape(-1).astype(np.float64)
        return _one_sided(outputs.reshape(-1), labels, squashed) if set(np.unique(labels)) == {0.0, 1.0} else {}
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return {}
    classes = outputs.shape[1]
    if targets.size == len(outputs) and targets.dtype.kind in "iu" and targets.min() >= 0 and targets.max() < classes:
        targets = one_hot(targets.reshape(-1), np.arange(classes))
    if targets.shape != outputs.shape or targets.min() < 0 or not np.allclose(targets.sum(1), 1, atol=1e-3):
        return {}
    return _unlogged(outputs, targets)


def _one_sided(outputs: np.ndarray, labels: np.ndarray, squashed: bool) -> dict[str, float]:
    """Cross-entropies of one output per example that leave out the examples of one class, 0 or 1.

    >>> _one_sided(np.array([0.5, 0.5]), np.array([0, 1]), True)["cross-entropy of the ones alone"]
    0.34657...
    """
    ones, zeros = _logarithms(outputs, squashed)
    return {
        "cross-entropy of the ones alone": float(-np.mean(labels * ones)),
        "cross-entropy of the zeros alone": float(-np.mean((1 - labels) * zeros)),
    }


def _unlogged(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Cross-entropies and divergences that take something else for the logarithms of probabilities.

    Args:
      outputs: shape (n, classes), logits or probabilities.
      targets: the same shape, probabilities.

    >>> halves = np.full((1, 2), 0.5)
    >>> {name: round(each, 3) for name, each in _unlogged(halves, np.array([[0.0, 1.0]])).items()}
    {'cross-entropy of probabilities without their logarithm': -0.5}
    """
    squashed = bool(outputs.min() >= 0 and outputs.max() <= 1)
    logarithms = log_softmax(outputs, -1)
    said = {"probabilities without their logarithm": outputs if squashed else np.exp(logarithms)}
    if not squashed and not np.allclose(logarithms, outputs, atol=1e-3):
        said["raw outputs, which are no logarithms of probabilities"] = outputs
    constant = float(np.mean(np.sum(targets * np.log(np.maximum(targets, 1e-30)), -1)))
    formulas = {}
    for name, each in said.items():
        entropy = float(-np.mean(np.sum(targets * each, -1)))
        formulas[f"cross-entropy of {name}"] = entropy
        if abs(constant) > 1e-6:
            formulas[f"divergence of {name}"] = constant + entropy
            formulas[f"mean divergence of {name}"] = (constant + entropy) / targets.shape[-1]
    return formulas


def value_formulas(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Losses of one value per example, and the same with every output beside every target."""
    gap, all_gaps = outputs - targets, outputs[:, None] - targets[None]
    return {
        "right": float(np.mean(gap**2)),
        "every output minus every target": float(np.mean(all_gaps**2)),
        "absolute, right": float(np.mean(np.abs(gap))),
        "absolute, every output minus every target": float(np.mean(np.abs(all_gaps))),
    }


__all__ = ["binary_formulas", "class_formulas", "value_formulas", "wrong_entropies", "wrong_signs"]
