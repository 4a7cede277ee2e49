"""Mini-batches inside the compiled program; splits and standardisation on the host.

An epoch is two arrays that ``jax.lax.scan`` iterates over, the indices of each batch and a mask of valid examples::

    def train_on(state, batch):
        indices_b, where_b = batch
        return step(state, take(examples, indices_b), where_b)

    epoch_key = jax.random.fold_in(shuffle_key, epoch)
    state, infos = jax.lax.scan(train_on, state, epoch_indices(epoch_key, size, batch_size))

So the order is a pure function of the key: it is the same on every machine, can be vmapped over seeds, and training can
resume at any epoch.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nnlearn.checks import check_count
from nnlearn.sharding.axes import take_rows
from nnlearn.tree import path_name
from nnlearn.types import Batch, Key, PyTree

REMAINDERS = ("mask", "drop", "error")
ROUNDING = 1e-9  # quotas such as 0.15 * 20 differ from an integer by rounding alone


class Examples(NamedTuple):
    """Inputs and targets, which share their leading axis."""

    inputs: PyTree
    targets: PyTree


class MaskedBatch(NamedTuple):
    """A batch with a mask of valid examples, as ``make_epoch`` passes it to the step.

    Attributes:
      examples: a pytree of arrays of shape (batch_size, ...).
      where: booleans of shape (batch_size,); False for padding examples.
    """

    examples: PyTree
    where: jax.Array | np.ndarray


class Split(NamedTuple):
    """The parts of a data set for training, for choosing settings, and for the reported result."""

    train: PyTree
    validation: PyTree
    test: PyTree


class Statistics(NamedTuple):
    """Mean and scale of each feature, from ``standardize``; the scale of a constant feature is 1."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, array: ArrayLike) -> np.ndarray:
        """``(array - mean) / scale`` as float32; ``array`` has shape (n, *features)."""
        return ((np.asarray(array, np.float64) - self.mean) / self.scale).astype(np.float32)

    def invert(self, array: ArrayLike) -> np.ndarray:
        """``array * scale + mean`` as float32: converts standardised values back to their original units."""
        return (np.asarray(array, np.float64) * self.scale + self.mean).astype(np.float32)


def example_count(arrays: Batch) -> int:
    """The number of examples: the common length of the leading axis of all arrays of a tree.

    Args:
      arrays: a pytree of arrays of shape (size, ...).

    Returns:
      The number of examples, a Python int.

    Raises:
      ValueError: if there are no arrays or no examples, an array is a scalar, or the lengths differ.

    >>> example_count({"inputs": np.ones((5, 2)), "targets": np.ones(4)})
    Traceback (most recent call last):
    ValueError: arrays must have one length, got 'inputs': 5, 'targets': 4
    """
    shapes = {path_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(arrays)}
    if not shapes:
        raise ValueError("there are no arrays to take examples from")
    for path, leaf in jax.tree.leaves_with_path(arrays):
        if isinstance(leaf, str | bytes):
            raise ValueError(
                f"{path_name(path)!r} is text, not an array; of a data set give one part, such as bundle.train"
            )
    for name, shape in shapes.items():
        if not shape:
            raise ValueError(f"the array {name!r} is a scalar; give every array a leading axis of examples")
    if len({shape[0] for shape in shapes.values()}) > 1:
        lengths = ", ".join(f"{name!r}: {shape[0]}" for name, shape in shapes.items())
        raise ValueError(f"arrays must have one length, got {lengths}")
    size = next(iter(shapes.values()))[0]
    if size == 0:
        raise ValueError(f"there are no examples: {', '.join(map(repr, shapes))} of length 0")
    return size


