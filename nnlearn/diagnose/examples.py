"""Examples as plain arrays, and some of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from nnlearn.diagnose.parts import Unknown
from nnlearn.types import PyTree

EXAMPLES = 256  # examples of each part that the network is evaluated on


class Data(NamedTuple):
    """The examples as plain arrays.

    Attributes:
      inputs: floats of shape (n, features).
      targets: as given, shape (n, ...).
      kind: ``"classes"`` (a whole number per example), ``"one-hot"``, ``"labels"`` (several numbers 0 or 1),
        ``"sequence"`` (whole numbers per position), ``"values"`` (other numbers) or ``"none"``.
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


def one_array(tree: PyTree, what: str = "inputs") -> np.ndarray:
    """The only array of a tree.

    Raises:
      Unknown: if there are several or none.

    >>> one_array({"tokens": np.arange(3)})
    array([0, 1, 2])
    """
    leaves = jax.tree.leaves(tree)
    if len(leaves) != 1:
        raise Unknown(f"the {what} are not one array")
    return np.asarray(leaves[0])


def in_form_of(targets: Any, others: Any) -> Any:
    """Targets in the form of others: as class numbers or one-hot, and with or without an axis of length 1.

    Args:
      targets: of validation examples, as given.
      others: of training examples.

    >>> in_form_of(np.array([1, 0]), np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    array([[0., 1., 0.],
           [1., 0., 0.]])
    >>> in_form_of(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1, 1])), in_form_of(np.ones((2, 1)), np.ones(3))
    (array([1, 0]), array([1., 1.]))
    """
    if not (hasattr(targets, "shape") and hasattr(others, "shape")):
        return targets
    given, wanted = np.asarray(targets), np.asarray(others)
    if {given.ndim, wanted.ndim} != {1, 2}:
        return targets
    matrix, vector = (given, wanted) if given.ndim == 2 else (wanted, given)
    if matrix.shape[1] == 1:
        return given.reshape(-1, *wanted.shape[1:])
    one_hot = np.all((matrix == 0) | (matrix == 1)) and np.all(matrix.sum(1) == 1)
    if not (one_hot and np.all((vector >= 0) & (vector < matrix.shape[1]) & (vector == np.round(vector)))):
        return targets
    return np.argmax(given, 1) if wanted.ndim == 1 else np.eye(wanted.shape[1], dtype=wanted.dtype)[given.astype(int)]


def exchanged(inputs: PyTree, start: int, stop: int) -> PyTree:
    """Sequences whose time steps from ``start`` to ``stop`` are those of the next example."""
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf[:, :start], np.roll(leaf, 1, 0)[:, start:stop], leaf[:, stop:]], 1), inputs
    )


def as_data(inputs: PyTree, targets: Any, shape: tuple[int, ...] | None = None) -> Data:
    """Examples as plain arrays; of several input arrays those with numbers, side by side.

    Args:
      inputs, targets: of all examples.
      shape: of the network's output for one example, if it is known: what whole numbers mean depends on it.

    >>> counts = np.array([0, 3, 1, 3, 0, 1, 1, 0])
    >>> as_data(counts, counts).kind, as_data(counts, counts, ()).kind, as_data(counts, counts > 1, ()).kind
    ('classes', 'values', 'classes')
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    numbers = [leaf for leaf in leaves if leaf.dtype.kind in "fiub" or leaf.dtype.name == "bfloat16"]
    flat = [leaf.reshape(len(leaf), -1).astype(np.float64) for leaf in numbers]
    if not flat:
        raise Unknown("the inputs are not arrays of numbers")
    wide = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
    leaves = jax.tree.leaves(targets)
    if len(leaves) != 1 or np.ndim(leaves[0]) == 0:
        return Data(wide, targets, "none", None)
    targets = np.asarray(leaves[0])
    whole = targets.dtype.kind in "iub"
    if targets.size == len(targets):
        kind = "classes" if _are_classes(targets.reshape(-1), whole, shape) else "values"
        return Data(wide, targets, kind, targets.reshape(-1).astype(np.int64) if kind == "classes" else None)
    binary = targets.ndim == 2 and bool(np.all((targets == 0) | (targets == 1)))
    if binary and np.all(targets.sum(1) == 1) and (not whole or shape is None or len(shape) < 2):
        return Data(wide, targets, "one-hot", np.argmax(targets, -1))
    shares = targets.ndim == 2 and targets.shape[1] > 2 and targets.dtype.kind == "f" and bool(np.all(targets >= 0))
    if shares and np.abs(targets.sum(1) - 1).max() < 1e-3:  # probabilities of a teacher, or mixed labels
        return Data(wide, targets, "one-hot", np.argmax(targets, -1))
    if whole and (shape is None or np.prod(shape) != np.prod(targets.shape[1:])):
        return Data(wide, targets, "sequence", None)
    return Data(wide, targets.astype(np.float64), "labels" if binary else "values", None)


def _are_classes(targets: np.ndarray, whole: bool, shape: tuple[int, ...] | None) -> bool:
    """Whether numbers name classes: few different whole ones, and at most two for a network with one output."""
    count = len(np.unique(targets))
    one_output = shape is not None and np.prod(shape) == 1
    most = 2 if one_output else len(targets) // 2 if whole else min(20, len(targets) // 8)
    return count <= max(most, 2) and bool(np.all(targets == np.round(targets)))


__all__ = ["EXAMPLES", "Data", "as_data", "exchanged", "in_form_of", "one_array", "some"]
