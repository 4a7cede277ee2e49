"""Kernels in C: every operation against NumPy, every optimizer against XLA's program, and the cases without kernels."""

import functools
import os
import re
import subprocess
import sys
import threading

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import CASES
from jax.experimental import serialize_executable
from jax.extend.core import Var
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.files import cache_folder
from nnlearn.native import is_native, library, native_status
from nnlearn.native.elementwise import BLOCK, can_compute, make_kernel
from nnlearn.native.folder import private_folder
from nnlearn.native.polynomial import polynomials
from nnlearn.programs import in_place as in_place_module
from nnlearn.programs import read as read_module
from nnlearn.programs.in_place import apply_gradients
from nnlearn.programs.one_pass import find_kernels, in_one_pass
from nnlearn.programs.read import LARGE

needs_compiler = pytest.mark.skipif(not is_native(), reason=native_status())
SIZE = 2 * BLOCK + 77


def refuse(*arguments):
    raise AssertionError("no kernel was found for the update")


def plain(tx):
    def update(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


def fast(tx):
    return in_one_pass(plain(tx), refuse)


def compiled(update, params, opt_state, grads):
    step = jax.jit(lambda params, opt_state, grads: update(grads, opt_state, params), donate_argnums=(0, 1))
    return step.lower(params, opt_state, grads).compile()


def steps_of(update, tx, params, count=20):
    random = np.random.default_rng(1)
    draws = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=(count, *leaf.shape)), leaf.dtype), params)

    def many(params, draws):
        def step(carry, grads):
            return update(grads, carry[1], carry[0]), None

        return jax.lax.scan(step, (params, tx.init(params)), draws)[0]

    return jax.jit(many)(params, draws)


def assert_close(one, other, rtol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert first.dtype == second.dtype
        first, second = (np.asarray(each, np.float64) for each in (first, second))
        np.testing.assert_allclose(first, second, rtol=rtol, atol=rtol * np.nanmax(np.abs(second), initial=1e-9))


@pytest.fixture
def everything_large(monkeypatch):
    monkeypatch.setattr(read_module, "LARGE", 2)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_every_optimizer_gives_the_same_numbers(case, dtype, everything_large):
    """All but those with sums of updates, and two that compute one array."""
    tx = case.ours(**case.varied)
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3).astype(dtype), "b": jnp.linspace(0.5, 1.0, 3)}
    may_refuse = case.whole_leaf or not case.exact or case.name in ("sign_sgd", "optimistic_gradient_descent")
    update = in_one_pass(plain(tx), plain(tx) if may_refuse else refuse)
    one, other = steps_of(plain(tx), tx, params), steps_of(update, tx, params)
    assert_close(other, one, 1e-6 if dtype == jnp.float32 else 2e-2)
    text = compiled(update, params, tx.init(params), params).as_text()
    assert text.count("nnlearn_one_pass") >= (0 if may_refuse else 1)


