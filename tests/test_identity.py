"""Comparison and hashing agree between processes, and do not depend on later changes of the caller's objects."""

import copy
import dataclasses
import functools
import gc
import json
import os
import pickle
import subprocess
import sys
import types
import weakref
from pathlib import Path

import identity_objects as objects
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.programs.fingerprint import program_hash
from nnlearn.settings import comparable, copied

OTHER_PROCESS = """
import json, pickle, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, sys.argv[1])
import identity_objects as objects
import numpy as np
from nnlearn.programs.fingerprint import program_hash
made, states, whole = pickle.load(open(sys.argv[2], "rb"))
wrong = []
for name, fresh in objects.equal_by_settings().items():
    if fresh != made[name] or (not isinstance(fresh, dict) and hash(fresh) != hash(made[name])):
        wrong.append(name)
for name, fresh in objects.states().items():
    same = jax.tree.structure(fresh) == jax.tree.structure(states[name])
    keyless = [tree if name in ("packed", "spread") else tree._replace(key=None) for tree in (fresh, states[name])]
    if not same or any(not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, keyless))):
        wrong.append(name)
run = jax.make_jaxpr(whole["train"])({"rate": 0.1}, jax.random.key(0))
for name in ("mnist", "clicks", "text"):
    jax.eval_shape(whole[name].make_train(steps=2), whole[name].hparams, jax.random.key(0))
print(json.dumps({"wrong": wrong, "run": program_hash(run), "count": len(made) + len(states)}))
"""


@pytest.mark.slow
def test_objects_and_programs_are_equal_in_another_process(tmp_path):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps((objects.equal_by_settings(), objects.states(), objects.whole())))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    env = os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["wrong"] == [] and said["count"] >= 26
    here = jax.make_jaxpr(objects.make_train())({"rate": 0.1}, jax.random.key(0))
    assert said["run"] == program_hash(here)


def test_copies_are_equal():
    for name, made in objects.equal_by_settings().items():
        for again in (copy.copy(made), copy.deepcopy(made)):
            assert again == made, name
    for state in objects.states().values():
        for again in (copy.copy(state), copy.deepcopy(state)):
            assert jax.tree.structure(again) == jax.tree.structure(state)


def test_accumulating_optimizers_with_equal_settings_have_equal_tree_nodes():
    one, other = (nnlearn.MultiSteps(nnlearn.adam(1e-3), count) for count in (2, 3))
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), nnlearn.MultiSteps(nnlearn.adam(1e-3), 2)):
        assert jax.tree.structure({"tx": again}) == jax.tree.structure({"tx": one})
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.map(lambda part: part, one).inner_opt == nnlearn.adam(1e-3)


def test_a_source_archive_and_a_wheel_of_one_package_are_distinguished(monkeypatch):
    from nnlearn.datasets import packages

    monkeypatch.setattr(packages, "_once", lambda name, fetch: name)
    names = {packages.unpack_python_package("a", f"a-1.0{ending}", "00") for ending in (".whl", ".tar.gz")}
    assert len(names) == 2


def test_custom_tree_nodes_are_copied_and_nnx_graphs_are_not():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=[])
    @dataclasses.dataclass
    class Mask:
        w: bool

    mask = Mask(True)
    kept = copied(mask)
    mask.w = False
    assert kept.w is True
    nnx = pytest.importorskip("flax.nnx")

    class Shared(nnx.Module):
        def __init__(self):
            self.one = nnx.Param(jnp.ones(2))
            self.other = self.one

    module = Shared()
    assert copied({"net": module})["net"] is module


def test_a_lambda_among_the_settings_does_not_pickle():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(nnlearn.sgd(lambda step: 0.1))


class Held:
    """A schedule with an attribute that its hash does not include."""

    def __init__(self, rate):
        self.rate = rate

    def at(self, step):
        return self.rate


def test_packed_states_of_a_custom_node_class_survive_pickling():
    equinox = pytest.importorskip("equinox")

    class Net(equinox.Module):
        w: jax.Array
        b: jax.Array
        name: str = equinox.field(static=True, default="net")

    state = nnlearn.init_state(Net(jnp.ones(2), jnp.ones(3)), nnlearn.adam(1e-3), packed=True)
    assert jax.tree.structure(copy.deepcopy(state)) == jax.tree.structure(state)
    assert copy.deepcopy(state.stored.layout) is state.stored.layout


CHANGES = {
    "dict": ({"w": True}, lambda mask: mask.update(w=False)),
    "nested": ({"w": [True]}, lambda mask: mask["w"].__setitem__(0, False)),
    "array": ({"w": np.array(True)}, lambda mask: mask["w"].__setitem__(..., False)),
}


