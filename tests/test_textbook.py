"""Values computed by hand, compared with the public functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.losses import (
    cross_entropy,
    mean_squared_error,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)


@pytest.mark.parametrize(
    ("targets", "predictions", "expected"),
    [([1, 0, 1], [0.8, 0.2, 0.9], 0.03), ([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.2], 0.025)],
)
def test_mean_squared_error_of_a_few_predictions(targets, predictions, expected):
    loss = mean_squared_error(jnp.array(predictions), jnp.array(targets))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_right_answer_with_probability_0_8_has_loss_0_223():
    logits = jnp.log(jnp.array([[0.8, 0.2]]))
    by_number = softmax_cross_entropy_with_integer_labels(logits, jnp.array([0]))
    by_distribution = softmax_cross_entropy(logits, jnp.array([[1.0, 0.0]]))
    by_sigmoid = sigmoid_binary_cross_entropy(jnp.log(jnp.array([0.8 / 0.2])), jnp.array([1]))
    for loss in (by_number, by_distribution, by_sigmoid, cross_entropy(logits, jnp.array([0]))):
        np.testing.assert_allclose(jnp.squeeze(loss), 0.22314355, rtol=1e-6)


def test_sigmoid_unit_forward_and_backward():
    x, w, y = 2.0, 0.5, 1.0
    np.testing.assert_allclose(jax.nn.sigmoid(w * x), 0.7310586, rtol=1e-6)

    # d/dw (s(wx) - y)**2 = 2 (s - y) s (1 - s) x = 2 * -0.2689414 * 0.7310586 * 0.2689414 * 2
    loss, slope = jax.value_and_grad(lambda w: squared_error(jax.nn.sigmoid(w * x), y))(w)
    np.testing.assert_allclose(loss, 0.07232949, rtol=1e-5)
    np.testing.assert_allclose(slope, -0.21150834, rtol=1e-5)

    # d/dw -log s(wx) = (s - y) x = -0.2689414 * 2: the sigmoid's own slope is gone
    loss, slope = jax.value_and_grad(lambda w: sigmoid_binary_cross_entropy(w * x, y))(w)
    np.testing.assert_allclose(loss, 0.3132617, rtol=1e-5)
    np.testing.assert_allclose(slope, -0.5378828, rtol=1e-5)


def descend(params, grads, learning_rate):
    tx = nnlearn.sgd(learning_rate)
    updates, _ = tx.update(grads, tx.init(params), params)
    return nnlearn.apply_updates(params, updates)


def test_one_step_of_gradient_descent_on_a_linear_unit():
    w = jnp.array(0.5)
    slope = jax.grad(lambda w: squared_error(w * 2.0, 3.0))(w)  # 2 (wx - y) x = 2 * (1 - 3) * 2
    np.testing.assert_allclose(slope, -8.0, rtol=1e-6)
    np.testing.assert_allclose(descend(w, slope, 0.1), 1.3, rtol=1e-6)


def test_one_step_of_gradient_descent_from_a_given_gradient():
    np.testing.assert_allclose(descend(jnp.array(2.0), jnp.array(0.5), 0.1), 1.95, rtol=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def forward(params, inputs):
    hidden = jax.nn.sigmoid(inputs @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def numpy_network(seed=0):
    draw = np.random.default_rng(seed).normal
    params = {"w1": draw(size=(4, 5)), "b1": draw(size=5), "w2": draw(size=(5, 2)), "b2": draw(size=2)}
    return params, draw(size=(7, 4)), sigmoid(draw(size=(7, 2)))


def backpropagate(params, inputs, output_error):
    """Gradients from the derivative of the loss with respect to the output layer's weighted inputs."""
    hidden = sigmoid(inputs @ params["w1"] + params["b1"])
    hidden_error = (output_error @ params["w2"].T) * hidden * (1 - hidden)
    return {
        "w1": inputs.T @ hidden_error,
        "b1": hidden_error.sum(0),
        "w2": hidden.T @ output_error,
        "b2": output_error.sum(0),
    }


@pytest.mark.parametrize("loss_name", ["squared", "cross_entropy"])
def test_backpropagation_by_hand_through_a_network_of_two_layers(loss_name):
    params, inputs, targets = numpy_network()
    outputs = sigmoid(sigmoid(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])
    error = (outputs - targets) / targets.size
    if loss_name == "squared":
        by_hand = backpropagate(params, inputs, 2 * error * outputs * (1 - outputs))
    else:
        by_hand = backpropagate(params, inputs, error)

    def loss_fn(params):
        logits = forward(params, inputs)
        if loss_name == "squared":
            return mean_squared_error(jax.nn.sigmoid(logits), targets)
        return sigmoid_binary_cross_entropy(logits, targets).mean()

    with jax.enable_x64(True):
        grads = jax.grad(loss_fn)(jax.tree.map(jnp.asarray, params))
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, by_hand[name], rtol=0, atol=1e-10)
        assert np.abs(by_hand[name]).max() > 1e-4, name


def test_gradient_of_the_softmax_cross_entropy_is_probability_minus_label():
    logits = np.log(np.array([[0.5, 0.3, 0.2]]))
    with jax.enable_x64(True):
        grad = jax.grad(cross_entropy)(jnp.asarray(logits), jnp.array([1]))
    np.testing.assert_allclose(grad, [[0.5, -0.7, 0.2]], rtol=0, atol=1e-10)
