"""Meshes of Explicit and Auto axes: several devices compute the same as one, without repeated work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import BY_NAME
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn import models
from nnlearn.data import MaskedBatch
from nnlearn.sharding.axes import disjoint, explicit_mesh, explicit_spec

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
X, Z = RNG.normal(size=(2, 8, 6)).astype(np.float32)
LABELS = RNG.integers(0, 3, 8)
TOKENS = RNG.integers(0, 11, (8, 6))
FRAMES = RNG.normal(size=(8, 5, 6)).astype(np.float32)
LENGTHS = np.array([5, 4, 5, 3, 5, 5, 4, 5])
PADDED = (np.arange(5)[None] >= LENGTHS[:, None]).astype(np.float32)
IMAGES = RNG.normal(size=(8, 4, 4, 2)).astype(np.float32)
NET = models.mlp((6, 4, 3))
PARAMS = NET.init(KEY)
SGD = nnlearn.sgd(0.1)


def mesh_of(kind, *names):
    shape = (4,) if len(names) == 1 else (2, 2)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def assert_equal_on(mesh, function, replicated, *sharded, tolerance=1e-4, entered=False):
    """Assert that the function's results on a mesh equal those on one device."""
    expected = jax.jit(function)(replicated, *sharded)
    whole = jax.device_put(replicated, NamedSharding(mesh, P()))
    parts = jax.device_put(sharded, NamedSharding(mesh, P("data")))
    if entered:
        with jax.set_mesh(mesh):
            got = jax.jit(lambda *arguments: function(*arguments))(whole, *parts)
    else:
        got = jax.jit(lambda *arguments: function(*arguments))(whole, *parts)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)
    return got


def summed(*losses):
    """Value and gradient of several losses of the first argument, in one program."""

    def total(x, *others):
        values = [loss(x, *others) for loss in losses]
        return sum(jnp.sum(jnp.sin(value)) for value in values), values

    return lambda weight, x, *others: jax.grad(total, has_aux=True)(x * weight, *others)


EXPLICIT = mesh_of(AxisType.Explicit, "data")
both = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
SOMETIMES_AUTO = [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
mostly_explicit = pytest.mark.parametrize("kind", SOMETIMES_AUTO, ids=str)


@pytest.mark.slow
def test_losses_that_compare_or_look_up_examples():
    weights = np.array([1.0, 2.0, 3.0], np.float32)
    where = np.arange(8) != 2
    losses = summed(
        lambda x, z, labels, where: nnlearn.info_nce_loss(x, z, symmetric=True, where=where),
        lambda x, z, labels, where: nnlearn.ntxent(x, labels, where=where),
        lambda x, z, labels, where: nnlearn.supervised_contrastive_loss(x, labels),
        lambda x, z, labels, where: nnlearn.sigmoid_pair_loss(x, z, where=where),
        lambda x, z, labels, where: nnlearn.batch_hard_triplet_loss(x, labels),
        lambda x, z, labels, where: nnlearn.cross_entropy(x[:, :3], labels, class_weights=weights, where=where),
        lambda x, z, labels, where: nnlearn.softmax_cross_entropy_with_integer_labels(x.T, labels, 0),
    )
    assert_equal_on(EXPLICIT, losses, np.float32(1), X, Z, LABELS, where)


@pytest.mark.slow
def test_sequence_losses_and_decoders():
    labels = RNG.integers(1, 6, (8, 2))
    none = np.zeros((8, 2), np.float32)

    def work_out(weight, logits, padded, labels, none):
        loss = jax.grad(lambda logits: jnp.sum(nnlearn.ctc_loss(logits, padded, labels, none)))(logits * weight)
        greedy = nnlearn.ctc_greedy_decode(logits, padded)
        beam = nnlearn.ctc_beam_search_decode(logits, padded, 3)
        wrong = nnlearn.losses.edit_distance(greedy.labels, greedy.label_paddings, labels, none)
        return loss, greedy, beam, wrong

    got = assert_equal_on(EXPLICIT, work_out, np.float32(1), FRAMES, PADDED, labels, none)
    # results are sharded like the examples
    assert {jax.typeof(leaf).sharding.spec[0] for leaf in jax.tree.leaves(got)} == {"data"}


@pytest.mark.parametrize(
    "cut", ["tokens", *(pytest.param(cut, marks=pytest.mark.slow) for cut in ("classes", "width"))]
)
def test_linear_cross_entropy(cut):
    hidden, weight = RNG.normal(size=(8, 3, 4)).astype(np.float32), RNG.normal(size=(4, 8)).astype(np.float32)
    labels = RNG.integers(0, 8, (8, 3))

    def loss(hidden, weight, labels):
        return nnlearn.linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)

    run = jax.value_and_grad(loss, (0, 1))
    mesh = EXPLICIT
    spec = {
        "tokens": (P("data"), P(), P("data")),
        "classes": (P(), P(None, "data"), P()),
        "width": (P(), P("data"), P()),
    }
    placed = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((hidden, weight, labels), spec[cut], strict=True)
    ]
    got, expected = jax.jit(run)(*placed), jax.jit(run)(hidden, weight, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6), got, expected)