def batch_count(size: int, batch_size: int, *, remainder: Literal["mask", "drop", "error"] = "mask") -> int:
    """The number of batches in an epoch.

    Args:
      size: the number of examples, >= 1.
      batch_size: examples per batch, >= 1; if above ``size``, there is one partly masked batch.
      remainder: treatment of an incomplete last batch; see ``epoch_indices``.

    Returns:
      ``ceil(size / batch_size)``, or ``floor(size / batch_size)`` with ``"drop"``.

    Raises:
      ValueError: if ``size`` or ``batch_size`` is below 1, ``remainder`` is unknown, it is ``"error"`` and there is a
        remainder, or it is ``"drop"`` and no batch is left.

    >>> batch_count(10, 4), batch_count(10, 4, remainder="drop")
    (3, 2)
    """
    size, batch_size = check_count("size", size), check_count("batch_size", batch_size)
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
    if remainder == "error" and size % batch_size:
        raise ValueError(
            f"batch_size={batch_size} leaves a remainder of {size % batch_size} out of size={size} examples; choose a "
            "divisor, remainder='mask' or remainder='drop'"
        )
    if remainder == "drop":
        if batch_size > size:
            raise ValueError(f"remainder='drop' leaves no batch at all: batch_size={batch_size} > size={size}")
        return size // batch_size
    return -(-size // batch_size)


def epoch_indices(
    key: Key | None,
    size: int,
    batch_size: int,
    *,
    shuffle: bool = True,
    remainder: Literal["mask", "drop", "error"] = "mask",
) -> tuple[jax.Array, jax.Array]:
    """The indices of every batch of one epoch: each example exactly once, in a random order.

    This function is pure: it can be jitted, scanned and vmapped over ``key``.

    Args:
      key: a random key, one for each epoch (``jax.random.fold_in(key, epoch)``); None without ``shuffle``.
      size: the number of examples, >= 1.
      batch_size: examples per batch, >= 1.
      shuffle: whether the order is random; otherwise it is ``0, 1, 2, ...``.
      remainder: ``"mask"`` pads the last batch with other examples, masked by False; ``"drop"`` omits an incomplete
        batch (different examples each epoch, with ``shuffle``); ``"error"`` raises if there is one.

    Returns:
      ``indices_nb``, int32 of shape (n_batches, batch_size), all in [0, size), and ``where_nb``, booleans of the same
      shape: True where the example counts. A mean over a batch is ``jnp.mean(losses_b, where=where_b)``.

    Raises:
      ValueError: as for ``batch_count``, or if ``shuffle`` is True and ``key`` is None.

    >>> indices_nb, where_nb = epoch_indices(None, 5, 3, shuffle=False)
    >>> indices_nb.tolist(), where_nb.tolist()
    ([[0, 1, 2], [3, 4, 0]], [[True, True, True], [True, True, False]])
    """
    shape = (batch_count(size, batch_size, remainder=remainder), batch_size)
    if not shuffle:
        order = jnp.arange(size)
    elif key is None:
        raise ValueError("key must be a random key to shuffle with, got None; or give shuffle=False")
    else:
        order = jax.random.permutation(key, size)
    places = np.arange(math.prod(shape))
    indices_nb = order.astype(jnp.int32)[places % size].reshape(shape)
    return indices_nb, jnp.asarray(places < size).reshape(shape)


@overload
def take(arrays: ArrayLike, indices: ArrayLike | Sequence[int]) -> jax.Array: ...
@overload
def take(arrays: Examples, indices: ArrayLike | Sequence[int]) -> Examples: ...
@overload
def take(arrays: Batch, indices: ArrayLike | Sequence[int]) -> Batch: ...
def take(arrays: Batch, indices: ArrayLike | Sequence[int]) -> Batch:
    """Gather the examples with the given indices from every array of a tree.

    Args:
      arrays: a pytree of arrays of shape (size, ...).
      indices: integers in [0, size), of any shape; may be traced. An index beyond the end gives NaN, or an extreme
        value for integers, so that the error is visible.

    Returns:
      The same tree, each array of shape (*indices.shape, ...).

    Raises:
      TypeError: if ``indices`` are not integers.
      ValueError: as for ``example_count``.

    >>> batch = take(Examples(np.arange(6.0).reshape(3, 2), np.array([7, 8, 9])), [2, 0])
    >>> batch.inputs.tolist(), batch.targets.tolist()
    ([[4.0, 5.0], [0.0, 1.0]], [9, 7])
    """
    example_count(arrays)
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype.name}; for a mask use jnp.where")
    return jax.tree.map(lambda array: take_rows(jnp.asarray(array), indices, spread=True), arrays)


