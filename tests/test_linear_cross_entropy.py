"""The fused linear cross-entropy equals the cross-entropy of the logits, with every option."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import nnlearn
from nnlearn.losses.linear_cross_entropy import linear_cross_entropy

TOKENS, WIDTH, CLASSES, CHUNK = 29, 5, 36, 12
OPTIONS = ("label_smoothing", "z_loss", "softcap", "class_weights")
# The arrays are tiny, so compilation takes most of the time.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that the test arrays need several, the last two of which overlap."""
    module = sys.modules[linear_cross_entropy.__module__]
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "COLUMNS", 16)


def make_problem(dtype=jnp.float32, tokens=TOKENS, width=WIDTH, classes=CLASSES, **options):
    """The arrays that a loss is differentiated with respect to, and the labels."""
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = {
        "hidden": jax.random.normal(keys[0], (tokens, width), dtype),
        "weight": jax.random.normal(keys[1], (width, classes), dtype),
        "bias": jax.random.normal(keys[2], (classes,), dtype),
    }
    known = {
        "label_smoothing": jnp.asarray(0.1, dtype),
        "z_loss": jnp.asarray(0.02, dtype),
        "softcap": jnp.asarray(2.5, dtype),
        "class_weights": jax.random.uniform(keys[3], (classes,), dtype),
    }
    arrays |= {name: known[name] if value is True else value for name, value in options.items() if value is not False}
    return arrays, jax.random.randint(keys[4], (tokens,), 0, classes)


def dense(hidden, weight, labels, bias=None, *, softcap=None, **options):
    logits = hidden @ weight
    logits = logits if bias is None else logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return nnlearn.cross_entropy(logits, labels, **options)


def value_and_grads(loss, arrays, labels, compiler=jit, **static):
    """A loss with a separate factor for each token, and its gradients with respect to all arrays, compiled."""

    @compiler
    def run(arrays, labels, where):
        def scalar(arrays):
            losses = loss(**arrays, labels=labels, where=where, **static)
            return losses if losses.ndim == 0 else jnp.sum(losses * jnp.cos(jnp.arange(losses.size)))

        return jax.value_and_grad(scalar)(arrays)

    where = static.pop("where", None)
    return run(arrays, labels, where)


def compiled_loss(arrays, labels, **static):
    return jit(lambda arrays, labels: linear_cross_entropy(**arrays, labels=labels, **static))(arrays, labels)


def assert_same(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype, path
        size = max(1.0, float(jnp.max(jnp.abs(other.astype(float)), initial=0)))
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), rtol=0, atol=tolerance * size, err_msg=str(path)
        )


def reference(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, class_weights, where):
    """The mean loss of the unmasked tokens, token by token, in float64."""
    total = count = 0.0
    for row, label, kept in zip(np.asarray(hidden, np.float64), np.asarray(labels), np.asarray(where), strict=True):
        if not kept:
            continue
        logits = softcap * np.tanh((row @ np.asarray(weight, np.float64) + np.asarray(bias, np.float64)) / softcap)
        log_sum = np.log(np.sum(np.exp(logits)))
        target = np.full(len(logits), label_smoothing / len(logits))
        target[label] += 1 - label_smoothing
        total += np.sum(class_weights * target * (log_sum - logits)) + class_weights[label] * z_loss * log_sum**2
        count += class_weights[label]
    return total / count


def test_the_value_equals_the_definition():
    arrays, labels = make_problem(**dict.fromkeys(OPTIONS, True))
    where = jnp.arange(TOKENS) % 3 != 0
    numbers = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    expected = reference(**numbers, labels=labels, where=where)
    assert float(compiled_loss(arrays, labels, where=where, chunk=CHUNK)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("used", "reduction"),
    [
        ((), "sum"),
        (("label_smoothing", "z_loss"), "none"),
        (("softcap",), "mean"),
        (OPTIONS, "mean"),
        (OPTIONS, "none"),
    ],
    ids=str,
)
def test_the_value_and_all_gradients_equal_those_from_logits(used, reduction):
    arrays, labels = make_problem(**dict.fromkeys(used, True))
    static = {"reduction": reduction, "where": jnp.arange(TOKENS) % 5 != 1}
    ours = value_and_grads(linear_cross_entropy, arrays, labels, chunk=CHUNK, **static)
    assert_same(ours, value_and_grads(dense, arrays, labels, **static), 1e-5)


