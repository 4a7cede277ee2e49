"""Extreme finite numbers: norms whose squares overflow float32, decays close to 1, logits of 100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.packing import leaf_norms, pack, unpack
from nnlearn.tree import BRANCH_SIZE, global_norm, scaled_norm

SCALES = [1e-36, 1e-30, 1e-19, 1e-9, 1.0, 1e9, 1e19, 1e30, 1e36]


def numbers(size=12, seed=0):
    return np.random.default_rng(seed).uniform(0.3, 1.0, size=size) * np.where(np.arange(size) % 3, 1, -1)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def close(got, want, rtol=3e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol)


TRANSFORMS = {
    "clip_by_global_norm": (nnlearn.clip_by_global_norm(1e-2), lambda g, w: g * min(1, 1e-2 / norm(g))),
    "clip_by_block_rms": (nnlearn.clip_by_block_rms(1e-2), lambda g, w: g * min(1, 1e-2 * len(g) ** 0.5 / norm(g))),
    "adaptive_grad_clip": (
        nnlearn.adaptive_grad_clip(1e-2, eps=0.0),
        lambda g, w: g * min(1, 1e-2 * norm(w) / norm(g)),
    ),
    "scale_by_trust_ratio": (nnlearn.scale_by_trust_ratio(), lambda g, w: g * (norm(w) / norm(g))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_updates_of_any_size(name):
    tx, reference = TRANSFORMS[name]

    @jax.jit
    def outcomes(g, w):
        def one(g, w):
            return tx.update({"g": g}, tx.init({"g": w}), {"g": w})[0]["g"]

        packs = pack({"a": g, "b": g / 2}), pack({"a": w, "b": w})
        packed = unpack(tx.update(packs[0], tx.init(packs[1]), packs[1])[0])
        return one(g, w), jax.vmap(one)(g[None], w[None])[0], packed["b"]

    direction, weights = numbers().astype(np.float32), numbers(seed=1).astype(np.float32)
    for scale in SCALES:
        for weight in (1e-15, 1.0, 1e15):
            g, w = direction * np.float32(scale), weights * np.float32(weight)
            alone, in_a_batch, packed = outcomes(g, w)
            want = reference(g.astype(np.float64), w)
            if np.all(np.abs(want) > 1e-37):  # otherwise XLA flushes it to 0
                close(alone, want)
                close(in_a_batch, want)
                if name != "clip_by_global_norm":
                    close(packed, reference(g.astype(np.float64) / 2, w))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_infinite_entry_counts_as_a_large_one(name):
    tx = TRANSFORMS[name][0]

    def outcomes():
        for dtype in (jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64):
            update, weights = jnp.array([jnp.inf, -1.0, 0.0], dtype), jnp.ones(3, dtype)
            yield tx.update(update, tx.init(weights), weights)[0]

    for update in jax.jit(lambda: list(outcomes()))():
        size = abs(np.asarray(update).astype(np.complex128))
        assert np.all(np.isfinite(size)) and size[0] > 0 and size[1] < 1e-3 * size[0] and size[2] == 0


@pytest.mark.slow
def test_norms_of_any_size_and_their_derivatives():
    @jax.jit
    def outcomes(x):
        tree = {"a": x[:5], "b": x[5:]}
        return (
            global_norm(tree),
            global_norm(pack(tree)),
            jax.vmap(global_norm)(x[None])[0],
            jax.grad(global_norm)(x),
            jax.jvp(global_norm, (x,), (x,))[1],
            leaf_norms(tree),
            leaf_norms(pack(tree)),
        )

    for scale in SCALES:
        x = (numbers() * scale).astype(np.float32)
        whole, packed, batch, gradient, along, leaves, packed_leaves = outcomes(x)
        for got in (whole, packed, batch, along):
            close(got, norm(x))
        close(gradient, x.astype(np.float64) / norm(x))
        for got in (leaves, packed_leaves):
            close(got, [norm(x[:5]), norm(x[5:])])
    close(global_norm({"a": jnp.array([3e20j, 4e20]), "b": jnp.float32(12e20)}), 13e20)
    assert global_norm(jnp.array([jnp.inf, 1.0])) == jnp.inf and jnp.isnan(global_norm(jnp.array([jnp.nan, 1.0])))
    assert global_norm(jnp.zeros(3)) == 0 and float(jax.grad(global_norm)(jnp.zeros(1))[0]) == 0
    hessian = jax.hessian(global_norm)(jnp.array([3.0, 4.0]))
    close(hessian, np.array([[16, -12], [-12, 9]]) / 125)


def test_a_norm_in_range_takes_one_sum_also_under_vmap():
    text = jax.jit(jax.vmap(lambda x: scaled_norm((x,))[0])).lower(jnp.ones((3, BRANCH_SIZE))).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text
    mixed = jnp.array([[3e20, 4e20], [3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0]])
    close(jax.jit(jax.vmap(jax.vmap(global_norm)))(mixed[None])[0], [5e20, 5, 5e-30, 0])


def test_centralize_does_not_overflow_in_the_sum():
    tx = nnlearn.centralize()
    rows = jnp.array([[3e38, 3e38, 1e38, 1e38], [jnp.inf, 1.0, 1.0, 2.0]])
    got = tx.update(rows, tx.init(rows))[0]
    close(got[0], [1e38, 1e38, -1e38, -1e38], rtol=1e-5)
    assert np.all(np.isfinite(got))


def normalized(x, eps, centre, axis):
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis, keepdims=True) if centre else x
    return x / np.sqrt((x**2).mean(axis, keepdims=True) + eps)


def test_normalisation_of_any_size():
    key, models = jax.random.key(0), nnlearn.models
    x = (np.random.default_rng(0).normal(size=(5, 8)) * np.array([[1e20], [1e-30], [1.0], [3e37], [1e-6]])).astype("f4")

    def layers(x, eps):
        for layer in (models.rms_norm(8, eps), models.layer_norm(8, eps), models.group_norm(8, 2, eps, dimensions=0)):
            yield layer.apply(layer.init(key), x)
        batch_norm = models.batch_norm(5, eps=eps)
        yield batch_norm.apply(*batch_norm.init(key), x.T, key)[0].T
        yield models.normalize_utterance(x.T, eps=eps).T

    def references(x, eps):
        centred = normalized(x, eps, True, -1)
        grouped = normalized(x.reshape(5, 2, 4), eps, True, -1).reshape(5, 8)
        return normalized(x, eps, False, -1), centred, grouped, centred, centred

    @jax.jit
    def outcomes(x, eps):
        return list(layers(x, eps)), jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in layers(x, eps)))(x)

    for eps in (1e-6, 0.0):
        outputs, slope = outcomes(x, eps)
        assert np.all(np.isfinite(slope))
        for got, want in zip(outputs, references(x, eps), strict=True):
            assert np.max(np.abs(got - want) / np.abs(want).max(-1, keepdims=True)) < 3e-6
    x[0, 0] = np.inf
    outputs, slope = outcomes(x, 0.0)
    assert all(np.all(np.isfinite(part)) for part in (*outputs, slope))


def test_running_statistics_stay_finite():
    layer = nnlearn.models.batch_norm(2)
    params, state = layer.init(jax.random.key(0))
    for x in ([[3e38, 1.0], [-3e38, 2.0]], [[jnp.inf, 1.0], [1.0, 2.0]]):
        _, state = layer.apply(params, state, jnp.array(x), jax.random.key(0))
        assert all(np.all(np.isfinite(part)) for part in state.values())
    close(state["var"][1], 0.9 * (0.9 + 0.1 * 0.25) + 0.1 * 0.25)


DECAYS = [0.0, 0.9, 0.999, 0.999999, 0.9999999]


def test_the_average_of_a_constant_is_that_constant():
    constant = jnp.array([0.7, -3e-3, 1e4])

    def averages(decay, steps):
        average = nnlearn.chain(nnlearn.sgd(0.0), nnlearn.average_params(decay))
        links = nnlearn.ema(decay), nnlearn.rmsprop(1.0, decay, 0.0, bias_correction=True)

        def step(_, carry):
            outs = [tx.update(constant, state, constant) for tx, state in zip(links, carry[1], strict=True)]
            updates, states = zip(*outs, strict=True)
            return average.update(0 * constant, carry[0], constant)[1], states, updates

        start = average.init(constant), tuple(tx.init(constant) for tx in links), (constant, constant)
        state, _, updates = jax.lax.fori_loop(0, steps, step, start)
        return nnlearn.averaged_params(state), updates[0], -updates[1] * jnp.abs(constant)

    run = jax.jit(lambda decays, steps: [averages(decay, steps) for decay in [*DECAYS, *decays]])
    for steps in (1, 2, 3, 30, 5000):
        for results in run(list(jnp.float32(DECAYS)), steps):
            for got in results:
                close(got, constant, rtol=2e-6)


def test_averages_near_1_follow_the_equation():
    decay, values = 0.999999, np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    tx = nnlearn.ema(decay)
    _, means = jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(jnp.zeros(3)), values)
    weights = decay ** np.arange(40)[::-1].astype(np.float64)
    for steps in (1, 7, 40):
        want = weights[-steps:] @ values[:steps].astype(np.float64) / weights[-steps:].sum()
        np.testing.assert_allclose(means[steps - 1], want, rtol=1e-5, atol=1e-6)


def test_an_overflowed_average_gives_no_nan():
    tx = nnlearn.rmsprop(1.0, bias_correction=True)
    state, params = tx.init(jnp.ones(2)), jnp.ones(2)
    for gradient in ([1e30, 1.0], [1.0, 1.0], [1.0, 1.0]):
        update, state = tx.update(jnp.array(gradient), state, params)
    assert np.all(np.isfinite(update)) and abs(update[1] + 1) < 1e-5


def test_focal_loss_and_two_derivatives_at_large_logits():
    logits = np.array([100.0, -100.0, 75.0, -75.0, 50.0, -50.0, 30.0, 3.0, 0.5, 1e4, -1e4])
    labels = np.array([0.9, 0.1, 0.0, 1.0, 1e-30, 1 - 2.0**-24])
    gammas = np.array([0.0, 0.5, 0.9, 1.5])
    x, y, gamma = (grid.ravel() for grid in np.meshgrid(logits, labels, gammas))

    def reference(x, y, gamma):
        wrong = y * jax.nn.sigmoid(-x) + (1 - y) * jax.nn.sigmoid(x)
        return wrong**gamma * (y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x))

    def three(loss):
        derivatives = loss, jax.grad(loss), jax.grad(jax.grad(loss))
        return list(map(np.asarray, jax.jit(jax.vmap(lambda *args: [f(*args) for f in derivatives]))(x, y, gamma)))

    got = three(lambda x, y, gamma: nnlearn.sigmoid_focal_loss(x, y, gamma=gamma))
    assert all(np.all(np.isfinite(part)) for part in got)
    with jax.enable_x64(True):
        want = three(reference)
    for ours, theirs in zip(got, want, strict=True):
        known = np.isfinite(theirs)
        assert known.mean() > 0.8
        np.testing.assert_allclose(ours[known], theirs[known], rtol=2e-4, atol=1e-7)


def test_per_example_norms_do_not_overflow_in_the_squares():
    def loss(params, batch, key):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"][None]) @ params["v"]) * batch["y"])

    shapes, random = {"w": (3, 9), "b": (9,), "v": (9,)}, np.random.default_rng(0)
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights = np.array([1e22, 1e-28, 1.0, 0.0], np.float32)
    batch = {"x": random.normal(size=(4, 3)).astype(np.float32), "y": weights}
    grads_b = jax.tree.leaves(nnlearn.per_example_grads(loss, params, batch))
    want = np.sqrt(sum(np.sum(np.float64(grad_b).reshape(4, -1) ** 2, 1) for grad_b in grads_b))
    close(jax.jit(lambda params: nnlearn.per_example_norms(loss, params, batch))(params), want, rtol=1e-5)
    clipped = jax.jit(nnlearn.clipped_value_and_grad(loss, 2.0))(params, {"x": batch["x"][:1], "y": weights[:1]}, None)
    close(global_norm(clipped[1]), 2.0)


def test_the_focal_loss_has_the_right_label_gradient_at_large_logits():
    """``u**gamma (-x + gamma H (1 - 2 p) / u)``, where ``u = H = exp(-x)`` for large x and the label 1."""
    slope = jax.grad(lambda y: nnlearn.sigmoid_focal_loss(jnp.float32(200.0), y, gamma=0.1))(jnp.float32(1.0))
    np.testing.assert_allclose(slope, np.exp(-20.0) * (-200.0 - 0.1), rtol=3e-5)