@needs_compiler
@pytest.mark.parametrize("library_of", [nnlearn, optax], ids=["nnlearn", "optax"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_several_blocks_in_place(library_of, name):
    """More elements than one block, and not a multiple; nothing is copied, and nothing else is written."""
    settings = {"momentum": 0.9} if name == "sgd" else {"weight_decay": 0.1}
    tx = optax.chain(nnlearn.clip_by_global_norm(1.0), getattr(library_of, name)(1e-2, **settings))
    params = {"large": jnp.linspace(-1.0, 1.0, SIZE), "small": jnp.ones(3)}
    grads = jax.tree.map(jnp.cos, params)
    state = tx.init(params)
    program = compiled(fast(tx), params, state, grads)
    assert program.as_text().count("custom_call_target=") == 1
    assert program.memory_analysis().temp_size_in_bytes < 2000
    expected = jax.jit(plain(tx))(grads, state, params)
    kept = jax.tree.map(jnp.copy, params)
    without_donation = jax.jit(fast(tx))(grads, state, params)
    assert_close(params, kept, 0)
    assert_close(without_donation, expected, 1e-6)
    assert_close(program(params, state, grads), expected, 1e-6)


@needs_compiler
def test_equal_arrays_share_one_kernel(monkeypatch):
    sources = []
    monkeypatch.setattr(library, "_register", lambda *words: sources.append(words) or "nowhere")
    tx, params = nnlearn.adamw(1e-3), [jnp.zeros(LARGE)] * 3
    text = jax.jit(fast(tx)).lower(params, tx.init(params), params).as_text()
    assert text.count("nowhere") >= 3 and len(set(sources)) == 1


SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, 3e-39, -2e38, 3e38, np.inf, -np.inf, np.nan, 1 / 3, 7.25])
FUNCTIONS = {
    "sums": lambda x, y, s: (x + y, x - s, -y),
    "products": lambda x, y, s: (x * y, x * s, x * 0.3),
    "quotients": lambda x, y, s: (x / y, 1 / x, y / s),
    "division by a constant": lambda x, y, s: (x / 0.7, x / 8.0),
    "roots": lambda x, y, s: (jnp.sqrt(x), jax.lax.rsqrt(jnp.abs(y)), jnp.abs(x)),
    "squares": lambda x, y, s: (x**2 + y, jnp.square(x), y**2),
    "powers": lambda x, y, s: (jax.lax.integer_pow(y, 3), jax.lax.integer_pow(y, 4)),
    "extremes": lambda x, y, s: (jnp.maximum(x, y), jnp.minimum(x, s), jnp.sign(y), jnp.sign(x)),
    "choices": lambda x, y, s: (
        jnp.where(x > y, x, s),
        jnp.where((x <= y) & ~(y == x), 1.0, y),
        jnp.where(jnp.isfinite(x) | (y != x), x, 2.0),
        jnp.where((x < 1) == (y >= 1), jnp.inf, -jnp.inf),
    ),
    "precision": lambda x, y, s: (
        x.astype(jnp.bfloat16) * y.astype(jnp.bfloat16),
        x.astype(jnp.float32) - y.astype(jnp.float32),
        (x > y).astype(jnp.float32).astype(jnp.bfloat16) * 3,
    ),
}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_equals_that_of_numpy(name, dtype, everything_large):
    """All pairs of zeros of both signs, the smallest and largest numbers, infinities and NaN."""
    if (name, dtype) == ("powers", "bfloat16"):
        pytest.skip("left to XLA, which may round between the factors")
    x, y = (each.reshape(-1) for each in np.meshgrid(SPECIAL, SPECIAL))
    with jax.enable_x64(True):
        values = jnp.asarray(x, dtype), jnp.asarray(y, dtype), jnp.asarray(0.9, dtype)

        def function(x, y, s):
            return tuple(each.astype(dtype) for each in FUNCTIONS[name](x, y, s))

        def update(grads, opt_state, params):
            return grads, function(*params)

        expected = [np.asarray(each) for each in function(*values)]  # op by op, rounded after each
        results = jax.jit(in_one_pass(update, refuse))((), (), values)[1]
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        tiny = np.abs(other) < 2.4e-38  # XLA flushes what is below the least normal number to 0
        exact = name not in ("quotients", "division by a constant", "roots")  # by the reciprocal, or another root
        rtol = 0 if exact else {"float32": 3e-7, "float64": 4e-16, "bfloat16": 8e-3}[dtype]
        np.testing.assert_allclose(one[~tiny], other[~tiny], rtol=rtol)
        np.testing.assert_allclose(one[tiny], other[tiny], atol=2.4e-38)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_subnormal_numbers_are_flushed_where_xla_flushes_them(dtype, everything_large):
    numbers = np.array([0.0, 1e-39, -1e-39, 9e-39, -9e-39, 2e-38, -2e-38, 1e-30, 1.0]).astype(jnp.dtype(dtype))
    x, y = (jnp.asarray(each.reshape(-1)) for each in np.meshgrid(numbers, numbers))
    half = jnp.asarray(0.5, dtype)

    def update(grads, opt_state, params):
        x, y = params
        extremes = jnp.maximum(x, y), jnp.minimum(x, y), jnp.clip(x, -1, 1)
        return grads, (*extremes, jnp.where(x > y, x, y), x * half, -x)

    expected = jax.jit(update)((), (), (x, y))[1]
    results = jax.jit(in_one_pass(update, refuse))((), (), (x, y))[1]
    flushed = np.float64(expected[0][10]) == 0 != np.float64(x[10])  # the larger of two subnormal numbers
    assert flushed or dtype == "bfloat16"  # XLA keeps some bfloat16 ones on some processors
    atol = 0 if flushed else float(jnp.finfo(jnp.float32).tiny)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=atol)


