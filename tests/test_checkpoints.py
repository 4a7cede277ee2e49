"""Checkpoints: every tree comes back equal to the bit and in type; damage is refused by name."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnlearn
from nnlearn.checkpoints import CheckpointError, Checkpoints, load, read_metadata, save, verify
from nnlearn.checkpoints.nodes import DTYPES

JAX_DTYPES = sorted(name for name in DTYPES if name not in ("float6_e2m3fn", "float6_e3m2fn", "int1", "uint1"))


def bits(leaf):
    """A leaf as bytes, with everything that tells its type."""
    if isinstance(leaf, jax.Array):
        impl = None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        return "jax", impl, str(leaf.dtype), leaf.shape, leaf.weak_type, np.asarray(leaf).tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), str(leaf.dtype), leaf.shape, leaf.tobytes()
    if isinstance(leaf, float | complex):  # NaN is not equal to itself
        return type(leaf), leaf.real.hex(), leaf.imag.hex()
    return type(leaf), leaf


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert bits(a) == bits(b), path


def zeroed(tree):
    """A tree of the same types with other values."""

    def other(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.zeros_like(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array | np.ndarray):
            return (jnp if isinstance(leaf, jax.Array) else np).zeros(leaf.shape, leaf.dtype)
        if isinstance(leaf, np.generic):
            return leaf.dtype.type(0)
        return leaf if callable(leaf) else type(leaf)()

    return jax.tree.map(other, tree)


def round_trip(tree, like=None):
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "it", tree)
        verify(Path(folder) / "it")
        return load(Path(folder) / "it", zeroed(tree) if like is None else like)


def random_bits(dtype, shape, seed):
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    content = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    if dtype == np.bool_:
        content = content % 2
    if dtype.itemsize == 1 and dtype.name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        content = content % (1 << int(dtype.name.lstrip("uintfloa").partition("_")[0]))
        return (
            content.astype(np.int8 if dtype.name.startswith(("int", "float")) else np.uint8)
            .astype(dtype)
            .reshape(shape)
        )
    return content.view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
arrays = st.builds(random_bits, st.sampled_from(JAX_DTYPES), shapes, st.integers(0, 99))
narrow = arrays.filter(lambda array: array.dtype.itemsize < 8 or array.dtype == np.complex64)
leaves = st.one_of(
    arrays,
    narrow.map(jnp.asarray),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.integers(0, 9).map(jax.random.key),
    st.integers(0, 9).map(lambda seed: jax.random.split(jax.random.key(seed, impl="rbg"), 2)),
    st.floats(-9, 9).map(np.float32),
    st.floats(-9, 9, width=32).map(jnp.asarray),
)
names = st.text("ab/'_\u00e9 .", max_size=4)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=3),
        st.dictionaries(st.integers(0, 30), inner, max_size=2),
        st.builds(optax.ScaleByAdamState, inner, inner, inner),
        st.builds(lambda x: optax.MaskedState(x), inner),
        st.just(optax.MaskedNode()),
        st.just(optax.EmptyState()),
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(trees)
def test_any_tree_comes_back_to_the_bit_and_in_type(tree):
    assert_same(round_trip(tree), tree)


@pytest.mark.parametrize("x64", [False, True])
def test_every_dtype_of_jax_comes_back(x64):
    with jax.enable_x64(x64):
        tree = {}
        for name in JAX_DTYPES:
            try:
                tree[name] = jnp.asarray(random_bits(name, (2, 3), 0))
            except TypeError:  # a dtype that this JAX does not have
                continue
        assert len(tree) >= 24
        assert_same(round_trip(tree), tree)


def trained(tx, params, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


MASK = {"w": True, "b": False, "empty": False}
STATES = {
    "multi_steps": lambda params: trained(optax.MultiSteps(nnlearn.adamw(1e-3), 2), params),
    "nnlearn_multi_steps": lambda params: trained(nnlearn.MultiSteps(nnlearn.adamw(1e-3), 2), params),
    "injected": lambda params: trained(nnlearn.inject_hyperparams(nnlearn.adamw)(learning_rate=0.1), params),
    "optax_injected": lambda params: trained(optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), params),
    "masked": lambda params: trained(optax.masked(optax.adam(0.1), MASK), params),
    "partition": lambda params: trained(
        optax.partition({"a": optax.adam(0.1), "z": optax.set_to_zero()}, lambda p: "a"), params
    ),
    "scaled": lambda params: trained(nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.lamb(0.1)), params),
    "packed": lambda params: trained(nnlearn.adamw(1e-3), nnlearn.pack(params)),
    "train_state": lambda params: nnlearn.init_state(params, nnlearn.adam(0.1), 0, model_state={"mean": jnp.ones(2)}),
}


@pytest.mark.parametrize("name", STATES)
def test_what_training_makes_comes_back(name):
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.ones(2, jnp.bfloat16), "empty": jnp.zeros((0, 2))}
    state = STATES[name](params)
    assert_same(round_trip(state), state)
    shapes = jax.eval_shape(lambda: state)
    assert_same(round_trip(state, like=shapes), state)


def test_packed_and_unpacked_trees_load_each_other():
    params = {"w": jnp.arange(6.0).reshape(3, 2), "half": jnp.ones(3, jnp.bfloat16), "b": jnp.float32(3)}
    packed = nnlearn.pack(params, labels={"w": "decay", "half": "free", "b": "free"})
    assert_same(round_trip(packed, like=zeroed(params)), params)
    assert_same(round_trip(params, like=zeroed(packed)), packed)
    assert_same(round_trip(nnlearn.pack(params), like=zeroed(packed)), packed)  # another layout
    runs = jax.vmap(lambda scale: jax.tree.map(lambda buffer: scale * buffer, packed))(
        jnp.arange(2, dtype=jnp.bfloat16)
    )
    assert_same(round_trip(runs), runs)


def test_packed_over_devices_comes_back_in_its_place():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = jax.NamedSharding(mesh, jax.P("data"))
    params = {"w": jax.device_put(jnp.arange(8.0).reshape(4, 2), cut), "b": jnp.arange(3.0)}
    for tree in (params, nnlearn.pack(params)):
        back = round_trip(tree, like=tree)
        assert_same(back, tree)
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert one.sharding == other.sharding


def test_modules_of_flax_and_equinox():
    nnx, eqx = pytest.importorskip("flax.nnx"), pytest.importorskip("equinox")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    back = round_trip(state, like=state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    np.testing.assert_array_equal(back["kernel"].get_value(), state["kernel"].get_value())
    module = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    back = round_trip(module, like=module)  # its activations are functions: taken from like
    assert bool(eqx.tree_equal(back, module))


def test_without_like_there_are_dicts_lists_and_arrays(tmp_path):
    tree = {"state": optax.ScaleByAdamState(jnp.int32(3), (jnp.ones(2),), None), 7: [1.5, jax.nn.relu]}
    tree = {"a": tree["state"], "b": {7: tree[7]}}  # JAX sorts the keys of one dict
    save(tmp_path / "it", tree, metadata={"task": "digits"}, step=3)
    back = load(tmp_path / "it")
    assert back["b"] == {7: [1.5, None]} and set(back["a"]) == {"count", "mu", "nu"} and back["a"]["nu"] is None
    assert isinstance(back["a"]["mu"][0], np.ndarray)
    assert read_metadata(tmp_path / "it") == {"task": "digits"}
    from safetensors.numpy import load_file

    (file,) = (tmp_path / "it").glob("*.safetensors")
    assert set(load_file(file)) == {"a/count", "a/mu/0"}


def test_saving_again_replaces_and_leaves_nothing(tmp_path):
    save(tmp_path / "it", {"w": jnp.zeros(2)})
    litter = tmp_path / ".it.123.draft"
    litter.mkdir()
    (litter / "arrays").write_text("of a killed process")
    save(tmp_path / "it", {"w": jnp.ones(3)})
    assert load(tmp_path / "it")["w"].tolist() == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]
    assert len(list((tmp_path / "it").iterdir())) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="other files"):
        save(tmp_path / "other", {})


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"'a/0' is a object"):
        save(tmp_path / "it", {"a": [object()]})
    with pytest.raises(TypeError, match="'a' is traced"):
        jax.jit(lambda x: save(tmp_path / "it", {"a": x}))(1.0)
    with pytest.raises(TypeError, match="'a' has dtype object"):
        save(tmp_path / "it", {"a": np.array([None])})
    with pytest.raises(TypeError, match="metadata"):
        save(tmp_path / "it", {}, metadata={"rate": float("nan")})
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(TypeError, match="donated"):
        save(tmp_path / "it", {"a": gone})
    assert list(tmp_path.iterdir()) == []


def test_a_warm_start_takes_what_fits(tmp_path):
    old = {"encoder": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "head": jnp.ones((2, 10)), "log": jnp.ones(1)}
    save(tmp_path / "old", {"params": old, "step": 3})
    new = {"body": {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, "head": jnp.zeros((2, 3)), "extra": jnp.zeros(1)}
    reports = []
    with pytest.raises(CheckpointError, match=r"not saved \(1\): extra.*do not fit.*head: saved float32\[2, 10\]"):
        load(tmp_path / "old", new, rename={"params/encoder": "body", "params": ""}, unexpected="ignore")
    settings = {"rename": {"params/encoder": "body", "params": ""}, "unexpected": "ignore", "missing": "keep"}
    back = load(tmp_path / "old", new, report=reports.append, **settings)
    report = reports[0]
    assert (
        report.taken == ("body/b", "body/w") and report.kept == ("extra",) and set(report.unexpected) == {"log", "step"}
    )
    assert report.mismatched[0] == ("head", "float32[2, 10]", "float32[2, 3]")
    assert back["body"]["w"].sum() == 4 and back["head"].sum() == 0
    packed = load(tmp_path / "old", nnlearn.pack(new), **settings)
    assert_same(nnlearn.unpack(packed), back)
    only = load(tmp_path / "old", new, only="*/b", **settings)
    assert only["body"]["b"].sum() == 2 and only["body"]["w"].sum() == 0
    with pytest.raises(ValueError, match="two saved leaves"):
        load(tmp_path / "old", new, rename=lambda name: "x")


def test_the_optimizer_of_yesterday_says_what_does_not_fit(tmp_path):
    params = {"w": jnp.ones(2)}
    save(tmp_path / "it", nnlearn.adamw(0.1).init(params))
    today = nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.trace(0.9), nnlearn.adamw(0.1)).init(params)
    with pytest.raises(CheckpointError, match="not saved.*missing='keep'.*rename="):
        load(tmp_path / "it", today)
    renamed = load(tmp_path / "it", today, rename=lambda name: f"2/{name}", missing="keep")
    assert_same(renamed[2], nnlearn.adamw(0.1).init(params))


def test_float64_is_not_narrowed(tmp_path):
    with jax.enable_x64(True):
        save(tmp_path / "it", {"w": jnp.ones(2, jnp.float64)})
        like = {"w": jnp.zeros(2, jnp.float64)}
    with pytest.raises(TypeError, match="jax_enable_x64"):
        load(tmp_path / "it", like)


def test_damage_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from damage import KINDS, damage

    trees = [
        {name: np.random.default_rng(seed).normal(size=500).astype(np.float32) for name in ("layer_1", "layer_2")}
        for seed in range(2)
    ]
    for name, tree in zip(("it", "other"), trees, strict=True):
        save(tmp_path / name, tree)
    files, others = (sorted((tmp_path / name).iterdir()) for name in ("it", "other"))
    contents = {path: path.read_bytes() for path in files}
    random, seen = np.random.default_rng(0), set()
    for at in range(300):
        if damage(KINDS[at % len(KINDS)], files, others, random):
            seen.add(KINDS[at % len(KINDS)])
            with pytest.raises(CheckpointError, match=str(tmp_path / "it")):
                load(tmp_path / "it", trees[0])
            with pytest.raises(CheckpointError):
                verify(tmp_path / "it")
        for path, content in contents.items():
            path.write_bytes(content)
    assert seen == set(KINDS)
    assert_same(load(tmp_path / "it", trees[0]), trees[0])


def test_consistent_forgeries_are_refused(tmp_path):
    """Manifests whose hash is right and whose content is hostile."""
    from blake3 import blake3

    from nnlearn.checkpoints import manifest as module

    save(tmp_path / "it", {"w": jnp.ones(3)}, step=5)
    (arrays,) = (tmp_path / "it").glob("arrays-*")
    facts = json.loads((tmp_path / "it" / "manifest.json").read_text())["manifest"]

    def forge(**changes):
        body = json.dumps(facts | changes).encode()
        content = b'{"blake3": "' + blake3(body).hexdigest().encode() + b'", "manifest": ' + body + b"}\n"
        (tmp_path / "it" / "manifest.json").write_bytes(content)

    leaf = {"kind": "array", "name": "w", "dtype": "float32", "shape": [3]}
    written = facts["files"][arrays.name]
    for changes in (
        {"files": {"../../etc/passwd": written}},
        {"files": {"arrays-../x.safetensors": written}},
        {"files": {}},
        {"files": {arrays.name: written | {"bytes": 1 << 60}}},
        {"tree": leaf | {"shape": [1 << 40]}},
        {"tree": leaf | {"shape": [-3]}},
        {"tree": leaf | {"dtype": "object"}},
        {"tree": leaf | {"dtype": "float64"}},
        {"tree": leaf | {"name": "../../w"}},
        {"tree": {"kind": "pickle"}},
        {"tree": {"kind": "list", "children": [leaf, leaf]}},
        {"version": 99},
        {"format": "orbax"},
    ):
        forge(**changes)
        with pytest.raises(CheckpointError):
            load(tmp_path / "it", jnp.ones(3))
    header = (
        b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    )
    for length, text in ((1 << 62, b"{}"), (len(header), header), (2, b"[]"), (3, b'{"a')):
        arrays.write_bytes(length.to_bytes(8, "little") + text + bytes(12))
        content = arrays.read_bytes()
        forge(files={arrays.name: {"bytes": len(content), "blake3": blake3(content).hexdigest()}})
        with pytest.raises(CheckpointError, match="header"):
            load(tmp_path / "it", jnp.ones(3))
    (tmp_path / "it" / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CheckpointError):
        load(tmp_path / "it")
    assert module.MAX_BYTES <= 64 << 20


def test_the_manager_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1, metric="loss") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        losses = {0: 3.0, 10: 1.0, 20: 2.0, 30: float("nan"), 40: 5.0}
        for step, loss in losses.items():
            checkpoints.save(step, {"w": jnp.full(3, step)}, metrics={"loss": loss}, metadata={"rate": 0.1})
        assert checkpoints.latest() == 40 and checkpoints.best() == 10 and checkpoints.steps() == (10, 30, 40)
        assert checkpoints.metrics(10) == {"loss": 1.0} and checkpoints.metadata(10) == {"rate": 0.1}
        assert checkpoints.load(like={"w": jnp.zeros(3, int)}, step=10)["w"].tolist() == [10, 10, 10]
        with pytest.raises(FileNotFoundError, match="no step 20"):
            checkpoints.load(step=20)
        with pytest.raises(ValueError, match="in use"):
            Checkpoints(tmp_path)
        with pytest.raises(ValueError, match="read_only"):
            Checkpoints(tmp_path, read_only=True).save(1, {})
    with Checkpoints(tmp_path, metric="loss", mode="max") as checkpoints:
        assert checkpoints.best() == 40


def test_damaged_steps_are_skipped_and_the_last_good_one_is_never_deleted(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jnp.full(3, step))
        checkpoints.wait()
        (file,) = checkpoints.path(2).glob("arrays-*")
        file.write_bytes(b"\0" * file.stat().st_size)
        with pytest.warns(UserWarning, match=r"step 2.*arrays-.*BLAKE3"):
            assert checkpoints.latest() == 1
        assert list(checkpoints.verify()) == [2]
        with pytest.warns(UserWarning):
            assert checkpoints.load()[0] == 1
        # step 3 cannot be trusted either: nothing is deleted for it
        original = Checkpoints._delete_old

        def damage(self, newest):
            (file,) = self.path(newest).glob("arrays-*")
            file.write_bytes(b"\0" * file.stat().st_size)
            original(self, newest)

        try:
            Checkpoints._delete_old = damage
            checkpoints.save(3, jnp.full(3, 3))
            with pytest.raises(CheckpointError, match="step-00000003"):
                checkpoints.wait()
        finally:
            Checkpoints._delete_old = original
        assert 1 in checkpoints.steps()
    checkpoints.path(1).rename(checkpoints.path(7))
    with pytest.warns(UserWarning, match="manifest is of step 1"):
        assert Checkpoints(tmp_path, read_only=True).latest() is None


def test_an_asynchronous_save_sees_the_values_of_its_moment(tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    host = np.zeros(1000)
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        w = jnp.zeros(1_000_000)
        for index in range(5):
            checkpoints.save(index, {"w": w, "host": host, "key": jax.random.key(index)})
            w = step(w)
            host += 1
        for index in range(5):
            tree = checkpoints.load(step=index)
            assert np.all(tree["w"] == index) and np.all(tree["host"] == index)
        with pytest.raises(TypeError, match="'f' is a object"):
            checkpoints.save(9, {"f": object()})


def test_an_asynchronous_save_sees_the_state_before_a_step_in_place(tmp_path):
    def loss_fn(params, batch, key):
        return jnp.mean((params["w"] - batch) ** 2)

    tx = nnlearn.adamw(0.1)
    step = nnlearn.jit_step(nnlearn.make_step(loss_fn, tx))
    state = nnlearn.init_state(nnlearn.pack({"w": jnp.zeros(300_000), "b": jnp.zeros(3)}), tx)
    wanted = []
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        for index in range(4):
            wanted.append(jax.tree.map(jnp.copy, state))
            checkpoints.save(index, state)
            state, _ = step(state, jnp.ones(300_000))
        for index in range(4):
            assert_same(checkpoints.load(state, step=index), wanted[index])


def test_a_full_disk_ends_the_run_or_not_as_one_chooses(tmp_path, monkeypatch):
    import nnlearn.checkpoints.folder as module

    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path / "raise") as checkpoints:
        checkpoints.save(1, jnp.ones(3))
        checkpoints.wait()
        monkeypatch.setattr(module, "write_arrays", full)
        checkpoints.save(2, jnp.ones(3))
        with pytest.raises(OSError, match="step 2 could not be saved.*No space left"):
            checkpoints.save(3, jnp.ones(3))
        assert checkpoints.latest() == 1
    with Checkpoints(tmp_path / "warn", on_error="warn") as checkpoints:
        checkpoints.save(1, jnp.ones(3))
        with pytest.warns(UserWarning, match="step 1 could not be saved"):
            checkpoints.wait()
    assert not list(tmp_path.glob("*/.step*"))


def test_a_killed_process_leaves_no_lock_and_no_litter(tmp_path):
    code = f"""
        import os, signal
        import jax.numpy as jnp
        import nnlearn.checkpoints.folder as module
        from nnlearn.checkpoints import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r}, asynchronous=False)
        checkpoints.save(1, jnp.ones(3))
        module.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, jnp.ones(3))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ)
    assert result.returncode == -9 and list(tmp_path.glob(".step*"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, jnp.ones(3))
        checkpoints.wait()
        assert not list(tmp_path.glob(".step*")) and checkpoints.steps() == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 0}, "keep_last must be an int >= 1, got 0"),
        ({"keep_best": -1}, "keep_best must be an int >= 0, got -1"),
        ({"mode": "up"}, "mode must be 'min' or 'max', got 'up'"),
        ({"every_minutes": 0}, "every_minutes must be > 0, got 0"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'warn'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **settings)


