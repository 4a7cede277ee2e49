"""Per-example gradients, norms and clipped means equal a loop over the examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.data import MaskedBatch
from nnlearn.gradients.clipped import clipped_value_and_grad
from nnlearn.gradients.ghost import TracedLoss
from nnlearn.gradients.noise_scale import noise_scale_from_batches, noise_scale_from_examples
from nnlearn.gradients.per_example import per_example_grads, per_example_norms
from nnlearn.models import dense, dropout, layer_norm, mlp, sequential

B, T, D, O = 6, 5, 4, 3  # noqa: E741
KEY = jax.random.key(7)
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))  # float64 if x64 is on


def mean_square(y):
    return jnp.mean(jnp.square(jnp.sin(y) - 0.3))


def of_model(model, *shape):
    shapes = jax.eval_shape(model.init, KEY)
    params = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), shapes)
    return lambda p, x, key: mean_square(model.apply(p, x, key)), params, normal(2, *shape)


def cases():
    """Name -> (loss_fn, params, batch, number of leaves recognised as dense weights)."""
    x, xs, w = normal(2, B, D), normal(2, B, T, D), normal(3, D, O)
    square, weights = normal(4, D, D), {"w": normal(3, D, O), "v": normal(5, O, O)}
    image, kernel = normal(2, B, 6, 6, 2), {"conv": normal(3, 3, 3, 2, 4), "out": normal(4, 4, 2)}

    def conv(p, x, key):
        h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return mean_square(jnp.mean(jnp.tanh(h), axis=(1, 2)) @ p["out"])

    def through_calls(p, x, key):
        h = jax.jit(lambda w, x: jax.nn.relu(x @ w))(p["w"], x)
        return mean_square(jax.checkpoint(lambda v, h: jnp.tanh(h @ v))(p["v"], h))

    @jax.custom_vjp
    def doubled(x, w):
        return x @ w

    doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, d: (2 * d @ kept[1].T, 2 * kept[0].T @ d))

    @jax.custom_jvp
    def tripled(x, w):
        return x @ w

    tripled.defjvp(lambda args, tangents: (args[0] @ args[1], 3 * (tangents[0] @ args[1] + args[0] @ tangents[1])))

    def batch_norm(p, x, key):
        h = x @ p["w"]
        return mean_square((h - jnp.mean(h, axis=0, keepdims=True) + 1) @ p["v"])

    def recurrent(p, xs, key):
        start = jnp.zeros((len(xs), D), xs.dtype)
        return mean_square(jax.lax.scan(lambda h, x: (jnp.tanh((x + h) @ p), None), start, xs.swapaxes(0, 1))[0])

    def heads(p, xs, key):
        y = jnp.einsum("btd,dhk->bhtk", xs, p["w"].reshape(D, 2, O))
        return mean_square(jnp.einsum("bhtk,hkd->btd", y, p["v"]))

    def parallel(p, xs, key):
        return mean_square(jnp.einsum("btd,tdo->bto", xs, p))

    def branches(p, x, key):
        return mean_square(jax.lax.cond(jnp.sum(x) > 0, lambda: x @ p, lambda: -x @ p))

    def regularised(p, x, key):
        return mean_square(x @ p["w"]) + jnp.sum(p["w"] ** 2), {"norm": jnp.sum(p["v"] ** 2)}

    in_half = lambda p, x, key: mean_square((x.astype(jnp.bfloat16) @ p.astype(jnp.bfloat16)).astype(p.dtype))  # noqa: E731
    return {
        "mlp": (*of_model(mlp((D, 8, O)), B, D), 2),
        "mlp on sequences": (*of_model(mlp((D, 8, O)), B, T, D), 2),
        "long sequences": (*of_model(mlp((D, 32, O)), B, 40, D), 2),
        "wide sequences": (*of_model(mlp((16, 32, 16)), B, 3, 16), 2),
        "layer_norm": (*of_model(mlp((D, 6, O), norm="layer"), B, D), 2),
        "dropout": (*of_model(sequential(dense(D, 8), dropout(0.5), dense(8, O)), B, D), 2),
        "layer_norm on sequences": (*of_model(sequential(layer_norm(D), dense(D, O)), B, T, D), 1),
        "conv": (conv, kernel, image, 1),
        "shared": (lambda p, x, key: mean_square(jnp.tanh(x @ p) @ p), square, x, 0),
        "tied": (lambda p, x, key: mean_square(jnp.tanh(x @ p["w"]) @ p["w"].T), {"w": w}, x, 0),
        "transposed": (lambda p, x, key: mean_square(x @ p.T), w.T, xs, 1),
        "left operand": (lambda p, x, key: mean_square(jnp.einsum("do,btd->obt", p, x)), w, xs, 1),
        "vector": (lambda p, x, key: mean_square(x @ p), normal(3, D), x, 1),
        "two leaves in one product": (lambda p, x, key: mean_square(x @ (p["w"] @ p["v"])), weights, x, 0),
        "heads": (heads, {"w": normal(3, D, 2 * O), "v": normal(4, 2, O, D)}, xs, 2),
        "parallel products": (parallel, normal(3, T, D, O), xs, 1),
        "vmapped": (lambda p, x, key: mean_square(jax.vmap(lambda x: x @ p)(x)), w, xs, 1),
        "jit and checkpoint": (through_calls, weights, x, 2),
        "custom_vjp": (lambda p, x, key: mean_square(doubled(x, p)), w, x, 0),
        "custom_jvp": (lambda p, x, key: mean_square(tripled(x, p)), w, x, 0),
        "stopped": (lambda p, x, key: mean_square(x @ jax.lax.stop_gradient(p["w"]) @ p["v"]), weights, x, 1),
        "scan": (recurrent, square, xs, 0),
        "cond": (branches, w, x, 0),
        "embedding": (lambda p, x, key: mean_square(p["table"][x] @ p["w"]), {"table": normal(1, 9, D), "w": w},
                      jnp.arange(B * T).reshape(B, T) % 9, 1),
        "batch norm": (batch_norm, weights, x, 2),
        "unused and aux": (regularised, weights, x, 0),
        "aux apart": (lambda p, x, key: (mean_square(x @ p), jnp.sum(p**2)), w, x, 1),
        "scalar": (lambda p, x, key: mean_square(x * p["a"] + p["b"]), {"a": normal(1), "b": normal(2)}, x, 0),
        "the loss itself": (lambda p, x, key: p * 1.0, normal(1), x, 0),
        "empty leaf": (lambda p, x, key: mean_square(x @ p["w"]) + jnp.sum(p["e"]), {"w": w, "e": normal(1, 0)}, x, 1),
        "no leaf": (lambda p, x, key: mean_square(x), {}, x, 0),
        "complex": (lambda p, x, key: jnp.mean(jnp.abs(x @ p) ** 2), w + 1j * normal(5, D, O), x, 0),
        "half precision inside": (in_half, w, x, 1),
    }  # fmt: skip


def loop(loss_fn, params, batch, key=None):
    """Every example's gradient, in a Python loop."""
    batch = jax.tree.map(np.asarray, batch)
    size = len(jax.tree.leaves(batch)[0])
    keys = [None] * size if key is None else jax.random.split(key, size)
    grad = quick_jit(jax.grad(lambda p, b, k: jax.tree.leaves(loss_fn(p, b, k))[0]))
    rows = [grad(params, jax.tree.map(lambda a, b=b: a[b : b + 1], batch), keys[b]) for b in range(size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def norms_of(grads, size=B):
    squares = [np.sum(np.abs(np.reshape(leaf, (size, -1))) ** 2, axis=1) for leaf in jax.tree.leaves(grads)]
    return np.sqrt(sum(squares, np.zeros(size)))


def assert_trees_close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


SINGLE = ["mlp", "long sequences", "half precision inside"]


def all_three(loss_fn, compiler_options=QUICK):
    """Gradients, norms and clipped mean, compiled in one program."""

    def run(params, batch, key, bound):
        clipped = clipped_value_and_grad(loss_fn, bound)(params, batch, key)[1]
        return per_example_grads(loss_fn, params, batch, key), per_example_norms(loss_fn, params, batch, key), clipped

    return jax.jit(run, compiler_options=compiler_options)


def clipped_mean(grads, bound, size=B):
    factors_b = np.minimum(1, bound / np.maximum(norms_of(grads, size), 1e-30))
    return jax.tree.map(lambda leaf: np.tensordot(factors_b, leaf, 1) / size, grads)


@pytest.mark.parametrize(("name", "x64"), [(name, True) for name in cases()] + [(name, False) for name in SINGLE])
def test_gradients_norms_and_clipped_mean_equal_the_loop(name, x64):
    with jax.enable_x64(x64):
        loss_fn, params, batch, dense_leaves = cases()[name]
        key = KEY if name == "dropout" else None
        expected = loop(loss_fn, params, batch, key)
        norms_b = norms_of(expected)
        bound = max(np.median(norms_b), 0.1)
        rtol = 5e-2 if "half" in name else 1e-11 if x64 else 1e-5
        found, found_norms_b, mean = all_three(loss_fn)(params, batch, key, bound)
        assert_trees_close(found, expected, rtol, rtol)
        np.testing.assert_allclose(found_norms_b, norms_b, rtol=rtol, atol=1e-12)
        assert_trees_close(mean, clipped_mean(expected, bound), rtol, rtol)

        leaves, treedef = jax.tree.flatten(params)
        one = jax.tree.map(lambda a: a[:1], batch)
        alone = lambda leaves, x, key: (jax.tree.leaves(loss_fn(treedef.unflatten(leaves), x, key))[0], None)  # noqa: E731
        assert len(TracedLoss(alone, leaves, one, key).dense) == dense_leaves


def test_packed_parameters_have_packed_gradients():
    with jax.enable_x64(True):
        loss_fn, params, batch, _ = cases()["mlp"]
        packed, expected = nnlearn.pack(params), loop(loss_fn, params, batch)
        grads, norms_b, mean = all_three(loss_fn)(packed, batch, None, 0.2)
        assert jax.tree.structure(mean) == jax.tree.structure(grads) == jax.tree.structure(packed)
        np.testing.assert_allclose(norms_b, norms_of(expected))
        assert_trees_close(nnlearn.unpack(grads), expected, 1e-11, 1e-12)
        assert_trees_close(nnlearn.unpack(mean), clipped_mean(expected, 0.2), 1e-11, 1e-12)


def test_without_clipping_it_equals_value_and_grad():
    def loss_fn(params, batch, key):
        outputs = jnp.tanh(batch @ params)
        return mean_square(outputs), {"outputs": outputs}

    params, batch = normal(1, D, O), normal(0, B, D)
    found = quick_jit(clipped_value_and_grad(loss_fn, 1e9))(params, batch, KEY)
    assert_trees_close(found, jax.value_and_grad(loss_fn, has_aux=True)(params, batch, KEY))


def masked_loss(params, batch, key):
    return jnp.mean(jnp.sum((batch.examples @ params) ** 2, axis=-1), where=batch.where)


def test_masked_examples_add_nothing_even_if_not_finite():
    params, x = normal(1, D, O), normal(2, B, D)
    where = jnp.arange(B) < 4
    batch = MaskedBatch(x.at[4].set(jnp.nan).at[5].set(jnp.inf), where)
    grads = loop(lambda p, x, k: masked_loss(p, MaskedBatch(x, jnp.ones(1, bool)), k), params, x[:4])
    padded = np.concatenate([grads, np.zeros((2, D, O))])
    found, norms_b, mean = all_three(masked_loss)(params, batch, None, 0.2)
    assert_trees_close((found, norms_b), (padded, norms_of(padded)))
    assert_trees_close(mean, clipped_mean(padded[:4], 0.2, size=4))
    unclipped = quick_jit(clipped_value_and_grad(masked_loss, 1e9))
    (loss, _), mean = unclipped(params, batch, KEY)
    assert_trees_close((loss, mean), jax.value_and_grad(masked_loss)(params, MaskedBatch(x, where), KEY))
    nothing = MaskedBatch(x, jnp.zeros(B, bool))
    assert_trees_close(unclipped(params, nothing, KEY), ((0.0, None), np.zeros((D, O))))


def test_a_non_finite_example_adds_nothing_but_counts():
    loss_fn, params, x, _ = cases()["mlp"]
    grads = loop(loss_fn, params, x[1:])
    found = quick_jit(clipped_value_and_grad(loss_fn, 1e9))(params, x.at[0].set(jnp.nan), KEY)[1]
    assert_trees_close(found, jax.tree.map(lambda leaf: np.sum(leaf, axis=0) / B, grads))


def test_zero_gradients_are_zero():
    params, x = jnp.zeros((D, O)), jnp.zeros((B, D))
    loss_fn = lambda p, x, key: jnp.mean((x @ p) ** 2)  # noqa: E731
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), all_three(loss_fn)(params, x, None, 1.0))
    slope = quick_jit(jax.grad(lambda p: jnp.sum(per_example_norms(loss_fn, p, x))))(params)
    np.testing.assert_array_equal(slope, 0)


