"""Sparsemax, its losses and Fenchel-Young losses: by bisection, against optax, and at the edges."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import check_masks_and_dtypes, check_reference, total

from nnlearn.losses.fenchel_young import make_fenchel_young_loss
from nnlearn.losses.sparsemax import multiclass_sparsemax_loss, sparsemax, sparsemax_loss

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])
SOFT = RNG.dirichlet(np.ones(5), size=6)
BINARY = np.arange(30).reshape(6, 5) % 3 == 0
fenchel_young_loss = make_fenchel_young_loss(jax.nn.logsumexp)


def plain_sparsemax(logits):
    """By bisection of the threshold, row by row."""
    low, high = logits.max(-1, keepdims=True) - 1, logits.max(-1, keepdims=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = np.maximum(logits - middle, 0).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(logits - (low + high) / 2, 0)


def plain_multiclass(scores, labels):
    p = plain_sparsemax(scores)
    right = np.take_along_axis(scores, labels[:, None], -1)
    return np.sum(p * (scores - right), -1) + 0.5 * (1 - np.sum(p**2, -1))


def plain_binary(logits, labels):
    """The multiclass loss of a label distribution, for the logits x and -x, by its definition."""
    p = np.clip((1 + logits) / 2, 0, 1)
    return (p - labels) * logits + p * (1 - p) - labels * (1 - labels)


def plain_fenchel_young(scores, targets):
    return np.log(np.exp(scores).sum(-1)) - np.sum(scores * targets, -1)


CASES = {
    "sparsemax": (sparsemax, plain_sparsemax, (X,), {}),
    "multiclass": (multiclass_sparsemax_loss, plain_multiclass, (2 * X, LABELS), {}),
    "binary": (sparsemax_loss, plain_binary, (2 * X, BINARY), {}),
    "binary-soft": (sparsemax_loss, plain_binary, (2 * X, SOFT), {}),
    "fenchel_young": (fenchel_young_loss, plain_fenchel_young, (X, SOFT), {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_those_of_a_plain_reference(case):
    check_reference(*case)


@pytest.mark.parametrize("name", CASES)
def test_masks_and_dtypes(name):
    function, reference, arrays, options = CASES[name]

    def masked(*arrays, where=None, **options):
        if where is not None and name.startswith("binary"):
            where = jnp.broadcast_to(where[:, None], arrays[0].shape)
        return function(*arrays, where=where, **options)

    check_masks_and_dtypes(masked, reference, arrays, options)


# Against optax -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [multiclass_sparsemax_loss, sparsemax_loss, make_fenchel_young_loss])
def test_signatures_start_like_those_of_optax(ours):
    theirs = getattr(optax.losses, ours.__name__)
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]


def test_values_and_gradients_equal_those_of_optax():
    cases = [
        (multiclass_sparsemax_loss, optax.losses.multiclass_sparsemax_loss, LABELS),
        (sparsemax_loss, optax.losses.sparsemax_loss, BINARY),
        (fenchel_young_loss, optax.losses.make_fenchel_young_loss(jax.nn.logsumexp), SOFT),
    ]

    def both(x):
        return [
            [
                jax.grad(functools.partial(total, function), has_aux=True)(x, jnp.asarray(labels))
                for function in (ours, theirs)
            ]
            for ours, theirs, labels in cases
        ]

    with jax.enable_x64(True):
        for ours, theirs in jax.jit(both)(3 * X):
            for mine, yours in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, yours, rtol=1e-10, atol=1e-12)


# Edges ---------------------------------------------------------------------------------------------------------------


def test_axes_and_missing_classes():
    x = jnp.asarray(X, jnp.float32)
    run = jax.jit(lambda x, where: (sparsemax(x.T, axis=0).T, sparsemax(x, where=where), sparsemax(x)))
    classes = np.array([True, True, False, True, True])
    across, masked, whole = run(x, np.broadcast_to(classes, X.shape))
    np.testing.assert_allclose(across, whole, atol=1e-7)
    np.testing.assert_allclose(masked[:, classes], plain_sparsemax(X[:, classes]), atol=1e-6)
    assert not masked[:, ~classes].any()
    rows = np.float32([[-np.inf, 1.0, 1.5], [-np.inf] * 3, [1e30, -1e30, 1e30], [1e4, -1e4, 9999.5]])
    np.testing.assert_allclose(sparsemax(rows), [[0, 0.25, 0.75], [0, 0, 0], [0.5, 0, 0.5], [0.75, 0, 0.25]], atol=1e-6)


def test_a_long_row_sums_to_one():
    """Rounded sums over a hundred thousand classes must not add any to the support."""
    logits = jnp.concatenate([jnp.linspace(0, 0.01, 300), jnp.full(100_000, -1.0), jnp.full(100_000, -0.003)])
    p = jax.jit(sparsemax)(logits)
    np.testing.assert_allclose(np.float64(p).sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(p, plain_sparsemax(np.float64(logits)), rtol=1e-3, atol=1e-7)


def test_extreme_scores_and_missing_labels():
    scores = np.float32([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e30, -1e30, 1e30], [-np.inf, 1, 0.8], [1, -np.inf, 0.5]])
    labels = np.array([0, 0, 0, 1, 1])

    def some(scores):
        loss = multiclass_sparsemax_loss(scores, labels)
        return loss[:4].sum(), loss

    run = jax.jit(jax.value_and_grad(some, has_aux=True))
    (_, loss), grad = run(scores)
    np.testing.assert_allclose(loss, [0, 2e4, 0.25, 0.16, np.inf], rtol=1e-6)
    expected = [[0, 0, 0], [-1, 1, 0], [-0.5, 0, 0.5], [0, -0.4, 0.4], [0, 0, 0]]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    value, grad = jax.jit(jax.vmap(jax.value_and_grad(sparsemax_loss)))(
        jnp.array([1e30, -1e30, jnp.inf, -jnp.inf, 1.0, -1.0, 0.0]), jnp.array([1, 1, 1, 1, 1, 0, 1])
    )
    np.testing.assert_array_equal(value, [0, np.float32(1e30), 0, np.inf, 0, 0, 0.25])
    np.testing.assert_array_equal(grad, [0, -1, 0, -1, 0, 0, -0.5])


def test_small_losses_are_accurate_where_the_published_form_is_not():
    gap = np.float32(2.0**-12)
    run = jax.jit(lambda *a: (multiclass_sparsemax_loss(*a), optax.losses.multiclass_sparsemax_loss(*a)))
    ours, theirs = run(jnp.array([[1 - gap, 0.0, -3.0]]), jnp.array([0]))
    exact = np.float64(gap) ** 2 / 4
    np.testing.assert_allclose(ours, exact, rtol=1e-3)
    assert np.abs(theirs / exact - 1) > 0.1


def test_a_label_out_of_range_gives_nan_unless_masked():
    run = jax.jit(jax.value_and_grad(lambda s, w: multiclass_sparsemax_loss(s, jnp.array([0, 9]), where=w).sum()))
    assert np.isnan(run(jnp.asarray(X[:2], jnp.float32), jnp.array([True, True]))[0])
    value, grad = run(jnp.asarray(X[:2], jnp.float32), jnp.array([True, False]))
    np.testing.assert_allclose(value, plain_multiclass(X[:1], LABELS[:1])[0], rtol=1e-5)
    assert not grad[1].any()


def test_second_derivatives_equal_those_of_the_projection():
    """The Hessian of the loss is the derivative of the probabilities: a projection on the support."""
    with jax.enable_x64(True):
        x = jnp.array([0.3, 0.1, -2.0])
        hessian = jax.jit(jax.hessian(lambda x: multiclass_sparsemax_loss(x, jnp.array(2))))(x)
        np.testing.assert_allclose(hessian, [[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]], atol=1e-12)


def test_arguments_are_passed_to_the_function_where_optax_drops_or_refuses_them():
    def half_square(scores, scale=1.0):
        return scale * jnp.sum(scores**2) / 2

    loss, theirs = make_fenchel_young_loss(half_square), jax.jit(optax.losses.make_fenchel_young_loss(half_square))
    exact = 3 * 0.5 * (X**2).sum(-1) - (X * SOFT).sum(-1)
    for found in jax.jit(lambda scale: (loss(X, SOFT, scale), loss(X, SOFT, scale=scale)))(3.0):
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    np.testing.assert_allclose(theirs(X, SOFT, scale=3.0), exact - (X**2).sum(-1), rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError):
        theirs(X, SOFT, 3.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sparsemax(X, axis=2), "axis 2 is out of bounds"),
        (lambda: sparsemax(X, where=np.ones(5, bool)), "where must have shape"),
        (
            lambda: multiclass_sparsemax_loss(X, LABELS[:3]),
            r"labels must have shape \(6,\) for scores of shape \(6, 5\)",
        ),
        (lambda: sparsemax_loss(X, BINARY[0]), r"logits \(6, 5\) and labels \(5,\) must have one shape"),
        (lambda: fenchel_young_loss(X, SOFT[0]), r"scores \(6, 5\) and targets \(5,\) must have one shape"),
        (lambda: fenchel_young_loss(X, SOFT, where=BINARY), "where must have shape"),
    ],
)
def test_wrong_values_and_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sparsemax(LABELS), "logits must be of floating dtype, got int32"),
        (lambda: multiclass_sparsemax_loss(X, SOFT[:, 0]), "labels must be of integer dtype"),
        (lambda: sparsemax_loss(BINARY, X), "logits must be of floating dtype"),
        (lambda: make_fenchel_young_loss("logsumexp"), "max_fun must be a function"),
    ],
)
def test_wrong_types_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()