def test_other_libraries_files(tmp_path):
    torch, flax = pytest.importorskip("torch"), pytest.importorskip("flax.serialization")
    from safetensors.torch import save_file

    from nnlearn import checkpoints

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1).bfloat16())
    save_file(model.state_dict(), tmp_path / "torch.safetensors")
    params = {f"layer_{at}": {"kernel": jnp.zeros((m, n)), "bias": jnp.zeros(n)} for at, m, n in ((0, 2, 3), (1, 3, 1))}
    params["layer_1"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["layer_1"])

    def rename(name):
        at, _, kind = name.partition(".")
        return f"layer_{at}/{ {'weight': 'kernel', 'bias': 'bias'}[kind] }"

    back = checkpoints.import_safetensors(
        tmp_path / "torch.safetensors", params, rename=rename, convert=lambda name, array: array.T
    )
    np.testing.assert_array_equal(back["layer_0"]["kernel"], model[0].weight.detach().numpy().T)
    assert back["layer_1"]["kernel"].dtype == jnp.bfloat16

    state = nnlearn.init_state(back, nnlearn.adamw(0.1), 0)
    checkpoints.export_msgpack(tmp_path / "it.msgpack", state)
    read = flax.from_bytes(zeroed(state), (tmp_path / "it.msgpack").read_bytes()).stored
    assert_same(jax.tree.map(jnp.asarray, read), back)
    assert_same(
        checkpoints.import_msgpack(tmp_path / "it.msgpack", back, rename={"stored": ""}, unexpected="ignore"), back
    )
    (tmp_path / "it.msgpack").write_bytes(b"\xc1\x00")
    with pytest.raises(CheckpointError, match=r"it\.msgpack.*cannot be read"):
        checkpoints.import_msgpack(tmp_path / "it.msgpack")
    (tmp_path / "torch.safetensors").write_bytes((1 << 60).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"torch\.safetensors.*header"):
        checkpoints.import_safetensors(tmp_path / "torch.safetensors")


def test_orbax_files(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from nnlearn import checkpoints

    state = nnlearn.adamw(0.1).init({"w": jnp.ones(2), "b": jnp.zeros(1, jnp.bfloat16)})
    checkpoints.export_orbax(tmp_path / "it", state)
    assert_same(checkpoints.import_orbax(tmp_path / "it", zeroed(state)), state)
