"""Examples as plain arrays, and some of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from nnlearn.diagnose.subject import Unknown
from nnlearn.types import PyTree

EXAMPLES = 256  # examples of each part that the network is evaluated on


class Data(NamedTuple):
    """The examples as plain arrays.

    Attributes:
      inputs: floats of shape (n, features).
      targets: as given, shape (n, ...).
      kind: ``"classes"`` (an integer per example), ``"one-hot"``, ``"sequence"`` (integers per position), ``"values"``
        (floats) or ``"none"``.
      labels: the class of each example, or None.
    """

    inputs: np.ndarray
    targets: Any
    kind: str
    labels: np.ndarray | None


def some(tree: PyTree, count: int = EXAMPLES) -> PyTree:
    """At most ``count`` examples of a tree of arrays, evenly spread."""
    size = len(jax.tree.leaves(tree)[0])
    rows = np.arange(size) if size <= count else np.linspace(0, size - 1, count).round().astype(int)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def as_data(inputs: PyTree, targets: Any) -> Data:
    """Examples as plain arrays; of several input arrays those with numbers, side by side."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    numbers = [leaf for leaf in leaves if leaf.dtype.kind in "fiub" or leaf.dtype.name == "bfloat16"]
    flat = [leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in numbers]
    if not flat:
        raise Unknown("the inputs are not arrays of numbers")
    wide = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
    if targets is None or not hasattr(targets, "shape"):
        return Data(wide, targets, "none", None)
    targets = np.asarray(targets)
    if targets.dtype.kind in "iub":
        if targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1):
            return Data(wide, targets, "classes", targets.reshape(-1).astype(np.int64))
        return Data(wide, targets, "sequence", None)
    targets = targets.astype(np.float64)
    if targets.ndim == 2 and targets.shape[1] > 1 and _one_hot(targets):
        return Data(wide, targets, "one-hot", np.argmax(targets, -1))
    values = np.unique(targets[:4096])
    whole = len(values) <= 20 and np.all(values == np.round(values)) and len(values) < max(3, len(targets) // 8)
    if targets.size == len(targets) and whole:
        return Data(wide, targets, "classes", targets.reshape(-1).astype(np.int64))
    return Data(wide, targets, "values", None)


def _one_hot(targets: np.ndarray) -> bool:
    return bool(np.all((targets == 0) | (targets == 1)) and np.all(targets.sum(-1) == 1))


__all__ = ["EXAMPLES", "Data", "as_data", "some"]
