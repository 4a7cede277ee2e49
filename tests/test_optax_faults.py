"""Faults of optax, and what nnlearn does in the same case.

Each test checks both. If a newer optax fixes a fault, that half of the test fails and can be removed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import BY_NAME, IN_OPTAX, make_noise, make_params, relative_error, run

import nnlearn


def finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_float16_zero_gradients_give_no_nan():
    def survives(factory):
        params = jnp.array([1.0, -2.0, 0.5], jnp.float16)
        tx = factory(learning_rate=0.01)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jnp.array([0.0, 1e-4, 1.0], jnp.float16), state, params)
            params = optax.apply_updates(params, updates)
        return finite((params, state))

    broken_in_optax = [case.name for case in IN_OPTAX if not survives(case.theirs)]
    assert len(broken_in_optax) >= 8, broken_in_optax
    assert [case.name for case in IN_OPTAX if not survives(case.ours)] == []


@pytest.mark.parametrize(("param_dtype", "grad_dtype"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)])
def test_mixed_dtypes_can_be_scanned(param_dtype, grad_dtype):
    params, noise = make_params(param_dtype), make_noise(3, grad_dtype)

    def scans(factory, numbers):
        try:
            jax.eval_shape(functools.partial(run, factory(**numbers)), params, noise)
        except TypeError as error:
            assert "carry" in str(error) or "branches" in str(error)
            return False
        return True

    stuck = [case.name for case in IN_OPTAX if not scans(case.theirs, case.varied)]
    assert len(stuck) >= 12, stuck
    assert all(scans(case.ours, case.varied) for case in IN_OPTAX)


def test_second_moment_of_bfloat16_parameters_does_not_stall():
    params = jnp.ones(4, jnp.bfloat16)

    def second_moment(tx):
        first = tx.update(jnp.ones(4, jnp.bfloat16), tx.init(params), params)[1]
        small = jnp.full(4, 0.01, jnp.bfloat16)
        last = jax.lax.fori_loop(0, 3000, lambda _, state: tx.update(small, state, params)[1], first)
        return float(optax.tree.get(last, "nu")[0])

    exact = 1e-3 * 0.999**3000 + 1e-4 * (1 - 0.999**3000)
    assert second_moment(optax.scale_by_adam()) > 4 * exact
    np.testing.assert_allclose(second_moment(nnlearn.scale_by_adam()), exact, rtol=1e-2)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "rmsprop", "lamb"])
def test_bfloat16_weights_learn_at_small_rates(name):
    """A bfloat16 weight of 1.0 does not change with a step of 1e-4; a float32 master copy accumulates the steps."""

    def moved(tx):
        params = jnp.ones(100, jnp.bfloat16)

        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jnp.ones_like(params), state, params)
            return optax.apply_updates(params, updates), state

        params, _ = jax.lax.fori_loop(0, 200, step, (params, tx.init(params)))
        return float(jnp.mean(params != 1)), float(params[0])

    case = BY_NAME[name]
    assert moved(case.theirs(learning_rate=1e-4))[0] == 0.0
    share, value = moved(case.ours(learning_rate=1e-4, master_dtype=jnp.float32))
    assert share == 1.0
    if name in ("adam", "sgd"):
        np.testing.assert_allclose(value, 0.98, atol=0.004)


def test_hyperparameters_keep_their_precision_with_bfloat16_parameters():
    params = jnp.ones(3, jnp.bfloat16)
    theirs = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3, b2=0.999)
    state = theirs.init(params)
    assert state.hyperparams["b2"] == 1.0
    assert not finite(theirs.update(params, state, params)[0])

    ours = nnlearn.inject_hyperparams(nnlearn.adam)(learning_rate=1e-3, b2=0.999)
    state = ours.init(params)
    assert all(value.dtype == jnp.float32 for value in state.hyperparams.values())
    updates, after = ours.update(params, state, params)
    assert finite(updates) and after.hyperparams["b2"] == jnp.float32(0.999)
    rescued = nnlearn.inject_hyperparams(optax.adam)(learning_rate=1e-3, b2=0.999)
    assert finite(rescued.update(params, rescued.init(params), params)[0])


def test_a_mask_function_is_not_taken_for_a_schedule():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}

    def matrices(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    def decayed(library):
        tx = library.inject_hyperparams(library.adamw)(0.1, weight_decay=0.5, mask=matrices)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return float(updates["w"][0, 0]), float(updates["b"][0])

    assert decayed(optax) == (0.0, 0.0)  # the mask receives the step count, which is not a matrix
    assert decayed(nnlearn) == pytest.approx((-0.05, 0.0))


def test_equal_optimizers_are_equal_and_a_new_rate_compiles_nothing():
    assert optax.adam(0.1) != optax.adam(0.1)
    assert nnlearn.adam(0.1) == nnlearn.adam(0.1)
    injected = nnlearn.inject_hyperparams(nnlearn.adam)
    assert injected(0.1) == nnlearn.inject_hyperparams(nnlearn.adam)(0.1)
    assert injected(0.1) != injected(0.2)


def count_inner_runs(multi_steps, mini_steps):
    runs = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(None))
        return updates, state

    tx = multi_steps(optax.GradientTransformation(lambda params: optax.EmptyState(), update), 4)
    step = jax.jit(tx.update)
    state = tx.init(jnp.zeros(2))
    for _ in range(mini_steps):
        _, state = step(jnp.ones(2), state)
    jax.effects_barrier()
    return len(runs)


def test_accumulation_runs_the_optimizer_once_every_k():
    assert count_inner_runs(optax.MultiSteps, 8) == 8
    assert count_inner_runs(nnlearn.MultiSteps, 8) == 2


def test_one_nan_gradient_does_not_poison_accumulation():
    def updates_after_nan(multi_steps):
        tx = multi_steps(optax.sgd(1.0), 2)
        state = tx.init(jnp.zeros(1))
        emitted = []
        for gradient in (jnp.nan, 1.0, 2.0, 4.0):
            change, state = tx.update(jnp.array([gradient]), state)
            emitted.append(float(change[0]))
        return emitted

    assert np.isnan(updates_after_nan(optax.MultiSteps)[3])
    np.testing.assert_array_equal(updates_after_nan(nnlearn.MultiSteps)[2:], [0.0, -3.0])


def test_clipping_by_global_norm_is_finite_at_the_edges():
    def clipped(factory, max_norm, values):
        tx = factory(max_norm)
        return np.asarray(tx.update(jnp.array(values), tx.init(jnp.zeros(3)))[0])

    assert np.all(np.isnan(clipped(optax.clip_by_global_norm, 0.0, [0.0, 0.0, 0.0])))
    np.testing.assert_array_equal(clipped(nnlearn.clip_by_global_norm, 0.0, [0.0, 0.0, 0.0]), 0.0)
    assert np.isnan(clipped(optax.clip_by_global_norm, 1.0, [1.0, jnp.inf, 1.0])[1])
    np.testing.assert_allclose(clipped(nnlearn.clip_by_global_norm, 1.0, [1.0, jnp.inf, 1.0]), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(clipped(nnlearn.clip_by_global_norm, 1.0, [0.0, 3e30, 0.0]), [0, 1, 0], atol=1e-12)
    assert np.all(np.isnan(clipped(nnlearn.clip_by_global_norm, 1.0, [1.0, jnp.nan, 1.0])))


def test_clipping_of_bfloat16_uses_a_float32_norm():
    gradient = jnp.full(4096, 1.0, jnp.bfloat16)
    tx = nnlearn.clip_by_global_norm(1.0)
    clipped = tx.update(gradient, tx.init(gradient))[0]
    assert clipped.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(clipped, np.float64), 1 / 64, rtol=1e-2)


def test_meta_gradient_through_adam_at_zero_gradients():
    def final_loss(tx_of_rate, rate):
        tx, params = tx_of_rate(rate), jnp.array([1.0, 0.0])
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(2 * params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    assert np.isnan(jax.grad(lambda rate: final_loss(optax.adam, rate))(0.1))
    slope = jax.grad(lambda rate: final_loss(nnlearn.adam, rate))(0.1)
    width = 1e-3
    difference = (final_loss(nnlearn.adam, 0.1 + width) - final_loss(nnlearn.adam, 0.1 - width)) / (2 * width)
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


def test_replacing_a_rate_by_a_schedule_keeps_the_structure_of_the_state():
    params = make_params()
    schedule = nnlearn.cosine_decay_schedule(0.1, 100)

    def structure(tx):
        return jax.tree.structure(tx.init(params))

    assert structure(optax.adam(0.1)) != structure(optax.adam(schedule))
    assert structure(nnlearn.adam(0.1)) == structure(nnlearn.adam(schedule))
    injected = nnlearn.inject_hyperparams(nnlearn.adamw)
    assert structure(injected(0.1)) == structure(injected(schedule, weight_decay=schedule))
    with pytest.raises(KeyError):
        optax.tree.get(optax.adam(schedule).init(params), "count")  # two counters of one name
    assert optax.tree.get(nnlearn.adam(schedule).init(params), "count") == 0


def test_schedules_share_one_counter():
    tx = nnlearn.inject_hyperparams(nnlearn.adamw)(
        nnlearn.linear_schedule(0.1, 0.0, 10), weight_decay=nnlearn.linear_schedule(0.5, 0.0, 10)
    )
    state = tx.init(jnp.ones(2))
    for _ in range(5):
        _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
    assert int(state.count) == 5
    assert state.hyperparams_states == {}
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.06, rtol=1e-6)
    np.testing.assert_allclose(state.hyperparams["weight_decay"], 0.3, rtol=1e-6)


def test_the_contract_detects_a_wrong_factor():
    """optax's own optimizer tests pass with every update times 1.1; the comparison used here must not."""
    params, noise = make_params(), make_noise(20)
    for case in IN_OPTAX:
        wrong = optax.chain(case.ours(**case.varied), optax.scale(1.0001))
        got = run(wrong, params, noise)[0]
        expected = run(case.theirs(**case.varied), params, noise)[0]
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        assert max(relative_error(left, right) for left, right in pairs) > 3e-6, case.name
