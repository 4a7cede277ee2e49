"""Losses of embeddings: contrastive losses and triplets."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loss_checks import check_masks_and_dtypes, check_number, check_reference, check_torch, slope, total

from nnlearn.losses.contrastive import info_nce_loss, ntxent, sigmoid_pair_loss, supervised_contrastive_loss
from nnlearn.losses.triplet import batch_hard_triplet_loss, triplet_margin_loss

RNG = np.random.default_rng(0)
X, Y, Z = RNG.normal(size=(3, 7, 4))
BANK = RNG.normal(size=(5, 4))
LABELS = np.array([0, 1, 0, 2, 1, 0, 2])


# References ----------------------------------------------------------------------------------------------------------


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def log_sum(numbers):
    largest = np.max(numbers)
    return largest + np.log(np.sum(np.exp(numbers - largest)))


def plain_info_nce(queries, keys, temperature=0.07, negatives=None, symmetric=False):
    queries, keys = unit(queries), unit(keys)
    costs = []
    for i in range(len(queries)):
        own = queries[i] @ keys[i] / temperature
        rivals = keys @ queries[i] if negatives is None else np.append(unit(negatives) @ queries[i], own * temperature)
        cost = log_sum(rivals / temperature) - own
        costs.append((cost + log_sum(queries @ keys[i] / temperature) - own) / 2 if symmetric else cost)
    return np.mean(costs)


def plain_ntxent(embeddings, labels, temperature=0.07):
    scores, costs = unit(embeddings) @ unit(embeddings).T / temperature, []
    for i in range(len(labels)):
        for j in range(len(labels)):
            if i != j and labels[i] == labels[j]:
                costs.append(log_sum(np.append(scores[i][labels != labels[i]], scores[i, j])) - scores[i, j])
    return np.mean(costs)


def plain_supervised(embeddings, labels, temperature=0.07):
    scores, costs = unit(embeddings) @ unit(embeddings).T / temperature, []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        likes = others & (labels == labels[i])
        if likes.any():
            costs.append(log_sum(scores[i][others]) - scores[i][likes].mean())
    return np.mean(costs)


def plain_sigmoid(queries, keys, logit_scale=10.0, logit_bias=-10.0):
    logits = logit_scale * unit(queries) @ unit(keys).T + logit_bias
    return np.logaddexp(0, np.where(np.eye(len(keys)), -logits, logits)).sum() / len(keys)


def plain_distance(x, y, degree=2, eps=1e-6):
    return (np.sum(np.abs(x - y) ** degree, -1) + eps) ** (1 / degree)


def plain_triplet(anchors, positives, negatives, norm_degree=2, margin=1.0, eps=1e-6, swap=False):
    far = plain_distance(anchors, negatives, norm_degree, eps)
    if swap:
        far = np.minimum(far, plain_distance(positives, negatives, norm_degree, eps))
    return np.maximum(0, plain_distance(anchors, positives, norm_degree, eps) - far + margin)


def plain_batch_hard(embeddings, labels, margin=1.0, eps=1e-6):
    costs = []
    for i in range(len(labels)):
        distances = plain_distance(embeddings[i], embeddings, eps=eps)
        likes = (labels == labels[i]) & (np.arange(len(labels)) != i)
        if likes.any() and (labels != labels[i]).any():
            gap = distances[likes].max() - distances[labels != labels[i]].min()
            costs.append(np.logaddexp(0, gap) if margin is None else max(0, gap + margin))
    return np.mean(costs)


CASES = {
    "info_nce": (info_nce_loss, plain_info_nce, (X, Y), {"temperature": 0.3}),
    "info_nce-symmetric": (info_nce_loss, plain_info_nce, (X, Y), {"temperature": 0.3, "symmetric": True}),
    "info_nce-negatives": (info_nce_loss, plain_info_nce, (X, Y), {"temperature": 0.3, "negatives": BANK}),
    "ntxent": (ntxent, plain_ntxent, (X, LABELS), {"temperature": 0.3}),
    "supervised": (supervised_contrastive_loss, plain_supervised, (X, LABELS), {"temperature": 0.3}),
    "sigmoid": (sigmoid_pair_loss, plain_sigmoid, (X, Y), {"logit_scale": 3.0, "logit_bias": -1.0}),
    "triplet": (triplet_margin_loss, plain_triplet, (X, Y, Z), {}),
    "triplet-cubic": (triplet_margin_loss, plain_triplet, (X, Y, Z), {"norm_degree": 3, "margin": 2.0}),
    "triplet-absolute": (triplet_margin_loss, plain_triplet, (X, Y, Z), {"norm_degree": 1, "eps": 0.0}),
    "triplet-swap": (triplet_margin_loss, plain_triplet, (X, Y, Z), {"norm_degree": 1.5, "swap": True}),
    "batch_hard": (batch_hard_triplet_loss, plain_batch_hard, (X, LABELS), {"margin": 0.5}),
    "batch_hard-soft": (batch_hard_triplet_loss, plain_batch_hard, (X, LABELS), {"margin": None}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_those_of_a_plain_reference(case):
    check_reference(*case)


@pytest.mark.parametrize("name", ["info_nce-symmetric", "info_nce-negatives", "ntxent", "supervised", "sigmoid",
                                  "triplet", "batch_hard"])  # fmt: skip
def test_masks_and_dtypes(name):
    function, reference, arrays, options = CASES[name]
    check_masks_and_dtypes(function, reference, arrays, options)


@pytest.mark.parametrize(("ours", "theirs"), [(ntxent, optax.losses.ntxent),
                                              (triplet_margin_loss, optax.losses.triplet_margin_loss)])  # fmt: skip
def test_signatures_start_like_those_of_optax(ours, theirs):
    ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]


# Against optax and torch ---------------------------------------------------------------------------------------------


def test_values_and_gradients_equal_those_of_optax():
    def both(x, y, z):
        return [
            [jax.grad(functools.partial(total, function), has_aux=True)(x, *rest) for function in functions]
            for functions, rest in (
                ((ntxent, optax.losses.ntxent), (jnp.asarray(LABELS), 0.2)),
                ((triplet_margin_loss, optax.losses.triplet_margin_loss), (y, z, -1, 4, 0.7, 1e-3)),
            )
        ]

    with jax.enable_x64(True):
        for ours, theirs in jax.jit(both)(X, Y, Z):
            for mine, yours in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, yours, rtol=1e-10, atol=1e-12)


def test_short_vectors_count_as_in_optax():
    embeddings = jnp.asarray(X, jnp.float32) * np.float32([1, 1e-5, 1e-4, 1e-3, 1, 0, 1])[:, None]
    ours, theirs = jax.jit(lambda x, y: (ntxent(x, y), optax.losses.ntxent(x, y)))(embeddings, LABELS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_ntxent_without_positives_or_without_negatives():
    run = jax.jit(lambda x, y: (jax.value_and_grad(ntxent)(x, y), optax.losses.ntxent(x, y)))
    for labels in np.arange(7), np.full(7, 5):
        (value, grad), theirs = run(jnp.asarray(X, jnp.float32), labels)
        assert value == 0 and not grad.any()
        assert np.isnan(theirs) == (labels[0] != labels[1])


def test_triplets_where_optax_gives_nan():
    """At odd norm degrees, optax takes roots of negative sums; without eps, it divides by a distance of 0."""
    anchors, positives, negatives = (jnp.asarray(array, jnp.float32) for array in (X, Y, Z))
    for function, broken in ((optax.losses.triplet_margin_loss, True), (triplet_margin_loss, False)):
        cubic = jax.jit(functools.partial(function, norm_degree=3))(anchors, positives, negatives)
        grad = jax.jit(jax.grad(lambda x, f=function: f(x, anchors, negatives, eps=0.0).sum()))(anchors)
        assert np.isnan(cubic).any() == np.isnan(grad).any() == broken


@pytest.mark.parametrize(("degree", "swap"), [(1.0, False), (2.0, True), (3.5, False)])
def test_triplet_margin_loss_equals_that_of_torch(degree, swap):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.TripletMarginLoss(margin=0.8, p=degree, eps=0.0, swap=swap, reduction="sum")
    check_torch(
        lambda *a: triplet_margin_loss(*a, norm_degree=degree, margin=0.8, eps=0.0, swap=swap).sum(), theirs, X, Y, Z
    )


def test_info_nce_equals_the_cross_entropy_of_torch():
    torch = pytest.importorskip("torch")

    def theirs(queries, keys):
        queries, keys = (torch.nn.functional.normalize(vectors) for vectors in (queries, keys))
        logits, labels = queries @ keys.T / 0.1, torch.arange(7)
        loss = torch.nn.functional.cross_entropy
        return (loss(logits, labels) + loss(logits.T, labels)) / 2

    check_torch(lambda *a: info_nce_loss(*a, temperature=0.1, symmetric=True), theirs, X, Y)


# Edges ---------------------------------------------------------------------------------------------------------------

EMBEDDING_LOSSES = {
    "info_nce": lambda x, t: info_nce_loss(x, x[::-1], temperature=t, symmetric=True),
    "negatives": lambda x, t: info_nce_loss(x, x[::-1], temperature=t, negatives=x),
    "ntxent": lambda x, t: ntxent(x, LABELS, t),
    "supervised": lambda x, t: supervised_contrastive_loss(x, LABELS, temperature=t),
    "sigmoid": lambda x, t: sigmoid_pair_loss(x, x[::-1], logit_scale=1 / t),
    "batch_hard": lambda x, t: batch_hard_triplet_loss(x, LABELS, margin=t, eps=0.0),
    "batch_hard-soft": lambda x, t: batch_hard_triplet_loss(x, LABELS, margin=None, eps=0.0),
    "triplet": lambda x, t: triplet_margin_loss(x, x, x[::-1], margin=t, eps=0.0).sum(),
}


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_zero_vectors_equal_vectors_and_extreme_sizes(name):
    run = jax.jit(jax.value_and_grad(EMBEDDING_LOSSES[name], (0, 1)))
    rough = X * 10.0 ** np.array([0, -30, 18, -3, 0, 4, -12])[:, None]
    rough[3] = 0
    for x in (np.zeros((7, 4)), np.ones((7, 4)), np.repeat(X[:1], 7, 0), rough):
        for temperature in (1e-4, 1.0):
            value, grads = run(jnp.asarray(x, jnp.float32), temperature)
            assert np.isfinite(value) and value >= 0
            assert all(np.isfinite(grad).all() for grad in grads)


def test_opposite_keys_at_a_low_temperature_have_the_right_loss():
    """Similarities of 1 and -1 at a temperature of 1e-4 are logits of 1e4 and -1e4."""
    queries = np.float32([[1, 0], [-1, 0]])
    run = jax.jit(jax.value_and_grad(lambda keys, t: info_nce_loss(queries, keys, temperature=t), 1))
    np.testing.assert_allclose(run(-queries, 1e-4), [2e4, -2e8], rtol=1e-5)
    assert run(queries, 1e-4)[0] == 0
    pairs = jax.jit(lambda keys: sigmoid_pair_loss(queries, keys, logit_scale=1e4, logit_bias=0.0))
    np.testing.assert_allclose(pairs(-queries), 2e4, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_distances_at_all_sizes(size):
    anchors, positives, negatives = (jnp.asarray(array * size, jnp.float32) for array in (X, Y, Z))
    run = jax.jit(jax.value_and_grad(lambda a: triplet_margin_loss(a, positives, negatives, margin=0.0, eps=0.0).sum()))
    value, grad = run(anchors)
    exact = plain_triplet(X, Y, Z, margin=0.0, eps=0.0).sum()
    np.testing.assert_allclose(value / size, exact, rtol=1e-5)
    at_one = slope(lambda a: plain_triplet(a, Y, Z, margin=0.0, eps=0.0).sum(), X)
    np.testing.assert_allclose(grad, at_one, rtol=1e-4, atol=1e-6)


def test_batch_hard_chooses_far_from_the_origin():
    """An inner product of vectors of length 1e4 has no digits left for distances of 1."""
    centre = np.float32([8192, -4096, 8192, 1024])
    moved = (np.round(X * 64) / 64).astype(np.float32)
    found = jax.jit(batch_hard_triplet_loss)(moved + centre, LABELS)
    np.testing.assert_allclose(found, plain_batch_hard(np.float64(moved), LABELS), rtol=1e-5)


NUMBERS = {
    "info_nce": (lambda v: info_nce_loss(X, Y, temperature=v, symmetric=True), [0.05, 0.3, 2.0]),
    "negatives": (lambda v: info_nce_loss(X, Y, temperature=v, negatives=BANK), [0.05, 0.3, 2.0]),
    "ntxent": (lambda v: ntxent(X, LABELS, v), [0.05, 0.3, 2.0]),
    "supervised": (lambda v: supervised_contrastive_loss(X, LABELS, temperature=v), [0.05, 0.3, 2.0]),
    "scale": (lambda v: sigmoid_pair_loss(X, Y, logit_scale=v), [1.0, 10.0, 30.0]),
    "bias": (lambda v: sigmoid_pair_loss(X, Y, logit_bias=v), [-10.0, 0.0, 1.0]),
    "degree": (lambda v: triplet_margin_loss(X, Y, Z, norm_degree=v, margin=3.0), [1.0, 2.0, 3.3]),
    "margin": (lambda v: triplet_margin_loss(X, Y, Z, margin=v), [0.0, 1.0, 3.0]),
    "eps": (lambda v: triplet_margin_loss(X, Y, Z, eps=v), [1e-8, 1e-3, 1.0]),
    "hard-margin": (lambda v: batch_hard_triplet_loss(X, LABELS, margin=v), [0.0, 1.0, 3.0]),
    "hard-eps": (lambda v: batch_hard_triplet_loss(X, LABELS, eps=v), [1e-8, 1e-3, 1.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_traced(name):
    check_number(*NUMBERS[name])


def test_component_masks_shorten_the_vectors():
    keep = np.array([True, False, True, True])
    where = np.broadcast_to(keep, X.shape)
    spoiled = np.where(keep, X, np.nan)
    found = jax.jit(triplet_margin_loss)(spoiled, Y, Z, where=where)
    np.testing.assert_allclose(found, plain_triplet(X[:, keep], Y[:, keep], Z[:, keep]), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: info_nce_loss(X[0], Y[0]), r"queries must have shape \[batch, dim\], got \(4,\)"),
        (lambda: info_nce_loss(X, Y[:3]), r"queries \(7, 4\) and keys \(3, 4\) must have one shape"),
        (lambda: info_nce_loss(X, Y, negatives=BANK[:, :2]), r"negatives must have shape \[negatives, 4\], got"),
        (lambda: info_nce_loss(X, Y, negatives=BANK, symmetric=True), "symmetric needs the keys of the batch"),
        (lambda: info_nce_loss(X, Y, temperature=0.0), r"temperature must be in \(0.0, inf\), got 0.0"),
        (lambda: info_nce_loss(X, Y, where=np.ones((7, 4), bool)), r"where must have shape \(7,\), one entry per"),
        (lambda: ntxent(X, LABELS[:3]), r"labels must have shape \(7,\), one per embedding, got \(3,\)"),
        (lambda: ntxent(X, LABELS, -0.1), "temperature must be in"),
        (lambda: sigmoid_pair_loss(X, Y, logit_scale=0.0), "logit_scale must be in"),
        (lambda: sigmoid_pair_loss(X, Y, logit_bias=np.inf), "logit_bias must be in"),
        (lambda: triplet_margin_loss(X, Y, Z[:3]), r"anchors \(7, 4\) and negatives \(3, 4\) must have one shape"),
        (lambda: triplet_margin_loss(X, Y, Z, norm_degree=0.5), "norm_degree must be in"),
        (lambda: triplet_margin_loss(X, Y, Z, margin=-1.0), "margin must be in"),
        (lambda: triplet_margin_loss(X, Y, Z, axis=2), "axis 2 is out of bounds"),
        (lambda: batch_hard_triplet_loss(X, LABELS[:, None]), r"labels \[batch\], got \(7, 4\) and \(7, 1\)"),
        (lambda: batch_hard_triplet_loss(X, LABELS, where=np.ones(3, bool)), r"where must have shape \(7,\)"),
    ],
)
def test_wrong_values_and_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: info_nce_loss(LABELS[:, None], LABELS[:, None]), "queries must be of floating dtype"),
        (lambda: info_nce_loss(X, Y, where=LABELS), "where must be boolean"),
        (lambda: ntxent(X, LABELS, "0.1"), "temperature must be a number"),
        (lambda: triplet_margin_loss(X, Y, LABELS), "negatives must be of floating dtype"),
    ],
)
def test_wrong_types_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()
