"""Properties of losses that hold for all inputs.

Shapes come from a short list, because each new shape triggers a compilation; the values vary.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn import losses

few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)

SHAPES = [(4,), (3, 4), (1, 4)]  # the classes last
EXTREMES = [0.0, -0.0, 1.0, -1.0, 1e-30, 88.0, -104.0, 1e4, -1e4, 1e30, -1e30]
numbers = st.one_of(st.floats(-20, 20, width=32), st.sampled_from([float(np.float32(one)) for one in EXTREMES]))
moderate = st.floats(-8, 8, width=32).map(lambda x: round(x, 3))


def arrays(shape, elements, dtype=np.float32):
    return numpy_strategies.arrays(dtype, shape, elements=elements)


@st.composite
def batches(draw, elements=numbers, shapes=tuple(SHAPES)):
    """Logits, integer labels, distributions over classes and a mask with at least one example."""
    shape = draw(st.sampled_from(shapes))
    logits = draw(arrays(shape, elements))
    labels = draw(arrays(shape[:-1], st.integers(0, shape[-1] - 1), np.int32))
    weights = draw(arrays(shape, st.sampled_from([0.0, 0.125, 0.5, 1.0])))
    weights = np.where(weights.sum(-1, keepdims=True) == 0, 1, weights)
    where = draw(arrays(shape[:-1], st.booleans(), bool))
    return logits, labels, (weights / weights.sum(-1, keepdims=True)).astype(np.float32), where


# One compiled program for each loss and shape, reused by every example.
@functools.cache
def compiled(name, **fixed):
    loss_fn = functools.partial(getattr(losses, name), **fixed)

    def value_and_grad(predictions, targets, **options):
        grad = jax.grad(lambda x: loss_fn(x, targets, **options).sum())(predictions)
        return loss_fn(predictions, targets, **options), grad

    return jax.jit(value_and_grad)


BY_TARGET = {
    "integer": ["softmax_cross_entropy_with_integer_labels", "multiclass_hinge_loss", "multiclass_perceptron_loss"],
    "distribution": ["softmax_cross_entropy", "poly_loss_cross_entropy"],
    "probability": ["sigmoid_binary_cross_entropy", "sigmoid_focal_loss"],
    "number": ["absolute_error", "huber_loss", "log_cosh", "cosine_distance"],
    "sign": ["hinge_loss", "perceptron_loss"],
}
TARGET_OF = {name: target for target, names in BY_TARGET.items() for name in names}


def targets_for(name, labels, distribution, logits):
    if TARGET_OF[name] == "integer":
        return labels
    if TARGET_OF[name] == "number":
        return np.clip(logits[..., ::-1], -5, 5)
    return np.where(distribution > 0.3, 1, -1).astype(np.float32) if TARGET_OF[name] == "sign" else distribution


@pytest.mark.parametrize("name", TARGET_OF)
@few
@hypothesis.given(batches())
def test_losses_are_finite_and_not_negative_with_finite_gradients(name, batch):
    logits, labels, distribution, _ = batch
    value, grad = compiled(name)(logits, targets_for(name, labels, distribution, logits))
    assert np.isfinite(value).all() and np.isfinite(grad).all()
    # A cosine distance is 1 minus a cosine, exact only to the rounding of 1.
    assert (value >= (-1e-6 if name == "cosine_distance" else 0)).all()


@pytest.mark.parametrize("name", TARGET_OF)
@few
@hypothesis.given(batches(moderate, shapes=((3, 4),)))
def test_compiled_losses_equal_uncompiled_ones(name, batch):
    logits, labels, distribution, _ = batch
    targets = targets_for(name, labels, distribution, logits)
    value, _ = compiled(name)(logits, targets)
    np.testing.assert_allclose(value, getattr(losses, name)(logits, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@few
@hypothesis.given(batch=batches(moderate, shapes=((3, 4),)))
def test_low_precision_equals_float32_of_the_same_numbers(dtype, batch):
    logits, labels, distribution, _ = batch
    narrow = jnp.asarray(logits).astype(dtype)
    for name, targets in [
        ("softmax_cross_entropy_with_integer_labels", labels),
        ("softmax_cross_entropy", distribution),
        ("sigmoid_focal_loss", distribution),
    ]:
        value, grad = compiled(name)(narrow, targets)
        exact, exact_grad = compiled(name)(narrow.astype(jnp.float32), targets)
        assert value.dtype == jnp.float32 and grad.dtype == dtype
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(grad.astype(jnp.float32), exact_grad, rtol=1e-2, atol=1e-6)


@few
@hypothesis.given(batches(moderate), st.floats(-30, 30, width=32))
def test_cross_entropy_does_not_change_with_a_constant_added_to_the_logits(batch, constant):
    logits, labels, distribution, _ = batch
    for name, targets in [
        ("softmax_cross_entropy_with_integer_labels", labels),
        ("softmax_cross_entropy", distribution),
    ]:
        value, grad = compiled(name)(logits, targets)
        moved, moved_grad = compiled(name)(logits + constant, targets)
        np.testing.assert_allclose(value, moved, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad, moved_grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-6)  # the derivative of that equality


@few
@hypothesis.given(batches())
def test_integer_labels_and_one_hot_labels_agree(batch):
    logits, labels, _, _ = batch
    one_hot = np.eye(logits.shape[-1], dtype=np.float32)[labels]
    for ours, theirs in zip(
        compiled("softmax_cross_entropy_with_integer_labels")(logits, labels),
        compiled("softmax_cross_entropy")(logits, one_hot),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@hypothesis.settings(few, max_examples=10)
@hypothesis.given(batches(moderate, shapes=((3, 4),)), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_a_masked_mean_is_the_mean_of_the_subset(batch, garbage):
    logits, labels, distribution, where = batch
    dirty = np.where(where[:, None], logits, np.float32(garbage))
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "class_weights": np.arange(1.0, 5.0, dtype=np.float32)}
    for name, targets, spoiled, chosen in [
        ("cross_entropy", labels, np.where(where, labels, -100), options),
        ("cross_entropy", distribution, np.where(where[:, None], distribution, np.float32(garbage)), options),
        ("mean_squared_error", distribution, distribution, {}),
        ("mean_absolute_error", distribution, distribution, {}),
    ]:
        value, grad = compiled(name)(dirty, spoiled, where=where, **chosen)
        expected = getattr(losses, name)(logits[where], targets[where], **chosen) if where.any() else 0.0
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert np.isfinite(grad).all() and (grad[~where] == 0).all()


@few
@hypothesis.given(batches(moderate, shapes=((3, 4),)))
def test_a_missing_class_equals_a_removed_class(batch):
    logits, labels, _, _ = batch
    labels = labels % 3
    missing = logits.copy()
    missing[:, 3] = -np.inf
    value, grad = compiled("softmax_cross_entropy_with_integer_labels")(missing, labels)
    expected, expected_grad = compiled("softmax_cross_entropy_with_integer_labels")(logits[:, :3], labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, np.pad(expected_grad, ((0, 0), (0, 1))), rtol=1e-5, atol=1e-6)


POSITIVE = st.floats(0.125, 2.0, width=32)
NUMERIC_ARGUMENTS = {
    ("huber_loss", "delta"): ("number", POSITIVE),
    ("sigmoid_focal_loss", "alpha"): ("probability", st.floats(0, 1, width=32)),
    ("sigmoid_focal_loss", "gamma"): ("probability", st.one_of(st.just(0.0), POSITIVE)),
    ("poly_loss_cross_entropy", "epsilon"): ("distribution", POSITIVE),
    ("cosine_similarity", "epsilon"): ("number", POSITIVE),
    ("smooth_labels", "alpha"): ("labels", st.floats(0, 1, width=32)),
    ("cross_entropy", "label_smoothing"): ("integer", st.floats(0, 1, width=32)),
    ("cross_entropy", "z_loss"): ("integer", POSITIVE),
}


@functools.cache
def over_numbers(name, argument):
    def loss_fn(number, *arrays):
        return getattr(losses, name)(*arrays, **{argument: number})

    def value_and_slope(number, *arrays):
        return loss_fn(number, *arrays), jax.grad(lambda number: loss_fn(number, *arrays).sum())(number)

    return jax.jit(lambda several, *arrays: jax.vmap(lambda number: value_and_slope(number, *arrays))(several))


@pytest.mark.parametrize(("name", "argument"), NUMERIC_ARGUMENTS)
@hypothesis.settings(few, max_examples=8)
@hypothesis.given(data=st.data())
def test_vmap_over_a_number_is_the_loop_over_python_numbers(name, argument, data):
    target, strategy = NUMERIC_ARGUMENTS[name, argument]
    logits, labels, distribution, _ = data.draw(batches(moderate, shapes=((3, 4),)))
    several = data.draw(st.lists(strategy, min_size=3, max_size=3))
    given = {
        "number": (logits, np.sin(np.arange(12, dtype=np.float32)).reshape(3, 4)),
        "integer": (logits, labels),
        "labels": (distribution,),
    }.get(target, (logits, distribution))
    values, slopes = over_numbers(name, argument)(np.float32(several), *given)
    loop = [getattr(losses, name)(*given, **{argument: number}) for number in several]
    np.testing.assert_allclose(values, np.stack(loop), rtol=2e-5, atol=1e-6)
    assert np.isfinite(slopes).all()


@few
@hypothesis.given(batches(moderate))
def test_accuracy_equals_that_of_numpy(batch):
    logits, labels, _, where = batch
    right = logits.argmax(-1) == labels
    np.testing.assert_allclose(losses.accuracy(logits, labels), right.mean(), rtol=1e-6)
    expected = right[where].mean() if where.any() else 0.0
    np.testing.assert_allclose(losses.accuracy(logits, labels, where), expected, rtol=1e-6)
