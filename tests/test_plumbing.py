"""``from_kernel`` with factored state, stacks of whole leaves, schedules, shared values and any state class."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import nnlearn
from nnlearn.packing import is_packed, pack, pack_like, unpack
from nnlearn.transforms.storage import Cast


def random_tree(shapes, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}


SHAPES = {"a": (4, 3), "b": (3,), "c": (4, 3), "d": (2, 5), "s": (), "u": (5,), "z": (4, 3)}


class Sums(NamedTuple):
    rows: object
    steps: jax.Array
    total: jax.Array
    columns: object


def row_and_column_sums(**options):
    """Each element plus the accumulated sums of its row and column, which the state has in an unusual order."""

    def kernel(g, rows, columns, *, rate, total):
        if g.ndim != 2:
            return g * rate + total, rows, columns
        rows, columns = rows + jnp.sum(g, 1), columns + jnp.sum(g, 0)
        return rate * (g + rows[:, None] + columns[None]) + total, rows, columns

    def per_step(count, *, total, updates, **_):
        leaves = jax.tree.leaves(updates)
        return {"total": total + sum(jnp.sum(leaf) for leaf in leaves)}

    return nnlearn.from_kernel(
        kernel,
        Sums,
        {
            "rows": nnlearn.Slot(shape=lambda shape: shape[:1] if len(shape) == 2 else (1,)),
            "columns": nnlearn.Slot(fill=0.5, shape=lambda shape: shape[1:] if len(shape) == 2 else (1,)),
        },
        {"rate": lambda step: 1.0 / (1 + step)},
        per_step,
        counters=("steps",),
        shared={"total": 0.0},
        whole_leaf=True,
        **options,
    )


@pytest.mark.parametrize("form", ["leaves", "stacked", "packed"])
def test_factored_state_shared_values_and_schedules(form):
    tx, params = row_and_column_sums(stack_equal=form == "stacked"), random_tree(SHAPES)
    params = pack(params) if form == "packed" else params
    state, update = tx.init(params), jax.jit(tx.update)
    assert jax.tree.map(jnp.shape, unpack(state.rows))["d"] == (2,)
    assert jax.tree.map(jnp.shape, unpack(state.columns)) == {
        "a": (3,), "b": (1,), "c": (3,), "d": (5,), "s": (1,), "u": (1,), "z": (3,)
    }  # fmt: skip
    rows, columns, total = np.zeros(4), np.full(3, 0.5), 0.0
    for step in range(3):
        gradient = random_tree(SHAPES, seed=step)
        total += sum(np.sum(np.asarray(leaf, np.float64)) for leaf in gradient.values())
        given = pack_like(params.layout, gradient) if form == "packed" else gradient
        updates, state = update(given, state)
        g = np.asarray(gradient["c"], np.float64)
        rows, columns = rows + g.sum(1), columns + g.sum(0)
        expected = (g + rows[:, None] + columns) / (1 + step) + total
        np.testing.assert_allclose(unpack(updates)["c"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(unpack(updates)["s"], np.asarray(gradient["s"]) / (1 + step) + total, rtol=1e-5)
    np.testing.assert_allclose(unpack(state.rows)["c"], rows, rtol=1e-5, atol=1e-6)
    assert int(state.steps) == 3 and is_packed(state.rows) is (form == "packed")


@pytest.mark.parametrize("stack_equal", [False, True])
def test_packing_of_whole_leaf_kernels_is_proven(stack_equal):
    assert nnlearn.packing_difference(row_and_column_sums(stack_equal=stack_equal), random_tree(SHAPES)) == ""


def test_init_accepts_shapes():
    tx, params = row_and_column_sums(), random_tree(SHAPES)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert jax.tree.map(jax.typeof, tx.init(shapes)) == jax.tree.map(jax.typeof, tx.init(params))


def test_errors_name_wrong_shapes_of_factored_state():
    tx, params = row_and_column_sums(), random_tree(SHAPES)
    with pytest.raises(ValueError, match="'d'.*state.rows"):
        tx.update(params | {"d": jnp.ones((3, 5))}, tx.init(params))
    packed = pack(params)
    with pytest.raises(ValueError, match=r"state\.rows and updates must be packed alike"):
        tx.update(packed, tx.init(params))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Momentum:
    trace: object
    seen: jax.Array


def test_state_may_be_a_dataclass_and_the_state_of_another_transformation_is_refused():
    def kernel(g, trace, *, decay):
        trace = g + decay * trace
        return trace, trace

    tx = nnlearn.from_kernel(kernel, Momentum, {"trace": nnlearn.Slot()}, {"decay": 0.5}, counters=("seen",))
    gradient = jnp.array([1.0])
    update, state = tx.update(gradient, tx.init(gradient))
    update, state = tx.update(gradient, state)
    assert isinstance(state, Momentum) and int(state.seen) == 2 and float(update[0]) == 1.5
    with pytest.raises(ValueError, match="Momentum"):
        tx.update(gradient, optax.TraceState(gradient))


def test_errors_name_faults_of_a_definition():
    def make(**options):
        given = {"slots": {"trace": nnlearn.Slot()}, "hyperparams": {"decay": 0.5}} | options
        return nnlearn.from_kernel(lambda g, trace, *, decay: (g, trace), optax.TraceState, **given)

    with pytest.raises(TypeError, match="TraceState has the fields"):
        make(slots={"momentum": nnlearn.Slot()})
    with pytest.raises(TypeError, match="decay.*schedules.*counts no steps"):
        make(hyperparams={"decay": lambda step: 0.5})
    with pytest.raises(TypeError, match="whole_leaf"):
        make(slots={"trace": nnlearn.Slot(shape=lambda shape: ())})


def test_a_schedule_is_evaluated_once_a_step_from_zero():
    steps = []

    def alpha(step):
        steps.append(step)
        return 2.0 * step

    tx, params = nnlearn.scale_by_ademamix(alpha=alpha), {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state)
    assert [int(step) for step in steps] == [0, 1]


def test_another_storage_works_with_every_method():
    class Half(Cast):
        def encode(self, value, stored, count):
            return super().encode(value / 2, stored, count)

        def decode(self, stored, wide):
            return 2 * super().decode(stored, wide)

    params = random_tree(SHAPES)
    plain, halved = nnlearn.scale_by_adam(), nnlearn.scale_by_adam(mu_dtype=Half())
    states = [tx.init(params) for tx in (plain, halved)]
    for seed in range(3):
        gradient = random_tree(SHAPES, seed)
        (one, states[0]), (other, states[1]) = (
            tx.update(gradient, state) for tx, state in zip((plain, halved), states, strict=True)
        )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_array_equal(states[0].mu["a"], 2 * states[1].mu["a"])


def count_products(function, *arguments):
    """The number of matrix products in a program."""
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


@pytest.mark.parametrize("packed", [False, True])
def test_muon_runs_one_newton_schulz_for_all_equal_matrices(packed):
    params = random_tree({name: (6, 4) for name in "abcdefgh"} | {"i": (4, 4), "j": (6,)})
    params = pack(params) if packed else params
    tx = nnlearn.muon(0.1)
    assert count_products(tx.update, params, tx.init(params), params) == 2 * 3 * 5


def conv_numbers(params):
    def choose(leaf):
        return {4: MuonDimensionNumbers((0, 2), 3), 2: MuonDimensionNumbers()}.get(leaf.ndim)

    return jax.tree.map(choose, params)


@pytest.mark.slow
def test_muon_of_convolutions_packed_and_unpacked():
    params = random_tree({"c": (3, 2, 5, 4), "d": (3, 2, 5, 4), "w": (4, 3), "b": (3,)})
    gradient = random_tree({"c": (3, 2, 5, 4), "d": (3, 2, 5, 4), "w": (4, 3), "b": (3,)}, seed=1)
    settings = {"weight_decay": 0.1, "muon_weight_dimension_numbers": conv_numbers}
    ours, theirs = nnlearn.muon(0.1, **settings), optax.contrib.muon(0.1, **settings)
    assert nnlearn.packing_difference(ours, params) == ""
    expected, _ = theirs.update(gradient, theirs.init(params), params)
    packed = pack(params)
    updates, _ = ours.update(gradient, ours.init(params), params)
    from_packed, _ = ours.update(pack_like(packed.layout, gradient), ours.init(packed), packed)
    for name, value in expected.items():
        np.testing.assert_allclose(updates[name], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(from_packed[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs matrices"):
        nnlearn.scale_by_muon().update(gradient, nnlearn.scale_by_muon().init(params))


def test_lookahead_accepts_gradients_of_fast_or_of_both_parameters():
    tx = nnlearn.lookahead(nnlearn.sgd(1.0), sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced({"w": jnp.zeros(2)})
    state = tx.init(both)
    gradient = {"w": jnp.array([1.0, -1.0])}
    one = tx.update(gradient, state, both)
    other = tx.update(optax.LookaheadParams(gradient, {"w": jnp.zeros(2)}), state, both)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    with pytest.raises(ValueError, match="LookaheadParams.init_synced"):
        tx.update(gradient, state, gradient)
    step = nnlearn.make_step(lambda params, batch, key: jnp.sum((params.fast["w"] - batch) ** 2), tx)
    trained = nnlearn.init_state(both, tx, packed=False)
    for _ in range(4):
        trained, _ = step(trained, jnp.ones(2) * 3.0)
    np.testing.assert_array_equal(trained.params.fast["w"], trained.params.slow["w"])


def test_adafactor_before_its_offset_decays_as_at_the_first_step():
    tx, gradient = nnlearn.scale_by_factored_rms(step_offset=5), jnp.array([4.0])
    update, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(update, [1.0])


@pytest.mark.parametrize("name", ["dion", "soap", "shampoo", "kron", "galore"])
def test_stacks_of_matrices_never_wait_for_each_other_in_the_thread_pool(name):
    """Two calls of LAPACK on batches, at the same time, can block all threads of XLA's pool; single ones do not."""
    options = {"galore": {"rank": 2}}.get(name, {})
    tx, params = getattr(nnlearn, name)(1e-3, **options), nnlearn.pack({"a": jnp.ones((6, 4)), "b": jnp.ones((6, 4))})
    shapes = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, shapes, params).as_text()
    calls = [line for line in text.splitlines() if "custom_call @lapack" in line]
    assert calls and not [line for line in calls if re.search(r"tensor<(\d+x){3,}", line)], calls[:2]