def test_vmap_over_the_bound_and_the_noise():
    params, batch = normal(1, D, O), normal(0, B, D)
    loss_fn = lambda p, x, key: mean_square(x @ p)  # noqa: E731
    bounds, noises = jnp.array([0.01, 0.1, 10.0]), jnp.array([0.0, 1.0, 2.0])

    def grads(bound, noise):
        return clipped_value_and_grad(loss_fn, bound, noise)(params, batch, KEY)[1]

    together = quick_jit(jax.vmap(grads))(bounds, noises)
    for index in range(3):
        alone = quick_jit(grads, static_argnums=(0, 1))(float(bounds[index]), float(noises[index]))
        assert_trees_close(together[index], alone)


def test_noise_has_the_stated_deviation_and_is_independent():
    params = {"a": jnp.zeros((60, 50)), "b": jnp.zeros((60, 50)), "c": jnp.zeros(3000, jnp.complex64)}

    def loss_fn(p, batch, key):
        return jnp.mean(batch.examples @ (p["a"] + p["b"])) + jnp.sum(jnp.real(p["c"])) * 0

    draw = quick_jit(clipped_value_and_grad(loss_fn, 0.5, 2.0))
    for valid in (8, 3):
        batch = MaskedBatch(jnp.zeros((8, 60)), jnp.arange(8) < valid)
        first, second = draw(params, batch, KEY)[1], draw(params, batch, jax.random.key(8))[1]
        arrays = first["a"], first["b"], second["a"], np.real(first["c"]), np.imag(first["c"])
        samples = np.stack([np.ravel(array) for array in arrays])
        deviation = 2.0 * 0.5 / valid
        assert np.all(np.abs(samples.mean(axis=1)) < 4 * deviation / 3000**0.5)
        np.testing.assert_allclose(samples.std(axis=1), deviation, rtol=4 / 6000**0.5)
        assert np.all(np.abs(np.corrcoef(samples) - np.eye(5)) < 4 / 3000**0.5)