@needs_compiler
def test_derivatives_and_vmap_equal_those_of_the_update(everything_large):
    def loss(rate, decay, update_of):
        tx = nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adamw(rate, weight_decay=decay))
        params, _ = steps_of(update_of(tx), tx, {"w": jnp.linspace(-1.0, 1.0, 6)}, count=3)
        return jnp.sum(params["w"] ** 2)

    rates = jnp.array([0.1, 0.2])
    one, other = (
        jax.vmap(jax.value_and_grad(lambda rate: loss(rate, 3 * rate, way)))(rates)  # noqa: B023
        for way in (plain, fast)
    )
    assert_close(other, one, 1e-5)
    one, other = (jax.jvp(lambda rate: loss(rate, 0.1, way), (0.1,), (1.0,)) for way in (plain, fast))  # noqa: B023
    assert_close(other, one, 1e-5)
    tx, params = nnlearn.adamw(0.1), jnp.linspace(-1.0, 1.0, 6)

    def last(params, update):
        return jnp.sum(update(jnp.zeros(6), tx.init(params), params)[0] ** 2)

    zero_gradient = [jax.jit(jax.grad(last), static_argnums=1)(params, way(tx)) for way in (plain, fast)]
    assert_close(*zero_gradient, 1e-6)  # where the derivative of the root at 0 is defined separately


def test_programs_that_cannot_be_fused():
    def found(update, *trees):
        return find_kernels(jax.make_jaxpr(update)(*trees).jaxpr, [])

    large = jnp.ones(LARGE)
    assert not found(lambda x: (x + 1, jnp.exp(x)), large)  # only one result; exp is not supported
    assert not found(lambda x: (x.reshape(2, -1) + 1, x.reshape(2, -1) * 2), large)
    assert not found(lambda x: (jnp.cumsum(x) + 1, jnp.cumsum(x) * 2), large)
    assert not found(lambda x: (x + 1, x * 2), large[1:])  # too small
    assert not found(lambda x, y: (x + 1, y * 2), large, large)  # nothing in common
    assert not found(lambda x: (x.astype(jnp.float16) + 1, x.astype(jnp.float16) * 2), large)
    assert len(found(lambda x, y: (x + 1, x * 2, y + 1, y * 2), large, large)) == 2
    assert len(found(lambda x, y: (x + 1, y * 2, x + y), large, large)) == 1
    assert len(found(lambda x: (x + jnp.sum(jnp.exp(x)), x * 2), large)) == 1  # the sum is left to XLA


@needs_compiler
def test_two_equal_results_share_memory(everything_large):
    def init(params):
        return {"one": params, "two": 2 * params}

    def update(updates, state, params=None):
        new = 0.9 * state["one"] + state["two"] + updates
        return -0.1 * new, {"one": new, "two": new}

    tx, params = optax.GradientTransformation(init, update), jnp.linspace(-1.0, 1.0, 12)
    expected = steps_of(plain(tx), tx, params)
    assert_close(steps_of(fast(tx), tx, params), expected, 1e-6)
    program = compiled(fast(tx), jnp.copy(params), tx.init(params), params)
    once = jax.jit(plain(tx))(params, tx.init(params), params)
    assert_close(program(*jax.tree.map(jnp.copy, (params, tx.init(params))), params), once, 1e-6)


@needs_compiler
@pytest.mark.slow
def test_without_jit_and_on_explicit_meshes(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    values = jnp.linspace(-1.0, 1.0, LARGE)
    with jax.disable_jit():
        losses = nnlearn.ctc_loss(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2)), jnp.array([[1]]), jnp.zeros((1, 1)))
    np.testing.assert_allclose(losses, -np.log(0.75), rtol=1e-6)
    tx, mesh = nnlearn.adamw(1e-2), jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        params = jax.device_put(values, jax.NamedSharding(mesh, P("data")))

        def step(carry, _):
            params, state = carry
            return apply_gradients(tx, params, params, state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), None, length=2)
    expected = steps_of_own_values(tx, values, 2)
    np.testing.assert_allclose(carry[0], expected, rtol=1e-5, atol=1e-8)


def steps_of_own_values(tx, params, count):
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


