"""Ranking losses against plain loops, optax and torch, with masks, and their error messages."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import check_masks_and_dtypes, check_number, check_reference, check_torch, total

from nnlearn.losses.ranking import list_mle_loss, margin_ranking_loss, pairwise_logistic_loss, ranking_softmax_loss

RNG = np.random.default_rng(0)
X, Y = 2 * RNG.normal(size=(2, 6, 5))
RELEVANCE = RNG.integers(0, 3, (6, 5))
WEIGHTS = RNG.uniform(0.2, 2, (6, 5))
SIGNS = np.sign(RNG.normal(size=(6, 5)))
ITEMS = RNG.random((6, 5)) < 0.6
ITEMS[0], ITEMS[1] = False, True


def lists(function):
    """The reference loss applied to several lists, with masks, weights and a reduction."""

    def plain(scores, labels, where=None, weights=None, reduce_fn=np.mean):
        where = np.ones(scores.shape, bool) if where is None else where
        weights = np.ones(scores.shape) if weights is None else weights
        costs = [function(*(array[keep] for array in (s, y, w)))
                 for s, y, w, keep in zip(scores, labels, weights, where, strict=True)]  # fmt: skip
        counted = [cost for cost in costs if cost is not None]
        return np.array([cost or 0.0 for cost in costs]) if reduce_fn is None else reduce_fn(counted)

    return plain


def log_sum(numbers):
    largest = np.max(numbers)
    return largest + np.log(np.sum(np.exp(numbers - largest)))


@lists
def plain_softmax(scores, labels, weights):
    return np.sum(weights * labels * (log_sum(scores) - scores)) if len(scores) else None


@lists
def plain_pairwise(scores, labels, weights):
    cost = weight = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if labels[i] > labels[j]:
                cost += weights[i] * np.logaddexp(0, scores[j] - scores[i])
                weight += weights[i]
    return cost / weight if weight else None


@lists
def plain_list_mle(scores, labels, weights):
    scores = scores[np.argsort(-labels, kind="stable")]
    return sum(log_sum(scores[i:]) - scores[i] for i in range(len(scores))) if len(scores) else None


def plain_margin(first, second, targets, margin=0.0):
    return np.maximum(0, margin - targets * (first - second))


CASES = {
    "softmax": (ranking_softmax_loss, plain_softmax, (X, RELEVANCE), {"weights": WEIGHTS}),
    "softmax-where": (ranking_softmax_loss, plain_softmax, (X, RELEVANCE), {"where": ITEMS}),
    "softmax-none": (ranking_softmax_loss, plain_softmax, (X, RELEVANCE), {"reduce_fn": None}),
    "pairwise": (pairwise_logistic_loss, plain_pairwise, (X, RELEVANCE), {}),
    "pairwise-where": (pairwise_logistic_loss, plain_pairwise, (X, RELEVANCE), {"where": ITEMS, "weights": WEIGHTS}),
    "list_mle": (list_mle_loss, plain_list_mle, (X, RELEVANCE), {"reduce_fn": None}),
    "list_mle-where": (list_mle_loss, plain_list_mle, (X, RELEVANCE), {"where": ITEMS}),
    "margin": (margin_ranking_loss, plain_margin, (X, Y, SIGNS), {"margin": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_those_of_a_plain_reference(name):
    check_reference(*CASES[name], differentiate=(0, 1) if name == "margin" else (0,))


@pytest.mark.parametrize("name", ["softmax", "softmax-none", "pairwise", "list_mle", "margin"])
def test_masks_and_dtypes(name):
    function, reference, arrays, options = CASES[name]
    if name == "margin":

        def masked(*arrays, where=None, **options):
            where = None if where is None else jnp.broadcast_to(where[:, None], arrays[0].shape)
            return margin_ranking_loss(*arrays, where=where, **options)

        check_masks_and_dtypes(masked, reference, arrays, options)
    else:
        check_masks_and_dtypes(function, reference, arrays, {k: v for k, v in options.items() if k != "weights"})


def test_masked_items_have_no_effect():
    garbage = np.resize(np.float32([np.nan, np.inf, -np.inf, 3e38]), X.shape)
    scores, labels = (np.where(ITEMS, array, garbage).astype(np.float32) for array in (X, RELEVANCE))
    weights = np.where(ITEMS, WEIGHTS, garbage)
    for function in (ranking_softmax_loss, pairwise_logistic_loss, list_mle_loss):
        options = {} if function is list_mle_loss else {"weights": weights}
        run = jax.jit(jax.value_and_grad(functools.partial(function, where=ITEMS, **options)))
        value, grad = run(scores, labels)
        clean = {} if function is list_mle_loss else {"weights": WEIGHTS}
        plain = {ranking_softmax_loss: plain_softmax, pairwise_logistic_loss: plain_pairwise}.get(
            function, plain_list_mle
        )
        np.testing.assert_allclose(value, plain(X, RELEVANCE, where=ITEMS, **clean), rtol=1e-5)
        assert np.isfinite(grad).all() and not grad[~ITEMS].any()


# Against optax and torch ---------------------------------------------------------------------------------------------


def test_the_signature_equals_that_of_optax():
    ours, theirs = (
        list(inspect.signature(function).parameters.values())
        for function in (ranking_softmax_loss, optax.losses.ranking_softmax_loss)
    )
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_values_and_gradients_equal_those_of_optax():
    cases = [{}, {"where": ITEMS}, {"weights": WEIGHTS, "reduce_fn": jnp.sum}, {"where": ITEMS, "reduce_fn": None}]

    def both(x):
        labels = jnp.asarray(RELEVANCE)
        return [
            [
                jax.grad(functools.partial(total, function), has_aux=True)(x, labels, **options)
                for function in (ranking_softmax_loss, optax.losses.ranking_softmax_loss)
            ]
            for options in cases
        ]

    with jax.enable_x64(True):
        for (grad, value), (their_grad, their_value) in jax.jit(both)(X):
            np.testing.assert_allclose(value, their_value, rtol=1e-12)
            assert np.isnan(their_grad[0]).any() == np.isnan(their_grad).any()  # a list without items is NaN in optax
            np.testing.assert_allclose(grad[1:], their_grad[1:], rtol=1e-10, atol=1e-13)
            assert np.isfinite(grad).all()


def test_margin_ranking_loss_equals_that_of_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MarginRankingLoss(margin=0.3, reduction="sum")
    check_torch(lambda *a: margin_ranking_loss(*a, margin=0.3).sum(), theirs, X, Y, SIGNS)


# Edges ---------------------------------------------------------------------------------------------------------------


def test_extreme_scores():
    scores = np.float32([[1e4, -1e4, 0, 3, -9999], [-1e4, 1e4, 0, -3, 9999], [1e30, -1e30, 0, 1, 2]])
    labels = np.array([[4, 0, 2, 3, 1], [4, 0, 2, 3, 1], [4, 0, 1, 2, 3]])
    functions = {pairwise_logistic_loss: plain_pairwise, list_mle_loss: plain_list_mle, ranking_softmax_loss: None}

    def total_of(function, scores):
        each = function(scores, labels, reduce_fn=None)
        return each.sum(), each

    run = jax.jit(lambda scores: [
        jax.value_and_grad(functools.partial(total_of, function), has_aux=True)(scores) for function in functions
    ])  # fmt: skip
    for plain, ((_, value), grad) in zip(functions.values(), run(scores), strict=True):
        assert np.isfinite(value).all() and np.isfinite(grad).all()
        if plain is not None:
            np.testing.assert_allclose(value, plain(np.float64(scores), labels, reduce_fn=None), rtol=1e-5)


def test_a_clearly_right_order_has_no_loss_and_lists_without_pairs_do_not_count():
    scores, labels = jnp.array([[90.0, 60.0, 30.0], [1.0, 2.0, 3.0]]), jnp.array([[2, 1, 0], [1, 1, 1]])
    run = jax.jit(jax.value_and_grad(pairwise_logistic_loss))
    value, grad = run(scores, labels)
    assert value < 1e-12 and np.abs(grad).max() < 1e-12
    swapped = run(scores[:, ::-1], labels)[0]
    np.testing.assert_allclose(swapped, (30 + 30 + 60) / 3, rtol=1e-6)  # the mean over one list, not two


def test_the_list_likelihood_is_the_probability_of_the_order():
    """The probabilities of all orders sum to 1."""
    import itertools

    orders = np.array(list(itertools.permutations(range(4))))
    losses = jax.jit(functools.partial(list_mle_loss, reduce_fn=None))(np.float32(np.tile(X[0, :4], (24, 1))), orders)
    np.testing.assert_allclose(np.exp(-losses).sum(), 1, rtol=1e-6)


def test_a_custom_reduction_receives_only_the_unmasked_lists():
    found = ranking_softmax_loss(X, RELEVANCE, where=ITEMS, reduce_fn=lambda loss, where: jnp.stack([loss, where]))
    assert found.shape == (2, 6)
    np.testing.assert_array_equal(found[1], ITEMS.any(-1))


def test_margin_may_be_traced():
    check_number(lambda v: margin_ranking_loss(X, Y, SIGNS, margin=v), [-1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ranking_softmax_loss(X, RELEVANCE[0]), r"logits \(6, 5\) and labels \(5,\) must have one shape"),
        (lambda: ranking_softmax_loss(X, RELEVANCE, weights=WEIGHTS[0]), r"logits \(6, 5\) and weights \(5,\) must"),
        (lambda: ranking_softmax_loss(X, RELEVANCE, weights=-WEIGHTS), "weights must be >= 0"),
        (lambda: ranking_softmax_loss(1.0, 1), r"logits must have an axis of items, shape \[..., items\]"),
        (lambda: pairwise_logistic_loss(X, RELEVANCE, where=ITEMS[0]), "where must have shape"),
        (lambda: list_mle_loss(X, Y[:3]), r"scores \(6, 5\) and labels \(3, 5\) must have one shape"),
        (lambda: margin_ranking_loss(X, Y[:3], 1), r"first \(6, 5\) and second \(3, 5\) must have one shape"),
        (lambda: margin_ranking_loss(X, Y, SIGNS[0]), r"first \(6, 5\) and targets \(5,\) must have one shape"),
        (lambda: margin_ranking_loss(X, Y, 1, margin=np.inf), "margin must be in"),
    ],
)
def test_wrong_values_and_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ranking_softmax_loss(RELEVANCE, X), "logits must be of floating dtype, got int32"),
        (lambda: pairwise_logistic_loss(X, RELEVANCE, where=RELEVANCE), "where must be boolean"),
        (lambda: margin_ranking_loss(X, RELEVANCE, 1), "second must be of floating dtype"),
    ],
)
def test_wrong_types_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()