def test_memory_stays_below_batch_size_times_parameters():
    size, model = 128, mlp((64, 128, 10))
    params = jax.eval_shape(model.init, KEY)
    batch = normal(0, size, 64), jnp.arange(size) % 10
    loss_fn = lambda p, batch, key: nnlearn.cross_entropy(model.apply(p, batch[0]), batch[1])  # noqa: E731
    all_of_them = 4 * size * sum(leaf.size for leaf in jax.tree.leaves(params))
    for function in (lambda p, b, k: per_example_norms(loss_fn, p, b, k), clipped_value_and_grad(loss_fn, 1.0)):
        held = jax.jit(function).lower(params, batch, None).compile().memory_analysis().temp_size_in_bytes
        assert held < all_of_them / 8


@pytest.mark.parametrize("check_vma", [True, False])
def test_on_several_devices(check_vma):
    params, batch = {"w": normal(1, D, O), "b": normal(2, 1, O)}, normal(0, 8, D)
    loss_fn = lambda p, x, key: mean_square(x @ p["w"] + p["b"])  # noqa: E731
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def part(params, batch):
        grads, norms_b, mean = all_three(loss_fn, None)(params, batch, None, 0.1)
        return grads, norms_b, jax.lax.pmean(mean, "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": (P("data"), P("data"), P()), "check_vma": check_vma}
    found = jax.jit(jax.shard_map(part, mesh=mesh, **specs))(params, batch)
    assert_trees_close(found, all_three(loss_fn)(params, batch, None, 0.1), 1e-4)