LEAVES = {f"leaf{n:02}": (n % 5, 3) if n % 7 else (n,) for n in range(40)}  # some are empty


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_kernel_splits_and_joins_packed_leaves(monkeypatch, dtype):
    """First and second derivatives, forward and reverse, and vmap equal those of XLA's slices."""
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        params = {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in LEAVES.items()}
        params["large"] = jnp.asarray(random.normal(size=200_000), dtype)
        packed, other = nnlearn.pack(params), nnlearn.pack(jax.tree.map(jnp.cos, params))

        def loss(packed, scale):
            tree = nnlearn.unpack(packed)
            kept = [tree[name] for name in sorted(tree) if name != "leaf03"]  # an unused part
            return scale * sum(jnp.sum(jnp.sin(n * leaf.astype(float))) for n, leaf in enumerate(kept))

        def everything(packed, other):
            gradient = jax.grad(loss)(packed, 1.0)
            _, slope = jax.jvp(lambda packed: loss(packed, 1.0), (packed,), (other,))
            _, bend = jax.jvp(jax.grad(lambda packed: loss(packed, 2.0)), (packed,), (other,))
            scales = jax.vmap(jax.grad(loss), in_axes=(None, 0))(packed, jnp.array([1.0, 2.0]))
            both = jax.tree.map(lambda *two: jnp.stack(two), packed, other)
            return nnlearn.unpack(packed), gradient, slope, bend, scales, jax.vmap(jax.grad(loss))(both, jnp.ones(2))

        expected = jax.jit(everything)(packed, other)
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        program = jax.jit(lambda *both: everything(*both)).lower(packed, other).compile()
        assert "nnlearn_split" in program.as_text() and "nnlearn_join" in program.as_text()
        assert_close(program(packed, other), expected, {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-12}[dtype])
        exact = jax.jit(lambda packed: jax.vjp(nnlearn.unpack, packed)[1](params)[0])(packed)
        assert_close(exact, packed, 0)


@needs_compiler
def test_packing_is_checked_through_kernels(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    params = [jnp.ones((4, 3))] * 20
    by_leaf = nnlearn.by_leaf(optax.scale_by_trust_ratio())
    assert not nnlearn.packing_difference(by_leaf, params)
    assert nnlearn.packing_difference(optax.scale_by_trust_ratio(), params)


@needs_compiler
def test_subnormal_numbers_are_flushed_in_every_block(everything_large):
    """Subnormal numbers may take a processor a hundred times as long, so every thread must flush them."""
    tx, params = nnlearn.adamw(1e-3), jnp.linspace(-1.0, 1.0, 16 * BLOCK)
    _, state = jax.jit(fast(tx))(jnp.full_like(params, 1e-38), tx.init(params), params)
    np.testing.assert_array_equal(state[0].mu, 0)  # 0.1 * 1e-38 is subnormal


@needs_compiler
def test_many_programs_at_once():
    """Threads that run kernels concurrently share the pool, without deadlocks or wrong results."""
    tx, params = nnlearn.adamw(1e-2), jnp.linspace(-1.0, 1.0, 8 * BLOCK)
    step = jax.jit(fast(tx))
    expected = step(params, tx.init(params), params)
    faults = []

    def run(scale):
        for _ in range(20):
            results = step(params, tx.init(params), params)
            if not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (results, expected)), strict=True)):
                faults.append(scale)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not faults and not any(thread.is_alive() for thread in threads)


