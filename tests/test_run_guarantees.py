"""Guarantees of a whole run: exact sums, effects that occur once, states of one check, averages at any time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import nnlearn
from nnlearn.packing import is_packed
from nnlearn.stream.dispatch import make_block
from nnlearn.sums import long_sum, zero_total
from nnlearn.sweeps import choice, successive_halving, sweep
from nnlearn.train.step import Skips

SEEN: list = []


def note(value, ordered=True):
    """Send a value to the host while a program runs."""
    io_callback(lambda seen: SEEN.append(np.asarray(seen).tolist()), None, value, ordered=ordered)


def seen_by(function, *args):
    """The values that the host received while a function ran."""
    SEEN.clear()
    jax.block_until_ready(function(*args))
    jax.effects_barrier()
    return list(SEEN)


def counting():
    return nnlearn.generated(lambda key, step: step.astype(jnp.float32))


def square(params, batch, key):
    return jnp.mean((params - batch) ** 2)


# Sums


@pytest.mark.parametrize("term", [0.1, 2500.3])
def test_a_sum_of_ten_million_terms_is_exact(term):
    count, right = 10_000_000, float(np.float32(term)) * 10_000_000
    one_by_one = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, total: total.plus(x), zero_total()).value)
    np.testing.assert_allclose(float(one_by_one(jnp.float32(term))), right, rtol=1e-7)
    np.testing.assert_allclose(float(jax.jit(long_sum)(jnp.full(count, term, jnp.float32))), right, rtol=1e-7)


def test_a_long_sum_equals_that_of_float64():
    terms = np.random.default_rng(0).normal(size=(100_000, 2)).astype(np.float32) * 1e3
    right = terms.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(jax.jit(long_sum)(terms), right, rtol=3e-7)
    assert np.abs(np.cumsum(terms[:, 0])[-1] - right[0]) > 1e-6 * np.abs(right[0])  # the case distinguishes them
    last = jax.lax.scan(lambda total, term: (total.plus(term), None), zero_total(), terms[:, 0])[0]
    np.testing.assert_allclose(last.value, right[0], rtol=3e-7)
    np.testing.assert_array_equal(long_sum(jnp.array([[1.0, jnp.inf], [jnp.inf, -jnp.inf]])), [np.inf, np.nan])
    assert float(zero_total().plus(jnp.float32(jnp.inf)).plus(jnp.float32(1.0)).value) == np.inf
    assert long_sum(jnp.full(3, 60_000, jnp.float16)) == 180_000
    np.testing.assert_array_equal(jax.grad(lambda x: long_sum(x) ** 2)(jnp.ones(3)), [6.0, 6.0, 6.0])


@pytest.mark.parametrize("dtype, value", [(jnp.float16, 2500.0), (jnp.bfloat16, 0.703125)])
def test_the_mean_of_low_precision_losses_is_accurate(dtype, value):
    tx, rule = nnlearn.sgd(0.0), nnlearn.diverged()

    def loss_fn(params, batch, key):
        return params.astype(dtype) + 0 * jnp.sum(batch).astype(dtype)

    train = nnlearn.make_train(loss_fn, tx, counting(), jnp.array(value), steps=90, check_every=45, stop=rule)
    step = nnlearn.make_step(loss_fn, tx, microbatches=2)
    state, batches = nnlearn.init_state(jnp.array(value), tx), [np.zeros(2, np.float32)] * 90
    result = nnlearn.fit(step, state, batches, check_every=45, stop=rule, progress=False)
    for trace in (jax.jit(train)({}, 0)[1], result.trace):
        assert trace.stopped_by == "all steps"
        np.testing.assert_array_equal(trace.metrics["train_loss"], [value, value])
    evaluate = nnlearn.evaluation(lambda params, batch: {"loss": loss_fn(params, batch.where, None)}, jnp.ones(90), 2)
    assert evaluate(jnp.array(value)) == {"loss": value}


def test_the_mean_over_a_million_steps_is_accurate():
    def loss_fn(params, batch, key):
        return params

    tx, count = nnlearn.sgd(0.0), 1 << 20
    block = make_block(nnlearn.make_step(loss_fn, tx, record=()))
    carry = nnlearn.init_state(jnp.array(0.1), tx), zero_total(), Skips(jnp.int32(0), jnp.int32(0)), {}
    (_, total, *_), _ = block(carry, jnp.zeros(count, bool), None, count)
    np.testing.assert_allclose(float(total.value) / count, np.float32(0.1), rtol=1e-7)
    train = nnlearn.make_train(
        loss_fn, tx, counting(), jnp.array(0.1), steps=count, record=(), record_every=1024, check_every=count
    )
    np.testing.assert_allclose(jax.jit(train)({}, 0)[1].metrics["train_loss"], [np.float32(0.1)], rtol=1e-7)


# Effects


def loud(params, batch, key):
    note(jnp.sum(batch))
    return square(params, batch, key)


def test_effects_occur_once_a_step_and_in_order():
    tx, start = nnlearn.adam(0.1), jnp.zeros(())
    right = [float(step) for step in range(7)]
    state = nnlearn.init_state(start, tx)
    for check_every in (3, 7):  # with and without a remainder
        train = nnlearn.make_train(
            loud, tx, counting(), start, steps=7, check_every=check_every, stop=nnlearn.diverged()
        )
        assert seen_by(jax.jit(train), {}, 0) == right
    step, batches = nnlearn.make_step(loud, tx), [np.full(2, step / 2, np.float32) for step in range(7)]
    for dispatch in (1, 3):
        fit = functools.partial(nnlearn.fit, step, state, batches, steps_per_dispatch=dispatch, progress=False)
        assert [float(value) for value in seen_by(lambda fit=fit: fit().state)] == right
    halves = nnlearn.make_step(loud, tx, microbatches=2)
    half = [value / 2 for value in right for _ in range(2)]
    assert seen_by(lambda: nnlearn.fit(halves, state, batches, progress=False).state) == half


def test_effects_of_checks_batches_and_schedules_occur_once():
    def told(what, value):
        io_callback(lambda _: SEEN.append(what), None, value, ordered=True)
        return value

    rule = nnlearn.StopRule("r", lambda: (), lambda state, metrics, step: (state, told("rule", step) < 0))
    batches = nnlearn.generated(lambda key, step: told("batch", step).astype(jnp.float32))
    train = nnlearn.make_train(
        square,
        nnlearn.sgd(lambda count: 0.1 + 0 * told("schedule", count)),
        batches,
        jnp.zeros(()),
        steps=4,
        check_every=2,
        evaluate=lambda params: {"size": told("evaluate", params)},
        stop=rule,
    )
    of_step = ["batch", "schedule"]
    assert seen_by(jax.jit(train), {}, 0) == ["schedule", *(2 * [*of_step, *of_step, "evaluate", "rule"])]


def test_the_result_of_a_callback_is_not_a_loop_constant():
    rates = iter(np.arange(1, 100, dtype=np.float32) / 100)

    def schedule(count):
        return io_callback(lambda: next(rates), jax.ShapeDtypeStruct((), jnp.float32), ordered=True)

    train = nnlearn.make_train(square, nnlearn.sgd(schedule), counting(), jnp.zeros(()), steps=5)
    state, trace = jax.jit(train)({}, 0)
    np.testing.assert_allclose(trace.info.learning_rate, [0.02, 0.03, 0.04, 0.05, 0.06], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(state.opt_state)[-1], 0.06, rtol=1e-6)


def test_loop_constants_have_the_values_of_the_last_iteration():
    """A rate computed from hyper-parameters, and its derivative, with a loss that has an effect."""
    train = nnlearn.make_train(loud, lambda h: nnlearn.sgd(jnp.sin(h)), counting(), jnp.zeros(()), steps=3)
    state, trace = jax.jit(train)(0.3, 0)
    rate = nnlearn.train.step.recorded_learning_rate(state.opt_state)
    np.testing.assert_allclose([rate, *trace.info.learning_rate], np.sin(0.3), rtol=1e-6)
    quiet = nnlearn.make_train(square, lambda h: nnlearn.sgd(jnp.sin(h)), counting(), jnp.zeros(()), steps=3)
    rate_of = jax.jit(lambda h: nnlearn.train.step.recorded_learning_rate(quiet(h, 0)[0].opt_state))
    np.testing.assert_allclose(jax.grad(rate_of)(0.3), np.cos(0.3), rtol=1e-6)


def test_a_sweep_has_the_effects_of_each_run_once():
    def loss_fn(params, batch, key):
        note(batch)
        return square(params, batch, key)

    train = nnlearn.make_train(loss_fn, lambda h: nnlearn.sgd(h["rate"]), counting(), jnp.zeros(()), steps=2)
    space = {"rate": choice(0.1, 0.2, 0.3)}
    results = []

    def run():
        results.append(sweep(train, space, seeds=2, metric="train_loss", width=2, workers=2))
        return ()

    assert seen_by(run) == [0.0, 1.0] * 6 and results[0].done.all()
    quiet = nnlearn.make_train(square, lambda h: nnlearn.sgd(h["rate"]), counting(), jnp.zeros(()), steps=2)
    side_by_side = sweep(quiet, space, seeds=2, metric="train_loss")
    np.testing.assert_allclose(results[0].values("train_loss"), side_by_side.values("train_loss"), rtol=1e-6)


def test_per_example_gradients_do_not_repeat_effects():
    def loss_fn(params, batch, key):
        loss = square(params, batch, key)
        jax.debug.callback(lambda size: SEEN.append(int(size)), jnp.sum(batch))
        return loss, 2 * loss

    tx, batch = nnlearn.sgd(0.1), jnp.arange(4.0)
    state = nnlearn.init_state(jnp.zeros(()), tx)
    recorded = jax.jit(nnlearn.make_step(loss_fn, tx, record=("noise_scale",)))
    assert seen_by(recorded, state, batch) == [6]
    quiet = nnlearn.make_step(square, tx, record=("noise_scale",))(state, batch)[1].noise_scale
    np.testing.assert_allclose(recorded(state, batch)[1].noise_scale.scale, quiet.scale, rtol=1e-5)
    clipped = nnlearn.clipped_value_and_grad(loss_fn, clip_norm=1e6)
    assert seen_by(jax.jit(clipped), jnp.zeros(()), batch, jax.random.key(0)) == [6]
    (loss, aux), grads = clipped(jnp.zeros(()), batch, jax.random.key(0))
    np.testing.assert_allclose([loss, aux, grads], [3.5, 7.0, -3.0], rtol=1e-6)


# One age


def averaging():
    """A run whose average is best after 20 steps; later batches make it worse."""
    tx = nnlearn.chain(nnlearn.adam(0.1), nnlearn.average_params(0.5))
    batches = nnlearn.generated(lambda key, step: jnp.where(step < 20, 1.0, 5.0))

    def evaluate(params, opt_state):
        return {"miss": (nnlearn.averaged_params(opt_state) - 1.0) ** 2}

    make = functools.partial(nnlearn.make_train, square, tx, batches, jnp.zeros(()), check_every=4, evaluate=evaluate)
    return tx, make


def test_a_run_ends_with_the_whole_state_of_its_best_check():
    tx, make = averaging()
    rule = nnlearn.patience("miss", 3)
    state, trace = jax.jit(make(steps=40, stop=rule))({}, 0)
    best = int(trace.best_step)
    assert best < int(trace.stop_step) < 40 and float(trace.metrics["miss"][best // 4 - 1]) == np.nanmin(
        trace.metrics["miss"]
    )
    shorter, _ = jax.jit(make(steps=best))({}, 0)
    assert int(state.step) == best
    jax.tree.map(np.testing.assert_array_equal, state._replace(key=None), shorter._replace(key=None))
    assert (state.key == shorter.key).all()

    batches = [np.full(1, 1.0 if step < 20 else 5.0, np.float32) for step in range(40)]
    start = nnlearn.init_state(jnp.zeros(()), tx, packed=False)
    evaluate = make(steps=4).evaluate
    result = nnlearn.fit(
        nnlearn.make_step(square, tx), start, batches, check_every=4, evaluate=evaluate, stop=rule, progress=False
    )
    assert int(result.trace.best_step) == int(result.state.step) == best
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        (state.stored, state.opt_state),
        (result.state.stored, result.state.opt_state),
    )


def test_halving_ends_with_the_whole_state_of_the_best_check():
    _, make = averaging()
    rule = nnlearn.keep_best("miss")
    train = make(steps=40, stop=lambda hparams: [rule])
    halving = successive_halving(
        train, [{"seed": 0}, {"seed": 1}, {"seed": 2}], metric="miss", rungs=[(3, 20), (1, 40)]
    )
    alone, trace = jax.jit(train)({"seed": 0}, 0)
    assert int(halving.state.step) == int(trace.best_step) < 40
    average, right = (nnlearn.averaged_params(state.opt_state) for state in (halving.state, alone))
    np.testing.assert_allclose(average, right, rtol=1e-5)


# Averages and parameters as trees


def many(leaves):
    return {f"layer_{at}": jnp.full((2, 1 + at % 3), 1.0 + at) for at in range(leaves)}


@pytest.mark.parametrize("leaves", [2, 20])
def test_averages_work_for_any_tree_and_at_any_time(leaves):
    params = many(leaves)
    tx = nnlearn.chain(nnlearn.apply_if_finite(nnlearn.adam(0.1), 5), nnlearn.average_params(0.9))
    state = nnlearn.init_state(params, tx)
    assert is_packed(state.stored) == (leaves == 20)
    jax.tree.map(np.testing.assert_array_equal, nnlearn.averaged_params(state.opt_state), params)
    step = jax.jit(nnlearn.make_step(lambda p, b, k: sum(jnp.sum(leaf * b) for leaf in jax.tree.leaves(p)), tx))
    total, weight = jax.tree.map(jnp.zeros_like, params), 0.0
    for _ in range(3):
        state, _ = step(state, jnp.ones(()))
        total = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, total, state.params)
        weight = 0.9 * weight + 0.1
    average = nnlearn.averaged_params(state.opt_state)
    jax.tree.map(lambda one, sum: np.testing.assert_allclose(one, sum / weight, rtol=1e-5), average, total)

    other = state.with_params(average)
    assert is_packed(other.stored) == is_packed(state.stored)
    jax.tree.map(np.testing.assert_array_equal, other.params, average)
    jax.tree.map(np.testing.assert_array_equal, other.opt_state, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.with_params(nnlearn.pack(average)).params, average)
    assert int(step(other, jnp.ones(()))[0].step) == 4 and step._cache_size() == 1


def test_an_average_of_vmapped_runs():
    train = nnlearn.make_train(
        square,
        lambda rate: nnlearn.chain(nnlearn.sgd(rate), nnlearn.average_params(0.5)),
        counting(),
        jnp.ones(2),
        steps=2,
    )
    rates = jnp.array([0.0, 0.1, 0.2])
    states, _ = jax.jit(jax.vmap(train, in_axes=(0, None)))(rates, 0)
    average, run = nnlearn.averaged_params(states.opt_state), jax.jit(train)
    alone = [nnlearn.averaged_params(run(rate, 0)[0].opt_state) for rate in rates]
    np.testing.assert_allclose(average, alone, rtol=1e-6)
    assert states.with_params(average).params.shape == (3, 2)


@pytest.mark.parametrize("leaves", [2, 20])
def test_replaced_parameters_must_match(leaves):
    state, params = nnlearn.init_state(many(leaves), nnlearn.sgd(0.1)), many(leaves)
    cases = [
        (params | {"more": jnp.ones(1)}, ValueError, "'more'"),
        (params | {"layer_1": None}, ValueError, "'layer_1'"),
        (params | {"layer_1": jnp.ones((2, 7))}, ValueError, r"'layer_1' has shape \(2, 7\)"),
        (params | {"layer_1": jnp.ones((2, 2), jnp.bfloat16)}, TypeError, "'layer_1' is bfloat16"),
    ]
    for other, error, words in cases:
        with pytest.raises(error, match=words):
            state.with_params(other)
    given = jax.tree.map(jnp.copy, params)
    donated = nnlearn.jit_step(nnlearn.make_step(lambda p, b, k: jnp.sum(p["layer_0"]), nnlearn.sgd(0.1)))
    donated(state.with_params(given), 0)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