def test_private_training_learns():
    """The gradient works like an ordinary one, with an optimizer in a compiled loop."""
    x = normal(0, 64, D)
    y = x @ jnp.arange(1.0, D + 1)
    loss_fn = lambda p, batch, key: jnp.mean((batch[0] @ p - batch[1]) ** 2)  # noqa: E731
    tx, gradient = nnlearn.adam(0.1), clipped_value_and_grad(loss_fn, 1.0, 0.1)

    def step(carry, key):
        params, state = carry
        (loss, _), grads = gradient(params, (x, y), key)
        updates, state = tx.update(grads, state, params)
        return (params + updates, state), loss

    start = jnp.zeros(D)
    (_, _), losses = quick_jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jax.random.split(KEY, 200)))()
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.slow
def test_arguments_are_checked():
    loss_fn, params, batch, _ = cases()["mlp"]
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="clip_norm"):
            clipped_value_and_grad(loss_fn, bad)
    with pytest.raises(ValueError, match="noise_multiplier"):
        clipped_value_and_grad(loss_fn, 1.0, -1.0)
    with pytest.raises(ValueError, match="key must be a random key"):
        clipped_value_and_grad(loss_fn, 1.0, 1.0)(params, batch, None)
    with pytest.raises(ValueError, match="one length"):
        per_example_norms(loss_fn, params, (batch, batch[1:]))
    with pytest.raises(TypeError, match="real scalar"):
        per_example_norms(lambda p, x, key: x @ p["hidden"][0]["kernel"], params, batch)
    with pytest.raises(TypeError, match="'count' is int32"):
        per_example_norms(loss_fn, {"count": jnp.array(1)}, batch)
    with pytest.raises(ValueError, match="where must have shape"):
        per_example_norms(masked_loss, params, MaskedBatch(batch, jnp.ones(2, bool)))