def split(
    examples: Batch,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    *,
    seed: int = 0,
    stratify: ArrayLike | None = None,
) -> Split:
    """Split examples at random into train, validation and test parts.

    Each part gets its fraction of every class, rounded up or down. The roundings are chosen so that the totals of the
    parts are also close to their fractions. Runs on the host, in NumPy.

    Args:
      examples: a pytree of arrays of shape (size, ...), such as ``Examples``.
      fractions: fractions of train (> 0), validation and test, each >= 0 and with sum 1.
      seed: an integer >= 0; the same seed gives the same split.
      stratify: the class of each example, shape (size,); None for a single class.

    Returns:
      A ``Split`` of three trees like ``examples`` with NumPy arrays, each part in random order. Every example is in
      exactly one part.

    Raises:
      ValueError: if fractions, seed or classes are invalid, or a part with a fraction above 0 would be empty.

    >>> parts = split(np.arange(20), (0.5, 0.25, 0.25), stratify=np.arange(20) % 2)
    >>> [(len(part), int(np.sum(part % 2))) for part in parts]
    [(10, 5), (5, 2), (5, 3)]
    """
    size = example_count(examples)
    shares = _check_fractions(fractions)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an int >= 0, got {seed!r}")
    labels = np.zeros(size, np.int32) if stratify is None else np.asarray(stratify)
    if labels.shape != (size,):
        raise ValueError(f"stratify must hold one class for each of {size} examples, got shape {labels.shape}")

    random = np.random.default_rng(seed)
    _, classes, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = [random.permutation(np.flatnonzero(classes == index)) for index in range(len(class_sizes))]
    ends = np.cumsum(_part_sizes(class_sizes, shares), axis=1)[:, :-1]
    pieces = [np.split(rows, end) for rows, end in zip(members, ends, strict=True)]
    parts = [random.permutation(np.concatenate(rows)) for rows in zip(*pieces, strict=True)]
    for name, fraction, rows in zip(Split._fields, shares, parts, strict=True):
        if fraction > 0 and not len(rows):
            raise ValueError(f"the {name} part, {fraction} of {size} examples, would be empty; give it 0 or more data")
    return Split(*(jax.tree.map(lambda array, rows=rows: np.asarray(array)[rows], examples) for rows in parts))


def _check_fractions(fractions: Sequence[float]) -> np.ndarray:
    values = np.asarray(fractions, np.float64)
    if values.shape != (3,):
        raise ValueError(f"fractions must be three numbers (train, validation, test), got {fractions!r}")
    if not np.all(values >= 0) or values[0] == 0:  # a NaN is not >= 0 either
        raise ValueError(f"fractions must be >= 0, and above 0 for train, got {fractions!r}")
    if abs(values.sum() - 1) > 1e-6:
        raise ValueError(f"fractions must add up to 1, got {fractions!r}, which add up to {values.sum():.6g}")
    return values / values.sum()


def _part_sizes(class_sizes: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """The number of examples of each class in each part, shape (classes, parts); each row sums to its class size.

    Each entry is its quota rounded down or up. The examples left over by rounding down go, class by class, to the parts
    that are furthest below their fraction of all examples so far.
    """
    sizes = np.zeros((len(class_sizes), len(fractions)), np.int64)
    behind = np.zeros(len(fractions))
    for row, class_size in zip(sizes, class_sizes, strict=True):
        quotas = fractions * class_size
        row[:] = np.floor(quotas + ROUNDING)
        behind += quotas - row
        may_round_up = quotas - row > ROUNDING
        neediest = np.argsort(np.where(may_round_up, -behind, np.inf), kind="stable")
        chosen = neediest[: class_size - row.sum()]
        row[chosen] += 1
        behind[chosen] -= 1
    return sizes


def standardize(train: ArrayLike, *others: ArrayLike) -> tuple[tuple[np.ndarray, ...], Statistics]:
    """Standardise every feature with the mean and standard deviation *of the training part*.

    ``z = (x - mean(train)) / std(train)``. A feature that is constant in training is only shifted. Runs on the host, in
    NumPy, in float64.

    Args:
      train: the training part, shape (n, *features).
      *others: arrays of shape (m, *features), such as the validation and the test part.

    Returns:
      ``(train, *others)`` as float32, and the ``Statistics``, to transform further arrays.

    Raises:
      ValueError: if ``train`` has no examples or holds a non-finite value, or features differ in shape.

    >>> (train, test), statistics = standardize(np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[4.0, 6.0]]))
    >>> train.tolist(), test.tolist(), statistics.scale.tolist()
    ([[-1.0, 0.0], [1.0, 0.0]], [[2.0, 1.0]], [1.0, 1.0])
    """
    arrays = [np.asarray(array, np.float64) for array in (train, *others)]
    example_count(arrays[0])
    features = arrays[0].shape[1:]
    for position, array in enumerate(arrays):
        if array.shape[1:] != features:
            raise ValueError(f"array {position} has features of shape {array.shape[1:]}, train has {features}")
    if not np.all(np.isfinite(arrays[0])):
        raise ValueError("train holds a NaN or an infinity; fill or leave out those examples first")
    constant = np.ptp(arrays[0], axis=0) == 0  # not std == 0, as the mean of equal values may be rounded
    statistics = Statistics(
        mean=np.where(constant, arrays[0][0], np.mean(arrays[0], axis=0)),
        scale=np.where(constant, 1.0, np.std(arrays[0], axis=0)),
    )
    return tuple(statistics.apply(array) for array in arrays), statistics