@pytest.mark.parametrize("kind", ["dict", "nested", "array"])
def test_changing_a_mask_afterwards_has_no_effect(kind):
    mask, change = copy.deepcopy(CHANGES[kind][0]), CHANGES[kind][1]
    like = copy.deepcopy(mask)
    params = jax.tree.map(lambda _: jnp.ones(2), mask)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params):
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    first = nnlearn.adamw(0.1, weight_decay=1.0, mask=mask)
    change(mask)
    again, changed = (nnlearn.adamw(0.1, weight_decay=1.0, mask=tree) for tree in (like, mask))
    assert first == again and first != changed
    for tx, expected in ((first, -0.1), (again, -0.1), (changed, 0.0)):  # -rate * decay * 1 where the mask is True
        (update,) = jax.tree.leaves(step(tx, params))
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_containers_of_the_caller_are_copied():
    table, names, seen = np.arange(3.0), ["a"], {"x"}

    @comparable
    def factory(table, names, seen, at):
        return lambda: (float(table[0]), list(names), set(seen), at.keywords["k"][0], float(at.args[0][0]))

    at = functools.partial(print, table, k=[1])
    made = factory(table, names, seen, at)
    same = factory(table.copy(), ["a"], {"x"}, functools.partial(print, table.copy(), k=[1]))
    table[0], names[0], at.keywords["k"][0] = 5.0, "b", 2
    seen.add("y")
    assert made() == (0.0, ["a"], {"x"}, 1, 0.0)
    assert made == same != factory(table, names, seen, at)


def test_mutable_objects_are_not_equal_to_others():
    held = Held(0.1)
    assert nnlearn.sgd(held.at) != nnlearn.sgd(held.at)  # held.rate may have changed since
    table = {0: 0.1}
    assert nnlearn.sgd(table.get) != nnlearn.sgd(table.get)
    tx = nnlearn.sgd(held.at)
    assert tx == tx and hash(tx) == hash(tx)
    assert nnlearn.sgd(objects.batch_fn) == nnlearn.sgd(objects.batch_fn)
    assert nnlearn.sgd(jax.nn.relu) == nnlearn.sgd(jax.nn.relu)


@pytest.mark.parametrize("static", [(), "b1"])
def test_injected_factories_accept_arguments_of_any_name(static):
    tx = nnlearn.inject_hyperparams(objects.with_options, static_args=static)(0.1, b1=0.5, nesterov=True)
    plain = nnlearn.adam(0.1, b1=0.5, nesterov=True)
    state = tx.init(jnp.zeros(1))
    assert set(state.hyperparams) == {"learning_rate"} | ({"b1"} if not static else set())
    grad = jnp.array([2.0])
    expected, plain_state = plain.update(grad, plain.init(jnp.zeros(1)))
    update, state = tx.update(grad, state)
    np.testing.assert_allclose(update, expected, rtol=1e-6)
    state = nnlearn.set_hyperparams(state, learning_rate=0.2)
    np.testing.assert_allclose(tx.update(grad, state)[0], 2 * plain.update(grad, plain_state)[0], rtol=1e-6)

    def product(*rates):
        return nnlearn.sgd(rates[0] * rates[1])

    tx = nnlearn.inject_hyperparams(product)(0.5, 0.25)
    state = tx.init(jnp.zeros(1))
    assert list(state.hyperparams) == ["rates[0]", "rates[1]"]
    np.testing.assert_allclose(tx.update(jnp.ones(1), state)[0], [-0.125])
    with pytest.raises(ValueError, match="static_args names"):
        nnlearn.inject_hyperparams(nnlearn.adam, static_args="beta")


def test_no_global_cache_holds_the_closure_of_a_factory():
    class Table:
        pass

    def use(through):
        table = Table()
        table.values = np.full(100, 0.1)

        def factory(learning_rate=0.1):
            return nnlearn.sgd(learning_rate * table.values[0])

        through(factory, table)
        return weakref.ref(table)

    uses = [
        lambda factory, _: nnlearn.inject_hyperparams(factory)(0.1).init(jnp.zeros(1)),
        lambda factory, _: comparable(factory)(0.2),
        lambda _, table: nnlearn.sgd(lambda step: table.values[0]).init(jnp.zeros(1)),
        lambda _, table: nnlearn.generated(lambda key, step: table.values),
        lambda _, table: nnlearn.pack({"a": jnp.asarray(table.values)}),
    ]
    kept = [use(through) for through in uses]
    gc.collect()
    assert [ref() is None for ref in kept] == [True] * len(uses)


