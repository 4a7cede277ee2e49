"""Losses against optax and plain float64 formulas, at infinities, with masks, and their error messages."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnlearn import losses

RNG = np.random.default_rng(0)
SHAPE = (4, 5)
X, Y = RNG.normal(size=(2, *SHAPE))
P, Q = np.exp(X) / np.exp(X).sum(-1, keepdims=True), np.exp(Y) / np.exp(Y).sum(-1, keepdims=True)
BINARY = (Y > 0).astype(float)
SIGNS = np.sign(Y)
INTEGERS = RNG.integers(0, SHAPE[-1], SHAPE[:-1])
CLASSES = RNG.random(SHAPE) < 0.7
CLASSES[np.arange(SHAPE[0]), INTEGERS] = True  # otherwise optax's integer form gives a meaningless number
ROWS = np.array([True, False, True, True])
KEPT = P * CLASSES / (P * CLASSES).sum(-1, keepdims=True)

# name, first argument, further arguments
CASES = {
    "squared_error": ("squared_error", X, (Y,), {}),
    "squared_error-alone": ("squared_error", X, (), {}),
    "l2_loss": ("l2_loss", X, (Y,), {}),
    "huber_loss": ("huber_loss", X, (Y,), {"delta": 0.7}),
    "log_cosh": ("log_cosh", X, (Y,), {}),
    "cosine_similarity": ("cosine_similarity", X, (Y,), {}),
    "cosine_similarity-epsilon": ("cosine_similarity", X, (Y,), {"epsilon": 4.0, "axis": 0}),
    "cosine_similarity-where": ("cosine_similarity", X, (Y,), {"where": CLASSES, "axis": None}),
    "cosine_distance": ("cosine_distance", X, (Y,), {"axis": (0, 1)}),
    "softmax_cross_entropy": ("softmax_cross_entropy", X, (Q,), {}),
    "softmax_cross_entropy-axes": ("softmax_cross_entropy", X, (Q,), {"axis": (1, 0)}),
    "softmax_cross_entropy-classes": ("softmax_cross_entropy", X, (Q,), {"where": CLASSES}),
    "safe_softmax_cross_entropy": ("safe_softmax_cross_entropy", X, (Q,), {}),
    "integer": ("softmax_cross_entropy_with_integer_labels", X, (INTEGERS,), {}),
    "integer-axis": ("softmax_cross_entropy_with_integer_labels", X.T, (INTEGERS, 0), {}),
    "integer-axes": ("softmax_cross_entropy_with_integer_labels", X.reshape(5, 2, 2), (INTEGERS[:2], (2, 0)), {}),
    "integer-classes": ("softmax_cross_entropy_with_integer_labels", X, (INTEGERS,), {"where": CLASSES}),
    "integer-rows": ("softmax_cross_entropy_with_integer_labels", X, (INTEGERS,), {"where": CLASSES & ROWS[:, None]}),
    "poly_loss_cross_entropy": ("poly_loss_cross_entropy", X, (Q,), {"epsilon": 1.5}),
    "poly_loss_cross_entropy-where": ("poly_loss_cross_entropy", X, (Q,), {"where": CLASSES}),
    "sigmoid_binary_cross_entropy": ("sigmoid_binary_cross_entropy", X, (BINARY,), {}),
    "sigmoid_binary_cross_entropy-soft": ("sigmoid_binary_cross_entropy", X, (Q,), {}),
    "sigmoid_focal_loss": ("sigmoid_focal_loss", X, (BINARY,), {}),
    "sigmoid_focal_loss-soft": ("sigmoid_focal_loss", X, (Q,), {"alpha": 0.3, "gamma": 1.3}),
    "kl_divergence": ("kl_divergence", np.log(P), (Q,), {}),
    "kl_divergence-where": ("kl_divergence", np.log(P), (Q,), {"where": CLASSES, "axis": None}),
    "kl_divergence_with_log_targets": ("kl_divergence_with_log_targets", np.log(P), (np.log(Q),), {"axis": 0}),
    "generalized_kl_divergence": ("generalized_kl_divergence", X, (Q,), {"where": CLASSES}),
    "hinge_loss": ("hinge_loss", X, (SIGNS,), {}),
    "perceptron_loss": ("perceptron_loss", X, (SIGNS,), {}),
    "multiclass_hinge_loss": ("multiclass_hinge_loss", X, (INTEGERS,), {}),
    "multiclass_perceptron_loss": ("multiclass_perceptron_loss", X, (INTEGERS,), {}),
    "smooth_labels": ("smooth_labels", P, (0.2,), {"axis": 0}),
}


def as_dtype(tree, dtype):
    """Cast floating arrays to ``dtype``; leave integers, booleans and Python numbers unchanged."""

    def cast(x):
        if not isinstance(x, np.ndarray):
            return x
        return jnp.asarray(x, dtype) if x.dtype == np.float64 else jnp.asarray(x)

    return jax.tree.map(cast, tree)


def weighted_total(function, x, *args, **kwargs):
    """The sum of the losses with different weights, and the losses."""
    loss = function(x, *args, **kwargs)
    return jnp.sum(loss * (1 + jnp.arange(loss.size, dtype=loss.dtype).reshape(loss.shape))), loss


def value_and_grad(function, x, *args, **kwargs):
    """The losses, and the gradient of their weighted sum."""
    total = functools.partial(weighted_total, function)
    grad, loss = jax.jit(lambda x: jax.grad(total, has_aux=True)(x, *args, **kwargs))(x)
    return np.asarray(loss, np.float64), np.asarray(grad, np.float64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_those_of_optax(case):
    name, x, args, kwargs = case

    def both(x):
        return [
            jax.grad(functools.partial(weighted_total, getattr(lib, name)), has_aux=True)(x, *args, **kwargs)
            for lib in (losses, optax.losses)
        ]

    with jax.enable_x64(True):
        ours, theirs = jax.jit(both)(x)
        assert ours[1].dtype == np.float64
        for mine, yours in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, yours, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES.values()} | {"convex_kl_divergence"}))
def test_signatures_start_like_those_of_optax(name):
    ours, theirs = (inspect.signature(getattr(lib, name)).parameters for lib in (losses, optax.losses))
    assert [(p.name, p.kind, p.default) for p in ours.values()][: len(theirs)] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def plain_focal(x, y, gamma):
    """The focal loss as in the paper, accurate for moderate logits."""
    p = jax.nn.sigmoid(x)
    return (y * (1 - p) + (1 - y) * p) ** gamma * (-y * jnp.log(p) - (1 - y) * jnp.log(1 - p))


def test_gradients_with_respect_to_labels():
    """Also at labels of exactly 0 and 1, where the derivative of a single branch would be wrong."""
    labels = np.where(np.arange(20).reshape(SHAPE) % 3 == 0, P, BINARY)
    with jax.enable_x64(True):
        for ours, exact in (
            (losses.softmax_cross_entropy, optax.softmax_cross_entropy),
            (losses.sigmoid_binary_cross_entropy, optax.sigmoid_binary_cross_entropy),
            (functools.partial(losses.sigmoid_focal_loss, gamma=1.5), functools.partial(plain_focal, gamma=1.5)),
        ):
            found, right = (value_and_grad(lambda q, f=f: f(jnp.asarray(3 * X), q), labels)[1] for f in (ours, exact))
            np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0, 1e4, 1e30])
def test_regression_at_all_sizes(size):
    """log_cosh is accurate near 0, where optax's form loses all digits, and does not overflow for large errors."""
    errors = np.array([-1.5, -1.0, -0.3, 0.0, 0.4, 1.0, 2.0]) * size
    ours = [value_and_grad(f, as_dtype(errors, np.float32)) for f in (losses.log_cosh, losses.huber_loss)]
    e = np.float64(np.float32(errors))
    a, weight = np.abs(e), 1 + np.arange(len(e))
    small = np.minimum(a, 1)
    exact = np.where(a < 1, 0.5 * np.log1p(np.sinh(np.where(a < 1, e, 0)) ** 2), np.logaddexp(a, -a) - np.log(2))
    np.testing.assert_allclose(ours[0][0], exact, rtol=1e-6)
    np.testing.assert_allclose(ours[0][1], weight * np.tanh(e), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(ours[1][0], 0.5 * small**2 + a - small, rtol=1e-6)
    np.testing.assert_allclose(ours[1][1], weight * np.clip(e, -1, 1), rtol=1e-6)
    if size == 1e-3:
        theirs = np.asarray(optax.losses.log_cosh(as_dtype(errors, np.float32)))
        assert np.max(np.abs(theirs - exact) / np.maximum(exact, 1e-30)) > 0.01


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_cosine_at_all_sizes(size):
    x, y = as_dtype(X * size, np.float32), as_dtype(Y * size, np.float32)
    exact = (X * Y).sum(-1) / np.sqrt((X**2).sum(-1) * (Y**2).sum(-1))
    value, grad = value_and_grad(losses.cosine_similarity, x, y)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    direction = Y / np.linalg.norm(Y, axis=-1, keepdims=True) - exact[:, None] * X / np.linalg.norm(
        X, axis=-1, keepdims=True
    )
    expected = direction / np.linalg.norm(X, axis=-1, keepdims=True) * (1 + np.arange(4))[:, None]
    np.testing.assert_allclose(grad * size, expected, rtol=1e-4, atol=1e-6)


def test_cosine_of_a_zero_vector_is_zero_without_nan():
    value, grad = value_and_grad(losses.cosine_similarity, jnp.zeros((2, 3)), jnp.ones((2, 3)))
    assert not value.any() and not grad.any()
    assert np.isnan(optax.losses.cosine_similarity(jnp.zeros(3), jnp.ones(3)))


# Softmax -------------------------------------------------------------------------------------------------------------


def softmax_reference(logits, mass):
    """Values and gradients in float64, for rows with at least one finite logit."""
    x = np.asarray(logits, np.float64)
    shifted = x - x.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    log_p = shifted - np.log(total)
    loss = -np.sum(np.where(mass == 0, 0, mass * np.where(mass == 0, 0, log_p)), -1)
    return loss, np.exp(shifted) / total * mass.sum(-1, keepdims=True) - mass


EXTREME_ROWS = np.array(
    [
        [1e4, -1e4, 0, 3, 9999],
        [1e30, -1e30, 1e30, 0, 5],
        [-1e30, -1e30, -1e30, -3e38, -1e30],
        [6e37, -6e37, 0, 1, 2],
        [12345.678, 12345.5, 12344, 12346, 12340],
        [-np.inf, 1, 2, -np.inf, 0.5],
        [-np.inf, -np.inf, 7, -np.inf, -np.inf],
        [-88, -104, 0, 17, 16.5],
    ],
    np.float32,
)
EXTREME_LABELS = np.array([0, 1, 4, 2, 2, 4, 2, 1])


def integer_loss(logits, labels, **kwargs):
    return losses.softmax_cross_entropy_with_integer_labels(logits, labels, **kwargs)


@pytest.mark.parametrize("form", ["integer", "soft"])
def test_softmax_at_extreme_logits_is_exact_and_finite(form):
    hot = np.eye(5)[EXTREME_LABELS]
    exact, exact_grad = softmax_reference(EXTREME_ROWS, hot)
    function = integer_loss if form == "integer" else losses.softmax_cross_entropy
    value, grad = value_and_grad(function, jnp.asarray(EXTREME_ROWS), EXTREME_LABELS if form == "integer" else hot)
    np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, exact_grad * (1 + np.arange(8))[:, None], rtol=1e-5, atol=1e-6)


