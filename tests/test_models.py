"""Models: initial variances, normalisation against NumPy and torch, dropout, shapes, and purity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn.models import (
    activation,
    activation_function,
    dense,
    dropout,
    initializer,
    layer_norm,
    mlp,
    parameter_count,
    rms_norm,
    sequential,
)
from nnlearn.models.named import ACTIVATIONS
from nnlearn.tree import path_name
from nnlearn.types import Model

KEY = jax.random.key(0)
MODELS = {
    "dense": dense(6, 3),
    "dense without bias": dense(6, 3, bias=False),
    "rms_norm": rms_norm(6),
    "layer_norm": layer_norm(6),
    "dropout": dropout(0.4),
    "activation": activation("gelu"),
    "sequential": sequential(dense(6, 5), jnp.tanh, dropout(0.2), dense(5, 3)),
    "mlp": mlp((6, 5, 4, 3), dropout=0.3),
    "residual mlp": mlp((6, 5, 5, 5, 3), residual=True, norm="rms", dropout=0.3, activation="silu"),
}


def paths(params):
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


@pytest.mark.parametrize("name", MODELS)
def test_jit_equals_no_jit(name):
    model = MODELS[name]
    params = model.init(KEY)
    inputs = jax.random.normal(jax.random.key(1), (7, 6))
    for key in (None, jax.random.key(2)):
        np.testing.assert_allclose(
            jax.jit(model.apply)(params, inputs, key), model.apply(params, inputs, key), rtol=1e-5, atol=1e-6
        )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(model.init)(KEY), params)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_examples_and_leading_axes_agree(name):
    model = MODELS[name]
    params = model.init(KEY)
    inputs = jax.random.normal(jax.random.key(1), (2, 3, 6))
    outputs = model.apply(params, inputs)
    each = jax.vmap(jax.vmap(lambda x: model.apply(params, x)))(inputs)
    assert outputs.shape[:2] == (2, 3)
    np.testing.assert_allclose(outputs, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_in_and_out(name, dtype):
    model = MODELS[name]
    params = model.init(KEY)
    inputs = jax.random.normal(jax.random.key(1), (7, 6))
    low = model.apply(jax.tree.map(lambda leaf: leaf.astype(dtype), params), inputs.astype(dtype), jax.random.key(2))
    assert low.dtype == dtype
    outputs = model.apply(params, inputs, jax.random.key(2))
    np.testing.assert_allclose(low.astype(jnp.float32), outputs, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite_and_keep_the_dtype(name):
    model = MODELS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(KEY))
    inputs = jnp.ones((4, 6), jnp.bfloat16)  # constant features: the hard case for norms
    params_grads, inputs_grads = jax.grad(
        lambda params, inputs: jnp.sum(model.apply(params, inputs, KEY).astype(jnp.float32)), argnums=(0, 1)
    )(params, inputs)
    assert jax.tree.structure(params_grads) == jax.tree.structure(params)
    for grad in [*jax.tree.leaves(params_grads), inputs_grads]:
        assert grad.dtype == jnp.bfloat16 and np.all(np.isfinite(np.asarray(grad, np.float32)))


def test_equal_settings_make_equal_models_and_one_trace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, key):
        traces.append(model)
        return model.apply(model.init(key), jnp.ones((2, 4)))

    def make(width):
        return sequential(mlp((4, width), norm="layer"), jax.nn.relu, dropout(0.1))

    run(make(3), KEY), run(make(3), KEY)
    assert len(traces) == 1
    run(make(5), KEY)
    assert len(traces) == 2
    assert dense(2, 3) != dense(2, 3, bias=False) and "dense(inputs=2, outputs=3)" in repr(dense(2, 3))


# --- initialisers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("he", 2 / 400),
        ("kaiming", 2 / 400),
        ("he_uniform", 2 / 400),
        ("glorot", 2 / 1000),
        ("xavier_uniform", 2 / 1000),
        ("lecun", 1 / 400),
        ("lecun_uniform", 1 / 400),
    ],
)
def test_kernels_have_the_documented_variance(name, variance):
    params = dense(400, 600, kernel_init=name).init(KEY)
    kernel = np.asarray(params["kernel"], np.float64)
    assert kernel.shape == (400, 600)
    assert abs(kernel.std() / np.sqrt(variance) - 1) < 0.01  # 240,000 draws: the standard error is 0.15 %
    assert abs(kernel.mean()) < 4 * np.sqrt(variance / kernel.size)
    assert not np.any(params["bias"])


@pytest.mark.parametrize(("activation_name", "gain"), [("relu", 2.0), ("gelu", 2.0), ("tanh", 1.0), ("identity", 1.0)])
def test_mlp_chooses_the_initialiser_by_activation(activation_name, gain):
    kernel = np.asarray(mlp((500, 500), activation=activation_name).init(KEY)["output"]["kernel"], np.float64)
    assert abs(kernel.std() * np.sqrt(500 / gain) - 1) < 0.01


def test_he_preserves_the_scale_of_a_deep_relu_network():
    model = mlp((256,) * 11)
    inputs = jax.random.normal(jax.random.key(1), (64, 256))
    mean_square = jnp.mean(jnp.square(model.apply(model.init(KEY), inputs)))
    assert 1 / 3 < mean_square < 5  # with LeCun's it would be 2 ** -9 of that


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
def test_orthogonal(shape):
    kernel = np.asarray(dense(*shape, kernel_init="orthogonal").init(KEY)["kernel"], np.float64)
    gram = kernel @ kernel.T if shape[0] <= shape[1] else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-5)


@pytest.mark.parametrize("kernel_init", ["he", "orthogonal", "he_uniform"])
def test_bfloat16_parameters_are_rounded_float32_ones(kernel_init):
    wide = dense(30, 20, kernel_init=kernel_init).init(KEY)["kernel"]
    low = dense(30, 20, kernel_init=kernel_init, dtype=jnp.bfloat16).init(KEY)["kernel"]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))


def test_initialiser_functions_are_accepted_and_unknown_names_are_refused():
    model = dense(3, 2, kernel_init=lambda key, shape, dtype: jnp.full(shape, 7, dtype), bias_init="ones")
    params = model.init(KEY)
    assert np.all(params["kernel"] == 7) and np.all(params["bias"] == 1)
    with pytest.raises(ValueError, match="he_normal.*orthogonal.*'hee'"):
        initializer("hee")
    with pytest.raises(TypeError, match="initializer must be a name or a function, got 3"):
        dense(3, 2, kernel_init=3)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_dense_against_numpy():
    params = dense(5, 3, bias_init="ones").init(KEY)
    inputs = jax.random.normal(jax.random.key(1), (2, 4, 5))
    expected = np.asarray(inputs, np.float64) @ np.asarray(params["kernel"], np.float64) + 1
    np.testing.assert_allclose(dense(5, 3).apply(params, inputs), expected, rtol=1e-5, atol=1e-6)
    assert set(dense(5, 3, bias=False).init(KEY)) == {"kernel"}


def test_pixels_may_be_integers():
    inputs = jnp.arange(12, dtype=jnp.uint8).reshape(2, 6)
    for model in (dense(6, 3), layer_norm(6), dropout(0.5), mlp((6, 4, 2))):
        params = model.init(KEY)
        np.testing.assert_array_equal(model.apply(params, inputs), model.apply(params, inputs.astype(jnp.float32)))
        assert model.apply(params, inputs, KEY).dtype == jnp.float32


def reference_norm(x, scale, bias, eps, centre):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if centre else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_norms_against_numpy(centre, eps):
    scale, bias = np.linspace(0.5, 2, 16), np.linspace(-1, 1, 16)
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 16)).astype(np.float32)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    make = layer_norm if centre else rms_norm
    expected = reference_norm(x, scale, bias if centre else 0.0, eps, centre)
    np.testing.assert_allclose(make(16, eps).apply(params, x), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
def test_norms_and_their_gradients_against_torch(make):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(1, 2, (6, 16)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float32)
    torch_x = torch.tensor(x, requires_grad=True)
    torch_norm = torch.nn.LayerNorm(16, eps=1e-4) if make is layer_norm else torch.nn.RMSNorm(16, eps=1e-4)
    torch_y = torch_norm(torch_x)
    (torch_y * torch.tensor(weights)).sum().backward()

    model = make(16, eps=1e-4)
    y, vjp = jax.vjp(lambda x: model.apply(model.init(KEY), x), jnp.asarray(x))
    np.testing.assert_allclose(y, torch_y.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vjp(jnp.asarray(weights))[0], torch_x.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
def test_norm_statistics_are_float32_in_low_precision(make):
    # In float16 the squares of these overflow; in bfloat16 their mean would be off by percents.
    for dtype, tolerance in ((jnp.float16, 1e-3), (jnp.bfloat16, 8e-3)):
        x = jnp.asarray(np.random.default_rng(0).normal(300, 200, (3, 500)), dtype)
        model = make(500)
        y = model.apply(model.init(KEY), x)
        assert y.dtype == dtype
        expected = reference_norm(np.asarray(x, np.float64), 1.0, 0.0, 1e-6, make is layer_norm)
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize(("make", "value"), [(layer_norm, 3.0), (rms_norm, 0.0)])
def test_norm_of_equal_numbers_is_zero_with_finite_gradient(make, value, eps):
    model = make(8, eps)
    params = model.init(KEY)
    y, vjp = jax.vjp(lambda params, x: model.apply(params, x), params, jnp.full((2, 8), value))
    assert np.all(y == 0)
    assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(vjp(jnp.arange(16.0).reshape(2, 8))))


@pytest.mark.slow
def test_norm_eps_may_be_traced():
    x = jax.random.normal(KEY, (3, 8))
    for make in (layer_norm, rms_norm):
        params = make(8).init(KEY)
        many = jax.vmap(lambda eps, make=make, params=params: make(8, eps).apply(params, x))(jnp.array([1e-3, 1.0]))
        np.testing.assert_allclose(many[1], make(8, 1.0).apply(params, x), rtol=1e-6)
        assert not np.allclose(many[0], many[1], atol=0.05)
        assert jax.grad(lambda eps, make=make, params=params: jnp.sum(make(8, eps).apply(params, x) ** 2))(0.5) < 0


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_elementwise_with_finite_gradients(name):
    x = jnp.array([-50.0, -1.0, 0.0, 0.5, 50.0])
    y = activation(name).apply({}, x)
    np.testing.assert_allclose(y, jnp.stack([activation_function(name)(value) for value in x]), rtol=1e-5, atol=1e-7)
    assert y[-1] > y[1] and np.all(np.isfinite(jax.vmap(jax.grad(activation_function(name)))(x)))


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="relu, .*tanh, .*'rleu'"):
        activation_function("rleu")
    with pytest.raises(ValueError, match="'rleu'"):
        mlp((2, 3, 1), activation="rleu")


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_mean_and_drops_the_fraction(rate, dtype):
    x = jnp.full((400, 500), 3.0, dtype)
    y = np.asarray(dropout(rate).apply({}, x, KEY), np.float64)
    error = np.sqrt(rate * (1 - rate) / x.size)
    assert abs((y == 0).mean() - rate) < 4 * error
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=1e-6 if dtype == jnp.float32 else 4e-3)
    assert abs(y.mean() / 3 - 1) < 4 * error / (1 - rate) + (0 if dtype == jnp.float32 else 4e-3)


def test_the_key_determines_dropout_and_without_one_it_is_off():
    model, x = dropout(0.5), jnp.ones((20, 20))
    np.testing.assert_array_equal(model.apply({}, x, KEY), model.apply({}, x, KEY))
    assert not np.array_equal(model.apply({}, x, KEY), model.apply({}, x, jax.random.key(1)))
    np.testing.assert_array_equal(model.apply({}, x), x)
    np.testing.assert_array_equal(dropout(0.0).apply({}, x, KEY), x)
    np.testing.assert_array_equal(jax.jit(lambda rate: dropout(rate).apply({}, x, KEY))(0.0), x)


def test_dropout_rate_may_be_vmapped_and_differentiated():
    x = jnp.full(1000, 2.0)

    def total(rate):
        return jnp.sum(dropout(rate).apply({}, x, KEY))

    rates = jnp.array([0.0, 0.3, 0.6])
    np.testing.assert_allclose(jax.vmap(total)(rates), [total(rate) for rate in (0.0, 0.3, 0.6)], rtol=1e-5)
    # d/drate 1 / (1 - rate) = 1 / (1 - rate) ** 2, times the sum of what is kept
    kept = np.count_nonzero(dropout(0.3).apply({}, x, KEY))
    np.testing.assert_allclose(jax.grad(total)(0.3), 2 * kept / 0.7**2, rtol=1e-5)


def test_dropout_at_a_traced_rate_of_one_is_zero_and_finite():
    def total(x, rate):
        return jnp.sum(dropout(rate).apply({}, x, KEY))

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.ones(50), 1.0)
    assert value == 0 and all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_dropout_rates_are_refused(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0.0, 1.0\), got"):
        dropout(rate)
    with pytest.raises(ValueError, match=r"rate must be in \[0.0, 1.0\), got"):
        mlp((2, 3, 1), dropout=rate)


# --- sequential and mlp ---------------------------------------------------------------------------------------------


def test_sequential_paths_keys_and_flattening():
    model = sequential(lambda x: x.reshape(len(x), -1), dense(12, 5), dropout(0.5), dropout(0.5), dense(5, 2))
    params = model.init(KEY)
    assert paths(params) == ["1/bias", "1/kernel", "4/bias", "4/kernel"]
    assert model.apply(params, jnp.ones((7, 3, 4))).shape == (7, 2)
    twice = sequential(dropout(0.5), dropout(0.5)).apply(({}, {}), jnp.ones(4000), KEY)
    assert abs(np.mean(np.asarray(twice) == 0) - 0.75) < 0.03  # one key for both layers would give 0.5
    same = sequential(dense(4, 4), dense(4, 4)).init(KEY)
    assert not np.array_equal(same[0]["kernel"], same[1]["kernel"])
    with pytest.raises(ValueError, match="at least one model"):
        sequential()
    with pytest.raises(ValueError, match="sequential has 5 layers, got the params of 2"):
        model.apply(params[:2], jnp.ones((7, 3, 4)))


def reference_mlp(params, x, residual, norm):
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), [*params["hidden"], params["output"]])
    h = np.asarray(x, np.float64) @ layers[0]["kernel"] + layers[0]["bias"]
    for layer in layers[1:]:
        z = h
        if norm:
            z = reference_norm(z, layer["norm"]["scale"], layer["norm"].get("bias", 0.0), 1e-6, norm == "layer")
        z = np.maximum(z, 0) @ layer["kernel"] + layer["bias"]
        h = h + z if residual and layer is not layers[-1] else z
    return h


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_mlp_against_numpy(residual, norm):
    model = mlp((6, 8, 8, 8, 8), residual=residual, norm=norm)
    params = model.init(KEY)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    x = jax.random.normal(jax.random.key(1), (5, 6))
    np.testing.assert_allclose(model.apply(params, x), reference_mlp(params, x, residual, norm), rtol=1e-4, atol=1e-4)


def test_mlp_paths_and_parameter_count():
    plain = mlp((64, 128, 128, 10)).init(KEY)
    assert paths(plain) == [
        *("hidden/0/bias", "hidden/0/kernel", "hidden/1/bias", "hidden/1/kernel"),
        *("output/bias", "output/kernel"),
    ]
    assert parameter_count(plain) == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    normed = jax.eval_shape(mlp((64, 128, 128, 10), norm="rms").init, KEY)
    assert "output/norm/scale" in paths(normed) and "hidden/0/norm/scale" not in paths(normed)
    assert parameter_count(normed) == parameter_count(plain) + 2 * 128
    assert parameter_count({"number": 1.0, "empty": {}}) == 1
    assert paths(mlp((4, 3)).init(KEY)) == ["output/bias", "output/kernel"]


def identity_kernel(key, shape, dtype):
    return jnp.eye(*shape, dtype=dtype)


def test_mlp_draws_dropout_separately_in_each_layer_and_not_without_a_key():
    x = jnp.ones((100, 30))
    model = mlp((30, 30, 30, 30), activation="identity", kernel_init=identity_kernel, dropout=0.5)
    params = model.init(KEY)
    kept = np.asarray(model.apply(params, x, KEY)) != 0
    assert abs(kept.mean() - 0.25) < 0.03  # two layers drop; one mask for both would keep half
    np.testing.assert_array_equal(model.apply(params, x), x)
    grad = jax.grad(lambda rate: jnp.sum(mlp((30, 30, 2), dropout=rate).apply(mlp((30, 30, 2)).init(KEY), x, KEY)))(0.5)
    assert np.isfinite(grad) and grad != 0


def test_mlp_drops_the_outputs_of_activations_not_their_inputs():
    model = mlp((30, 30, 30), activation="sigmoid", kernel_init=identity_kernel, dropout=0.5)
    outputs = np.asarray(model.apply(model.init(KEY), jnp.zeros((100, 30)), KEY))
    assert set(outputs.ravel()) == {0.0, 1.0}  # sigmoid(0) / (1 - rate), or nothing


@pytest.mark.slow
def test_vmap_over_init_keys_makes_many_networks():
    model = mlp((3, 8, 2), norm="layer")
    keys = jax.random.split(KEY, 4)
    many = jax.vmap(model.init)(keys)
    x = jnp.ones((5, 3))
    outputs = jax.vmap(model.apply, in_axes=(0, None))(many, x)
    assert outputs.shape == (4, 5, 2)
    for index, key in enumerate(keys):
        np.testing.assert_allclose(outputs[index], model.apply(model.init(key), x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"kernel.*\(3, 8\), got \(4, 3, 8\); .*jax.vmap\(model.apply"):
        model.apply(many, x)


def test_mlp_learns_xor():
    model = mlp((2, 16, 1), activation="tanh")
    x, y = jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]), jnp.array([[0.0], [1], [1], [0]])

    def loss_fn(params):
        return jnp.mean(jnp.square(model.apply(params, x) - y))

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss_fn)(params)), None

    @jax.jit
    @jax.vmap
    def train(key):
        return loss_fn(jax.lax.scan(step, model.init(key), None, length=1000)[0])

    losses = train(jax.random.split(KEY, 4))
    assert np.all(losses < 1e-3)  # a linear model cannot get below 0.25


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (dense(64, 3), (5, 8, 8), r"dense\(64, 3\) expects .* 64, got shape \(5, 8, 8\); .*x.reshape\(len\(x\), -1\)"),
        (dense(64, 3), (8, 8), r"got shape \(8, 8\); .*x.reshape\(-1\)"),
        (dense(64, 3), (5, 7), r"got shape \(5, 7\); .*\(\.\.\., 64\), or make the layer for 7 features"),
        (dense(64, 3), (), r"got shape \(\)"),
        (mlp((64, 3, 2)), (5, 8, 8), r"mlp\(\(64, 3, 2\)\) expects .* 64.*reshape"),
        (layer_norm(4), (2, 1), r"layer_norm\(4\) expects"),
        (rms_norm(4), (2, 1), r"rms_norm\(4\) expects"),
    ],
)
def test_errors_of_inputs_name_layer_shapes_and_cure(model, shape, message):
    params = model.init(KEY)
    with pytest.raises(ValueError, match=message):
        model.apply(params, jnp.ones(shape))
    with pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(params, jnp.ones(shape))


def test_errors_name_wrong_params():
    with pytest.raises(ValueError, match=r"dense\(3, 2\) needs a parameter 'kernel', got \['bias'\]"):
        dense(3, 2).apply({"bias": jnp.ones(2)}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="'kernel' of shape .*these are the params of another model"):
        dense(3, 2).apply(dense(3, 4).init(KEY), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"has 2 layers, got the params of 3"):
        mlp((3, 4, 2)).apply(mlp((3, 4, 4, 2)).init(KEY), jnp.ones((1, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dense(0, 2), ValueError, "inputs must be an int >= 1, got 0"),
        (lambda: dense(2, 2.0), TypeError, "outputs must be an int, got 2.0"),
        (lambda: dense(2, True), ValueError, "outputs must be an int >= 1, got True"),
        (lambda: dense(2, 2, dtype=jnp.int32), TypeError, "dtype must be a floating"),
        (lambda: jax.jit(lambda n: dense(2, n).init(KEY))(3), TypeError, "outputs decides an array's shape"),
        (lambda: layer_norm(4, eps=-1.0), ValueError, "eps must be in"),
        (lambda: mlp((4,)), ValueError, r"sizes must name at least the inputs and the outputs.*\(4,\)"),
        (lambda: mlp(4), ValueError, "sizes must name"),
        (lambda: mlp((4, -3, 2)), ValueError, r"sizes\[1\] must be an int >= 1, got -3"),
        (lambda: mlp((4, 2), norm="batch"), ValueError, "norm must be one of layer, rms, or None; got 'batch'"),
        (lambda: mlp((4, 8, 16, 2), residual=True), ValueError, r"sizes=\(4, 8, 16, 2\) has hidden widths \(8, 16\)"),
        (lambda: mlp((4, 8, 2), residual=True), ValueError, "at least two hidden layers of equal width"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_any_pair_of_functions_is_a_model():
    shift = Model(lambda key: {"bias": jnp.zeros(2)}, lambda params, x, key=None: x + params["bias"][None])
    model = sequential(shift, dense(2, 1, kernel_init="ones"))
    np.testing.assert_allclose(model.apply(model.init(KEY), jnp.ones((3, 2))), np.full((3, 1), 2.0))
