"""The training step: one function, alone, scanned, vmapped and on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.data import MaskedBatch

WIDTH = 3


def loss_fn(params, batch, key):
    inputs, targets = batch
    errors = inputs @ params["w"] + params["b"] - targets
    return jnp.mean(errors**2), {"worst": jnp.max(jnp.abs(errors))}


def make_batch(size=16, seed=0):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(size, WIDTH)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(inputs @ np.arange(1.0, WIDTH + 1, dtype=np.float32) + 1)


def make_params():
    return {"w": jnp.zeros(WIDTH), "b": jnp.zeros(())}


def assert_trees_close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def numbers(state):
    """A state without its key, which NumPy cannot compare."""
    return state._replace(key=jax.random.key_data(state.key))


def test_a_step_is_gradient_optimizer_update():
    tx = nnlearn.adam(0.1)
    batch = make_batch()
    step = nnlearn.make_step(loss_fn, tx, record=("grad_norm", "update_norm"))
    state, info = step(nnlearn.init_state(make_params(), tx), batch)
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(make_params(), batch, None)
    updates, _ = tx.update(grads, tx.init(make_params()), make_params())
    assert_trees_close(state.params, optax.apply_updates(make_params(), updates))
    assert_trees_close((info.loss, info.aux), (loss, aux))
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(info.update_norm, optax.tree.norm(updates), rtol=1e-6)
    np.testing.assert_allclose(info.learning_rate, 0.1)
    assert int(state.step) == 1


def test_a_step_learns_and_compiles_once():
    tx = nnlearn.adam(nnlearn.cosine_decay_schedule(0.3, 200))
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state(make_params(), tx)
    for index in range(200):
        state, info = step(state, make_batch(seed=index))
    assert step._cache_size() == 1
    np.testing.assert_allclose(state.params["w"], [1.0, 2.0, 3.0], atol=1e-3)
    np.testing.assert_allclose(info.learning_rate, 0.3 * 0.5 * (1 + np.cos(np.pi * 199 / 200)), rtol=1e-3)


def test_donation_consumes_the_state_and_not_the_caller_s_parameters():
    tx, params, key = nnlearn.adam(0.1), make_params(), jax.random.key(0)
    first = nnlearn.init_state(params, tx, key)
    nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))(first, make_batch())
    assert first.params["w"].is_deleted()
    assert not params["w"].is_deleted() and not key.is_deleted()


def test_a_scan_in_two_halves_equals_a_whole_scan_bit_for_bit():
    tx = nnlearn.adamw(1e-2)
    step = nnlearn.make_step(loss_fn, tx)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make_batch(seed=seed) for seed in range(10)])
    start = nnlearn.init_state(make_params(), tx)
    whole, _ = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(start, batches)
    half = jax.jit(lambda s, b: jax.lax.scan(step, s, b))
    middle, _ = half(start, jax.tree.map(lambda leaf: leaf[:5], batches))
    resumed, _ = half(middle, jax.tree.map(lambda leaf: leaf[5:], batches))
    jax.tree.map(np.testing.assert_array_equal, numbers(whole), numbers(resumed))


def test_vmap_over_seeds_and_rates_equals_the_loop():
    batch = make_batch()

    def train(rate, seed):
        tx = nnlearn.adam(rate)
        params = {"w": jax.random.normal(jax.random.key(seed), WIDTH), "b": jnp.zeros(())}
        step = nnlearn.make_step(loss_fn, tx)
        return jax.lax.fori_loop(0, 5, lambda _, state: step(state, batch)[0], nnlearn.init_state(params, tx)).params

    rates, seeds = jnp.array([0.01, 0.1, 0.3]), jnp.array([1, 2, 3])
    together = jax.jit(jax.vmap(train))(rates, seeds)
    for index in range(3):
        alone = jax.jit(train)(rates[index], seeds[index])
        assert_trees_close(jax.tree.map(lambda leaf, i=index: leaf[i], together), alone)


def mapped_steps():
    mesh = lambda: jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))  # noqa: E731

    def shard_map(step, check_vma):
        def mapped(state, batch):
            specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
            return jax.jit(jax.shard_map(step, mesh=mesh(), **specs))(state, batch)

        return mapped

    def over_parts(transform, step):
        def mapped(state, batch):
            parts = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
            return jax.tree.map(
                lambda leaf: leaf[0], transform(step, in_axes=(None, 0), axis_name="data")(state, parts)
            )

        return mapped

    return {
        "shard_map": lambda step: shard_map(step, True),
        "shard_map-unchecked": lambda step: shard_map(step, False),
        "pmap": functools.partial(over_parts, jax.pmap),
        "vmap": functools.partial(over_parts, jax.vmap),
    }


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("mapped", mapped_steps().values(), ids=mapped_steps().keys())
def test_a_step_on_many_devices_equals_that_on_one(mapped, microbatches):
    tx = nnlearn.adam(0.1)
    state, batch = nnlearn.init_state(make_params(), tx), make_batch()
    expected, expected_info = nnlearn.make_step(loss_fn, tx)(state, batch)
    step = nnlearn.make_step(loss_fn, tx, axis_name="data", microbatches=microbatches)
    got, info = mapped(step)(state, batch)
    assert_trees_close(numbers(got), numbers(expected))
    assert_trees_close(info._replace(aux=None), expected_info._replace(aux=None))


def test_a_plain_mean_of_gradients_under_shard_map_would_be_wrong():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    batch = make_batch()

    def naive(params, batch):
        return jax.lax.pmean(jax.grad(lambda p: loss_fn(p, batch, None)[0])(params), "data")

    sharded = jax.shard_map(naive, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(make_params(), batch)
    exact = jax.grad(lambda p: loss_fn(p, batch, None)[0])(make_params())
    np.testing.assert_allclose(sharded["w"], 4 * exact["w"], rtol=1e-5)


def test_a_step_with_microbatches_equals_that_of_the_whole_batch():
    tx = nnlearn.sgd(0.1, momentum=0.9)
    state, batch = nnlearn.init_state(make_params(), tx), make_batch()
    expected, info = nnlearn.make_step(loss_fn, tx)(state, batch)
    got, accumulated = nnlearn.make_step(loss_fn, tx, microbatches=4)(state, batch)
    assert_trees_close(numbers(got), numbers(expected))
    np.testing.assert_allclose(accumulated.loss, info.loss, rtol=1e-6)
    with pytest.raises(ValueError, match=r"microbatches=3"):
        nnlearn.make_step(loss_fn, tx, microbatches=3)(state, batch)
    with pytest.raises(ValueError, match="microbatches"):
        nnlearn.make_step(loss_fn, tx, microbatches=0)


def masked_loss(params, batch, key):
    (inputs, targets), where = batch
    errors = inputs @ params["w"] + params["b"] - targets
    return jnp.mean(errors**2, where=where), jnp.sum(where)


def padded_batch(size, valid):
    return MaskedBatch(make_batch(size), jnp.arange(size) < valid)


@pytest.mark.slow
@pytest.mark.parametrize("valid", [16, 13, 3])
def test_parts_of_a_masked_batch_are_weighted_by_their_valid_examples(valid):
    """With 3 of 16 valid, three of the four parts hold nothing at all."""
    tx = nnlearn.sgd(0.1)
    state, batch = nnlearn.init_state(make_params(), tx), padded_batch(16, valid)
    expected, info = nnlearn.make_step(masked_loss, tx)(state, batch)
    parted = nnlearn.make_step(masked_loss, tx, microbatches=4)(state, batch)
    results = [parted]
    for mapped in mapped_steps().values():
        for microbatches in (1, 2):
            step = nnlearn.make_step(masked_loss, tx, axis_name="data", microbatches=microbatches)
            results.append(mapped(step)(state, batch))
    for got, got_info in results:
        assert_trees_close(numbers(got), numbers(expected))
        np.testing.assert_allclose(got_info.loss, info.loss, rtol=1e-5)
        np.testing.assert_allclose(got_info.grad_norm, info.grad_norm, rtol=1e-5)


def test_an_epoch_with_a_remainder_is_the_same_in_microbatches():
    tx = nnlearn.adam(0.1)
    start = nnlearn.init_state(make_params(), tx)
    whole, parts = (
        nnlearn.make_epoch(nnlearn.make_step(masked_loss, tx, microbatches=count), make_batch(21), batch_size=8)
        for count in (1, 4)
    )
    expected, infos = whole(start, jax.random.key(0))
    got, parted = parts(start, jax.random.key(0))
    assert_trees_close(numbers(got), numbers(expected), rtol=1e-4)
    np.testing.assert_allclose(parted.loss, infos.loss, rtol=1e-4)


def test_a_bad_batch_size_is_named_when_the_epoch_is_built():
    step = nnlearn.make_step(masked_loss, nnlearn.sgd(0.1))
    with pytest.raises(ValueError, match="batch_size"):
        nnlearn.make_epoch(step, make_batch(21), batch_size=0)
    with pytest.raises(ValueError, match="remainder"):
        nnlearn.make_epoch(step, make_batch(21), batch_size=8, remainder="dropp")


def donated_optimizers():
    rate = jnp.float32(0.1)
    return {
        "MultiSteps": nnlearn.MultiSteps(nnlearn.adam(0.1), 2),
        "apply_if_finite": nnlearn.apply_if_finite(nnlearn.adam(0.1), 2),
        "add_noise": nnlearn.chain(nnlearn.add_noise(0.1, 0.5, key=jax.random.key(0)), nnlearn.sgd(0.1)),
        "inject_hyperparams": nnlearn.inject_hyperparams(nnlearn.adamw)(rate, weight_decay=rate),
        "master": nnlearn.adam(0.1, master_dtype=jnp.float32),
        "lbfgs": optax.lbfgs(),
        **{name: getattr(nnlearn.optimizers, name)(rate) for name in ("adamw", "amsgrad", "yogi", "lars", "radam")},
    }


@pytest.mark.parametrize("tx", donated_optimizers().values(), ids=donated_optimizers().keys())
def test_every_state_can_be_donated_and_initialised_again(tx):
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    finals = []
    for _ in range(2):
        state = nnlearn.init_state(make_params(), tx)
        for seed in range(2):
            state, _ = step(state, make_batch(seed=seed))
        finals.append(state.params)
    jax.tree.map(np.testing.assert_array_equal, *finals)


def test_microbatches_of_low_precision_are_summed_in_float32():
    tx = nnlearn.sgd(1.0)
    step = nnlearn.make_step(lambda param, batch, key: jnp.mean(param * batch), tx, microbatches=64)
    batch = jnp.ones(64, jnp.bfloat16).at[0].set(256.0)  # in bfloat16, 256 + 1 is 256
    state, _ = step(nnlearn.init_state(jnp.zeros((), jnp.bfloat16), tx), batch)
    assert state.params == jnp.bfloat16(-(256 + 63) / 64)


def test_microbatches_of_low_precision_keep_the_gradient_s_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
    tx = optax.adam(0.1)
    step = nnlearn.make_step(loss_fn, tx, microbatches=2)
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_batch())
    state, _ = jax.lax.scan(lambda state, _: step(state, batch), nnlearn.init_state(params, tx), length=2)
    assert state.opt_state[0].mu["w"].dtype == jnp.bfloat16


def test_a_line_search_sees_the_loss_that_was_differentiated():
    seen = []

    def update(updates, state, params=None, *, value, value_fn, **extra_args):
        seen.append((value, value_fn(params)))
        return updates, state

    def noisy(params, batch, key):
        return jnp.mean((params["b"] - jax.random.normal(key, batch.shape)) ** 2)

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for microbatches in (1, 4):
        step = nnlearn.make_step(noisy, tx, microbatches=microbatches)
        step(nnlearn.init_state({"b": jnp.array(0.5)}, tx), jnp.zeros(8))
    for value, again in seen:
        np.testing.assert_allclose(value, again, rtol=1e-6)


def test_aux_may_hold_python_numbers():
    tx = nnlearn.sgd(0.1)
    step = nnlearn.make_step(lambda p, b, k: (jnp.mean(p["b"] * b[1]), {"n": 3}), tx, microbatches=2)
    assert step(nnlearn.init_state(make_params(), tx), make_batch())[1].aux["n"] == 3.0


def test_weak_types_compile_once():
    tx = nnlearn.adam(0.1)
    step = nnlearn.jit_step(nnlearn.make_step(lambda p, b, k: jnp.sum(p["a"] ** 2 + p["b"] ** 2), tx))
    state = nnlearn.init_state({"a": jnp.asarray(0.5), "b": 1.0}, tx)
    for _ in range(2):
        state, _ = step(state, None)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_random_numbers_differ_by_step_and_by_device_and_repeat_by_key():
    def draw(params, batch, key):
        return jnp.sum(params**2), jax.random.uniform(key)

    tx = nnlearn.sgd(0.0)
    step = nnlearn.make_step(draw, tx)
    state = nnlearn.init_state(jnp.ones(()), tx, key=3)
    later, first = step(state, jnp.ones(1))
    _, second = step(later, jnp.ones(1))
    assert first.aux != second.aux
    assert first.aux == step(state, jnp.ones(1))[1].aux

    apart = nnlearn.make_step(
        lambda p, b, k: (jnp.sum(p**2), jax.nn.one_hot(b, 4) * jax.random.uniform(k)), tx, axis_name="d"
    )
    _, info = jax.vmap(apart, in_axes=(None, 0), axis_name="d")(state, jnp.arange(4))
    assert len(set(np.asarray(info.aux[0]).tolist())) == 4


@pytest.mark.slow
def test_optax_optimizers_and_line_searches_run_in_the_step():
    for tx in (optax.adam(0.1), optax.lbfgs(), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())):
        step = jax.jit(nnlearn.make_step(loss_fn, tx))
        state = nnlearn.init_state(make_params(), tx)
        losses = []
        for _ in range(5):
            state, info = step(state, make_batch())
            losses.append(float(info.loss))
        assert losses[-1] < losses[0]


def test_the_learning_rate_is_read_wherever_it_is_recorded():
    read = nnlearn.train.step.recorded_learning_rate
    params = make_params()
    assert read(optax.adam(0.1).init(params)) is None
    assert read(nnlearn.inject_hyperparams(nnlearn.adam)(0.1).init(params)) == jnp.float32(0.1)
    assert read(optax.inject_hyperparams(optax.adam)(0.1).init(params)) == jnp.float32(0.1)
    assert read(nnlearn.MultiSteps(nnlearn.sgd(0.1), 2).init(params)) == jnp.float32(0.1)
    parts = nnlearn.partition({"w": nnlearn.sgd(0.1), "b": nnlearn.sgd(0.2)}, {"w": "w", "b": "b"})
    np.testing.assert_allclose(sorted(read(parts.init(params))), [0.1, 0.2])


def test_the_recorded_rate_includes_the_factor_of_a_plateau_rule():
    rule = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    parts = {"w": optax.chain(nnlearn.sgd(0.1), rule), "b": nnlearn.sgd(0.2)}
    cases = {
        "chain": (optax.chain(nnlearn.sgd(0.1), rule), 0.1, 0.05),
        "nested": (optax.chain(optax.chain(nnlearn.sgd(0.1)), optax.chain(optax.identity(), rule)), 0.1, 0.05),
        "injected": (optax.inject_hyperparams(lambda learning_rate: optax.chain(optax.sgd(learning_rate), rule))(0.1),
                     0.1, 0.05),
        "before": (optax.chain(rule, nnlearn.sgd(0.1)), 0.1, 0.1),  # it scales the gradient, not the update
        "parts": (nnlearn.partition(parts, {"w": "w", "b": "b"}), [0.1, 0.2], [0.05, 0.2]),
        "unknown": (optax.chain(optax.sgd(0.1), rule), None, None),
    }  # fmt: skip
    params, grads = {"w": jnp.ones(2), "b": jnp.ones(())}, {"w": jnp.ones(2), "b": jnp.ones(())}
    for name, (tx, first, second) in cases.items():
        state, rates = tx.init(params), []
        for value in (1.0, 1.0):  # the second is no better than the first
            updates, state = tx.update(grads, state, params, value=value)
            rates.append(nnlearn.train.step.recorded_learning_rate(state))
        if first is None:
            assert rates == [None, None]
            continue
        np.testing.assert_allclose(np.sort(np.atleast_1d(rates[0])), first, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(np.sort(np.atleast_1d(rates[1])), second, rtol=1e-6, err_msg=name)
        if name != "before" and name != "parts":
            np.testing.assert_allclose(-updates["w"], rates[1], rtol=1e-6, err_msg=name)


def test_the_key_of_the_state_is_a_copy():
    key = jax.random.key(3)
    state = nnlearn.init_state(make_params(), nnlearn.sgd(0.1), key)
    assert not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(key))
    seeded = nnlearn.init_state(make_params(), nnlearn.sgd(0.1), np.int64(3))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(seeded.key))


def test_errors_name_parameters_that_cannot_be_trained():
    with pytest.raises(TypeError, match=r"'layer/count' is int32"):
        nnlearn.init_state({"layer": {"count": jnp.array(1)}}, nnlearn.sgd(0.1))


def test_the_error_names_the_wrong_arguments_of_a_loss():
    with pytest.raises(TypeError, match=r"\(params, batch, key\).*\(params, batch\)"):
        nnlearn.make_step(lambda params, batch: 0.0, nnlearn.sgd(0.1))


@pytest.mark.parametrize(
    "bad",
    [
        lambda p, b, k: {"loss": 1.0},
        lambda p, b, k: None,
        lambda p, b, k: p["w"],
        lambda p, b, k: jnp.array(1),
        lambda p, b, k: jnp.array(1j),
    ],
)
def test_a_loss_that_is_not_a_real_scalar_is_refused(bad):
    tx = nnlearn.sgd(0.1)
    with pytest.raises(TypeError, match="real scalar"):
        nnlearn.make_step(bad, tx)(nnlearn.init_state(make_params(), tx), make_batch())