@needs_compiler
def test_a_step_on_one_cpu_uses_the_kernel(monkeypatch):
    tx, batch, params = nnlearn.adamw(1e-3), jnp.ones((2, 256)), {"w": jnp.ones((256, LARGE // 256)), "b": jnp.ones(3)}

    def text_and_result(packed):
        step = nnlearn.make_step(lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2), tx)
        state = nnlearn.init_state(params, tx, packed=packed)
        program = jax.jit(step).lower(state, batch).compile()
        return program.as_text(), program(state, batch)[0]

    before = text_and_result(False)
    assert "nnlearn_one_pass" not in before[0]  # several devices here: XLA must be able to divide the program
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        for packed in (False, True):
            after = text_and_result(packed)
            assert "nnlearn_one_pass" in after[0]
            assert_close(after[1].params, before[1].params, 1e-6)
        patch.setenv("NNLEARN_NATIVE", "0")
        assert native_status() == "off: NNLEARN_NATIVE=0"
        assert "nnlearn_one_pass" not in text_and_result(False)[0]
        assert_close(text_and_result(False)[1].params, before[1].params, 1e-6)


@needs_compiler
def test_xla_replaces_a_kernel_that_does_not_compile(monkeypatch):
    def refused(*words):
        raise library.CannotCompile("no")

    monkeypatch.setattr(library, "_register", refused)
    tx, params = nnlearn.adamw(1e-3), jnp.linspace(0.0, 1.0, LARGE)
    program = compiled(fast(tx), params, tx.init(params), params)
    assert "custom_call_target=" not in program.as_text()
    expected = jax.jit(plain(tx))(params, tx.init(params), params)
    assert_close(program(jnp.copy(params), tx.init(params), params), expected, 1e-6)


REPORT = """
import jax, jax.numpy as jnp, nnlearn
tx, params = nnlearn.lion(1e-3), jnp.ones(1 << 16)
step = jax.jit(lambda p, s: nnlearn.apply_gradients(tx, p, p, s))
text = step.lower(params, tx.init(params)).compile().as_text()
print(nnlearn.native_status(), "|", "nnlearn_one_pass" in text)
"""


@pytest.mark.parametrize(
    ("variables", "status", "used"),
    [
        pytest.param({}, "on:", True, marks=needs_compiler),
        ({"PATH": "/nowhere"}, "off: there is no C compiler", False),
        ({"CC": "true"}, "off: .*true made no library", False),
        pytest.param(
            {"NNLEARN_CACHE": "/dev/null/here"}, "off: a kernel cannot be stored", False, marks=needs_compiler
        ),
        ({"NNLEARN_NATIVE": "off"}, "off: NNLEARN_NATIVE=0", False),
    ],
    ids=["usual", "no compiler", "no real compiler", "no cache", "switched off"],
)
def test_the_status_says_whether_kernels_work_and_programs_run_without_them(variables, status, used, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NNLEARN_CACHE": str(tmp_path), **variables}
    said = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True)
    assert re.match(status, said.stdout) and said.stdout.strip().endswith(str(used))


@needs_compiler
@pytest.mark.slow
def test_a_damaged_kernel_in_the_cache_is_compiled_again(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NNLEARN_CACHE": str(tmp_path)}

    def kernels():
        subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, check=True)
        return {path: path.read_bytes() for path in (tmp_path / "native").glob("*.so")}

    kept = kernels()
    assert len(kept) == 2
    for path, whole in kept.items():
        path.write_bytes(whole[: len(whole) // 3])
    assert kernels() == kept


@pytest.mark.parametrize(
    ("place", "mode", "owner", "fault"),
    [
        ("cache/native", 0o777, None, "cache/native can be written to by other users"),
        ("cache", 0o777, None, "cache can be written to by other users"),
        ("cache", 0o1777, None, None),  # as in /tmp, where only an owner can rename an entry
        ("cache/native", 0o700, 4711, "cache/native belongs to user 4711, and this process runs as user"),
        ("cache", 0o755, 4711, "cache belongs to user 4711, and this process runs as user"),
        ("cache", 0o755, 0, None),
    ],
)
def test_a_folder_that_others_can_change_is_refused_with_the_cause(tmp_path, monkeypatch, place, mode, owner, fault):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    (tmp_path / place).chmod(mode)
    if owner is not None:

        def status(path):
            *mode, user = path.stat()[:5]
            return os.stat_result([*mode, owner if path == tmp_path / place else os.getuid(), *path.stat()[5:]])

        monkeypatch.setattr("nnlearn.native.folder._status", status)
    if fault is None:
        assert private_folder(folder) == folder.resolve()
    else:
        with pytest.raises(PermissionError, match=f"{fault}.* or set NNLEARN_CACHE"):
            private_folder(folder)


def test_missing_folders_of_the_cache_are_private(tmp_path):
    before = os.umask(0)
    try:
        private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [(tmp_path / place).stat().st_mode & 0o777 for place in ("a", "a/b")] == [0o700, 0o700]


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "NNLEARN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache_folder().name == f"nnlearn-{os.getuid()}"


def test_a_compiler_error_does_not_end_a_program(tmp_path, monkeypatch):
    compiler = tmp_path / "my cc"
    compiler.write_bytes(
        b"#!/bin/sh\n[ \"$1\" = --version ] && echo 'caf\xe9 1.0' || { echo 'error: \xff\xe9' >&2; exit 1; }\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}'")
    command, version = library._compiler.__wrapped__()
    assert command == (str(compiler),) and version == "caf\ufffd 1.0"
    with pytest.raises(library.CannotCompile, match="my cc' says: error: \ufffd"):
        library._compile(command, (), "", tmp_path / "kernel")

    def broken(*words):
        raise UnicodeError("surprise")

    monkeypatch.setattr(library, "_tuning", broken)
    assert library._fault.__wrapped__() == "UnicodeError: surprise"
    monkeypatch.setattr(library, "_register", broken)
    with pytest.raises(library.CannotCompile, match="UnicodeError: surprise"):
        library.target_name("any", "")


@needs_compiler
def test_a_program_that_leaves_the_process_is_traced_without_kernels(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    arguments = jnp.zeros((1, 4, 3)), jnp.zeros((1, 4)), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1))
    loss = jax.jit(nnlearn.ctc_loss)
    expected = loss(*arguments)
    with pytest.raises(ValueError, match=r"native_kernels\(False\)"):  # from JAX, which prints the kernel's name
        jax.export.export(loss)(*arguments)
    with nnlearn.native_kernels(False):
        assert native_status() == "off: inside native_kernels(False)"
        exported = jax.export.export(loss)(*arguments)
        executable = serialize_executable.serialize(loss.lower(*arguments).compile())
        with nnlearn.native_kernels(True):
            assert is_native()
        lowered_outside = jax.jit(lambda *values: loss(*values)).trace(*arguments)
    assert is_native()
    assert "custom_call_target=" not in lowered_outside.lower().compile().as_text()
    assert_close(exported.call(*arguments), expected, 1e-6)
    assert_close(
        serialize_executable.deserialize_and_load(*executable, execution_devices=jax.devices()[:1])(*arguments),
        expected,
        1e-6,
    )


@needs_compiler
def test_the_error_of_a_wrong_source_has_the_compiler_s_message(tmp_path, monkeypatch):
    monkeypatch.setenv("NNLEARN_CACHE", str(tmp_path))
    with pytest.raises(library.CannotCompile, match="says:.*error"):
        library.target_name("wrong", "this is no C")
    assert not list((tmp_path / "native").iterdir())


def test_kernels_with_different_in_place_pairs_differ():
    program = jax.make_jaxpr(lambda x, s: (x * s, x + 1.0))(jnp.ones(4), 2.0).jaxpr
    known = [equation for equation in program.eqns if can_compute(equation)]
    first, second = (
        make_kernel(known, [var for var in program.invars if isinstance(var, Var)], list(program.outvars), {0: at})
        for at in (0, 1)
    )
    assert first != second and hash(first) != hash(second) and first == first


def test_small_programs_are_not_analysed(monkeypatch):
    """A program of many small arrays is not analysed."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(in_place_module, "in_one_pass", refuse)
    tx, params = nnlearn.adamw(1e-3), [jnp.ones(3)] * 4
    jax.jit(lambda params, state: apply_gradients(tx, params, params, state))(params, tx.init(params))


@needs_compiler
def test_matrix_polynomials_equal_those_of_numpy_and_of_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = jnp.array([[3.4, -4.8, 2.0], [2.0, -1.5, 0.5]])
    for shape in ((1, 64, 64), (3, 17, 41), (2, 70, 16), (2, 2, 33, 90)):
        x = np.random.default_rng(0).normal(size=shape) / max(shape[-2:])
        function = functools.reduce(lambda f, _: jax.vmap(f), range(len(shape) - 2), lambda x: polynomials(x, rows))
        expected, turned = x, shape[-2] > shape[-1]
        for a, b, c in np.asarray(rows, np.float64):
            gram = np.swapaxes(expected, -1, -2) @ expected if turned else expected @ np.swapaxes(expected, -1, -2)
            inner = b * gram + c * gram @ gram
            expected = a * expected + (expected @ inner if turned else inner @ expected)
        x = jnp.asarray(x, jnp.float32)
        found = jax.jit(function)(x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.max(np.abs(expected)))
    value, derivative = jax.jit(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(x)
    with nnlearn.native_kernels(False):
        by_xla = jax.jit(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(value, by_xla[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(derivative, by_xla[1], rtol=0, atol=1e-4)
