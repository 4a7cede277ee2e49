"""Losses against PyTorch in float64, a second reference, whose weighted mean nnlearn follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn import losses

torch = pytest.importorskip("torch")
functional = torch.nn.functional

RNG = np.random.default_rng(0)
LOGITS, LABELS = 2 * RNG.normal(size=(6, 5)), np.array([0, 4, 2, 2, 1, 3])
SOFT = RNG.dirichlet(np.ones(5), size=6)
CLASS_WEIGHTS = RNG.uniform(0.2, 3, size=5)


def assert_same(ours, theirs, predictions):
    """Compare value and gradient of two functions of the predictions that return a scalar."""
    with jax.enable_x64(True):
        value, grad = jax.value_and_grad(ours)(jnp.asarray(predictions))
        assert value.dtype == np.float64
    tensor = torch.tensor(predictions, requires_grad=True)
    their_value = theirs(tensor)
    their_value.backward()
    np.testing.assert_allclose(value, their_value.item(), rtol=1e-12)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-10, atol=1e-13)
    assert np.abs(grad).max() > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.slow
def test_cross_entropy_from_integer_labels(reduction, label_smoothing, weighted):
    assert_same(
        lambda x: losses.cross_entropy(
            x,
            LABELS,
            label_smoothing=label_smoothing,
            class_weights=CLASS_WEIGHTS if weighted else None,
            reduction=reduction,
        ),
        lambda x: functional.cross_entropy(
            x,
            torch.tensor(LABELS),
            label_smoothing=label_smoothing,
            weight=torch.tensor(CLASS_WEIGHTS) if weighted else None,
            reduction=reduction,
        ),
        LOGITS,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_without_ignored_labels(weighted):
    labels = np.where(np.arange(6) % 3 == 1, -100, LABELS)
    weights = CLASS_WEIGHTS if weighted else None
    assert_same(
        lambda x: losses.cross_entropy(x, labels, where=labels != -100, class_weights=weights),
        lambda x: functional.cross_entropy(
            x, torch.tensor(labels), ignore_index=-100, weight=None if weights is None else torch.tensor(weights)
        ),
        LOGITS,
    )


@pytest.mark.parametrize(("label_smoothing", "weighted"), [(0.0, False), (0.2, False), (0.2, True)])
def test_cross_entropy_from_distributions(label_smoothing, weighted):
    # Sums, because torch divides by the number of examples here, for any class weights.
    weights = CLASS_WEIGHTS if weighted else None
    assert_same(
        lambda x: losses.cross_entropy(
            x, SOFT, label_smoothing=label_smoothing, class_weights=weights, reduction="sum"
        ),
        lambda x: functional.cross_entropy(
            x,
            torch.tensor(SOFT),
            label_smoothing=label_smoothing,
            weight=None if weights is None else torch.tensor(weights),
            reduction="sum",
        ),
        LOGITS,
    )


def test_the_weighted_mean_is_the_same_for_integer_and_one_hot_labels_unlike_in_torch():
    one_hot, weights = np.eye(5)[LABELS], torch.tensor(CLASS_WEIGHTS)
    theirs = functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS), weight=weights).item()
    from_one_hot = functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(one_hot), weight=weights).item()
    assert abs(theirs - from_one_hot) > 0.01
    for labels in (LABELS, one_hot):
        np.testing.assert_allclose(losses.cross_entropy(LOGITS, labels, class_weights=CLASS_WEIGHTS), theirs, rtol=1e-5)


@pytest.mark.parametrize("delta", [0.3, 1.0, 4.0])
def test_huber_loss(delta):
    assert_same(
        lambda x: losses.huber_loss(x, SOFT, delta=delta).sum(),
        lambda x: functional.huber_loss(x, torch.tensor(SOFT), delta=delta, reduction="sum"),
        LOGITS,
    )


@pytest.mark.parametrize("name", ["mean_squared_error", "mean_absolute_error"])
def test_mean_errors(name):
    theirs = functional.mse_loss if name == "mean_squared_error" else functional.l1_loss
    assert_same(lambda x: getattr(losses, name)(x, SOFT), lambda x: theirs(x, torch.tensor(SOFT)), LOGITS)


def test_binary_cross_entropy():
    assert_same(
        lambda x: losses.sigmoid_binary_cross_entropy(x, SOFT).mean(),
        lambda x: functional.binary_cross_entropy_with_logits(x, torch.tensor(SOFT)),
        LOGITS,
    )


def test_divergence():
    log_predictions = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    assert_same(
        lambda x: losses.kl_divergence(x, SOFT).mean(),
        lambda x: functional.kl_div(x, torch.tensor(SOFT), reduction="batchmean"),
        log_predictions,
    )
    assert_same(
        lambda x: losses.kl_divergence_with_log_targets(x, np.log(SOFT)).mean(),
        lambda x: functional.kl_div(x, torch.tensor(np.log(SOFT)), reduction="batchmean", log_target=True),
        log_predictions,
    )


def test_cosine_similarity():
    assert_same(
        lambda x: losses.cosine_similarity(x, SOFT).sum(),
        lambda x: functional.cosine_similarity(x, torch.tensor(SOFT)).sum(),
        LOGITS,
    )


def test_multiclass_hinge_loss_is_zero_where_that_of_torch_is():
    # torch's multi_margin_loss sums the violations, over classes, where this takes the largest: with 2 classes, and
    # its division by their number undone, they are one.
    assert_same(
        lambda x: losses.multiclass_hinge_loss(x, LABELS % 2).sum(),
        lambda x: 2 * functional.multi_margin_loss(x, torch.tensor(LABELS % 2), reduction="sum"),
        LOGITS[:, :2],
    )