def test_minus_infinity_without_label_weight_has_no_loss_where_optax_gives_nan():
    logits, labels = jnp.array([1.0, 2.0, -jnp.inf]), jnp.array([0.25, 0.75, 0.0])
    loss, grad = jax.value_and_grad(losses.softmax_cross_entropy)(logits, labels)
    np.testing.assert_allclose(loss, losses.softmax_cross_entropy(logits[:2], labels[:2]), rtol=1e-6)
    assert np.isfinite(grad).all() and grad[2] == 0
    assert np.isfinite(jax.grad(losses.softmax_cross_entropy, 1)(logits, labels)).all()
    assert np.isnan(optax.softmax_cross_entropy(logits, labels))


@pytest.mark.parametrize("row", [[1.0, -np.inf, 0.0], [-np.inf] * 3])
def test_a_label_on_a_missing_class_has_infinite_loss_without_nan(row):
    logits = jnp.array(row)
    for function, labels in ((integer_loss, 1), (losses.softmax_cross_entropy, jnp.array([0.0, 1.0, 0.0]))):
        loss, grad = jax.value_and_grad(function)(logits, labels)
        assert loss == np.inf and np.isfinite(grad).all() and grad[1] == -1
    mask = jnp.array([True, False, True])
    assert integer_loss(jnp.zeros(3), 1, where=mask) == np.inf


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("form", ["integer", "soft"])
def test_traced_options_equal_python_numbers_even_with_missing_classes(smoothing, form):
    """With missing classes, a smoothing of 0 must not become ``0 * inf``."""
    labels = EXTREME_LABELS if form == "integer" else np.eye(5)[EXTREME_LABELS]
    loss = functools.partial(losses.cross_entropy, jnp.asarray(EXTREME_ROWS), labels, reduction="none")
    traced = jax.jit(lambda s, z: loss(label_smoothing=s, z_loss=z))(smoothing, 0.0)
    np.testing.assert_allclose(traced, loss(label_smoothing=smoothing), rtol=1e-6)
    assert not np.isnan(traced).any()
    if smoothing == 0:  # a missing class has a share of the smoothed label, so the loss is infinite
        assert np.isfinite(traced).all()
    else:
        np.testing.assert_array_equal(np.isinf(traced), np.isinf(EXTREME_ROWS).any(-1))
    kept = loss(label_smoothing=smoothing, where=jnp.asarray(np.isfinite(EXTREME_ROWS)))
    assert np.isfinite(kept).all()


