"""Transformations: compared with optax, in every dtype, and in edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import make_noise, make_params, relative_error

import nnlearn
from nnlearn.train.step import recorded_learning_rate
from nnlearn.transforms.clipping import unitwise_norm

KEY = jax.random.key(7)

PAIRS = {
    "clip": lambda lib: lib.clip(0.2),
    "clip_by_block_rms": lambda lib: lib.clip_by_block_rms(0.2),
    "clip_by_global_norm": lambda lib: lib.clip_by_global_norm(0.5),
    "clip_by_global_norm-loose": lambda lib: lib.clip_by_global_norm(1e6),
    "adaptive_grad_clip": lambda lib: lib.adaptive_grad_clip(0.05, eps=0.2),
    "adaptive_grad_clip-axis": lambda lib: lib.adaptive_grad_clip(0.05, axis=()),
    "centralize": lambda lib: lib.centralize(),
    "add_noise": lambda lib: lib.add_noise(0.3, 0.6, key=KEY),
    "add_decayed_weights": lambda lib: lib.add_decayed_weights(0.3),
    "add_decayed_weights-mask": lambda lib: lib.add_decayed_weights(0.3, {"w": True, "b": False, "s": True}),
    "add_decayed_weights-schedule": lambda lib: lib.add_decayed_weights(lambda count: 0.1 / (1 + count)),
    "freeze": lambda lib: lib.freeze({"w": True, "b": False, "s": False}),
    "scale": lambda lib: lib.scale(-0.3),
    "scale_by_learning_rate": lambda lib: lib.scale_by_learning_rate(0.3),
    "scale_by_learning_rate-up": lambda lib: lib.scale_by_learning_rate(0.3, flip_sign=False),
    "scale_by_schedule": lambda lib: lib.scale_by_schedule(lambda count: 0.3 / (1 + count)),
    "scale_by_trust_ratio": lambda lib: lib.scale_by_trust_ratio(0.1, 0.5, 0.01),
    "scale_by_sign": lambda lib: lib.scale_by_sign(),
    "scale_by_lion-smooth": lambda lib: lib.scale_by_lion(0.8, 0.9, mode="smooth", smooth_beta=2.0),
    "scale_by_lion-refined": lambda lib: lib.scale_by_lion(0.8, 0.9, mode="refined"),
    "trace": lambda lib: lib.trace(0.8, nesterov=True),
    "ema": lambda lib: lib.ema(0.8),
    "ema-biased": lambda lib: lib.ema(0.8, debias=False),
    "scale_by_adam": lambda lib: lib.scale_by_adam(0.8, 0.9, 1e-3, 1e-3),
    "scale_by_rms": lambda lib: lib.scale_by_rms(0.8, 1e-3, 0.2, False, True),
    "scale_by_stddev": lambda lib: lib.scale_by_stddev(0.8, 1e-3, 0.2, False, True),
    "scale_by_yogi": lambda lib: lib.scale_by_yogi(0.8, 0.9, 1e-3, 1e-3, 0.2),
    "apply_if_finite": lambda lib: lib.apply_if_finite(lib.trace(0.9), 2),
    "MultiSteps": lambda lib: lib.MultiSteps(lib.scale_by_adam(), 2, accumulator_dtype=float).gradient_transformation(),
    "MultiSteps-sum": lambda lib: lib.MultiSteps(lib.trace(0.9), 3, False, None, float).gradient_transformation(),
    "inject_hyperparams": lambda lib: lib.inject_hyperparams(lib.scale_by_adam)(b1=0.8, eps=1e-3),
}


def updates_over(tx, params, noise):
    """The updates of every step, stacked."""
    return jax.lax.scan(lambda state, g: tx.update(g, state, params)[::-1], tx.init(params), noise)[1]


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=lambda dtype: dtype.__name__)
def test_updates_equal_those_of_optax(make, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, noise = make_params(dtype), make_noise(6, dtype)
        ours = jax.jit(functools.partial(updates_over, make(nnlearn)))(params, noise)
        theirs = jax.jit(functools.partial(updates_over, make(optax)))(params, noise)
        tolerance = 1e-6 if dtype == jnp.float32 else 1e-12
        for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert relative_error(left, right) <= tolerance


LOW = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: dtype.__name__)
def test_a_transformation_keeps_the_dtype_of_the_updates(make, dtype):
    params, noise = make_params(dtype), make_noise(3, dtype)
    tx = make(nnlearn)
    updates = jax.jit(functools.partial(updates_over, tx))(params, noise)
    for update in jax.tree.leaves(updates):
        assert bool(jnp.all(jnp.isfinite(update)))
    if not isinstance(tx, nnlearn.MultiSteps):  # which passes its float32 mean on
        assert all(update.dtype == dtype for update in jax.tree.leaves(updates))


@pytest.mark.slow
def test_unitwise_norms_of_kernels():
    for shape in ((), (4,), (2, 3), (2, 3, 4), (2, 2, 3, 4), (1, 2, 2, 3, 4)):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        theirs = optax.transforms.unitwise_norm(x)
        np.testing.assert_allclose(unitwise_norm(x), theirs, rtol=1e-6)
    with pytest.raises(ValueError, match="axis"):
        unitwise_norm(jnp.ones((2,) * 6))


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_moment_dtypes_are_independent_and_do_not_change(name):
    tx = nnlearn.adam(0.1, **{name: jnp.bfloat16})
    params = make_params()
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    moments = {"mu_dtype": state[0].mu, "nu_dtype": state[0].nu}
    for other, moment in moments.items():
        assert moment["w"].dtype == (jnp.bfloat16 if other == name else jnp.float32)


def test_second_moments_of_complex_parameters_are_real():
    params = make_params(jnp.complex64)
    state = nnlearn.adam(0.1).init(params)[0]
    assert state.nu["w"].dtype == jnp.float32 and state.mu["w"].dtype == jnp.complex64


def test_parameters_are_the_rounded_independent_master_copy():
    tx = nnlearn.adamw(1e-3, master_dtype=jnp.float32)
    params = make_params(jnp.bfloat16)
    state = tx.init(params)
    for seed in range(10):
        gradient = jax.tree.map(lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape, p.dtype), params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for param, master in zip(jax.tree.leaves(params), jax.tree.leaves(state.master), strict=True):
            assert param.dtype == jnp.bfloat16 and master.dtype == jnp.float32
            np.testing.assert_array_equal(param, master.astype(jnp.bfloat16))
    same = jnp.ones(3)
    assert nnlearn.sgd(0.1, master_dtype=jnp.float32).init(same).master is not same
    donated = jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))
    donated(same, nnlearn.sgd(0.1, master_dtype=jnp.float32).init(same))


def test_master_dtype_needs_parameters_and_values():
    tx = nnlearn.sgd(0.1, master_dtype=jnp.float32)
    with pytest.raises(ValueError, match="master_dtype"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match="master_dtype"):
        tx.init(jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(TypeError, match="master_dtype"):
        nnlearn.sgd(0.1, master_dtype=jnp.int32)


def test_a_weight_changed_by_the_user_updates_its_master_copy():
    tx = nnlearn.sgd(0.5, master_dtype=jnp.float32)
    params = jnp.ones(2, jnp.bfloat16)
    state = tx.init(params)
    updates, state = tx.update(jnp.ones(2, jnp.bfloat16), state, params)
    params = optax.apply_updates(params, updates) * jnp.array([3.0, 1.0], jnp.bfloat16)
    updates, state = tx.update(jnp.ones(2, jnp.bfloat16), state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), [1.0, 0.0])

    scaled = nnlearn.chain(nnlearn.sgd(1.0, master_dtype=jnp.float32), nnlearn.scale(0.25))
    params, state = jnp.ones(1, jnp.bfloat16), scaled.init(jnp.ones(1, jnp.bfloat16))
    for _ in range(4):
        updates, state = scaled.update(jnp.ones(1, jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, [0.0])


def test_arithmetic_is_as_wide_as_the_state():
    with jax.enable_x64(True):
        tx = nnlearn.trace(1.0, accumulator_dtype=jnp.float64)
        state = tx.init(jnp.zeros(1, jnp.float32))
        for gradient in (1e8, 1.0, 1.0):
            _, state = tx.update(jnp.array([gradient], jnp.float32), state)
        assert float(state.trace[0]) == 100000002.0


def test_radam_with_a_low_threshold_is_momentum_until_the_root_is_real():
    tx = nnlearn.scale_by_radam(threshold=3.0)
    updates = updates_over(tx, make_params(), make_noise(8))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


def test_bounds_may_be_infinite():
    huge = jnp.array([1e19, -3.0])
    for tx in (nnlearn.clip(jnp.inf), nnlearn.clip_by_global_norm(jnp.inf)):
        np.testing.assert_array_equal(tx.update(huge, tx.init(huge))[0], huge)


def test_integer_hyperparameters_become_floats():
    tx = nnlearn.inject_hyperparams(nnlearn.sgd)(learning_rate=1)
    state = nnlearn.set_hyperparams(tx.init(jnp.zeros(1)), learning_rate=0.5)
    assert float(tx.update(jnp.ones(1), state)[0][0]) == -0.5
    counted = nnlearn.inject_hyperparams(nnlearn.sgd)(learning_rate=jnp.array(1))
    with pytest.raises(ValueError, match="cannot hold"):
        nnlearn.set_hyperparams(counted.init(jnp.zeros(1)), learning_rate=0.5)


def test_conditionals_keep_shardings():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
        for tx in (nnlearn.MultiSteps(nnlearn.adam(0.1), 2), nnlearn.apply_if_finite(nnlearn.adam(0.1), 2)):
            updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
            assert updates.shape == (4,)


NEEDY = [nnlearn.add_decayed_weights, nnlearn.adaptive_grad_clip, nnlearn.scale_by_trust_ratio]


@pytest.mark.parametrize("make", NEEDY)
def test_errors_name_missing_parameters(make):
    tx = make(0.1)
    with pytest.raises(ValueError, match=make.__name__):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


BAD = [
    ("b2", lambda: nnlearn.adam(0.1, b2=1.0)),
    ("b1", lambda: nnlearn.adam(0.1, b1=jnp.array(-0.1))),
    ("learning_rate", lambda: nnlearn.sgd(-0.1)),
    ("learning_rate", lambda: nnlearn.sgd(np.float64("nan"))),
    ("learning_rate", lambda: nnlearn.sgd(jnp.ones(3))),
    ("mu_dtype", lambda: nnlearn.adam(0.1, mu_dtype="int8")),
    ("max_norm", lambda: nnlearn.clip_by_global_norm(-1.0)),
    ("threshold", lambda: nnlearn.clip_by_block_rms(0.0)),
    ("mode", lambda: nnlearn.scale_by_lion(mode="soft")),
    ("every_k_schedule", lambda: nnlearn.MultiSteps(nnlearn.sgd(0.1), 0)),
    ("every_k_schedule", lambda: nnlearn.MultiSteps(nnlearn.sgd(0.1), 2.5)),
    ("'no'", lambda: nnlearn.freeze({"body": "no"})),
    ("max_consecutive_errors", lambda: nnlearn.apply_if_finite(nnlearn.sgd(0.1), -1)),
    ("static_args", lambda: nnlearn.inject_hyperparams(nnlearn.adam, static_args="b3")),
    ("key", lambda: nnlearn.add_noise(0.1, 0.1, key=1, seed=2)),
    ("step_size_fn", lambda: nnlearn.scale_by_schedule(0.1)),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=[f"{name}-{index}" for index, (name, _) in enumerate(BAD)])
def test_errors_name_bad_arguments(name, make):
    with pytest.raises((ValueError, TypeError), match=name):
        make()


def test_tracers_are_not_checked():
    jax.jit(lambda rate, b2: nnlearn.adam(rate, b2=b2).init(jnp.ones(2)))(-1.0, 2.0)


# Gradient accumulation


def test_a_bare_state_can_be_donated():
    for tx in (nnlearn.MultiSteps(nnlearn.amsgrad(0.1), 2), nnlearn.apply_if_finite(nnlearn.yogi(0.1), 2)):
        state = tx.init(make_params())
        jax.jit(lambda s: jax.tree.map(lambda leaf: leaf, s), donate_argnums=0)(state)


def test_accumulation_equals_the_mean_gradient():
    tx = nnlearn.MultiSteps(nnlearn.adam(0.1), 3)
    plain = nnlearn.adam(0.1)
    params, gradients = make_params(), make_noise(9)
    state, plain_state = tx.init(params), plain.init(params)
    update = jax.jit(tx.update)
    for index in range(9):
        change, state = update(jax.tree.map(lambda g, i=index: g[i], gradients), state, params)
        assert bool(tx.has_updated(state)) == (index % 3 == 2)
        if index % 3 != 2:
            assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(change))
            continue
        mean = jax.tree.map(lambda g, i=index: jnp.mean(g[i - 2 : i + 1], axis=0), gradients)
        expected, plain_state = plain.update(mean, plain_state, params)
        for left, right in zip(jax.tree.leaves(change), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
    assert update._cache_size() == 1
    assert int(state.gradient_step) == 3


def test_accumulation_is_a_transformation_like_any_other():
    tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), 2)
    assert isinstance(tx, nnlearn.GradientTransformationExtraArgs)
    assert tx.gradient_transformation() is tx
    assert tx == nnlearn.MultiSteps(nnlearn.sgd(1.0), 2) != nnlearn.MultiSteps(nnlearn.sgd(1.0), 3)
    assert jax.tree.map(lambda part: part, tx) == tx
    chained = optax.chain(nnlearn.clip(1.0), tx)
    state = chained.init(jnp.zeros(1))
    for expected in (0.0, -1.0):
        change, state = chained.update(jnp.array([5.0]), state)
        assert float(change[0]) == expected


def test_accumulation_by_schedule_tracer_and_vmap():
    tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), lambda step: jnp.where(step < 1, 1, 3))
    assert tx.inner_opt == nnlearn.sgd(1.0)
    state, ran = tx.init(jnp.zeros(1)), []
    for _ in range(7):
        _, state = tx.update(jnp.ones(1), state)
        ran.append(bool(tx.has_updated(state)))
    assert ran == [True, False, False, True, False, False, True]

    def emitted(every):
        tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), every)
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(())), jnp.arange(1.0, 7.0))[1]

    many = jax.vmap(emitted)(jnp.array([1, 2, 3]))
    np.testing.assert_allclose(many, [[-1, -2, -3, -4, -5, -6], [0, -1.5, 0, -3.5, 0, -5.5], [0, 0, -2, 0, 0, -5]])


def test_a_skipped_mini_step_adds_nothing():
    tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), 2, should_skip_update_fn=nnlearn.skip_not_finite)
    state, emitted = tx.init(jnp.zeros(1)), []
    for gradient in (1.0, jnp.nan, 3.0):
        change, state = jax.jit(tx.update)(jnp.array([gradient]), state)
        emitted.append(float(change[0]))
    assert emitted == [0.0, 0.0, -2.0]
    large = functools.partial(nnlearn.skip_large_updates, max_squared_norm=4.0)
    assert [bool(large(jnp.array([x]), 0, None)[0]) for x in (1.0, 2.0, jnp.nan)] == [False, True, True]
    with pytest.raises(ValueError, match="should_skip_update_fn"):
        nnlearn.MultiSteps(nnlearn.sgd(1.0), 2, should_skip_update_fn=lambda *a: (1.0, ())).update(
            jnp.ones(1), nnlearn.MultiSteps(nnlearn.sgd(1.0), 2).init(jnp.ones(1))
        )


def test_accumulation_of_low_precision_gradients_is_float32():
    tx = nnlearn.MultiSteps(nnlearn.sgd(1.0), 256)
    gradient = jnp.full(1, 1 + 1 / 128, jnp.bfloat16)
    state = jax.lax.fori_loop(0, 255, lambda _, s: tx.update(gradient, s)[1], tx.init(gradient))
    change, _ = tx.update(gradient, state)
    np.testing.assert_allclose(float(change[0]), -(1 + 1 / 128), rtol=1e-6)


# Guard


def test_a_non_finite_step_is_skipped_until_the_limit():
    tx = nnlearn.apply_if_finite(nnlearn.trace(0.9), max_consecutive_errors=2)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
    for gradient, expected, total in ((1.0, 1.0, 0), (jnp.inf, 0.0, 1), (jnp.nan, 0.0, 2), (1.0, 1.9, 2)):
        change, state = update(jnp.array([gradient]), state)
        np.testing.assert_allclose(change, [expected], rtol=1e-6)
        assert int(state.total_notfinite) == total
    for _ in range(3):
        change, state = update(jnp.array([jnp.nan]), state)
    assert np.isnan(change[0])


# Hyper-parameters in the state


def test_hyperparameters_are_found_and_set_wherever_they_are():
    params = make_params()
    tx = nnlearn.chain(
        nnlearn.inject_hyperparams(nnlearn.clip_by_global_norm)(max_norm=1.0),
        nnlearn.inject_hyperparams(nnlearn.adamw, static_args="eps")(0.1, mask={"w": True, "b": False, "s": False}),
    )
    state = tx.init(params)
    assert set(nnlearn.get_hyperparams(state)) == {"max_norm", "learning_rate", "b1", "b2", "eps_root", "weight_decay"}
    changed = nnlearn.set_hyperparams(state, max_norm=2.0, learning_rate=0.5)
    assert nnlearn.get_hyperparams(changed)["max_norm"] == 2.0
    assert jax.tree.map(jax.typeof, changed) == jax.tree.map(jax.typeof, state)
    with pytest.raises(ValueError, match=r"'eps'.*learning_rate"):
        nnlearn.set_hyperparams(state, eps=1.0)
    with pytest.raises(ValueError, match="inject_hyperparams"):
        nnlearn.set_hyperparams(nnlearn.adam(0.1).init(params), learning_rate=1.0)


def test_a_mask_function_is_not_a_schedule():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = nnlearn.inject_hyperparams(nnlearn.adamw)(
        0.1, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)
    with pytest.raises(ValueError, match="weight_decay was taken for a schedule"):
        nnlearn.inject_hyperparams(nnlearn.adamw)(0.1, weight_decay=lambda step: {"w": 0.1}).init(params)
    with pytest.raises(ValueError, match="learning_rate has shape"):
        nnlearn.set_hyperparams(tx.init(params), learning_rate=jnp.ones(3))


def test_injected_hyperparameters_equal_plain_ones():
    params, noise = make_params(), make_noise(5)
    plain = updates_over(nnlearn.adamw(0.1, b1=0.8, weight_decay=0.2), params, noise)
    inside = updates_over(nnlearn.inject_hyperparams(nnlearn.adamw)(0.1, b1=0.8, weight_decay=0.2), params, noise)
    for left, right in zip(jax.tree.leaves(inside), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=1e-6)  # 1 - b2 in float32 has four digits


def test_stateful_schedules_of_optax_keep_their_state():
    class Halving:
        def init(self):
            return jnp.array(1.0)

        def update(self, state, **extra_args):
            return state / 2

        def __call__(self, state, **extra_args):
            return state

    tx = nnlearn.inject_hyperparams(nnlearn.sgd)(learning_rate=Halving())
    state, rates = tx.init(jnp.zeros(1)), []
    for _ in range(3):
        change, state = tx.update(jnp.ones(1), state)
        rates.append(float(change[0]))
    assert rates == [-1.0, -0.5, -0.25]


def test_noise_without_a_key_warns():
    with pytest.warns(UserWarning, match="key"):
        nnlearn.add_noise(0.1, 0.5)


def test_explicit_defaults_are_the_same_settings():
    assert nnlearn.adam(0.1) == nnlearn.adam(learning_rate=0.1, b1=0.9)
    assert hash(nnlearn.adam(0.1)) == hash(nnlearn.adam(0.1, 0.9))


def test_repr_names_the_settings():
    assert repr(nnlearn.adam(0.1, b1=0.8).init) == "adam(learning_rate=0.1, b1=0.8).init"
    assert "MultiSteps" in repr(nnlearn.MultiSteps(nnlearn.sgd(0.1), 2).update)


def test_optax_tools_read_the_state():
    params = make_params()
    tx = nnlearn.adam(0.1)
    state = tx.init(params)
    assert optax.tree.get(state, "count") == 0
    assert jax.tree.structure(optax.tree.get(state, "mu")) == jax.tree.structure(params)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert bool(jnp.all(doubled[0].mu["w"] == 1)) and doubled[0].count == 0
    from_optax = (optax.adam(0.1).init(params)[0], state[1])  # moments are optax's own state class
    assert jax.tree.structure(from_optax) == jax.tree.structure(state)


@pytest.mark.parametrize("answer", [jnp.zeros(2, bool), jnp.int32(0)], ids=["two", "an integer"])
def test_the_skip_decision_is_one_boolean(answer):
    tx = nnlearn.MultiSteps(nnlearn.sgd(0.1), 2, should_skip_update_fn=lambda updates, step, params: (answer, ()))
    state = tx.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="must return a boolean scalar first"):
        tx.update(jnp.ones(2), state, jnp.zeros(2))


REFUSED = {
    "scale": (lambda: nnlearn.scale(jnp.nan), "step_size"),
    "scale_by_stddev": (lambda: nnlearn.scale_by_stddev(decay=1.5), "decay"),
    "temperature": (lambda: nnlearn.ntxent(jnp.eye(2), jnp.arange(2), temperature=jnp.inf), "temperature"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_for_a_bad_value_names_the_argument(name):
    function, argument = REFUSED[name]
    with pytest.raises(ValueError, match=argument):
        function()


def test_weights_do_not_decay_by_default():
    params = jnp.ones(2)
    tx = nnlearn.add_decayed_weights()
    np.testing.assert_array_equal(tx.update(params, tx.init(params), params)[0], params)


@pytest.mark.parametrize("make", [nnlearn.scale_by_adam, nnlearn.scale_by_adamax, nnlearn.scale_by_belief])
def test_the_first_moment_has_the_requested_dtype(make):
    assert make(mu_dtype=jnp.bfloat16).init(jnp.zeros(2)).mu.dtype == jnp.bfloat16


def test_each_rate_of_a_chain_is_recorded():
    tx = nnlearn.chain(nnlearn.scale_by_learning_rate(0.25), nnlearn.scale_by_learning_rate(0.5))
    np.testing.assert_array_equal(recorded_learning_rate(tx.init(jnp.zeros(1))), [0.25, 0.5])