def through(model, **options):
    """Outputs, and the gradient with respect to the parameters, of a model's training pass."""

    def run(params, inputs):
        def total(params):
            outputs = model.apply(params, inputs, **options)
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.grad(total, has_aux=True)(params)

    return run


MODELS = {
    "transformer": (
        models.transformer(11, layers=2, width=8, heads=2, max_length=8, dropout=0.2, scan=True),
        TOKENS,
        {"key": jax.random.key(1)},
    ),
    "learned": (models.encoder(11, 3, layers=1, width=8, heads=2, max_length=8, positions="learned"), TOKENS, {}),
    "factorization": (models.factorization_machine((11,) * 6, 3), TOKENS, {}),
    "gru": (models.gru(6, 4, bidirectional=True), FRAMES, {}),
    "grouped": (models.conv(2, 4, 3, groups=2, stride=2), IMAGES, {}),
    "group_norm": (models.group_norm(2, 2), IMAGES, {}),
}


SLOW = ("transformer", "learned", "gru")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_models(name):
    model, inputs, options = MODELS[name]
    got = assert_equal_on(EXPLICIT, through(model, **options), jax.jit(model.init)(KEY), inputs)
    assert jax.typeof(got[1]).sharding.spec[0] == "data"


@pytest.mark.slow
def test_a_transformer_with_kernels_sharded_over_explicit_axes():
    mesh = mesh_of(AxisType.Explicit, "data", "model")
    model = models.transformer(12, layers=1, width=8, heads=2, max_length=8)
    params = model.init(KEY)

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P(None, "model") if leaf.ndim > 1 else P()))

    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    got = jax.jit(through(model))(jax.tree.map(place, params), tokens)
    expected = jax.jit(through(model))(params, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5), got, expected)
    assert jax.typeof(got[0]["embedding"]["kernel"]).sharding.spec == P(None, "model")


@pytest.mark.slow
def test_tokens_are_generated_on_an_explicit_mesh():
    model = models.transformer(11, layers=1, width=8, heads=2, max_length=8)
    run = functools.partial(nnlearn.models.generate, model, length=2, key=0, top_k=3)
    assert_equal_on(EXPLICIT, lambda p, tokens: run(p, tokens), model.init(KEY), TOKENS)


def masked_loss(params, batch, key):
    (x, labels), where = batch
    return nnlearn.cross_entropy(NET.apply(params, x), labels, where=where)


def loss(params, batch, key):
    return nnlearn.cross_entropy(NET.apply(params, batch[0]), batch[1])


STEPS = {
    "noise scale": {"record": ("noise_scale", "leaf_grad_norms")},
    "parts": {"microbatches": 2, "record": ("noise_scale",)},
    "uneven parts": {"microbatches": 3},
    "clipped": {"value_and_grad": functools.partial(nnlearn.clipped_value_and_grad, clip_norm=0.5)},
}


@pytest.mark.parametrize("name", [*STEPS][:2] + [pytest.param(name, marks=pytest.mark.slow) for name in [*STEPS][2:]])
def test_steps(name):
    step = nnlearn.make_step(masked_loss, SGD, **STEPS[name])
    state = nnlearn.init_state(PARAMS, SGD)._replace(key=None)
    batch = MaskedBatch((X, LABELS), np.arange(8) != 5)
    with_key = lambda state, batch: step(state, batch, key=jax.random.key(0))  # noqa: E731
    assert_equal_on(EXPLICIT, with_key, state, batch, entered=name == "uneven parts")