def test_smoothing_z_loss_and_weights_follow_their_formula():
    weights = np.array([0.5, 1.0, 2.0, 0.0, 3.0])
    hot = np.eye(5)[INTEGERS]
    mass = (0.9 * hot + 0.1 / 5) * weights
    log_sum = np.log(np.exp(X).sum(-1))
    exact = softmax_reference(X, mass)[0] + (hot @ weights) * 0.01 * log_sum**2
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weights": weights}
    with jax.enable_x64(True):
        np.testing.assert_allclose(integer_loss(X, INTEGERS, **options), exact, rtol=1e-12)
        for labels in (INTEGERS, hot):
            each, total, mean = (
                losses.cross_entropy(X, labels, reduction=how, **options) for how in ("none", "sum", "mean")
            )
            np.testing.assert_allclose(each, exact, rtol=1e-12)
            np.testing.assert_allclose(total, exact.sum(), rtol=1e-12)
            np.testing.assert_allclose(mean, exact.sum() / (hot @ weights).sum(), rtol=1e-12)


def test_z_loss_gradient():
    grad = jax.grad(lambda x: integer_loss(x, 0, z_loss=0.1) - integer_loss(x, 0))(jnp.array([1.0, 2.0]))
    log_sum = np.log(np.exp(1) + np.exp(2))
    np.testing.assert_allclose(grad, 0.2 * log_sum * np.exp([1, 2]) / np.exp(log_sum), rtol=1e-5)