def planted(key, size):
    """Gradients of examples drawn around G = (1, 2, ...) with known variances."""
    signal, deviations = jnp.arange(1.0, D + 1), jnp.array([1.0, 2.0, 3.0, 0.5])
    return (
        signal[None] + deviations[None] * jax.random.normal(key, (size, D)),
        jnp.sum(deviations**2),
        jnp.sum(signal**2),
    )


def within_standard_errors(samples, expected, errors=4):
    error = np.std(samples) / len(samples) ** 0.5
    assert abs(np.mean(samples) - expected) < errors * error, (np.mean(samples), expected, error)


def test_noise_scale_is_unbiased():
    """The loss |params - x|^2 / 2 has the gradients params - x, which have the covariance of the examples."""

    def estimate(key):
        examples, _, _ = planted(key, 8)
        loss_fn = lambda p, x, key: jnp.mean(jnp.sum((p - x) ** 2, axis=-1)) / 2  # noqa: E731
        start = jnp.zeros((1, D))
        norms_b = per_example_norms(loss_fn, start, examples)
        where = jnp.arange(8) < 5
        some = noise_scale_from_examples(norms_b, jnp.linalg.norm(jnp.mean(examples[:5], axis=0)), where)
        every = noise_scale_from_examples(norms_b, jnp.linalg.norm(jnp.mean(examples, axis=0)))
        pairs = jnp.linalg.norm(jnp.mean(examples.reshape(4, 2, D), axis=1), axis=-1)
        return every, some, noise_scale_from_batches(pairs, jnp.linalg.norm(jnp.mean(examples, axis=0)), 2, 8)

    _, noise, signal = planted(KEY, 1)
    for found in quick_jit(jax.vmap(estimate))(jax.random.split(KEY, 4000)):
        within_standard_errors(found.noise, noise)
        within_standard_errors(found.signal, signal)
        np.testing.assert_allclose(found.scale, found.noise / found.signal, rtol=1e-5)


def test_noise_scale_equals_its_definition_and_handles_edge_cases():
    gradients = np.random.default_rng(0).normal(size=(10, D)) + 1
    mean = np.mean(gradients, axis=0)
    found = noise_scale_from_examples(np.linalg.norm(gradients, axis=1), np.linalg.norm(mean))
    trace = np.trace(np.cov(gradients.T))
    np.testing.assert_allclose(found.noise, trace, rtol=1e-5)
    np.testing.assert_allclose(found.signal, mean @ mean - trace / 10, rtol=1e-5)
    assert np.isnan(noise_scale_from_examples(jnp.ones(3), 1.0, jnp.arange(3) < 1).scale)
    same = noise_scale_from_examples(jnp.full(4, 2.0), 2.0)
    np.testing.assert_allclose(same, (0, 4, 0), atol=1e-6)
    with pytest.raises(ValueError, match="one length"):
        noise_scale_from_examples(jnp.ones(3), 1.0, jnp.ones(2, bool))
    with pytest.raises(ValueError, match="below big_size"):
        noise_scale_from_batches(1.0, 1.0, 8, 8)
    traced = jax.jit(noise_scale_from_batches)(1.5, 1.0, 1, 4)
    np.testing.assert_allclose(traced, noise_scale_from_batches(1.5, 1.0, 1, 4), rtol=1e-6)