class TestFlax:
    def test_packed_and_plain_states_can_read_each_other_s_files(self):
        serialization = pytest.importorskip("flax.serialization")
        tx = nnlearn.adamw(1e-2)
        params = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
        plain, packed = (nnlearn.init_state(params, tx, 3, packed=form) for form in (False, True))
        packed = packed._replace(stored=jax.tree.map(lambda leaf: leaf + 1, packed.stored))
        assert set(serialization.to_state_dict(packed)["stored"]) == {"w", "b"}
        written = serialization.to_bytes(packed)
        for target in (packed, plain):
            read = serialization.from_bytes(target, written)
            assert jax.tree.structure(read) == jax.tree.structure(target)
            np.testing.assert_array_equal(read.params["w"], np.arange(4.0) + 1)
            assert jnp.array_equal(jax.random.key_data(read.key), jax.random.key_data(packed.key))
            assert jax.random.key_impl(read.key) == jax.random.key_impl(packed.key)
        back = serialization.from_bytes(packed, serialization.to_bytes(plain))
        np.testing.assert_array_equal(back.params["w"], np.arange(4.0))

    def test_a_state_of_another_tree_is_refused(self):
        serialization = pytest.importorskip("flax.serialization")
        one, other = (nnlearn.pack({"w": jnp.ones(size), "b": jnp.ones(2)}) for size in (2, 3))
        with pytest.raises(ValueError, match="'w' has shape"):
            serialization.from_state_dict(one, serialization.to_state_dict(other))


@pytest.mark.slow
def test_exported_steps_and_runs_accept_packed_states():
    pytest.importorskip("flatbuffers")
    from jax import export

    tx = nnlearn.MultiSteps(nnlearn.adamw(1e-2), 2)
    state = nnlearn.init_state(objects.PARAMS, tx, packed=True)
    step = jax.jit(nnlearn.make_step(objects.loss_fn, tx))
    read = export.deserialize(export.export(step)(state, jnp.ones(())).serialize())
    expected, got = step(state, jnp.ones(())), read.call(state, jnp.ones(()))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    np.testing.assert_array_equal(got[0].params["w"], expected[0].params["w"])
    run = jax.jit(objects.make_train())
    read = export.deserialize(export.export(run)({"rate": 0.1}, jax.random.key(0)).serialize())
    (end, trace), expected = read.call({"rate": 0.1}, jax.random.key(0)), run({"rate": 0.1}, jax.random.key(0))
    assert trace.rules == ("patience(train_loss)",)
    np.testing.assert_array_equal(end.params["w"], expected[0].params["w"])


def test_a_layout_can_be_rebuilt_from_plain_values():
    layout = nnlearn.pack(objects.PARAMS, labels={"w": True, "b": "True", "more": (3, None)}).layout
    facts = json.loads(json.dumps(layout.describe()))
    from nnlearn.packing.layout import layout_of

    assert layout_of(layout.treedef, facts) is layout


class TestProgramHash:
    def test_the_hash_depends_on_constants_operations_and_types(self):
        def of(function, *args):
            return program_hash(jax.make_jaxpr(function)(*args))

        table = np.arange(3.0, dtype=np.float32)
        hashes = {
            of(lambda x: x * 2.0, 1.0),
            of(lambda x: x * 3.0, 1.0),
            of(lambda x: x + 2.0, 1.0),
            of(lambda x: x * 2.0, jnp.ones(2)),
            of(lambda x: x + table, 1.0),
            of(lambda x: x + table[::-1], 1.0),
            of(lambda x, y: x - y, 1.0, 2.0),
            of(lambda x, y: y - x, 1.0, 2.0),
            of(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x), 1.0),
            of(lambda x: jax.lax.cond(x > 0, jnp.cos, jnp.sin, x), 1.0),
            of(lambda x: jax.lax.scan(lambda c, a: (c * a, None), x, table)[0], 1.0),
            of(lambda x: jax.lax.scan(lambda c, a: (c * a, None), x, table + 1)[0], 1.0),
            of(jax.nn.relu, 1.0),
            of(jax.nn.relu6, 1.0),
            of(lambda key: jax.random.normal(key), jax.random.key(0)),
            of(lambda key: jax.random.normal(key), jax.random.key(0, impl="rbg")),
        }
        assert len(hashes) == 16
        assert of(lambda x: x + table, 1.0) == of(lambda y: y + table.copy(), 2.0)  # names have no effect

    def test_the_hash_of_host_functions_depends_on_code_and_closure(self):
        def trace(scale, double=False):
            held = types.SimpleNamespace(scale=[scale])

            def on_host(x):
                return np.asarray(x) * held.scale[0]

            def twice(x):
                return 2 * on_host(x)

            shape = jax.ShapeDtypeStruct((), jnp.float32)
            return program_hash(
                jax.make_jaxpr(lambda x: jax.pure_callback(twice if double else on_host, shape, x))(jnp.float32(1))
            )

        assert trace(1.0) == trace(1.0)
        assert len({trace(1.0), trace(2.0), trace(1.0, double=True)}) == 3


def test_a_wrapper_of_another_factory_s_function_has_its_own_identity():
    @comparable
    def inner(value):
        return lambda: value

    @comparable
    def outer(value):
        return inner(value)

    assert outer(1) == outer(1) != inner(1)
    assert repr(outer(1)) == "outer(value=1)"