@pytest.mark.parametrize("label", [-1, -100, 5, 1000])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int16])
def test_a_label_out_of_range_gives_nan_unless_masked(label, dtype):
    labels = np.array([2, label]).astype(dtype)
    if labels[1] in range(5):
        pytest.skip("wraps around to a class in this dtype")
    logits = jnp.asarray(X[:2], jnp.float32)
    loss, grad = value_and_grad(integer_loss, logits, labels)
    np.testing.assert_array_equal(np.isnan(loss), [False, True])
    np.testing.assert_array_equal(np.isnan(grad), [[False] * 5, [True] * 5])
    for function in (losses.multiclass_hinge_loss, losses.multiclass_perceptron_loss):
        np.testing.assert_array_equal(np.isnan(function(logits, labels)), [False, True])
    assert np.isnan(losses.cross_entropy(logits, labels))
    kept = losses.cross_entropy(logits, labels, where=jnp.array([True, False]), label_smoothing=0.1, z_loss=0.1)
    alone = losses.cross_entropy(logits[:1], labels[:1], label_smoothing=0.1, z_loss=0.1)
    np.testing.assert_allclose(kept, alone, rtol=1e-6)


def test_optax_treats_minus_one_as_the_last_class():
    logits = jnp.asarray(X[0], jnp.float32)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(-1))
    assert theirs == optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(4))


# Binary --------------------------------------------------------------------------------------------------------------

BINARY_LOGITS = np.array([-3e38, -1e30, -1e4, -100, -61, -50, -1, 0, 0.5, 17, 59, 70, 1e4, 1e30, 3e38], np.float32)


def binary_reference(x, y, gamma):
    """Focal loss and its derivative in float64, in an order that does not overflow."""
    a, against = np.abs(x), np.where(x >= 0, 1 - y, y)
    small = np.exp(-a)
    entropy = np.log1p(small) + a * against
    wrong = (against + (1 - against) * small) / (1 + small)
    log_wrong = np.where(against == 0, -a, np.log(np.where(against == 0, 1, wrong * (1 + small)))) - np.log1p(small)
    weight = np.exp(gamma * log_wrong)
    ratio = np.where(against == 0, 1, small / np.where(against == 0, 1, against + (1 - against) * small)) / (1 + small)
    slope = against - small / (1 + small) + gamma * entropy * (2 * against - 1) * ratio
    return weight * entropy, np.where(x >= 0, 1, -1) * weight * slope


@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_binary_losses_at_extreme_logits_are_exact_and_finite(label, gamma):
    exact, exact_grad = binary_reference(np.float64(BINARY_LOGITS), label, gamma)
    functions = [functools.partial(losses.sigmoid_focal_loss, gamma=gamma)]
    if gamma == 0:
        functions.append(losses.sigmoid_binary_cross_entropy)
    for function in functions:
        value, grad = value_and_grad(function, jnp.asarray(BINARY_LOGITS), label)
        np.testing.assert_allclose(value, exact, rtol=2e-5, atol=1e-37)
        np.testing.assert_allclose(grad, exact_grad * (1 + np.arange(len(grad))), rtol=5e-5, atol=1e-36)


def test_infinite_binary_logits_have_zero_loss_if_right_and_infinite_loss_if_wrong():
    logits, labels = jnp.array([-jnp.inf, jnp.inf, -jnp.inf, jnp.inf]), jnp.array([0, 1, 1, 0])
    for function in (losses.sigmoid_binary_cross_entropy, losses.sigmoid_focal_loss):
        value, grad = value_and_grad(function, logits, labels)
        np.testing.assert_array_equal(value, [0, 0, np.inf, np.inf])
        np.testing.assert_array_equal(grad, [0, 0, -3, 4])


def test_focal_loss_with_gamma_0_is_cross_entropy():
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Q, jnp.float32)
    ours = losses.sigmoid_focal_loss(x, y, gamma=0.0)
    np.testing.assert_allclose(ours, losses.sigmoid_binary_cross_entropy(x, y), rtol=1e-6)