@pytest.mark.slow
def test_float64_is_exact_for_all_combinations_of_options():
    def run(loss):
        def on_case(label_smoothing, z_loss, softcap, weigh):
            own = {"softcap": softcap, "label_smoothing": label_smoothing, "z_loss": z_loss}
            own["class_weights"] = jnp.where(weigh, arrays["class_weights"], 1.0)
            return jax.value_and_grad(lambda arrays: loss(**arrays, labels=labels))(arrays | own)

        cases = np.meshgrid([0.0, 0.1, 1.0], [0.0, 0.05], [1e6, 2.0], [False, True])
        return jit(jax.vmap(on_case))(*(jnp.asarray(case.ravel()) for case in cases))

    with jax.enable_x64(True):
        arrays, labels = make_problem(jnp.float64, class_weights=True)
        ours, theirs = run(functools.partial(linear_cross_entropy, chunk=CHUNK)), run(dense)
        assert ours[0].dtype == jnp.float64 and ours[0].shape == (24,)
        assert_same(ours, theirs, 1e-10)


def test_transposed_weight_and_batch_axes():
    arrays, labels = make_problem(tokens=28, label_smoothing=0.1)
    arrays |= {"hidden": arrays["hidden"].reshape(4, 7, WIDTH)}
    labels, where = labels.reshape(4, 7), jnp.arange(28).reshape(4, 7) % 3 != 0
    expected = value_and_grads(dense, arrays, labels, where=where)
    turned = arrays | {"weight": arrays["weight"].T}
    value, grads = value_and_grads(linear_cross_entropy, turned, labels, where=where, transposed=True, chunk=CHUNK)
    assert_same((value, grads | {"weight": grads["weight"].T}), expected, 1e-5)
    losses = compiled_loss(turned, labels, where=where, transposed=True, reduction="none")
    assert losses.shape == (4, 7)


def test_masked_tokens_have_no_effect():
    arrays, labels = make_problem(label_smoothing=True, class_weights=True)
    where = jnp.arange(TOKENS) % 4 != 2
    clean = value_and_grads(linear_cross_entropy, arrays, labels, where=where, chunk=CHUNK)
    rotten = jnp.where(where[:, None], arrays["hidden"], jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e38, 0.0])[None])
    dirty = arrays | {"hidden": rotten}, jnp.where(where, labels, -100)
    for reduction in ("mean", "none"):
        _, grads = found = value_and_grads(linear_cross_entropy, *dirty, where=where, reduction=reduction, chunk=CHUNK)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))
        assert not jnp.any(grads["hidden"][~where])
        if reduction == "mean":
            assert_same(found, clean, 0)


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_loss_of_no_tokens_is_zero(tokens):
    arrays, labels = make_problem(tokens=tokens, label_smoothing=True)
    found = value_and_grads(linear_cross_entropy, arrays, labels, where=jnp.zeros(tokens, bool))
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(found))
    assert found[1]["hidden"].shape == (tokens, WIDTH)


def test_a_label_out_of_range_gives_nan():
    arrays, labels = make_problem()
    losses = compiled_loss(arrays, labels.at[3].set(-1).at[9].set(CLASSES), reduction="none", chunk=CHUNK)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [3, 9]
    value, grads = value_and_grads(linear_cross_entropy, arrays, labels.at[3].set(CLASSES), chunk=CHUNK)
    assert all(jnp.any(jnp.isnan(leaf)) for leaf in (value, *grads.values()))


def test_missing_classes():
    arrays, labels = make_problem(label_smoothing=jnp.array(0.0), z_loss=True)
    arrays |= {"bias": arrays["bias"].at[30:].set(-jnp.inf)}
    labels = labels % 30
    ours = value_and_grads(linear_cross_entropy, arrays, labels, chunk=CHUNK)
    assert_same(ours, value_and_grads(dense, arrays, labels), 1e-5)
    assert compiled_loss(arrays, labels.at[0].set(33)) == jnp.inf


