"""Values at the limits of float32, where a formula as published gives NaN or 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnlearn import losses

MARGIN = {"multiclass_hinge_loss": 1.0, "multiclass_perceptron_loss": 0.0}


@pytest.mark.parametrize("name", MARGIN)
def test_margin_losses_at_extreme_scores(name):
    scores = np.array([[1e9, 1e9, 0.0], [1e30, -1e30, 0.0], [0.0, -np.inf, 0.5], [-1e4, 1e4, 0.0], [2.0, 4.5, 0.0]])
    labels = np.array([0, 1, 0, 0, 0])
    gaps = scores - np.take_along_axis(scores, labels[:, None], 1)
    expected = (gaps + MARGIN[name] * (np.arange(3) != labels[:, None])).max(-1)
    value, grad = jax.vmap(jax.value_and_grad(getattr(losses, name)))(jnp.asarray(scores, jnp.float32), labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(grad[1:], [[1, -1, 0], [-1, 0, 1], [-1, 1, 0], [-1, 1, 0]])


@pytest.mark.parametrize("name", MARGIN)
@pytest.mark.parametrize("scores", [[0.0, -np.inf, 1.0], [-np.inf] * 3])
def test_a_label_on_a_missing_class_has_infinite_margin_loss_without_nan(name, scores):
    value, grad = jax.value_and_grad(getattr(losses, name))(jnp.array(scores), jnp.array(1))
    assert value == np.inf and np.isfinite(grad).all()


@pytest.mark.parametrize("name", MARGIN)
def test_a_label_out_of_range_makes_only_its_own_margin_loss_nan(name):
    value = jax.jit(getattr(losses, name))(jnp.zeros((4, 3)), jnp.array([-1, 0, 3, 2]))
    np.testing.assert_array_equal(np.isnan(value), [True, False, True, False])


def test_a_log_target_that_underflows_counts_as_zero():
    def value_and_grad(loss_fn):
        return jax.value_and_grad(loss_fn)(jnp.array([0.0, -jnp.inf]), jnp.array([0.0, -200.0]))

    assert np.isnan(value_and_grad(optax.losses.kl_divergence_with_log_targets)[0])
    value, grad = value_and_grad(losses.kl_divergence_with_log_targets)
    assert value == 0
    np.testing.assert_array_equal(grad, [-1, 0])


def test_cross_entropy_is_accurate_with_a_large_normalizer():
    logits, exact = jnp.array([1e4, 1e4 - 5]), np.log1p(np.exp(-5))
    theirs = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array(0))
    assert abs(theirs - exact) > 1e-4
    for loss in (
        losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array(0)),
        losses.softmax_cross_entropy(logits, jnp.array([1.0, 0.0])),
        losses.cross_entropy(logits[None], jnp.array([0])),
    ):
        np.testing.assert_allclose(loss, exact, rtol=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_focal_loss_of_a_very_wrong_logit_has_full_gradient(label):
    side = 1 - 2 * label  # in favour of the wrong answer
    value, slope = jax.vmap(jax.value_and_grad(losses.sigmoid_focal_loss), (0, None))(
        side * jnp.array([1e4, 1e30, 3e38, jnp.inf]), label
    )
    np.testing.assert_allclose(value, np.float32([1e4, 1e30, 3e38, np.inf]), rtol=1e-6)
    np.testing.assert_allclose(slope, side * np.ones(4), rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives_ignore_missing_classes():
    def loss(logits):
        return losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array(0), label_smoothing=0.0, z_loss=0.1)

    full = jax.hessian(loss)(jnp.array([0.0, -jnp.inf, 1.0]))
    cut = jax.hessian(loss)(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(full[jnp.ix_(jnp.array([0, 2]), jnp.array([0, 2]))], cut, rtol=1e-5)
    assert (full[1] == 0).all() and (full[:, 1] == 0).all()


WEIGHTED = {
    "class_weights": lambda w: losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1]), class_weights=w),
    "weights": lambda w: losses.mean_squared_error(jnp.zeros(3), jnp.ones(3), weights=w),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("kind", [np.array, jnp.array, list])
def test_concrete_negative_weights_are_refused(name, kind):
    with pytest.raises(ValueError, match=f"^{name} must be >= 0, got a smallest value of -1.0"):
        WEIGHTED[name](kind([1.0, -1.0, 2.0]))
    assert np.isfinite(WEIGHTED[name](kind([1.0, 0.0, 2.0])))


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_may_be_traced_and_differentiated(name):
    weights = jnp.array([1.0, 0.5, 2.0])
    value, grad = jax.jit(jax.value_and_grad(WEIGHTED[name]))(weights)
    np.testing.assert_allclose(value, WEIGHTED[name](weights), rtol=1e-6)
    assert np.isfinite(grad).all()
    several = jnp.stack([weights, 2 * weights])
    np.testing.assert_allclose(jax.vmap(WEIGHTED[name])(several), [value, value], rtol=1e-6)


@pytest.mark.parametrize("name", ["mean_squared_error", "mean_absolute_error"])
def test_a_mask_hides_weights_that_are_nan(name):
    where, weights = jnp.array([True, False, True]), jnp.array([1.0, jnp.nan, 3.0])
    loss_fn = functools.partial(getattr(losses, name), where=where, weights=weights)
    value, grad = jax.value_and_grad(loss_fn)(jnp.array([1.0, jnp.inf, -2.0]), jnp.zeros(3))
    np.testing.assert_allclose(value, 3.25 if name == "mean_squared_error" else 1.75, rtol=1e-6)
    assert np.isfinite(grad).all() and grad[1] == 0


def test_integer_labels_of_every_width():
    logits = jnp.arange(600.0).reshape(2, 300) / 100
    expected = losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array([7, 120]))
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32):
        loss = losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array([7, 120], dtype))
        np.testing.assert_array_equal(loss, expected)
    beyond = losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array([7, 4_000_000_000], jnp.uint32))
    np.testing.assert_array_equal(np.isnan(beyond), [False, True])


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("options", [{}, {"class_weights": np.ones(3, np.float32)}, {"label_smoothing": 0.1}])
def test_no_option_hides_a_label_out_of_range(label, options):
    loss_fn = functools.partial(losses.softmax_cross_entropy_with_integer_labels, **options)
    loss = loss_fn(jnp.zeros((2, 3)), jnp.array([label, 1]))
    np.testing.assert_array_equal(np.isnan(loss), [True, False])
    assert np.isnan(losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([label, 1]), **options))


def test_a_masked_label_gives_class_weights_no_gradient():
    def loss(class_weights):
        return losses.cross_entropy(
            jnp.zeros((2, 3)), jnp.array([1, -100]), where=jnp.array([True, False]), class_weights=class_weights
        )

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), np.zeros(3), atol=1e-7)  # the mean divides by the weight
    assert np.isnan(losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([1, -100]), class_weights=jnp.ones(3)))