def test_second_derivatives_of_the_binary_losses():
    """Second derivatives, which differentiate the explicit first ones, against those of the plain formulas."""

    def ours(x, y, gamma):
        return losses.sigmoid_focal_loss(x, y, gamma=gamma)

    def hessians(x, y, gamma):
        return [jax.vmap(jax.hessian(f, (0, 1, 2)))(x, y, gamma) for f in (ours, plain_focal)]

    def curvatures(x, y, gamma):
        return [jax.vmap(jax.grad(jax.grad(f)))(x, y, gamma) for f in (ours, plain_focal)]

    with jax.enable_x64(True):
        x, y = (grid.ravel() for grid in np.meshgrid([-2.0, 0.0, 0.7, 3.0], [0.0, 0.4, 1.0]))
        gamma = np.full_like(x, 1.7)
        soft = y % 1 != 0
        for found, exact in (jax.jit(hessians)(x[soft], y[soft], gamma[soft]), jax.jit(curvatures)(x, y, gamma)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, exact)
        curvature = jax.vmap(jax.grad(jax.grad(losses.sigmoid_binary_cross_entropy)))(x, y)
        np.testing.assert_allclose(curvature, jax.nn.sigmoid(x) * jax.nn.sigmoid(-x), rtol=1e-12)


def temporaries(function, *args):
    compiled = jax.jit(jax.value_and_grad(lambda x, *rest: function(x, *rest).mean())).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / args[0].nbytes


def test_focal_loss_needs_fewer_temporaries_than_optax_s():
    x = jnp.ones((256, 1024))
    ours, theirs = temporaries(losses.sigmoid_focal_loss, x, x), temporaries(optax.losses.sigmoid_focal_loss, x, x)
    assert ours < 0.6 * theirs, (ours, theirs)
    assert temporaries(losses.sigmoid_binary_cross_entropy, x, x) < 1.5


def test_integer_cross_entropy_stores_no_array_of_the_logits_size():
    logits, labels = jnp.ones((256, 1024)), jnp.zeros(256, int)
    assert temporaries(integer_loss, logits, labels) < 0.5
    assert temporaries(losses.softmax_cross_entropy, logits, jnp.ones((256, 1024))) < 1.5


# Divergences and hinges ----------------------------------------------------------------------------------------------


def test_divergences_treat_zero_times_infinity_as_zero():
    log_predictions, targets = jnp.array([-jnp.inf, 0.0, -2.0]), jnp.array([0.0, 1.0, 0.0])
    for function, target in (
        (losses.kl_divergence, targets),
        (losses.kl_divergence_with_log_targets, jnp.log(targets)),
        (losses.generalized_kl_divergence, targets),
    ):
        assert np.isfinite(function(log_predictions, target))
        for argument in (0, 1):
            assert np.isfinite(jax.grad(function, argument)(log_predictions, target)).all()
        assert function(jnp.array([-jnp.inf, 0.0, 0.0]), jnp.roll(target, -1)) == np.inf
    assert losses.kl_divergence(log_predictions, targets) == 0
    assert np.isnan(optax.losses.kl_divergence(log_predictions, targets))
    assert np.isnan(optax.losses.kl_divergence_with_log_targets(log_predictions, jnp.log(targets)))