def test_large_logits_are_accurate():
    arrays, labels = make_problem()
    arrays |= {"bias": arrays["bias"] + 1e5, "hidden": jnp.round(100 * arrays["hidden"])}
    ours = value_and_grads(linear_cross_entropy, arrays, labels, chunk=CHUNK)
    assert_same(ours, value_and_grads(dense, arrays, labels), 1e-5)


@pytest.mark.slow
def test_low_precision_is_summed_in_float32():
    dtype = jnp.bfloat16
    arrays, labels = make_problem(dtype, tokens=200, z_loss=True)
    value, grads = value_and_grads(linear_cross_entropy, arrays, labels, chunk=CHUNK)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
    expected, wide_grads = value_and_grads(dense, wide, labels)
    assert value.dtype == jnp.float32 and all(grads[name].dtype == dtype for name in grads)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for name, grad in grads.items():
        error = jnp.max(jnp.abs(grad.astype(jnp.float32) - wide_grads[name])) / jnp.max(jnp.abs(wide_grads[name]))
        assert error < 2 * float(jnp.finfo(dtype).eps), name


def test_scan_and_vmap_over_arrays():
    arrays, labels = make_problem(tokens=24, softcap=True)
    loss = functools.partial(linear_cross_entropy, chunk=CHUNK)
    batches = arrays["hidden"].reshape(3, 8, WIDTH), labels.reshape(3, 8)

    def on_batch(loss, hidden, labels):
        return jax.value_and_grad(lambda arrays: loss(**arrays, labels=labels))(arrays | {"hidden": hidden})

    expected = jit(jax.vmap(functools.partial(on_batch, dense)))(*batches)
    assert_same(jit(jax.vmap(functools.partial(on_batch, loss)))(*batches), expected, 1e-5)
    _, scanned = jit(lambda: jax.lax.scan(lambda _, batch: (None, on_batch(loss, *batch)), None, batches))()
    assert_same(scanned, expected, 1e-5)


def test_second_derivatives():
    arrays, labels = make_problem(tokens=7, classes=9, softcap=True)

    def product(loss):
        grad = jax.grad(lambda arrays: loss(**arrays, labels=labels))
        return jit(lambda: jax.jvp(grad, (arrays,), (jax.tree.map(jnp.sin, arrays),))[1])()

    assert_same(product(linear_cross_entropy), product(dense), 1e-5)


def count_products(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("dot_general")


def test_no_more_matrix_products_than_needed():
    arrays, labels = make_problem()

    def loss(hidden, weight, reduction="mean"):
        return jnp.sum(linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk=CHUNK))

    pair = arrays["hidden"], arrays["weight"]
    assert count_products(loss, *pair) == 1
    assert count_products(jax.grad(loss, (0, 1)), *pair) == 3
    assert count_products(jax.grad(loss), *pair) == 2  # a frozen weight
    assert count_products(jax.grad(functools.partial(loss, reduction="none"), (0, 1)), *pair) == 4


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_a_tenth_of_the_logits(monkeypatch, transposed):
    monkeypatch.undo()
    tokens, width, classes = 4096, 512, 50_257
    shapes = [(tokens, width), (classes, width) if transposed else (width, classes), (classes,)]

    def loss(hidden, weight, bias, labels):
        return linear_cross_entropy(hidden, weight, labels, bias, transposed=transposed)

    arguments = [*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), jax.ShapeDtypeStruct((tokens,), int)]
    for function in (loss, jax.value_and_grad(loss, (0, 1, 2))):
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * 4 * tokens * classes


SPECS = {"weight": PartitionSpec(None, "classes"), "bias": PartitionSpec("classes"), "hidden": PartitionSpec(),
         "class_weights": PartitionSpec("classes")}  # fmt: skip


