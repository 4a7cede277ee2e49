"""Losses against torch's, in float64: values, and gradients with respect to the first argument."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn import losses

torch = pytest.importorskip("torch")
F = torch.nn.functional

RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(2, 6, 4)) * 3
P = np.exp(Y) / np.exp(Y).sum(-1, keepdims=True)
LABELS = np.array([0, 3, -100, 1, 1, 2])
WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0])


def integer(x, **options):
    return losses.cross_entropy(x, LABELS, where=LABELS != -100, **options)


CASES = {
    "cross_entropy": (integer, lambda x: F.cross_entropy(x, torch.tensor(LABELS))),
    "cross_entropy-weights": (
        functools.partial(integer, class_weights=WEIGHTS),
        lambda x: F.cross_entropy(x, torch.tensor(LABELS), torch.tensor(WEIGHTS)),
    ),
    "cross_entropy-weights-smoothing": (
        functools.partial(integer, class_weights=WEIGHTS, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, torch.tensor(LABELS), torch.tensor(WEIGHTS), label_smoothing=0.1),
    ),
    "cross_entropy-sum": (
        functools.partial(integer, class_weights=WEIGHTS, label_smoothing=0.1, reduction="sum"),
        lambda x: F.cross_entropy(x, torch.tensor(LABELS), torch.tensor(WEIGHTS), label_smoothing=0.1, reduction="sum"),
    ),
    "cross_entropy-soft": (
        lambda x: losses.cross_entropy(x, P, label_smoothing=0.2),
        lambda x: F.cross_entropy(x, torch.tensor(P), label_smoothing=0.2),
    ),
    "cross_entropy-soft-weights": (
        lambda x: losses.cross_entropy(x, P, class_weights=WEIGHTS, reduction="none"),
        lambda x: F.cross_entropy(x, torch.tensor(P), torch.tensor(WEIGHTS), reduction="none"),
    ),
    "huber_loss": (
        lambda x: losses.huber_loss(x, Y, delta=1.5),
        lambda x: F.huber_loss(x, torch.tensor(Y), reduction="none", delta=1.5),
    ),
    "mean_absolute_error": (
        lambda x: losses.mean_absolute_error(x, Y),
        lambda x: F.l1_loss(x, torch.tensor(Y)),
    ),
    "sigmoid_binary_cross_entropy": (
        lambda x: losses.sigmoid_binary_cross_entropy(x, P),
        lambda x: F.binary_cross_entropy_with_logits(x, torch.tensor(P), reduction="none"),
    ),
    "kl_divergence": (
        lambda x: losses.kl_divergence(x, P, axis=None),
        lambda x: F.kl_div(x, torch.tensor(P), reduction="sum"),
    ),
    "kl_divergence_with_log_targets": (
        lambda x: losses.kl_divergence_with_log_targets(x, np.log(P), axis=None),
        lambda x: F.kl_div(x, torch.tensor(np.log(P)), reduction="sum", log_target=True),
    ),
    "cosine_similarity": (
        lambda x: losses.cosine_similarity(x, Y),
        lambda x: F.cosine_similarity(x, torch.tensor(Y), -1),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_torch_s(ours, theirs):
    with jax.enable_x64(True):
        grad, value = jax.jit(jax.grad(lambda x: (jnp.sum(ours(x)), ours(x)), has_aux=True))(X)
    x = torch.tensor(X, requires_grad=True)
    expected = theirs(x)
    expected.sum().backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_distributions_with_class_weights_average_as_integers_do_and_unlike_torch_s():
    """torch divides by the weights of integer labels, but by the number of examples for the same labels as one-hot."""
    labels = np.array([0, 3, 2, 1, 1, 2])
    hot = np.eye(4)[labels]
    with jax.enable_x64(True):
        by_number, by_hot = (losses.cross_entropy(X, y, class_weights=WEIGHTS) for y in (labels, hot))
    x, weights = torch.tensor(X), torch.tensor(WEIGHTS)
    np.testing.assert_allclose(by_number, by_hot, rtol=1e-12)
    np.testing.assert_allclose(by_number, F.cross_entropy(x, torch.tensor(labels), weights), rtol=1e-12)
    assert abs(F.cross_entropy(x, torch.tensor(hot), weights).item() / float(by_hot) - 1) > 0.1
