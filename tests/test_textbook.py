"""Numbers that can be checked by hand: losses, one unit, one step of gradient descent, backpropagation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnlearn import losses


@pytest.mark.parametrize(
    ("targets", "predictions", "mean"),
    [([1, 0, 1], [0.8, 0.2, 0.9], 0.03), ([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.2], 0.025)],
)
def test_mean_squared_error(targets, predictions, mean):
    np.testing.assert_allclose(losses.mean_squared_error(np.array(predictions), np.array(targets)), mean, rtol=1e-6)
    np.testing.assert_allclose(losses.squared_error(np.array(predictions), np.array(targets)).mean(), mean, rtol=1e-6)


def test_cross_entropy_is_minus_log_of_the_right_probability():
    """-log 0.8 = 0.223, from class numbers, from a distribution and from one logit."""
    logits = jnp.log(jnp.array([0.8, 0.15, 0.05]))
    for loss in (
        losses.cross_entropy(logits, 0),
        losses.softmax_cross_entropy(logits, jnp.array([1, 0, 0])),
        losses.kl_divergence(logits, jnp.array([1.0, 0, 0])),
        losses.sigmoid_binary_cross_entropy(jnp.log(0.8 / 0.2), 1),
    ):
        assert loss == pytest.approx(0.22314355, rel=1e-6)


def test_a_sigmoid_unit():
    """x = 2, w = 0.5, y = 1: p = s(1) = 0.731; gradients 2 (p - y) p (1 - p) x and (p - y) x."""
    x, w, y = 2.0, 0.5, 1.0
    p = 1 / (1 + np.exp(-1.0))
    assert p == pytest.approx(0.731, abs=1e-3)
    assert jax.nn.sigmoid(w * x) == pytest.approx(p, rel=1e-6)
    squared = jax.grad(lambda w: losses.squared_error(jax.nn.sigmoid(w * x), y))(w)
    entropy = jax.grad(lambda w: losses.sigmoid_binary_cross_entropy(w * x, y))(w)
    assert squared == pytest.approx(2 * (p - y) * p * (1 - p) * x, rel=1e-5)
    assert squared == pytest.approx(-0.2115, abs=1e-4)
    assert entropy == pytest.approx((p - y) * x, rel=1e-5)
    assert entropy == pytest.approx(-0.5379, abs=1e-4)


def test_one_step_of_gradient_descent_on_a_line():
    """w = 0.5, x = 2, y = 3 under (w x - y)**2: the gradient is 2 (1 - 3) 2 = -8, and 0.5 + 0.1 * 8 = 1.3."""
    import nnlearn

    w = jnp.array(0.5)
    grad = jax.grad(lambda w: losses.squared_error(w * 2.0, 3.0))(w)
    assert grad == -8
    tx = nnlearn.sgd(0.1)
    updates, _ = tx.update(grad, tx.init(w), w)
    assert optax.apply_updates(w, updates) == pytest.approx(1.3, rel=1e-6)


def test_one_step_from_a_given_gradient():
    """2.0 - 0.1 * 0.5 = 1.95."""
    import nnlearn

    tx, w = nnlearn.sgd(0.1), jnp.array(2.0)
    updates, _ = tx.update(jnp.array(0.5), tx.init(w), w)
    assert optax.apply_updates(w, updates) == pytest.approx(1.95, rel=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("loss", ["mean_squared_error", "cross_entropy"])
def test_backpropagation_by_hand(loss):
    """Two layers of sigmoid units in float64, under squared error and under cross-entropy."""
    rng = np.random.default_rng(3)
    inputs, targets = rng.normal(size=(6, 3)), rng.integers(0, 2, (6, 2)).astype(float)
    params = {
        "w1": rng.normal(size=(3, 4)),
        "b1": rng.normal(size=(1, 4)),
        "w2": rng.normal(size=(4, 2)),
        "b2": rng.normal(size=(1, 2)),
    }

    def loss_fn(params):
        hidden = jax.nn.sigmoid(inputs @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"] + params["b2"]
        if loss == "cross_entropy":
            return losses.sigmoid_binary_cross_entropy(logits, targets).mean()
        return losses.mean_squared_error(jax.nn.sigmoid(logits), targets)

    hidden = sigmoid(inputs @ params["w1"] + params["b1"])
    outputs = sigmoid(hidden @ params["w2"] + params["b2"])
    at_logits = (outputs - targets) / targets.size
    if loss == "mean_squared_error":
        at_logits = 2 * at_logits * outputs * (1 - outputs)
    at_hidden = at_logits @ params["w2"].T * hidden * (1 - hidden)
    by_hand = {
        "w1": inputs.T @ at_hidden,
        "b1": at_hidden.sum(0, keepdims=True),
        "w2": hidden.T @ at_logits,
        "b2": at_logits.sum(0, keepdims=True),
    }
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss_fn))(params)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, by_hand[name], rtol=1e-10, atol=1e-10)
        assert np.abs(by_hand[name]).max() > 1e-3
