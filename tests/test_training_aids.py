"""Options of a step: exact accumulation, mixed precision, loss scaling, averages, model state, noise scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import nnlearn
from nnlearn.data import Examples, MaskedBatch
from nnlearn.models import mlp

MODEL = mlp((6, 16, 4))


def make_batch(size, valid=None, seed=0):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(size, 6)).astype(np.float32)
    examples = Examples(jnp.asarray(inputs), jnp.asarray(np.argmax(inputs[:, :4], axis=1)))
    return MaskedBatch(examples, jnp.asarray(random.permutation(size) < (valid or size)))


def loss_fn(params, batch, key):
    (inputs, targets), where = batch
    return nnlearn.cross_entropy(MODEL.apply(params, inputs, key), targets, where=where)


def trained(step, tx, batches, params=None, **options):
    state = nnlearn.init_state(MODEL.init(jax.random.key(0)) if params is None else params, tx, **options)
    step = jax.jit(step)
    for batch in batches:
        state, info = step(state, batch)
    return state, info


def close(left, right, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-6, "atol": 1e-6} | tolerances), left, right
    )


@pytest.mark.parametrize(("size", "valid"), [(16, 16), (16, 11), (13, 13), (13, 6), (16, 1)])
def test_accumulation_equals_the_whole_batch_with_unequal_masks_and_ragged_batches(size, valid):
    tx = nnlearn.sgd(0.2, momentum=0.9)
    batches = [make_batch(size, valid, seed) for seed in range(4)]
    expected, whole = trained(nnlearn.make_step(loss_fn, tx), tx, batches)
    for parts in (1, 2, 4, 8):
        state, info = trained(nnlearn.make_step(loss_fn, tx, microbatches=parts), tx, batches)
        close(state.params, expected.params)
        np.testing.assert_allclose(info.loss, whole.loss, rtol=1e-6)


def test_parts_may_be_weighted_by_tokens():
    """A mean over tokens without padding: parts are weighted by their tokens, not by their examples."""
    tokens, length = 8, 5
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.normal(size=(tokens, length, 6)), jnp.float32)
    counts = jnp.asarray([5, 1, 2, 5, 4, 1, 1, 3])
    batch = {"x": inputs, "real": jnp.arange(length)[None, :] < counts[:, None]}

    def token_loss(params, batch, key):
        return jnp.mean(jnp.sum(MODEL.apply(params, batch["x"]) ** 2, axis=-1), where=batch["real"])

    tx = nnlearn.sgd(0.1)
    expected, _ = trained(nnlearn.make_step(token_loss, tx), tx, [batch])
    weigh = lambda batch: jnp.sum(batch["real"])  # noqa: E731
    state, _ = trained(nnlearn.make_step(token_loss, tx, microbatches=4, batch_weight=weigh), tx, [batch])
    close(state.params, expected.params)
    wrong, _ = trained(nnlearn.make_step(token_loss, tx, microbatches=4), tx, [batch])
    assert not np.allclose(wrong.params["output"]["kernel"], expected.params["output"]["kernel"], atol=1e-4)


def line_loss(params, batch, key):
    examples, where = batch
    return nnlearn.mean_squared_error(jnp.sum(examples["x"] * params[None, :], axis=-1), examples["y"], where=where)


def with_nan(where):
    targets = jnp.where(jnp.asarray(where), jnp.arange(1.0, 5.0), jnp.array([jnp.nan, jnp.inf, jnp.nan, -jnp.inf]))
    return MaskedBatch({"x": jnp.arange(1.0, 9.0).reshape(4, 2), "y": targets}, jnp.asarray(where))


def over_two(step):
    """The step on each half of a batch, by two devices."""

    def mapped(state, batch):
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
        both = jax.vmap(step, in_axes=(None, 0), axis_name="data")(state, halves)
        return jax.tree.map(lambda leaf: leaf[0], both)

    return mapped


def over_two_sharded(step):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": (PartitionSpec(), PartitionSpec())}
    return jax.shard_map(step, mesh=mesh, **specs)


@pytest.mark.parametrize("mapped", [None, over_two, over_two_sharded])
@pytest.mark.parametrize("where", [[True, True, False, False], [False, False, False, True], [False] * 4])
def test_a_part_without_valid_examples_has_no_effect(where, mapped):
    tx, batch = nnlearn.sgd(0.1), with_nan(where)
    expected, whole = trained(nnlearn.make_step(line_loss, tx), tx, [batch], jnp.ones(2))
    assert np.isfinite(expected.params).all()
    for parts in (2, 4) if mapped is None else (1, 2):
        options = {"microbatches": parts, "record": ("grad_norm", "noise_scale")[: 1 + (parts == 4)]}
        if mapped is not None:
            options["axis_name"] = "data"
        step = nnlearn.make_step(line_loss, tx, **options)
        state, info = trained(step if mapped is None else mapped(step), tx, [batch], jnp.ones(2))
        close((state.params, info.loss, info.grad_norm), (expected.params, whole.loss, whole.grad_norm))


@pytest.mark.parametrize("mapped", [None, over_two, over_two_sharded])
def test_a_part_of_weight_0_may_have_a_nan_loss_and_gradient(mapped):
    """A mean over no tokens is 0 / 0."""

    def loss(params, batch, key):
        outputs = jnp.sum(batch["x"] * params[None, :], axis=-1)
        return jnp.mean(outputs**2, where=batch["real"]), {"mean": jnp.mean(outputs, where=batch["real"])}

    tx, x = nnlearn.sgd(0.01), jnp.arange(1.0, 9.0).reshape(4, 2)
    real = [False, True, False, True] if mapped is None else [False, False, True, True]  # a microbatch is every second
    batch = {"x": x, "real": jnp.array(real)}
    expected, whole = trained(nnlearn.make_step(loss, tx), tx, [batch], jnp.ones(2))
    options = {"microbatches": 2} if mapped is None else {"axis_name": "data"}
    step = nnlearn.make_step(loss, tx, batch_weight=lambda part: jnp.sum(part["real"]), **options)
    state, info = trained(step if mapped is None else mapped(step), tx, [batch], jnp.ones(2))
    close((state.params, info.loss, info.aux), (expected.params, whole.loss, whole.aux))


def test_a_batch_without_valid_examples_keeps_the_model_state():
    def loss(params, batch, key, model_state):
        seen = {"mean": jnp.mean(batch.examples["y"]), "count": model_state["count"] + 1, "key": key}
        return line_loss(params, batch, key), None, seen

    tx = nnlearn.sgd(0.1)
    start = {"mean": jnp.array(7.0), "count": jnp.array(3), "key": jax.random.key(5)}
    in_parts, on_devices = (None, {"microbatches": 2}), (over_two, {"axis_name": "data"})
    # a microbatch is every second example, a device's part is a half
    cases = ([False] * 4, 7.0, 3, in_parts), ([False, True, False, True], 3.0, 4, in_parts)
    cases += ([False] * 4, 7.0, 3, on_devices), ([False, False, True, True], 3.5, 4, on_devices)
    for where, mean, count, (mapped, options) in cases:
        step = nnlearn.make_step(loss, tx, **options)
        step = step if mapped is None else mapped(step)
        state, info = trained(step, tx, [with_nan(where)], jnp.ones(2), model_state=start)
        assert (float(state.model_state["mean"]), int(state.model_state["count"])) == (mean, count)
        assert (state.model_state["key"] == start["key"]) == (count == 3)
        assert np.isfinite(info.loss)


def test_a_line_search_on_a_batch_without_valid_examples_sees_0():
    values = []

    def update(updates, state, params=None, *, value_fn, **extra_args):
        values.append(value_fn(params))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for microbatches in (1, 2):
        step = nnlearn.make_step(line_loss, tx, microbatches=microbatches)
        step(nnlearn.init_state(jnp.ones(2), tx), with_nan([False] * 4))
    assert values == [0.0, 0.0]


@pytest.mark.parametrize("microbatches", [1, 4])
def test_model_state_is_updated_and_equals_that_of_the_whole_batch(microbatches):
    """Running statistics, and a count that stays an integer."""

    def loss(params, batch, key, model_state):
        mean = jnp.mean(batch.examples.inputs, axis=0)
        new = {"mean": 0.9 * model_state["mean"] + 0.1 * mean, "count": model_state["count"] + 1}
        return loss_fn(params, batch, key), {"norm": jnp.linalg.norm(mean)}, new

    tx = nnlearn.sgd(0.1)
    start = {"mean": jnp.zeros(6), "count": jnp.zeros([], jnp.int32)}
    batches = [make_batch(16, seed=seed) for seed in range(3)]
    state, info = trained(nnlearn.make_step(loss, tx, microbatches=microbatches), tx, batches, model_state=start)
    expected = np.zeros(6)
    for batch in batches:
        expected = 0.9 * expected + 0.1 * np.mean(batch.examples.inputs, axis=0)
    np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5, atol=1e-7)
    assert state.model_state["count"].dtype == jnp.int32 and int(state.model_state["count"]) == 3
    assert info.aux["norm"] > 0
    with pytest.raises(ValueError, match=r"init_state\(params, tx, model_state=...\)"):
        nnlearn.make_step(loss, tx)(nnlearn.init_state(MODEL.init(jax.random.key(0)), tx), batches[0])
    with pytest.raises(TypeError, match=r"must return \(loss, aux, model_state\)"):
        bad = nnlearn.make_step(lambda params, batch, key, model_state: 0.0, tx)
        bad(nnlearn.init_state(MODEL.init(jax.random.key(0)), tx, model_state=start), batches[0])
    with pytest.raises(ValueError, match=r"'mean' has shape \(7,\)"):
        other = lambda p, b, k, model_state: (loss_fn(p, b, k), None, model_state | {"mean": jnp.zeros(7)})  # noqa: E731
        nnlearn.make_step(other, tx)(
            nnlearn.init_state(MODEL.init(jax.random.key(0)), tx, model_state=start), batches[0]
        )


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float16])
def test_a_policy_computes_in_low_and_stores_in_high_precision(compute):
    seen = []

    def loss(params, batch, key, hparams):
        seen.append((params["output"]["kernel"].dtype, batch.examples.inputs.dtype, batch.examples.targets.dtype))
        return loss_fn(params, batch, key) * hparams

    policy = nnlearn.Policy(compute=compute)
    tx = nnlearn.dynamic_loss_scale(nnlearn.adam(0.01))
    step = nnlearn.make_step(policy.wrap(loss), tx, hparams=1.0)
    batches = [make_batch(32, seed=seed) for seed in range(60)]
    state, info = trained(step, tx, batches)
    assert seen[0][:2] == (compute, compute) and jnp.issubdtype(seen[0][2], jnp.integer)
    assert state.params["output"]["kernel"].dtype == info.loss.dtype == jnp.float32
    plain, exact = trained(nnlearn.make_step(loss_fn, nnlearn.adam(0.01)), nnlearn.adam(0.01), batches)
    np.testing.assert_allclose(info.loss, exact.loss, rtol=0.02)
    np.testing.assert_allclose(info.grad_norm, exact.grad_norm, rtol=0.05)
    assert policy.cast_params(state.params)["output"]["kernel"].dtype == jnp.float32
    with pytest.raises(TypeError, match="compute"):
        nnlearn.Policy(compute=jnp.int8).wrap(loss_fn)


def test_loss_scaling_prevents_underflow_in_float16():
    """The gradient 1e-8 underflows in float16; scaled by 2 ** 15 it does not."""

    def loss(params, batch, key):
        for factor in batch:
            params = jax.lax.reduce_precision(params.astype(jnp.float16) * factor, 5, 10)  # XLA may not round
        return jnp.sum(params)

    params, factors = jnp.ones(4), jnp.full(2, 1e-4, jnp.float16)
    plain = nnlearn.make_step(loss, nnlearn.sgd(1.0))
    scaled_tx = nnlearn.dynamic_loss_scale(nnlearn.sgd(1.0))
    scaled = nnlearn.make_step(loss, scaled_tx)
    _, lost = trained(plain, nnlearn.sgd(1.0), [factors], params)
    _, info = trained(scaled, scaled_tx, [factors], params)
    assert lost.grad_norm == 0 and lost.loss == info.loss  # the recorded loss is not scaled
    np.testing.assert_allclose(info.grad_norm, 2e-8, rtol=0.2)


def test_an_overflow_is_skipped_and_the_scale_recovers():
    """Compared with the rule in Python: halve and skip on an overflow, double after three good steps."""
    tx = nnlearn.dynamic_loss_scale(nnlearn.sgd(0.5), initial_scale=8.0, growth_interval=3)
    params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
    gradients = [1.0, 1.0, 1.0, np.inf, 1.0, np.nan, 1.0, 1.0, 1.0, 1.0]
    scale, good, skipped, value = 8.0, 0, 0, 1.0
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(jnp.array([gradient]), state, params)
        params = optax.apply_updates(params, updates)
        if np.isfinite(gradient):
            good, value = good + 1, value - 0.5
            if good == 3:
                scale, good = 2 * scale, 0
        else:
            scale, good, skipped = scale / 2, 0, skipped + 1
        assert (float(state.loss_scale), int(state.good_steps), int(state.skipped)) == (scale, good, skipped)
        assert float(params[0]) == value
    assert nnlearn.current_loss_scale(nnlearn.chain(nnlearn.clip(1.0), tx).init(params)) == 8.0
    assert nnlearn.current_loss_scale(nnlearn.sgd(0.1).init(params)) is None
    with pytest.raises(ValueError, match="factor"):
        nnlearn.dynamic_loss_scale(nnlearn.sgd(0.1), factor=1.0)


def test_the_scale_changes_no_result_without_overflow():
    tx, batches = nnlearn.adam(0.01), [make_batch(16, seed=seed) for seed in range(5)]
    expected, _ = trained(nnlearn.make_step(loss_fn, tx), tx, batches)
    scaled_tx = nnlearn.dynamic_loss_scale(tx, growth_interval=2)
    for options in ({}, {"microbatches": 4}):
        state, _ = trained(nnlearn.make_step(loss_fn, scaled_tx, **options), scaled_tx, batches)
        close(state.params, expected.params, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_average_is_the_weighted_mean_of_all_parameters(packed):
    decay, tx = 0.8, nnlearn.chain(nnlearn.adam(0.05), nnlearn.average_params(0.8))
    step = jax.jit(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state(MODEL.init(jax.random.key(0)), tx, packed=packed)
    seen = []
    for seed in range(6):
        state, _ = step(state, make_batch(16, seed=seed))
        seen.append(np.asarray(state.params["output"]["kernel"], np.float64))
    weights = decay ** np.arange(len(seen))[::-1]
    expected = sum(weight * kernel for weight, kernel in zip(weights, seen, strict=True)) / weights.sum()
    average = nnlearn.packing.unpack(nnlearn.averaged_params(state.opt_state))
    np.testing.assert_allclose(average["output"]["kernel"], expected, rtol=1e-5)
    reference = optax.ema(decay, debias=True)
    memory = reference.init(jnp.zeros_like(seen[0]))
    for kernel in seen:
        value, memory = reference.update(jnp.asarray(kernel, jnp.float32), memory)
    np.testing.assert_allclose(average["output"]["kernel"], value, rtol=1e-5)
    with pytest.raises(ValueError, match="0 averages"):
        nnlearn.averaged_params(nnlearn.adam(0.1).init(jnp.zeros(1)))


@pytest.mark.parametrize("microbatches", [1, 8])
def test_the_noise_scale_is_recorded_and_equals_the_known_one(microbatches):
    """Examples x ~ N(1, 4) in 10 dimensions and the loss |p - x|^2 / 2 at p = 0: noise 40, signal 10."""
    tx = nnlearn.sgd(0.0)

    def loss(params, batch, key):
        return 0.5 * jnp.mean(jnp.sum((params[None, :] - batch) ** 2, axis=-1))

    step = jax.jit(nnlearn.make_step(loss, tx, record=("noise_scale",), microbatches=microbatches))
    state = nnlearn.init_state(jnp.zeros(10), tx)
    noise, signal = [], []
    for seed in range(200):
        batch = 1 + 2 * jax.random.normal(jax.random.key(seed), (64, 10))
        _, info = step(state, batch)
        noise.append(float(info.noise_scale.noise))
        signal.append(float(info.noise_scale.signal))
    for values, truth in ((noise, 40.0), (signal, 10.0)):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(len(values))
    assert info.grad_norm is None

    scaled = nnlearn.dynamic_loss_scale(tx)  # the noise scale does not depend on the loss scale
    step = nnlearn.make_step(loss, scaled, record=("noise_scale",), microbatches=microbatches)
    _, with_scale = jax.jit(step)(nnlearn.init_state(jnp.zeros(10), scaled), batch)
    np.testing.assert_allclose(with_scale.noise_scale, info.noise_scale, rtol=1e-4)


@pytest.mark.slow
def test_the_gradient_function_may_be_replaced():
    tx, batch = nnlearn.sgd(0.1), make_batch(16, 12)

    def clipped(loss_fn):
        return nnlearn.clipped_value_and_grad(loss_fn, clip_norm=0.1)

    state, info = trained(nnlearn.make_step(loss_fn, tx, value_and_grad=clipped), tx, [batch])
    assert 0 < info.grad_norm <= 0.1 + 1e-6  # the mean of twelve vectors no longer than 0.1
    norms = nnlearn.per_example_norms(loss_fn, MODEL.init(jax.random.key(0)), batch, jax.random.key(0))
    assert (np.asarray(norms)[~np.asarray(batch.where)] == 0).all() and float(norms.max()) > 0.1
    in_parts, _ = trained(nnlearn.make_step(loss_fn, tx, value_and_grad=clipped, microbatches=2), tx, [batch])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), in_parts.params, state.params)


def test_a_loss_may_take_hyperparameters():
    def loss(params, batch, key, hparams):
        return hparams["weight"] * loss_fn(params, batch, key)

    tx, batch = nnlearn.sgd(1.0), make_batch(16)
    one, _ = trained(nnlearn.make_step(loss, tx, hparams={"weight": 0.5}), tx, [batch])
    two, _ = trained(nnlearn.make_step(loss_fn, nnlearn.sgd(0.5)), tx, [batch])
    close(one.params, two.params)