def test_margin_losses_ignore_missing_classes():
    scores, labels = jnp.array([[1.0, -jnp.inf, 1.5], [2.0, 0.0, -jnp.inf]]), jnp.array([0, 0])
    value, grad = value_and_grad(losses.multiclass_hinge_loss, scores, labels)
    np.testing.assert_array_equal(value, [1.5, 0.0])
    np.testing.assert_array_equal(grad, [[-1, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(losses.multiclass_perceptron_loss(scores, labels), [0.5, 0.0])


# Masks and means -----------------------------------------------------------------------------------------------------


MASKED = np.array([0, 1, 0, 0, 1, 0, 1, 1], bool)  # the first row left out holds NaN, the next infinity, and so on
GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)
MASKABLE = {
    "mean_squared_error": {},
    "mean_absolute_error": {"weights": jnp.arange(8.0)},
    "softmax_cross_entropy": {},
    "poly_loss_cross_entropy": {},
    "softmax_cross_entropy_with_integer_labels": {"label_smoothing": 0.1, "z_loss": 0.1},
    "cross_entropy": {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": jnp.arange(5.0)},
    "kl_divergence": {},
    "kl_divergence_with_log_targets": {},
    "generalized_kl_divergence": {},
    "cosine_similarity": {},
}


@pytest.mark.parametrize(("name", "kwargs"), MASKABLE.items(), ids=MASKABLE.keys())
def test_masked_entries_have_no_effect(name, kwargs):
    """Neither in the loss nor, as a NaN times 0, in the gradient."""
    function = getattr(losses, name)
    x, targets = np.float32(np.concatenate([X, Y])), np.float32(np.concatenate([Q, P]))
    x[~MASKED] = targets[~MASKED] = GARBAGE[:, None]
    if "class_weights" in kwargs or "integer" in name:
        targets = np.where(MASKED, np.tile(INTEGERS, 2), [-1, 5, -100, 99, 7, 0, -5, 3])

    def both(where):
        total = functools.partial(weighted_total, function)
        return jax.grad(total, has_aux=True)(x, targets, where=where, **kwargs)

    (grad, value), (nothing, zero) = jax.jit(lambda mask: (both(mask), both(mask & False)))(jnp.asarray(MASKED))
    if "weights" in kwargs:
        kwargs = kwargs | {"weights": kwargs["weights"][MASKED]}
    alone = jax.jit(functools.partial(function, **kwargs))(x[MASKED], targets[MASKED])
    np.testing.assert_allclose(value if value.ndim == 0 else value[MASKED], alone, rtol=2e-6)
    assert value.ndim == 0 or not value[~MASKED].any()
    assert np.isfinite(grad).all() and not grad[~MASKED].any() and grad[MASKED].any(-1).all()
    assert not nothing.any() and not zero.any()


def test_masks_by_class_equal_missing_classes():
    x, mask = jnp.asarray(X, jnp.float32), jnp.asarray(CLASSES)
    gone = jnp.where(mask, x, -jnp.inf)
    for labels in (INTEGERS, KEPT):
        np.testing.assert_array_equal(
            losses.cross_entropy(x, labels, where=mask, reduction="none"),
            losses.cross_entropy(gone, labels, reduction="none"),
        )


def test_weighted_means():
    weights = np.arange(4.0)
    each = (X - Y) ** 2
    exact = (each.mean(-1) * weights).sum() / weights.sum()
    np.testing.assert_allclose(losses.mean_squared_error(X, Y, weights=weights), exact, rtol=1e-6)
    np.testing.assert_allclose(losses.mean_squared_error(X, Y, weights=CLASSES), each[CLASSES].mean(), rtol=1e-6)
    np.testing.assert_allclose(losses.mean_absolute_error(X, Y, where=ROWS), np.abs(X - Y)[ROWS].mean(), rtol=1e-6)
    assert losses.mean_squared_error(X, Y, weights=np.zeros(4)) == 0
    assert not jax.grad(losses.mean_squared_error)(jnp.asarray(X), Y, where=np.zeros(4, bool)).any()


def test_smoothed_labels_give_missing_classes_no_weight():
    smooth = losses.smooth_labels(jnp.asarray(KEPT, jnp.float32), 0.3, where=CLASSES)
    np.testing.assert_allclose(smooth.sum(-1), 1, rtol=1e-6)
    assert not smooth[~CLASSES].any()
    np.testing.assert_allclose(
        losses.cross_entropy(X, KEPT, label_smoothing=0.3, where=CLASSES, reduction="none"),
        optax.softmax_cross_entropy(X, optax.smooth_labels(KEPT, 0.3, where=CLASSES), where=CLASSES),
        rtol=1e-5,
    )


def test_accuracy():
    logits = jnp.array([[3.0, 1.0], [0.0, 2.0], [5.0, 5.0], [jnp.nan, 1.0], [1.0, 0.0]])
    labels = jnp.array([0, 0, 0, 0, -1])
    assert losses.accuracy(logits, labels) == pytest.approx(2 / 5)
    assert losses.accuracy(logits, jax.nn.one_hot(labels, 2)[:, :]) == pytest.approx(3 / 5)
    assert losses.accuracy(logits, labels, where=labels >= 0) == pytest.approx(2 / 4)
    assert losses.accuracy(logits, labels, where=labels > 9) == 0
    assert losses.accuracy(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32


# Dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {case[0]: name for name, case in CASES.items()}.values())
def test_low_precision_is_widened_before_any_arithmetic(name):
    function, x, args, kwargs = CASES[name]
    function = getattr(losses, function)

    def both(x, args):
        wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (x, args))
        return function(x, *args, *rest, **kwargs), function(wide[0], *wide[1], *rest, **kwargs)

    arrays, rest = [a for a in args if isinstance(a, np.ndarray)], [a for a in args if not isinstance(a, np.ndarray)]
    assert jax.eval_shape(both, as_dtype(x, jnp.float16), as_dtype(arrays, jnp.float16))[0].dtype == jnp.float32
    loss, exact = jax.jit(both)(as_dtype(x, jnp.bfloat16), as_dtype(arrays, jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, exact)


def test_gradients_have_the_dtype_of_the_logits():
    logits = jnp.asarray(X, jnp.bfloat16)
    assert jax.grad(lambda x: losses.cross_entropy(x, INTEGERS))(logits).dtype == jnp.bfloat16


def test_optax_returns_bfloat16_for_integer_labels():
    logits = jnp.asarray(X, jnp.bfloat16)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, INTEGERS)
    exact = softmax_reference(np.float64(logits), np.eye(5)[INTEGERS])[0]
    assert theirs.dtype == jnp.bfloat16
    assert np.abs(np.float64(theirs) / exact - 1).max() > 5e-4
    ours = integer_loss(logits, INTEGERS)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-6)


# Traced numbers ------------------------------------------------------------------------------------------------------

NUMBERS = {
    "huber_loss": (lambda v: losses.huber_loss(X, Y, delta=v), [0.3, 1.0, 2.5]),
    "cosine_similarity": (lambda v: losses.cosine_similarity(X, Y, epsilon=v), [0.0, 2.0, 30.0]),
    "sigmoid_focal_loss-gamma": (lambda v: losses.sigmoid_focal_loss(X, BINARY, gamma=v), [0.5, 2.0, 3.0]),
    "sigmoid_focal_loss-alpha": (lambda v: losses.sigmoid_focal_loss(X, BINARY, alpha=v), [0.1, 0.5, 0.9]),
    "smooth_labels": (lambda v: losses.smooth_labels(P, v), [0.0, 0.5, 1.0]),
    "poly_loss_cross_entropy": (lambda v: losses.poly_loss_cross_entropy(X, Q, epsilon=v), [-1.0, 0.5, 2.0]),
    "label_smoothing": (lambda v: losses.cross_entropy(X, INTEGERS, label_smoothing=v), [0.0, 0.1, 1.0]),
    "label_smoothing-soft": (lambda v: losses.cross_entropy(X, Q, label_smoothing=v), [0.0, 0.1, 1.0]),
    "z_loss": (lambda v: losses.cross_entropy(X, INTEGERS, z_loss=v), [0.0, 1e-4, 1.0]),
    "class_weights": (
        lambda v: losses.cross_entropy(X, INTEGERS, class_weights=1 + v * jnp.arange(5.0)),
        [0.1, 0.5, 2.0],
    ),
    "weights": (lambda v: losses.mean_squared_error(X, Y, weights=1 + v * jnp.arange(4.0)), [0.1, 0.5, 2.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_traced(name):
    function, values = NUMBERS[name]
    with jax.enable_x64(True):
        values = np.array(values)
        looped = np.stack([function(float(value)) for value in values])
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(values), looped, rtol=1e-12)
        slope = jax.jit(jax.jacfwd(function))(values[1])
        difference = (np.asarray(function(values[1] + 1e-6)) - np.asarray(function(values[1] - 1e-6))) / 2e-6
        np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)


# Errors --------------------------------------------------------------------------------------------------------------

EIGHT, COLUMN, TABLE = jnp.zeros(8), jnp.zeros((8, 1)), jnp.zeros((8, 5))
WHOLE = jnp.zeros(8, int)

SHAPE_ERRORS = {
    f"{name}-{kind}": (functools.partial(getattr(losses, name), *arguments), words)
    for name, first in {
        "squared_error": "predictions",
        "l2_loss": "predictions",
        "absolute_error": "predictions",
        "huber_loss": "predictions",
        "log_cosh": "predictions",
        "mean_squared_error": "predictions",
        "mean_absolute_error": "predictions",
        "cosine_similarity": "predictions",
        "cosine_distance": "predictions",
        "hinge_loss": "predictor_outputs",
        "perceptron_loss": "predictor_outputs",
        "sigmoid_binary_cross_entropy": "logits",
        "sigmoid_focal_loss": "logits",
        "softmax_cross_entropy": "logits",
        "safe_softmax_cross_entropy": "logits",
        "poly_loss_cross_entropy": "logits",
        "kl_divergence": "log_predictions",
        "kl_divergence_with_log_targets": "log_predictions",
        "generalized_kl_divergence": "log_predictions",
    }.items()
    for kind, arguments, words in (
        ("column", (EIGHT, COLUMN), rf"{first} \(8,\) and \w+ \(8, 1\) must have one shape; pass \w+.reshape"),
        ("row", (COLUMN, EIGHT), rf"{first} \(8, 1\) and \w+ \(8,\) must have one shape"),
        ("short", (TABLE, COLUMN), rf"{first} \(8, 5\) and \w+ \(8, 1\) must have one shape; broadcast"),
    )
}
SHAPE_ERRORS |= {
    f"{name}-{kind}": (functools.partial(getattr(losses, name), TABLE, labels), words)
    for name in (
        "softmax_cross_entropy_with_integer_labels",
        "cross_entropy",
        "accuracy",
        "multiclass_hinge_loss",
        "multiclass_perceptron_loss",
    )
    for kind, labels, words in (
        ("column", WHOLE[:, None], r"labels must have shape \(8,\) for .*, got \(8, 1\); pass labels.reshape"),
        ("short", WHOLE[:7], r"labels must have shape \(8,\) for .*, got \(7,\); pass one integer per example"),
    )
}
SHAPE_ERRORS |= {
    "where-losses": (lambda: losses.cross_entropy(TABLE, WHOLE, where=jnp.ones(5, bool)), r"where must have shape"),
    "where-column": (lambda: losses.cross_entropy(TABLE, WHOLE, where=jnp.ones((8, 1), bool)), r"where must have"),
    "where-mean": (lambda: losses.mean_squared_error(TABLE, TABLE, where=jnp.ones(5, bool)), r"where must have"),
    "where-accuracy": (lambda: losses.accuracy(TABLE, WHOLE, jnp.ones(5, bool)), r"where must have"),
    "weights": (lambda: losses.mean_squared_error(TABLE, TABLE, weights=jnp.ones(5)), r"weights must have shape"),
    "class_weights": (lambda: losses.cross_entropy(TABLE, WHOLE, class_weights=EIGHT), r"class_weights must have"),
    "one-hot": (lambda: integer_loss(TABLE, TABLE.astype(int)), "for a distribution over classes use"),
    "axis": (lambda: losses.softmax_cross_entropy(TABLE, TABLE, axis=2), "axis 2 is out of bounds"),
    "axis-twice": (lambda: losses.softmax_cross_entropy(TABLE, TABLE, axis=(1, -1)), "names a dimension twice"),
    "axis-none": (lambda: integer_loss(TABLE, WHOLE, axis=None), "axis must be an integer or a tuple"),
    "reduction": (lambda: losses.cross_entropy(TABLE, WHOLE, reduction="avg"), 'reduction must be "mean"'),
}


@pytest.mark.parametrize(("call", "words"), SHAPE_ERRORS.values(), ids=SHAPE_ERRORS.keys())
def test_shapes_that_do_not_match_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
    with pytest.raises(ValueError, match=words):  # and while tracing
        jax.eval_shape(call)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.squared_error(WHOLE, EIGHT), "predictions must be of floating dtype, got int32"),
        (lambda: losses.squared_error(EIGHT, EIGHT.astype(complex)), "targets must be real"),
        (lambda: losses.softmax_cross_entropy(TABLE.astype(int), TABLE), "logits must be of floating dtype"),
        (lambda: integer_loss(TABLE, EIGHT), "labels must be of integer dtype, got float32"),
        (lambda: losses.cross_entropy(TABLE, EIGHT), "labels must be of integer dtype, got float32"),
        (lambda: losses.cross_entropy(TABLE, EIGHT > 0), "labels must be of integer dtype, got bool"),
        (lambda: losses.accuracy(TABLE, EIGHT), "labels must be of integer dtype, got float32"),
        (lambda: losses.multiclass_hinge_loss(TABLE, EIGHT), "labels must be of integer dtype"),
        (lambda: losses.kl_divergence(TABLE, TABLE.astype(int)), "targets must be of floating dtype"),
        (lambda: losses.cross_entropy(TABLE, WHOLE, where=EIGHT), "where must be boolean, got float32"),
        (lambda: losses.mean_squared_error(TABLE, TABLE, where=EIGHT), "where must be boolean, got float32"),
        (lambda: losses.huber_loss(EIGHT, EIGHT, delta="1"), "delta must be a number"),
    ],
)
def test_wrong_dtypes_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: losses.huber_loss(EIGHT, EIGHT, delta=v), [0.0, -1.0, np.inf, np.nan]),
        (lambda v: losses.cosine_similarity(EIGHT, EIGHT, epsilon=v), [-1e-8, np.nan]),
        (lambda v: losses.sigmoid_focal_loss(EIGHT, EIGHT, alpha=v), [-0.1, 1.1]),
        (lambda v: losses.sigmoid_focal_loss(EIGHT, EIGHT, gamma=v), [-0.1, np.inf]),
        (lambda v: losses.smooth_labels(EIGHT, v), [-0.1, 1.1, jnp.float32(2)]),
        (lambda v: losses.cross_entropy(TABLE, WHOLE, label_smoothing=v), [-0.1, 1.1, np.float64(2)]),
        (lambda v: losses.cross_entropy(TABLE, WHOLE, z_loss=v), [-1.0, np.inf]),
        (lambda v: losses.poly_loss_cross_entropy(TABLE, TABLE, epsilon=v), [-1.1, np.inf]),
    ],
)
def test_numbers_out_of_range_are_refused(call, words):
    for value in words:
        with pytest.raises(ValueError, match=r"must be in [\[(]"):
            call(value)
    with pytest.raises(ValueError, match="jax.vmap over them"):
        call(jnp.ones(3))


def test_only_scalar_targets_are_broadcast():
    np.testing.assert_array_equal(losses.squared_error(jnp.arange(3.0), 1), [1, 0, 1])
    np.testing.assert_allclose(losses.sigmoid_binary_cross_entropy(jnp.zeros(2), 1), np.log([2, 2]), rtol=1e-6)


def test_optax_broadcasts_a_column_of_targets_into_a_table():
    with jax.numpy_rank_promotion("allow"):
        assert optax.huber_loss(EIGHT, COLUMN).shape == (8, 8)
        assert optax.sigmoid_binary_cross_entropy(EIGHT, COLUMN).shape == (8, 8)
