"""Updates that overwrite their arguments without copies: which operations are delayed, and that results are equal."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import CASES
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.programs import in_place as module
from nnlearn.programs import read as read_module
from nnlearn.programs.in_place import in_place
from nnlearn.programs.read import LARGE

SHAPE = (256, LARGE // 256)
ARRAY_BYTES = 4 * LARGE


def updating(tx):
    def update(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


def compiled(update, params, opt_state, grads):
    """The update as a step that donates parameters and state."""
    step = jax.jit(lambda params, opt_state, grads: update(grads, opt_state, params), donate_argnums=(0, 1))
    return step.lower(params, opt_state, grads).compile()


def temporaries(update, tx, params):
    return compiled(update, params, tx.init(params), params).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("library", [nnlearn, optax], ids=["nnlearn", "optax"])
@pytest.mark.parametrize("weights", [1, 3])
def test_lion_needs_no_copy_of_its_momentum(library, weights):
    tx = library.lion(1e-3)
    params = [jnp.zeros(SHAPE)] * weights
    assert temporaries(updating(tx), tx, params) >= ARRAY_BYTES  # otherwise there would be nothing to fix
    assert temporaries(in_place(updating(tx)), tx, params) < 1000


def test_moments_in_bfloat16_need_no_copy():
    tx = nnlearn.adamw(1e-3, mu_dtype=jnp.bfloat16)
    assert temporaries(updating(tx), tx, jnp.zeros(SHAPE)) >= ARRAY_BYTES / 2
    assert temporaries(in_place(updating(tx)), tx, jnp.zeros(SHAPE)) < 1000


def test_adamw_is_not_rewritten():
    tx = nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adamw(1e-3))
    params = {"w": jnp.zeros(SHAPE), "b": jnp.zeros(3)}
    texts = [compiled(update, params, tx.init(params), params).as_text() for update in both(tx)]
    assert texts[0].count(" fusion(") == texts[1].count(" fusion(")


def both(tx):
    return updating(tx), in_place(updating(tx))


def steps_of(update, tx, params, count=20):
    """Parameters and state after some steps on random gradients."""
    random = np.random.default_rng(1)
    draws = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=(count, *leaf.shape)), leaf.dtype), params)

    @jax.jit
    def many(params, draws):
        def step(carry, grads):
            return update(grads, carry[1], carry[0]), None

        return jax.lax.scan(step, (params, tx.init(params)), draws)[0]

    return many(params, draws)


def assert_same(one, other, rtol=0.0):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert first.dtype == second.dtype
        np.testing.assert_allclose(np.asarray(first, np.float64), np.asarray(second, np.float64), rtol=rtol, atol=rtol)


@pytest.fixture
def everything_large(monkeypatch):
    monkeypatch.setattr(read_module, "LARGE", 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_optimizer_gives_the_same_numbers(case, everything_large):
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.linspace(0.5, 1.0, 3)}
    plain, ordered = (steps_of(update, case.ours(**case.varied), params) for update in both(case.ours(**case.varied)))
    assert_same(plain, ordered, 1e-6)


@pytest.mark.parametrize("tx", [nnlearn.lion(1e-2), nnlearn.adadelta(0.1)], ids=["lion", "adadelta"])
def test_packed_parameters_low_precision_and_non_finite_numbers(tx, everything_large):
    params = {"w": jnp.ones((4, 3)), "half": jnp.full(5, 1.5, jnp.bfloat16), "bad": jnp.array([jnp.nan, jnp.inf, 1.0])}
    for form in (lambda tree: tree, nnlearn.pack):
        plain, ordered = (steps_of(update, tx, form(params)) for update in both(tx))
        assert_same(plain, ordered, 1e-6)


def test_under_vmap_and_grad(everything_large):
    def loss(rate, update_of):
        tx = nnlearn.lion(rate, weight_decay=0.1)
        params, _ = steps_of(update_of(tx), tx, {"w": jnp.linspace(-1.0, 1.0, 6)}, count=3)
        return jnp.sum(params["w"] ** 2)

    rates = jnp.array([0.1, 0.2])
    plain, ordered = (
        jax.vmap(jax.value_and_grad(lambda rate: loss(rate, way)))(rates)  # noqa: B023
        for way in (updating, lambda tx: in_place(updating(tx)))
    )
    assert_same(plain, ordered, 1e-6)


def exchange(uses_own):
    """A transformation with two moments that each use the other's old value, or that use a delayed one."""

    def init(params):
        return {"one": jax.tree.map(jnp.zeros_like, params), "two": jax.tree.map(jnp.ones_like, params)}

    def update(updates, state, params=None):
        one, two = state["one"], state["two"]
        new_one = jax.tree.map(lambda two, g: 0.5 * two + g, two, updates)
        new_two = jax.tree.map(lambda one, g: 0.5 * one - g, new_one if uses_own else one, updates)
        return jax.tree.map(lambda one, two: 0.1 * one * two, one, new_two), {"one": new_one, "two": new_two}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("uses_own", [False, True])
def test_results_that_depend_on_each_other(uses_own, everything_large):
    tx, params = exchange(uses_own), jnp.linspace(-1.0, 1.0, 6)
    plain, ordered = (steps_of(update, tx, params) for update in both(tx))
    assert_same(plain, ordered, 1e-6)


def test_values_that_are_returned_unchanged(everything_large):
    """A state that holds a constant, the gradient, or the old parameters."""

    def init(params):
        return {"kept": params, "last": params, "before": params}

    def update(updates, state, params=None):
        return jax.tree.map(jnp.add, updates, state["last"]), {"kept": state["kept"], "last": updates, "before": params}

    tx = optax.GradientTransformation(init, update)
    plain, ordered = (steps_of(way, tx, jnp.linspace(-1.0, 1.0, 6), count=3) for way in both(tx))
    assert_same(plain, ordered)


def test_a_step_on_one_device_avoids_the_copies(monkeypatch):
    tx, batch = nnlearn.lion(1e-3), jnp.ones((2, SHAPE[0]))
    state = nnlearn.init_state({"w": jnp.ones(SHAPE), "b": jnp.ones(3)}, tx)

    def step_bytes():
        step = nnlearn.make_step(lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2), tx)
        return nnlearn.jit_step(step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    several = step_bytes()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert several - step_bytes() > 0.9 * ARRAY_BYTES


def test_programs_with_effects_are_not_rewritten(monkeypatch, capfd):
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def told(step):
        jax.debug.print("once")
        return 0.1

    tx, params = nnlearn.lion(told), jnp.ones(SHAPE)
    state = jax.block_until_ready(tx.init(params))
    jax.effects_barrier()
    capfd.readouterr()
    jax.block_until_ready(jax.jit(lambda p, s: nnlearn.apply_gradients(tx, p, p, s))(params, state))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("once") == 1
    monkeypatch.setattr(module, "in_place", None)  # an analysis would raise
    nnlearn.apply_gradients(tx, params, params, tx.init(params))  # not compiled
    mesh = jax.make_mesh((1,), ("d",))
    over = jax.shard_map(lambda p, s: nnlearn.apply_gradients(tx, p, p, s), mesh=mesh, in_specs=P(), out_specs=P())
    jax.jit(over)(params, tx.init(params))


def test_analysing_the_program_is_fast_with_many_arrays():
    tx = nnlearn.lion(1e-3)
    params = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * 200
    arguments = params, jax.eval_shape(tx.init, params), params
    seconds = []
    for update in both(tx):
        start = time.process_time()
        jax.make_jaxpr(update)(*arguments)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 6 * seconds[0] + 0.5
