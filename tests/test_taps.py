"""Statistics of activations, read from the programs of networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.programs.places import Place
from nnlearn.programs.taps import activations, statistics

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (16, 4))


def erf_gelu(x):
    return 0.5 * x * (1 + jax.lax.erf(x / 2**0.5))


NONLINEARITIES = {
    "jax relu": (jax.nn.relu, "relu"),
    "max": (lambda x: jnp.maximum(x, 0), "relu"),
    "where": (lambda x: jnp.where(x > 0, x, 0), "relu"),
    "times": (lambda x: x * (x >= 0), "relu"),
    "tanh": (jnp.tanh, "tanh"),
    "sigmoid": (jax.nn.sigmoid, "sigmoid"),
    "silu": (lambda x: x * jax.nn.sigmoid(x), "silu"),
    "gelu": (jax.nn.gelu, "gelu"),
    "erf gelu": (erf_gelu, "gelu"),
    "softmax": (lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True), "softmax"),
    "jax softmax": (jax.nn.softmax, "softmax"),
    "log_softmax": (jax.nn.log_softmax, "log_softmax"),
    "elu": (jax.nn.elu, "elu"),
    "no relu": (lambda x: x / jnp.sqrt(jnp.maximum(jnp.var(x, axis=1, keepdims=True), 0) + 1), None),
    "masked": (lambda x: jnp.where(jnp.arange(4)[None] > 0, x, 0), None),
}


def test_nonlinearities_are_recognised():
    functions = {name: function for name, (function, _) in NONLINEARITIES.items()}
    params = {name: jnp.eye(4) for name in functions}

    def predict(params, x):
        return [function(x @ params[name]) for name, function in functions.items()]

    found = activations(predict, params, X)
    kinds = {name: [each.kind for each in found if each.layer == name and each.kind != "matmul"] for name in functions}
    assert kinds == {name: [kind] if kind else [] for name, (_, kind) in NONLINEARITIES.items()}
    assert all(each.of == (("matmul",) if each.kind != "matmul" else ()) for each in found)


def reference(kind, value):
    """The statistics of an array (examples, units), in NumPy."""
    value = np.asarray(value, np.float64)
    finite = value[np.isfinite(value)]
    off = {"relu": value <= 0, "tanh": abs(value) >= 0.97, "sigmoid": abs(value - 0.5) >= 0.47}.get(kind)
    return {
        "mean": finite.mean(),
        "std": finite.std(),
        "largest": abs(finite).max(),
        "zero": (value == 0).mean(),
        "nonfinite": 1 - np.isfinite(value).mean(),
        "dead": np.nan if off is None else off.all(0).mean(),
        "saturated": np.nan if off is None or kind == "relu" else off.mean(),
        "alike": np.nan if kind != "matmul" else (abs(value - np.roll(value, 1, 1)).max(0) < 1e-4).mean(),
    }


@pytest.mark.parametrize("kind", ["relu", "tanh", "sigmoid", "matmul"])
def test_statistics_are_those_of_numpy(kind):
    measure = jax.jit(statistics, static_argnums=(0, 2))
    value = 3 + 2 * jax.random.normal(KEY, (32, 6))
    value = value.at[:, 1].set(0).at[:, 3].set(value[:, 2]).at[0, 5].set(jnp.nan if kind == "relu" else 0.0)
    value = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "matmul": lambda x: x}[kind](value)
    found = measure(kind, value, (1,))
    for name, expected in reference(kind, value).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)


def test_a_large_offset_does_not_hide_the_spread():
    value = 1e4 + jax.random.normal(KEY, (64, 4))
    found = jax.jit(statistics, static_argnums=(0, 2))("matmul", value, (1,))
    np.testing.assert_allclose(found["std"], np.asarray(value).std(), rtol=1e-3)


@pytest.mark.slow
def test_networks_of_other_libraries_need_no_change():
    import equinox as eqx
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Conv(3, (2, 2))(x))
            return nn.Dense(2)(nn.relu(x - 100.0).reshape(len(x), -1))

    net, images = Net(), jax.random.normal(KEY, (5, 4, 4, 1))
    found = activations(net.apply, jax.jit(net.init)(KEY, images), images)
    assert [(each.kind, each.layer, each.units) for each in found] == [
        ("conv", "params/Conv_0/kernel", 3),
        ("relu", "params/Conv_0/kernel", 3),
        ("matmul", "params/Dense_0/kernel", 2),
    ]
    assert found[0].where.scope == "Net/Conv_0" and found[1].where.function == "Net.__call__"
    assert float(found[1].dead) == 1 and [each.is_output for each in found] == [False, False, True]

    arrays, static = eqx.partition(eqx.nn.MLP(4, 2, 5, 1, key=KEY), eqx.is_array)
    found = activations(lambda params, x: jax.vmap(eqx.combine(params, static))(x), arrays, X)
    assert [(each.kind, each.layer, each.units) for each in found] == [
        ("matmul", "layers/0/weight", 5),
        ("relu", "layers/0/weight", 5),
        ("matmul", "layers/1/weight", 2),
    ]
    assert Place(__file__).file == found[0].where.file


def recurrent(params, x):
    def turn(h, x_t):
        h = jnp.tanh(x_t @ params["w"] + h @ params["u"])
        return h, None

    return jax.lax.scan(turn, jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1))[0] @ params["out"]


def test_loops_give_statistics_of_every_iteration():
    params = {"w": jnp.ones((1, 3)), "u": jnp.eye(3), "out": jnp.ones((3, 1))}
    x = jnp.array([[0.0, 0.1, 9.0, 0.0]])[..., None]
    found = {(each.kind, each.layer): each for each in activations(recurrent, params, x)}
    tanh = found["tanh", "u"]
    assert tanh.loops == (4,) and tanh.shape == (1, 3) and tanh.of == ("matmul",)
    np.testing.assert_array_equal(tanh.saturated, [0, 0, 1, 0])
    np.testing.assert_array_equal(found["matmul", "w"].alike, [1, 1, 1, 1])
    assert found["matmul", "u"].of == ("tanh",) and found["matmul", "out"].is_output


def test_a_branch_that_does_not_run_has_no_statistics():
    def predict(params, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.nn.relu(x @ params), lambda x: x @ params, x)

    measure = jax.jit(functools.partial(activations, predict))
    kinds = [(each.kind, bool(jnp.isnan(each.mean))) for each in measure(jnp.eye(4), X.at[0, 0].set(1.0))]
    assert sorted(kinds) == [("matmul", False), ("matmul", True), ("relu", False)]


@pytest.mark.slow
def test_statistics_follow_jit_and_vmap():
    model = nnlearn.models.mlp((4, 8, 2))
    params = jax.jit(jax.vmap(model.init))(jax.random.split(KEY, 3))
    found = jax.jit(jax.vmap(functools.partial(activations, model.apply), in_axes=(0, None)))(params, X)
    alone = activations(model.apply, jax.tree.map(lambda leaf: leaf[1], params), X)
    for each, single in zip(found, alone, strict=True):
        np.testing.assert_allclose(each.std[1], single.std, rtol=1e-5)
        assert each.where == single.where