@pytest.mark.parametrize(
    ("where_differentiated", "reduction"),
    [("inside", "mean"), ("outside", "none"), ("outside unchecked", "mean"), ("outside unchecked", "none")],
)
def test_classes_divided_over_devices(reduction, where_differentiated):
    arrays, labels = make_problem(**dict.fromkeys(OPTIONS, True))
    static, where = {"reduction": reduction}, jnp.arange(TOKENS) % 5 != 1
    expected = value_and_grads(dense, arrays, labels, where=where, **static)
    loss = functools.partial(linear_cross_entropy, axis_name="classes", chunk=CHUNK)
    specs = {name: SPECS.get(name, PartitionSpec()) for name in arrays}
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma="unchecked" not in where_differentiated)
    if where_differentiated == "inside":
        found = over(
            lambda arrays: value_and_grads(loss, arrays, labels, jax.jit, where=where, **static),
            in_specs=(specs,),
            out_specs=(PartitionSpec(), specs),
        )(arrays)
    else:

        def sharded(**arrays):
            return over(
                lambda arrays: loss(**arrays, labels=labels, where=where, **static),
                in_specs=(specs,),
                out_specs=PartitionSpec(),
            )(arrays)

        found = jit(jax.value_and_grad(lambda arrays: _weighted(sharded(**arrays))))(arrays)
    assert_same(found, expected, 1e-5)


def _weighted(losses):
    return losses if losses.ndim == 0 else jnp.sum(losses * jnp.cos(jnp.arange(losses.size)))


def test_tokens_and_classes_divided_over_devices():
    arrays, labels = make_problem(tokens=24)
    mesh = jax.make_mesh((2, 2), ("tokens", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {name: SPECS[name] for name in arrays} | {"hidden": PartitionSpec("tokens")}

    def on_device(arrays, labels):
        def loss(arrays):
            own = linear_cross_entropy(**arrays, labels=labels, axis_name="classes", chunk=4)
            return jax.lax.pmean(own, "tokens")

        return jax.value_and_grad(loss)(arrays)

    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, PartitionSpec("tokens")), out_specs=(PartitionSpec(), specs)
    )
    assert_same(jit(run)(arrays, labels), value_and_grads(dense, arrays, labels), 1e-5)
    bad = jax.shard_map(
        lambda arrays, labels: linear_cross_entropy(
            **arrays, labels=labels, axis_name="classes", reduction="none", chunk=4
        ),
        mesh=mesh, in_specs=(specs, PartitionSpec("tokens")), out_specs=PartitionSpec("tokens"),
    )  # fmt: skip
    losses = bad(arrays, labels.at[3].set(CLASSES))
    np.testing.assert_array_equal(np.isnan(losses), np.arange(24) == 3)


def test_values_and_gradients_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    arrays, labels = make_problem(class_weights=True)
    tensors = {name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in arrays.items()}
    logits = tensors["hidden"] @ tensors["weight"] + tensors["bias"]
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor(np.asarray(labels)).long(), tensors["class_weights"].detach(), label_smoothing=0.2
    )
    loss.backward()
    value, grads = value_and_grads(linear_cross_entropy, arrays, labels, label_smoothing=0.2, chunk=CHUNK)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    for name in ("hidden", "weight", "bias"):
        np.testing.assert_allclose(grads[name], tensors[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": jnp.ones((CLASSES, WIDTH))}, ValueError, "transposed=True"),
        ({"weight": jnp.ones((WIDTH, 0))}, ValueError, "one class at least"),
        ({"weight": jnp.ones((WIDTH, CLASSES), int)}, TypeError, "weight must be of floating dtype"),
        ({"bias": jnp.ones((CLASSES, 1))}, ValueError, "bias must have shape"),
        ({"class_weights": jnp.ones(3)}, ValueError, "class_weights must have shape"),
        ({"class_weights": -jnp.ones(CLASSES)}, ValueError, "class_weights must be >= 0"),
        ({"labels": jnp.zeros((TOKENS, 1), int)}, ValueError, "labels must have shape"),
        ({"labels": jnp.zeros(TOKENS)}, TypeError, "labels must be of integer dtype"),
        ({"where": jnp.ones((TOKENS, CLASSES), bool)}, ValueError, "bias of -inf"),
        ({"where": jnp.ones(TOKENS)}, TypeError, "where must be boolean"),
        ({"softcap": 0.0}, ValueError, "softcap must be in"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be in"),
        ({"reduction": "avg"}, ValueError, "reduction must be"),
        ({"chunk": 0}, ValueError, "chunk must be an int >= 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    arrays, labels = make_problem()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arrays | {"labels": labels} | changes))


def test_forward_mode_is_refused():
    arrays, labels = make_problem()
    bias = [arrays.pop("bias")]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda bias: linear_cross_entropy(**arrays, bias=bias, labels=labels), bias, bias)
