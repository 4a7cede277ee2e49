"""Data sets of scikit-learn, split and prepared as the healthy programs use them."""

import functools

import numpy as np


def parts(inputs, targets, sizes, seed=0):
    """Random train, validation and test parts of the given sizes; the test part has what is left."""
    order = np.random.default_rng(seed).permutation(len(inputs))
    rows = np.split(order, np.cumsum(sizes))
    return [(inputs[part], targets[part]) for part in rows]


def standardised(pieces):
    """The inputs of all pieces in units of the first one's mean and deviation."""
    mean, scale = pieces[0][0].mean(0), pieces[0][0].std(0) + 1e-8
    return [(((x - mean) / scale).astype(np.float32), y) for x, y in pieces]


@functools.cache
def digits(train=1000, seed=0):
    """8 x 8 images, (n, 64) with values in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return parts((data.data / 16).astype(np.float32), data.target.astype(np.int32), (train, 300), seed)


@functools.cache
def table(name, sizes, seed=0):
    """A table of scikit-learn as it is, not standardised."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    kind = np.float32 if name == "diabetes" else np.int32
    return parts(data.data.astype(np.float32), data.target.astype(kind), sizes, seed)
