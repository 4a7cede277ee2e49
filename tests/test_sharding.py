"""Placement on meshes: layouts agree with one device, memory is divided, devices communicate as little as possible."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn import models, sharding
from nnlearn.sharding import bytes_per_device, describe, fsdp, make_mesh, place, shard_batch, tensor_parallel, zero

MODEL = models.transformer(32, layers=1, width=16, heads=2, max_length=8)
RNG = np.random.default_rng(0)
BATCHES = [RNG.integers(0, 32, (8, 8)) for _ in range(4)]
ADAMW = nnlearn.adamw(1e-3)
MATRIX = nnlearn.muon(1e-3)


def loss_fn(params, batch, key):
    return nnlearn.cross_entropy(MODEL.apply(params, batch[:, :-1]), batch[:, 1:])


def vector_loss(params, batch, key):
    return jnp.mean((batch @ params["w"] + params["b"][None]) ** 2)


VECTORS = {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)}


@functools.cache
def on_one_device(tx):
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state, losses = nnlearn.init_state(MODEL.init, tx), []
    for batch in BATCHES:
        state, info = step(state, batch)
        losses.append(info.loss)
    return state, np.array(losses)


LAYOUTS = {
    "data": ("data=4", None, {}),
    "fsdp": ("data=4", fsdp(), {}),
    "fsdp packed": ("data=4", fsdp(), {"packed": True}),
    "zero": ("data=4", "zero", {}),
    "zero packed": ("data=4", "zero", {"packed": True}),
    "tensor": ("data=2,model=2", tensor_parallel(), {}),
    "tensor packed": ("data=2,model=2", tensor_parallel(), {"packed": True}),
    "two axes": ("data=2,model=2", fsdp("data", tensor_parallel()), {}),
    "gathered once": ("data=4", fsdp(), {"packed": True, "axis_name": "data"}),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("tx", [ADAMW, MATRIX], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_trajectory_of_one_device(name, tx, explicit):
    axes, rules, options = LAYOUTS[name]
    mesh = make_mesh(axes, explicit=explicit)
    expected, losses = on_one_device(tx)
    if rules == "zero":
        tx, rules = zero(tx, mesh), None
    state = nnlearn.init_state(MODEL.init, tx, mesh=mesh, rules=rules, packed=options.get("packed"))
    axis = options.get("axis_name")
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx, axis_name=axis, mesh=mesh if axis else None), like=state)
    before, found = [leaf.sharding for leaf in jax.tree.leaves(state)], []
    for batch in BATCHES:
        state, info = step(state, shard_batch(batch, mesh))
        found.append(info.loss)
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-5)
    assert before == [leaf.sharding for leaf in jax.tree.leaves(state)] and step._cache_size() <= 2
    if "fsdp" in name or name in ("two axes", "gathered once"):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves((expected.stored, expected.opt_state)))
        assert max(bytes_per_device((state.stored, state.opt_state)).values()) < 1.05 * whole / 4


def all_reduces(step, state, batch):
    """The numbers of elements of the all-reduces of a compiled step, scalars left out."""
    program = jax.jit(step).lower(state, batch).compile().as_text()
    found = []
    for line in re.findall(r"= (.*?) (?:all-reduce|reduce-scatter|all-gather)(?:-start)?\(", program):
        shapes = re.findall(r"f32\[([\d,]*)\]", line)
        found += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return [size for size in found if size > 1]


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_packed_step_communicates_once_for_each_buffer(microbatches):
    mesh = make_mesh("data=4")
    state = nnlearn.init_state(MODEL.init, ADAMW, mesh=mesh, packed=True)
    make = functools.partial(nnlearn.make_step, loss_fn, ADAMW, axis_name="data", mesh=mesh)
    batch = shard_batch(np.concatenate(BATCHES[:4]), mesh)
    size = state.stored.buffers[0].size
    assert all_reduces(make(microbatches=microbatches), state, batch) == [size]
    leaves = nnlearn.init_state(MODEL.init, ADAMW, mesh=mesh, packed=False)
    assert len(all_reduces(make(), leaves, batch)) == len(jax.tree.leaves(leaves.params))  # the check can fail


def test_gradients_are_summed_in_bfloat16_on_request():
    mesh = make_mesh("data=4")
    state = nnlearn.init_state(VECTORS, ADAMW, mesh=mesh, packed=True)
    batch = shard_batch(RNG.normal(size=(8, 6)).astype(np.float32), mesh)
    make = functools.partial(nnlearn.make_step, vector_loss, nnlearn.sgd(0.1), axis_name="data", mesh=mesh)
    state = nnlearn.init_state(VECTORS, nnlearn.sgd(0.1), mesh=mesh, packed=True)
    steps = {dtype: jax.jit(make(reduce_dtype=dtype)) for dtype in (None, jnp.bfloat16)}
    assert re.search(r"\}\) : \(tensor<36xbf16>", steps[jnp.bfloat16].lower(state, batch).as_text())
    exact, short = (step(state, batch)[0].stored.buffers[0] for step in steps.values())
    error = np.abs(np.asarray(exact) - np.asarray(short)).max()
    assert 0 < error < 0.01


def test_pmap_and_shard_map_agree_with_jit():
    tx = nnlearn.sgd(0.1)
    batch = RNG.normal(size=(8, 6)).astype(np.float32)
    whole, _ = nnlearn.make_step(vector_loss, tx)(nnlearn.init_state(VECTORS, tx), batch)
    step = nnlearn.make_step(vector_loss, tx, axis_name="data")
    mapped, info = nnlearn.pmap_step(step)(
        nnlearn.replicate(nnlearn.init_state(VECTORS, tx)), nnlearn.split_over_devices(batch)
    )
    assert info.loss.shape == (4,)
    mesh = make_mesh("data=4")
    inside = nnlearn.make_step(vector_loss, tx, axis_name="data", mesh=mesh)
    on_mesh, _ = jax.jit(inside)(nnlearn.init_state(VECTORS, tx, mesh=mesh), shard_batch(batch, mesh))
    for other in (nnlearn.unreplicate(mapped), on_mesh):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), other.params, whole.params)


@pytest.mark.slow
def test_padding_of_packed_parameters_is_in_no_norm():
    mesh = make_mesh("data=4")
    tx = nnlearn.chain(nnlearn.clip_by_global_norm(0.1), nnlearn.lamb(0.1, weight_decay=0.1))
    batch = RNG.normal(size=(8, 6)).astype(np.float32)
    alone = nnlearn.init_state(VECTORS, tx, packed=True)
    state = nnlearn.init_state(VECTORS, tx, mesh=mesh, rules=fsdp(), packed=True)
    assert state.stored.buffers[0].shape == (36,) and state.stored.buffers[0].sharding.spec == P("data")
    for record in (("grad_norm", "update_norm", "leaf_grad_norms"),):
        step = nnlearn.make_step(vector_loss, tx, record=record)
        one, info = jax.jit(step)(alone, batch)
        other, info_4 = jax.jit(step)(state, shard_batch(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), info, info_4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.params, other.params)
    assert float(other.stored.buffers[0][-1]) == 0


@pytest.mark.parametrize(
    "tx",
    [optax.adafactor(0.1, min_dim_size_to_factor=2), optax.sm3(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1)),
     optax.masked(optax.adam(0.1), {"w": True, "b": False}), nnlearn.soap(0.1)],
    ids=["adafactor", "sm3", "chain", "masked", "soap"],
)  # fmt: skip
def test_the_state_of_any_transformation_follows_its_parameters(tx):
    mesh = make_mesh("data=4")
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(8)}
    state = nnlearn.init_state(params, tx, mesh=mesh, rules={"*": "data"}, packed=False)
    alone = nnlearn.init_state(params, tx, packed=False)
    assert jax.tree.structure(state) == jax.tree.structure(alone)
    sizes = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size >= 8]
    assert all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in sizes if leaf.size > 16) and sizes
    grads = jax.tree.map(jnp.ones_like, params)
    one = jax.jit(tx.update)(grads, alone.opt_state, alone.stored)
    other = jax.jit(tx.update)(place(grads, mesh, {"*": "data"}), state.opt_state, state.stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.slow
def test_whole_runs_take_a_mesh(tmp_path):
    examples = RNG.normal(size=(16, 6)).astype(np.float32)
    runs = []
    for options in ({}, {"mesh": make_mesh("data=4"), "rules": fsdp()}):
        params = {"w": jnp.ones((6, 8)), "b": jnp.zeros(8)}
        train = nnlearn.make_train(
            vector_loss, lambda hparams: nnlearn.adamw(hparams["rate"]),
            nnlearn.shuffled(examples, 8, remainder="drop"), params, epochs=3, **options,
        )  # fmt: skip
        state, trace = jax.jit(train)({"rate": 0.1}, 0)
        runs.append((state.params, trace.loss))
        if options:
            assert state.opt_state[0].mu["w"].sharding.spec == P(None, "data")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *runs)
    results = nnlearn.sweep(train, {"rate": nnlearn.sweeps.choice(0.1, 0.2)}, seeds=2, metric="train_loss", full=True)
    np.testing.assert_allclose(results.traces[0].loss[0, 0], runs[0][1], rtol=1e-5)


@pytest.mark.slow
def test_fit_and_checkpoints_take_a_mesh(tmp_path):
    mesh, other = make_mesh("data=4"), make_mesh("data=2,model=2")
    params = {"w": jnp.ones((6, 8)), "b": jnp.zeros(8)}
    step = nnlearn.make_step(vector_loss, ADAMW)
    batches = [RNG.normal(size=(8, 6)).astype(np.float32) for _ in range(4)]
    alone, trace = nnlearn.fit(step, nnlearn.init_state(params, ADAMW), batches)
    sharded = jax.NamedSharding(mesh, P("data"))
    state = nnlearn.init_state(params, ADAMW, mesh=mesh, rules=fsdp())
    folder = tmp_path / "run"
    nnlearn.fit(step, state, batches, steps=2, sharding=sharded, checkpoints=folder)
    elsewhere = nnlearn.init_state(params, ADAMW, mesh=other, rules=fsdp("data", {"w": "model"}))
    result = nnlearn.fit(
        step, elsewhere, batches, steps=4, sharding=jax.NamedSharding(other, P("data")), checkpoints=folder,
        changed="accept",
    )  # fmt: skip
    np.testing.assert_allclose(result.trace.loss, trace.loss, rtol=1e-5)
    assert result.state.stored["w"].sharding.spec == P("model", "data")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone.params, result.state.params)


ERRORS = {
    "mesh 'data=64' needs 64 devices, but there are 4": lambda mesh: make_mesh("data=64"),
    "has the axis 'data' twice": lambda mesh: make_mesh("data=2,data=2"),
    "cannot be read: write axes as": lambda mesh: make_mesh("data:2"),
    "names the axis 'modl', which the mesh .* did you mean 'model'": lambda mesh: place(VECTORS, mesh, {"w": "modl"}),
    "'w' of shape .6, 5. uses the axis 'data' twice": lambda mesh: place(VECTORS, mesh, {"w": ("data", "data")}),
    "axis 1 of 'w' of shape .6, 5. cannot be sharded over 'data': 5 is no multiple of 2": lambda mesh: place(
        VECTORS, mesh, {"w": (None, "data")}
    ),
    "'b' of shape .5,. has 2 entries": lambda mesh: place(VECTORS, mesh, {"b": (None, "data")}),
    "rule 'blocks/0/atention/\\*' matches no leaf; did you mean 'blocks/0/attention/": lambda mesh: nnlearn.init_state(
        MODEL.init, ADAMW, mesh=mesh, rules=fsdp("data", {"blocks/0/atention/*": "model"})
    ),
    "batch leaf .* of shape .7, 6. cannot be sharded over 'data'.*multiple of 2": lambda mesh: shard_batch(
        np.ones((7, 6)), mesh
    ),
    "rules need a mesh": lambda mesh: nnlearn.init_state(VECTORS, ADAMW, rules=fsdp()),
    "mesh needs axis_name": lambda mesh: nnlearn.make_step(vector_loss, ADAMW, mesh=mesh),
    "axis_name='dat' is no axis": lambda mesh: nnlearn.make_step(vector_loss, ADAMW, mesh=mesh, axis_name="dat"),
    "cannot be split over 3 devices": lambda mesh: nnlearn.split_over_devices(np.ones(4), 3),
}


def test_errors_name_path_shape_axis_and_cure():
    for message, act in ERRORS.items():
        with pytest.raises(ValueError, match=message):
            act(make_mesh("data=2,model=2"))


def test_a_description_has_the_bytes_of_each_device():
    mesh = make_mesh("data=4")
    state = nnlearn.init_state({"w": jnp.ones((8, 2))}, ADAMW, mesh=mesh, rules=fsdp())
    assert "stored/w  " in describe(state) and " 16" in describe(state)
    assert set(bytes_per_device(state.stored).values()) == {16}
    assert make_mesh("data,model=2").shape == {"data": 2, "model": 2}
    assert sharding.make_mesh({"data": 2}).size == 2