@pytest.mark.slow
@mostly_explicit
def test_a_run_and_its_evaluation_on_sharded_examples(kind):
    def run(weight, x, labels):
        examples = (x * weight, labels)
        metrics = lambda params, batch: {"loss": masked_loss(params, batch, None)}  # noqa: E731
        evaluate = nnlearn.evaluation(metrics, examples, 5)
        batches, rule = nnlearn.shuffled(examples, 4), nnlearn.patience("loss", 5)
        train = nnlearn.make_train(
            masked_loss, SGD, batches, NET.init, epochs=2, microbatches=2, evaluate=evaluate, stop=rule
        )
        state, trace = train({}, 0)
        return state.params, trace.loss, trace.metrics

    assert_equal_on(mesh_of(kind, "data"), run, np.float32(1), X, LABELS)


@mostly_explicit
def test_fit_with_a_sharding(kind):
    mesh = mesh_of(kind, "data")
    results = []
    for sharding in (None, NamedSharding(mesh, P("data"))):
        state = nnlearn.init_state(PARAMS, SGD)
        state = state if sharding is None else jax.device_put(state, NamedSharding(mesh, P()))
        step = nnlearn.make_step(loss, SGD)
        results.append(nnlearn.fit(step, state, [(X, LABELS)] * 3, sharding=sharding, progress=False))
    one, several = (result.state.params for result in results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6), several, one)


@both
def test_each_part_of_a_sharded_batch_is_on_every_device(kind):
    def wide_loss(params, batch, key):
        return jnp.mean(jnp.tanh(batch @ params["w"]) @ params["v"])

    mesh = mesh_of(kind, "data")
    params = {"w": np.ones((6, 16), np.float32), "v": np.ones(16, np.float32)}
    state = jax.device_put(nnlearn.init_state(params, SGD), NamedSharding(mesh, P()))
    batch = jax.device_put(np.ones((32, 6), np.float32), NamedSharding(mesh, P("data")))
    step = jax.jit(nnlearn.make_step(wide_loss, SGD, microbatches=4))
    program = step.lower(state, batch).compile().as_text()
    rows = {int(count) for count in re.findall(r"f32\[(\d+),16\]\S* dot\(", program)}
    assert max(rows - {6}) == 2  # 32 rows in 4 parts on 4 devices; 6 is the gradient of w
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", program)


def test_microbatches_take_every_kth_example():
    seen = []

    def spy(params, batch, key):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), batch, ordered=True)
        return jnp.mean(params * batch)

    step = nnlearn.make_step(spy, SGD, microbatches=2)
    jax.block_until_ready(step(nnlearn.init_state(jnp.ones(()), SGD), jnp.arange(6.0)))
    assert sorted(map(tuple, seen)) == [(0, 2, 4), (1, 3, 5)]


def test_arrays_without_an_explicit_mesh_add_no_operation():
    assert explicit_mesh(jnp.ones(2), {"a": 1.0}, np.ones(2), None) is None
    assert explicit_spec(jax.device_put(jnp.ones(4), NamedSharding(mesh_of(AxisType.Auto, "data"), P("data")))) == (
        None,
    )
    program = str(jax.make_jaxpr(lambda x, y: nnlearn.info_nce_loss(x, y))(X, Z))
    assert "reshard" not in program
    assert disjoint((("data", "model"), None, "model")) == (("data", "model"), None, None)


@pytest.mark.slow
def test_every_optimizer_updates_parameters_sharded_over_explicit_axes():
    specs = {"w": P("data"), "v": P(None, "data"), "s": P()}
    shapes = {"w": (8, 4), "v": (4, 8), "s": ()}
    params = {
        name: jax.device_put(np.ones(shapes[name], np.float32), NamedSharding(EXPLICIT, specs[name])) for name in specs
    }
    for name in BY_NAME:
        if BY_NAME[name].adapt:  # it takes pairs of parameters, the loss or another optimizer
            continue
        clipped = nnlearn.chain(nnlearn.adaptive_grad_clip(0.1), nnlearn.clip_by_global_norm(1.0))
        tx = nnlearn.chain(clipped, getattr(nnlearn, name)(0.1))

        def step(params, tx=tx):
            updates, _ = tx.update(params, tx.init(params), params)
            return nnlearn.apply_updates(params, updates)

        for tree in (params, nnlearn.pack(params)):  # JAX raises sharding errors while tracing
            after = jax.eval_shape(step, tree)
            for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(tree), strict=True):
                assert explicit_names(one.sharding.spec) == explicit_names(other.sharding.spec), name


def explicit_names(spec):
    return [(axis, names) for axis, names in enumerate(spec) if names is not None]
