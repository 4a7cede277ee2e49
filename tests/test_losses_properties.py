"""What must hold of the losses for any logits, labels and masks."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nnlearn import losses

few = settings(max_examples=25, deadline=None, derandomize=True)

SHAPES = [(3, 4), (1, 2)]
"""Few, because every shape is compiled anew."""
ORDINARY = st.floats(-50, 50, width=32)
ANY = st.one_of(ORDINARY, st.sampled_from([-1e30, -1e4, 0.0, 1e4, 1e30]))
WITH_MISSING = st.one_of(ANY, st.just(-np.inf))


@st.composite
def batches(draw, elements=ANY):
    """Logits, integer labels, a mask of the examples and another array like the logits."""
    shape = draw(st.sampled_from(SHAPES))
    logits, other = (draw(hnp.arrays(np.float32, shape, elements=part)) for part in (elements, ORDINARY))
    labels = draw(hnp.arrays(np.int32, shape[:1], elements=st.integers(0, shape[1] - 1)))
    return logits, labels, draw(hnp.arrays(bool, shape[:1])), other


def distributions(logits):
    return np.asarray(jax.nn.softmax(np.asarray(logits)))


INTEGER_LOSSES = {
    "plain": losses.softmax_cross_entropy_with_integer_labels,
    "options": functools.partial(
        losses.softmax_cross_entropy_with_integer_labels, label_smoothing=0.1, z_loss=1e-4, class_weights=None
    ),
    "hinge": losses.multiclass_hinge_loss,
    "perceptron": losses.multiclass_perceptron_loss,
}
LIKE_LOSSES = {
    "softmax_cross_entropy": lambda x, y: losses.softmax_cross_entropy(x, jax.nn.softmax(y)),
    "sigmoid_binary_cross_entropy": lambda x, y: losses.sigmoid_binary_cross_entropy(x, jax.nn.sigmoid(y)),
    "sigmoid_focal_loss": lambda x, y: losses.sigmoid_focal_loss(x, jnp.where(y > 0, 1.0, 0.0), alpha=0.25),
    "sigmoid_focal_loss-soft": lambda x, y: losses.sigmoid_focal_loss(x, jax.nn.sigmoid(y), gamma=0.5),
    "kl_divergence": lambda x, y: losses.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y)) + 1e-5,
    "huber_loss": losses.huber_loss,
    "log_cosh": losses.log_cosh,
    "absolute_error": losses.absolute_error,
    "cosine_distance": lambda x, y: losses.cosine_distance(x, y) + 1e-6,
    "hinge_loss": lambda x, y: losses.hinge_loss(x, jnp.sign(y)),
    "perceptron_loss": lambda x, y: losses.perceptron_loss(x, jnp.sign(y)),
}


@jax.jit
def all_losses(logits, labels, other):
    """Every loss with its gradient, in one program."""

    def with_grad(function, second):
        def total(x):
            loss = function(x, second)
            return jnp.sum(loss), loss

        return jax.grad(total, has_aux=True)(logits)

    return {name: with_grad(function, labels) for name, function in INTEGER_LOSSES.items()} | {
        name: with_grad(function, other) for name, function in LIKE_LOSSES.items()
    }


@few
@given(batches())
def test_losses_are_not_negative_and_have_finite_gradients(batch):
    logits, labels, _, other = batch
    for name, (grad, loss) in all_losses(logits, labels, other).items():
        assert (np.asarray(loss) >= 0).all(), name
        assert np.isfinite(loss).all() and np.isfinite(grad).all(), name


@jax.jit
def integer_and_soft(logits, labels, dtype_like):
    hot = jax.nn.one_hot(labels, logits.shape[-1])
    return [
        jax.value_and_grad(lambda x, y=y: jnp.sum(losses.cross_entropy(x, y, reduction="none")), has_aux=False)(logits)
        for y in (labels, hot)
    ] + [losses.cross_entropy(dtype_like, labels, reduction="none")]


@few
@given(batches(WITH_MISSING), st.sampled_from([jnp.bfloat16, jnp.float16]))
def test_cross_entropy_with_missing_classes_has_no_nan_and_both_forms_agree(batch, dtype):
    logits, labels, _, _ = batch
    (hard, hard_grad), (soft, soft_grad), low = integer_and_soft(logits, labels, jnp.asarray(logits, dtype))
    assert np.isfinite(hard_grad).all() and hard >= 0
    np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hard_grad, soft_grad, rtol=1e-5, atol=1e-5)
    on_missing = np.isneginf(logits[np.arange(len(labels)), labels]).any()
    assert np.isinf(hard) == on_missing
    assert low.dtype == jnp.float32


@jax.jit
def shifted_pair(logits, labels, shift):
    return [losses.softmax_cross_entropy_with_integer_labels(x, labels) for x in (logits, logits + shift)]


@few
@given(batches(st.integers(-20, 20).map(float)), st.sampled_from([-4096.0, -1.0, 64.0, 65536.0]))
def test_cross_entropy_does_not_see_a_constant_added_to_the_logits(batch, shift):
    """Exactly, as long as the sum is exact: whole numbers are."""
    before, after = shifted_pair(batch[0], batch[1], shift)
    np.testing.assert_array_equal(before, after)


@jax.jit
def masked_means(logits, labels, mask, other):
    weights = jnp.arange(1.0, 1 + logits.shape[-1])
    options = {"label_smoothing": 0.1, "class_weights": weights}

    def cross_entropy(x):
        return losses.cross_entropy(x, labels, where=mask, **options)

    def squared(x):
        return losses.mean_squared_error(x, other, where=mask)

    each = losses.cross_entropy(logits, labels, reduction="none", **options)
    errors = losses.squared_error(logits, other)
    return jax.value_and_grad(cross_entropy)(logits), jax.value_and_grad(squared)(logits), each, errors, weights[labels]


@few
@given(batches(ORDINARY))
def test_a_mask_equals_the_subset(batch):
    logits, labels, mask, other = batch
    (entropy, entropy_grad), (squared, squared_grad), *rest = masked_means(logits, labels, mask, other)
    each, errors, weights = (np.asarray(array, np.float64) for array in rest)
    for value, grad, expected in (
        (entropy, entropy_grad, each[mask].sum() / max(weights[mask].sum(), 1e-9)),
        (squared, squared_grad, errors[mask].sum() / max(errors[mask].size, 1)),
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert not np.asarray(grad)[~mask].any()
        if not mask.any():
            assert value == 0


def with_numbers(logits, labels, other, delta, smoothing, z_loss, gamma, alpha):
    return (
        losses.huber_loss(logits, other, delta=delta).sum(),
        losses.cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=z_loss),
        losses.sigmoid_focal_loss(logits, jax.nn.sigmoid(other), alpha=alpha, gamma=gamma).sum(),
        losses.smooth_labels(jax.nn.softmax(other), smoothing),
    )


mapped = jax.jit(jax.vmap(with_numbers, (None, None, None, 0, 0, 0, 0, 0)))
single = jax.jit(with_numbers)
fraction = st.floats(0, 1, width=32)


@few
@given(batches(), st.lists(st.tuples(*[fraction] * 5), min_size=2, max_size=2))
def test_numbers_under_vmap_equal_the_loop_and_jit_equals_no_jit(batch, numbers):
    logits, labels, _, other = batch
    delta, smoothing, z_loss, gamma, alpha = np.float32(numbers).T
    columns = (delta + 0.125, smoothing, 1e-3 * z_loss, 4 * gamma, alpha)
    together = mapped(logits, labels, other, *columns)
    for index in range(2):
        alone = single(logits, labels, other, *[column[index] for column in columns])
        jax.tree.map(lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), together, alone)
    plain = with_numbers(logits, labels, other, *[float(column[0]) for column in columns])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6), together, plain)
