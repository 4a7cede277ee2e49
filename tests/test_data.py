"""Batches, splits and standardisation: every example exactly once, and no silent loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnlearn.data import Examples, batch_count, epoch_indices, example_count, split, standardize, take
from nnlearn.datasets import load

KEY = jax.random.key(0)


# --- epochs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 5))
def test_every_example_occurs_exactly_once(size, batch_size, shuffle, seed):
    indices_nb, where_nb = epoch_indices(jax.random.key(seed), size, batch_size, shuffle=shuffle)
    assert indices_nb.shape == where_nb.shape == (batch_count(size, batch_size), batch_size)
    assert indices_nb.dtype == jnp.int32 and where_nb.dtype == jnp.bool_
    indices_nb, where_nb = np.asarray(indices_nb), np.asarray(where_nb)
    assert sorted(indices_nb[where_nb]) == list(range(size))
    assert indices_nb.min() >= 0 and indices_nb.max() < size  # padding indices are valid too
    assert where_nb[:-1].all() and where_nb[-1].any()
    assert (np.diff(where_nb.ravel().astype(int)) <= 0).all()  # only the end is padding
    if not shuffle:
        assert indices_nb[where_nb].tolist() == list(range(size))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_drop_leaves_out_less_than_one_batch(size, batch_size):
    if batch_size > size:
        with pytest.raises(ValueError, match=f"no batch at all: batch_size={batch_size} > size={size}"):
            epoch_indices(KEY, size, batch_size, remainder="drop")
        return
    indices_nb, where_nb = epoch_indices(KEY, size, batch_size, remainder="drop")
    kept = np.asarray(indices_nb).ravel()
    assert np.all(where_nb) and len(set(kept)) == len(kept) == size - size % batch_size


def test_orders_differ_by_key_and_repeat_with_it():
    first, _ = epoch_indices(KEY, 50, 7)
    np.testing.assert_array_equal(first, epoch_indices(KEY, 50, 7)[0])
    assert not np.array_equal(first, epoch_indices(jax.random.key(1), 50, 7)[0])
    assert not np.array_equal(first, epoch_indices(jax.random.fold_in(KEY, 1), 50, 7)[0])


def test_every_position_gets_every_example_equally_often():
    orders = jax.vmap(lambda key: epoch_indices(key, 4, 2)[0].reshape(-1))(jax.random.split(KEY, 4000))
    counts = np.stack([np.bincount(place, minlength=4) for place in np.asarray(orders).T])
    assert np.all(np.abs(counts - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75))


def test_inside_jit_scan_and_vmap():
    examples = Examples(jnp.arange(10.0)[:, None] * jnp.ones((1, 3)), jnp.arange(10))

    def run(key):
        def one_batch(seen, batch):
            indices_b, where_b = batch
            rows = take(examples, indices_b)
            losses_b = jnp.sum(rows.inputs, axis=1)
            return seen.at[rows.targets].add(where_b.astype(jnp.int32)), jnp.mean(losses_b, where=where_b)

        def one_epoch(seen, epoch):
            return jax.lax.scan(one_batch, seen, epoch_indices(jax.random.fold_in(key, epoch), 10, 4))

        return jax.lax.scan(one_epoch, jnp.zeros(10, jnp.int32), jnp.arange(3))

    keys = jax.random.split(KEY, 2)
    seen, means = jax.jit(jax.vmap(run))(keys)
    np.testing.assert_array_equal(seen, np.full((2, 10), 3))
    assert means.shape == (2, 3, 3)
    # a mean weighted with the counts 4, 4, 2 is the mean over the epoch, whatever the order
    np.testing.assert_allclose(means @ jnp.array([0.4, 0.4, 0.2]), np.full((2, 3), 13.5), rtol=1e-5)
    for index, key in enumerate(keys):
        alone = run(key)
        np.testing.assert_array_equal(means[index], alone[1])


def test_batches_larger_than_the_data_are_one_masked_batch():
    indices_nb, where_nb = epoch_indices(KEY, 3, 8)
    assert indices_nb.shape == (1, 8) and where_nb.tolist() == [[True] * 3 + [False] * 5]
    assert batch_count(3, 8) == 1 and batch_count(8, 8) == 1 and batch_count(9, 8) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: batch_count(10, 0), ValueError, "batch_size must be an int >= 1, got 0"),
        (lambda: batch_count(0, 4), ValueError, "size must be an int >= 1, got 0"),
        (lambda: batch_count(10, 2.5), TypeError, "batch_size must be an int, got 2.5"),
        (lambda: batch_count(10, True), ValueError, "batch_size must be an int >= 1, got True"),
        (lambda: jax.jit(lambda b: batch_count(10, b))(3), TypeError, "batch_size decides an array's shape"),
        (lambda: batch_count(10, 3, remainder="keep"), ValueError, "mask, drop, error, got 'keep'"),
        (lambda: batch_count(10, 4, remainder="error"), ValueError, "batch_size=4 leaves a remainder of 2 .*size=10"),
        (lambda: epoch_indices(None, 10, 4), ValueError, "key must be a random key.*shuffle=False"),
    ],
)
def test_bad_batch_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_error_remainder_accepts_a_divisor():
    indices_nb, where_nb = epoch_indices(KEY, 12, 4, remainder="error")
    assert indices_nb.shape == (3, 4) and np.all(where_nb)


# --- take and counts ------------------------------------------------------------------------------------------------


def test_take_gathers_every_leaf():
    arrays = {"x": np.arange(12.0).reshape(4, 3), "y": jnp.arange(4), "key": jax.random.split(KEY, 4)}
    rows = take(arrays, jnp.array([[3, 0], [1, 1]]))
    np.testing.assert_array_equal(rows["x"], arrays["x"][[[3, 0], [1, 1]]])
    assert rows["y"].tolist() == [[3, 0], [1, 1]] and rows["y"].dtype == jnp.int32
    np.testing.assert_array_equal(jax.random.key_data(rows["key"])[0, 0], jax.random.key_data(arrays["key"])[3])
    assert take(np.arange(4), 2) == 2
    assert np.isnan(take(np.arange(4.0), 4))


def test_take_refuses_masks_and_floats():
    for indices in (np.array([True, False, True]), np.array([0.0, 1.0])):
        with pytest.raises(TypeError, match="indices must be integers"):
            take(np.arange(3), indices)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, "'x': 3, 'y': 4"),
        (Examples(np.ones(3), {"a": np.ones(3), "b": np.ones(2)}), "'inputs': 3, 'targets/a': 3, 'targets/b': 2"),
        (np.ones((0, 3)), "there are no examples"),
        ({"x": np.ones(3), "y": 1.0}, "'y' is a scalar"),
        ({}, "there are no arrays"),
    ],
)
def test_faulty_examples_are_refused(arrays, message):
    for call in (example_count, lambda arrays: take(arrays, 0), split):
        with pytest.raises(ValueError, match=message):
            call(arrays)


def test_the_error_names_a_whole_data_set_given_as_a_part():
    with pytest.raises(ValueError, match=r"'name' is text.*bundle\.train"):
        example_count(load("xor"))
    assert jax.tree.map(jnp.shape, load("xor").parts).train.inputs == (4, 2)


def test_example_count():
    assert example_count(Examples(np.ones((3, 2)), jnp.ones(3))) == 3
    assert jax.eval_shape(lambda x: jnp.ones(example_count(x)), jnp.ones((5, 2))).shape == (5,)


# --- split ----------------------------------------------------------------------------------------------------------


@st.composite
def fractions_of_twenty(draw):
    train = draw(st.integers(1, 20))
    validation = draw(st.integers(0, 20 - train))
    return train / 20, validation / 20, (20 - train - validation) / 20


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(fractions_of_twenty(), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 9), st.booleans())
def test_split_is_disjoint_complete_and_stratified(fractions, class_sizes, seed, stratified):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    numbers = np.arange(len(labels))
    try:
        parts = split(Examples(numbers, labels), fractions, seed=seed, stratify=labels if stratified else None)
    except ValueError as error:
        # refused only if a part must be empty, or nearly so
        assert min(fraction * len(labels) for fraction in fractions if fraction > 0) < 2, error
        return
    assert sorted(np.concatenate([part.inputs for part in parts])) == numbers.tolist()
    for part, fraction in zip(parts, fractions, strict=True):
        np.testing.assert_array_equal(part.targets, labels[part.inputs])  # rows stay together
        if stratified:
            counts = np.bincount(part.targets, minlength=len(class_sizes))
            assert np.all(np.abs(counts - fraction * np.asarray(class_sizes)) < 1)
            assert abs(len(part.inputs) - fraction * len(labels)) < len(parts)
        else:
            assert abs(len(part.inputs) - fraction * len(labels)) < 1


def test_many_small_classes_do_not_all_round_the_same_way():
    labels = np.repeat(np.arange(200), 3)  # quotas 2.1, 0.45 and 0.45 each
    parts = split(labels, (0.7, 0.15, 0.15), stratify=labels)
    assert [len(part) for part in parts] == pytest.approx([420, 90, 90], abs=2)


@pytest.mark.parametrize(
    ("class_sizes", "fractions", "quota"),
    [
        ((7, 20, 50), (0.25, 0.28, 0.47), 14),  # 0.28 * 50 is 14.000000000000002
        ((50, 25, 50), (0.23, 0.19, 0.58), 29),  # 0.58 * 50 is 28.999999999999996
    ],
)
def test_integer_quotas_are_met_despite_rounding(class_sizes, fractions, quota):
    labels = np.repeat(np.arange(3), class_sizes)
    parts = split(labels, fractions, stratify=labels)
    assert quota in [np.count_nonzero(part == 2) for part in parts]


def test_the_seed_determines_the_split_and_classes_are_mixed():
    labels = np.repeat(["no", "yes"], 100)
    numbers = np.arange(200)
    first = split(numbers, seed=3, stratify=labels)
    for one, other in zip(first, split(numbers, seed=3, stratify=labels), strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(first.train) != set(split(numbers, seed=4, stratify=labels).train)
    assert [len(part) for part in first] == [140, 30, 30]
    for part in first:  # neither in data order nor sorted by class
        assert 0.2 < np.mean(part[: len(part) // 2] < 100) < 0.8 and not np.all(np.diff(part) > 0)


def test_a_fraction_of_zero_gives_an_empty_part():
    parts = split(np.arange(10), (0.8, 0.0, 0.2))
    assert [len(part) for part in parts] == [8, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": (0.5, 0.5)}, r"three numbers .*got \(0.5, 0.5\)"),
        ({"fractions": (0.8, 0.3, -0.1)}, r">= 0.*got \(0.8, 0.3, -0.1\)"),
        ({"fractions": (0.0, 0.5, 0.5)}, r"above 0 for train, got \(0.0, 0.5, 0.5\)"),
        ({"fractions": (0.7, 0.2, 0.2)}, r"must add up to 1, got \(0.7, 0.2, 0.2\), which add up to 1.1"),
        ({"fractions": (float("nan"), 0.5, 0.5)}, "nan"),
        ({"fractions": (0.98, 0.01, 0.01)}, "the validation part, 0.01 of 20 examples, would be empty"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"seed": 0.5}, "seed must be an int >= 0, got 0.5"),
        ({"stratify": np.zeros(3)}, r"one class for each of 20 examples, got shape \(3,\)"),
    ],
)
def test_bad_split_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(np.arange(20), **arguments)


# --- standardize ----------------------------------------------------------------------------------------------------


def test_standardize_fits_on_train_only():
    random = np.random.default_rng(0)
    train, test = random.normal(5, 3, (50, 4)), random.normal(-2, 1, (20, 4))
    (train_z, test_z), statistics = standardize(train, test)
    assert train_z.dtype == test_z.dtype == np.float32
    np.testing.assert_allclose(train_z.mean(0), np.zeros(4), atol=1e-6)
    np.testing.assert_allclose(train_z.std(0), np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(test_z, (test - train.mean(0)) / train.std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.invert(statistics.apply(test)), test, rtol=1e-5)
    (alone,), _ = standardize(train)
    np.testing.assert_array_equal(alone, train_z)


def test_constant_features_are_shifted_only():
    # The mean of three times 0.1 is not 0.1, and a scale from that rounding error would amplify it.
    train = np.stack([np.full(3, 0.1), np.arange(3.0)], axis=1)
    (train_z, test_z), statistics = standardize(train, np.array([[1.1, 1.0]]))
    assert np.std(train[:, 0]) > 0 and np.all(train_z[:, 0] == 0) and statistics.scale[0] == 1
    np.testing.assert_allclose(test_z, [[1.0, 0.0]], rtol=1e-6)


def test_standardize_keeps_precision_with_a_large_mean():
    train = 1e6 + np.arange(4.0)[:, None, None] * np.ones((1, 2, 2))
    (train_z,), _ = standardize(train)
    np.testing.assert_allclose(train_z[:, 1, 1], (np.arange(4) - 1.5) / np.sqrt(1.25), rtol=1e-6)


def test_bad_standardize_arguments_are_refused():
    with pytest.raises(ValueError, match="NaN or an infinity"):
        standardize(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"array 1 has features of shape \(3,\), train has \(2,\)"):
        standardize(np.ones((4, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="no examples"):
        standardize(np.ones((0, 2)))
