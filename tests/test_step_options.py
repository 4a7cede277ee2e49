"""Every pair of ``make_step``'s options, against the step in NumPy; and gradients that the user takes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.data import MaskedBatch

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DEVICES, SIZE, RATE, CLIP = 4, 8, 0.1, 1.5
RECORD = ("grad_norm", "update_norm", "leaf_grad_norms", "noise_scale")
OPTIONS = {
    "custom": (None, "clipped", "jax"),
    "axis_name": (None, "d"),
    "microbatches": (1, 2),
    "packed": (False, True),
    "record": ((), RECORD),
    "batch_weight": (False, True),
    "hparams": (False, True),
    "model_state": (False, True),
    "loss_scale": (False, True),
    "masked": (False, True),
}


def is_refused(options):
    parts = options["axis_name"] or options["microbatches"] > 1
    return options["custom"] == "clipped" and options["batch_weight"] and parts


def covering_rows():
    """A small set of combinations of options that contains every possible pair of choices."""
    names, rows = list(OPTIONS), []
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(OPTIONS[a]))
        for y in range(len(OPTIONS[b]))
    }
    every = [tuple(enumerate(row)) for row in itertools.product(*(range(len(OPTIONS[name])) for name in names))]
    every = [tuple((names[at], choice) for at, choice in row) for row in every]
    every = [row for row in every if not is_refused({name: OPTIONS[name][choice] for name, choice in row})]
    while any(missing.intersection(itertools.combinations(row, 2)) for row in every):
        best = max(every, key=lambda row: len(missing.intersection(itertools.combinations(row, 2))))
        missing -= set(itertools.combinations(best, 2))
        rows.append({name: OPTIONS[name][choice] for name, choice in best})
    return rows


def make_loss(options):
    """The mean squared residual of a linear model, weighted by tokens or not, with the signature for the options."""

    def loss_fn(params, batch, key, model_state=None, hparams=None):
        (x, y, tokens), where = batch if options["masked"] else (batch, None)
        weights = tokens if options["batch_weight"] else jnp.ones_like(tokens)
        weights = weights if where is None else jnp.where(where, weights, 0)
        mean = lambda values: jnp.tensordot(weights, values, 1) / jnp.sum(weights)  # noqa: E731
        residuals = x @ params["w"] + params["b"] - y
        loss = mean(residuals**2) + (0 if hparams is None else hparams["l2"] * jnp.sum(params["w"] ** 2))
        if model_state is None:
            return loss, {"residual": mean(residuals)}
        new = {"mean": 0.9 * model_state["mean"] + 0.1 * mean(x), "count": model_state["count"] + 1}
        return loss, {"residual": mean(residuals)}, model_state | new

    if options["hparams"] and options["model_state"]:
        return lambda params, batch, key, model_state, hparams: loss_fn(params, batch, key, model_state, hparams)
    if options["hparams"]:
        return lambda params, batch, key, hparams: loss_fn(params, batch, key, None, hparams)
    if options["model_state"]:
        return lambda params, batch, key, model_state: loss_fn(params, batch, key, model_state)
    return lambda params, batch, key: loss_fn(params, batch, key)


def make_data():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(SIZE, 3)), random.normal(size=SIZE)
    where = np.array([1, 1, 1, 0, 1, 1, 0, 0], bool)
    return x, y, np.arange(1.0, SIZE + 1), where, random.normal(size=3), 0.3


def noise_scale(s, m, small, big):
    noise, signal = (s - m) / (1 / small - 1 / big), (big * m - small * s) / (big - small)
    return noise, signal, noise / signal


def reference(options):
    """The step by its definition: expected results by name, and the noise scale for each way to divide the batch."""
    x, y, tokens, where, w, b = make_data()
    where = where if options["masked"] else np.ones(SIZE, bool)
    weights = np.where(where, tokens if options["batch_weight"] else 1.0, 0)
    l2 = 0.05 if options["hparams"] else 0.0
    residuals = x @ w + b - y
    # the gradients of each example with respect to w and b
    grads_b = np.concatenate([2 * residuals[:, None] * x + 2 * l2 * w, 2 * residuals[:, None]], axis=1)
    losses_b = residuals**2 + l2 * np.sum(w**2)
    norms_b = np.linalg.norm(grads_b, axis=1)
    grad, loss = np.average(grads_b, 0, weights), np.average(losses_b, 0, weights)
    true = grad
    if options["custom"]:
        true = np.average(grads_b, 0, where)
    if options["custom"] == "clipped":
        loss = np.average(losses_b, 0, where)
        grad = np.average(grads_b * np.minimum(1, CLIP / norms_b)[:, None], 0, where)
    expected = {
        "params": np.append(w, b) - RATE * grad,
        "loss": loss,
        "residual": np.average(residuals, 0, weights),
        "mean": 0.9 + 0.1 * np.average(x, 0, weights),
        "grad_norm": np.linalg.norm(grad),
        "update_norm": RATE * np.linalg.norm(grad),
        "leaf_grad_norms": [abs(grad[3]), np.linalg.norm(grad[:3])],
    }
    m, count = np.sum(true**2), where.sum()
    if options["custom"] or options["microbatches"] == 1:
        return expected, [noise_scale(np.average(norms_b**2, 0, where), m, 1, count)]
    noises, devices = [], DEVICES if options["axis_name"] else 1
    for order in ("C", "F"):  # parts of consecutive examples, and of every second example
        rows = np.arange(SIZE).reshape(devices, 2, -1) if order == "C" else np.arange(SIZE).reshape(devices, -1, 2).mT
        parts = [part for part in rows.reshape(2 * devices, -1) if where[part].any()]
        squares = [np.sum(np.average(grads_b[part], 0, weights[part]) ** 2) for part in parts]
        size = len(parts) / np.sum([1 / where[part].sum() for part in parts])
        noises.append(noise_scale(np.mean(squares), m, size, count))
    return expected, noises


def clipped(loss_fn):
    return nnlearn.clipped_value_and_grad(loss_fn, CLIP)


def by_jax(loss_fn):
    return jax.value_and_grad(loss_fn, has_aux=True)


def make(options, **changed):
    """A step, its state and its batch."""
    x, y, tokens, where, w, b = make_data()
    tx = nnlearn.sgd(RATE)
    tx = nnlearn.dynamic_loss_scale(tx, 64.0) if options["loss_scale"] else tx
    batch = (x, y, tokens)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    batch = MaskedBatch(batch, jnp.asarray(where)) if options["masked"] else batch

    def count(part):
        part, where = part if options["masked"] else (part, True)
        return jnp.sum(jnp.where(where, part[2], 0))

    step = nnlearn.make_step(
        make_loss(options),
        tx,
        axis_name=options["axis_name"],
        microbatches=options["microbatches"],
        packed=options["packed"],
        record=options["record"],
        batch_weight=count if options["batch_weight"] else None,
        value_and_grad={None: None, "clipped": clipped, "jax": by_jax}[options["custom"]],
        hparams={"l2": jnp.float32(0.05)} if options["hparams"] else None,
    )
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.float32(b)}
    model_state = {"mean": jnp.ones(3), "count": jnp.int32(4), "table": jnp.array([jnp.inf, 1.0])}
    model_state = model_state if options["model_state"] else None
    return step, nnlearn.init_state(params, tx, packed=options["packed"], model_state=model_state), batch


def over_parts(transform):
    def of_step(step):
        mapped = transform(step, in_axes=(None, 0), axis_name="d")
        mapped = quick_jit(mapped) if transform is jax.vmap else mapped

        def first_of(state, batch):
            parts = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch)
            state, info = mapped(state, parts)
            state = state._replace(key=jax.random.key_data(state.key))
            for leaf in jax.tree.leaves((state, info)):  # all results are equal on all devices
                np.testing.assert_array_equal(leaf[0], leaf[1])
            return jax.tree.map(lambda leaf: leaf[0], (state, info))

        return first_of

    return of_step


def over_mesh(check_vma, shape=(DEVICES,), names=("d",)):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    specs = {"in_specs": (P(), P(names)), "out_specs": P(), "check_vma": check_vma}
    return lambda step: quick_jit(jax.shard_map(step, mesh=mesh, **specs))


MAPPED = {
    "vmap": over_parts(jax.vmap),
    "shard_map": over_mesh(True),
    "pmap": over_parts(jax.pmap),
    "unchecked": over_mesh(False),
    "mesh of two axes": over_mesh(True, (2, 2), ("a", "d")),
}


def check(options, run):
    step, state, batch = make(options)
    state, info = run(step)(state, batch)
    expected, noises = reference(options)
    near = {"rtol": 2e-5, "atol": 1e-6}
    np.testing.assert_allclose(np.append(state.params["w"], state.params["b"]), expected["params"], **near)
    np.testing.assert_allclose(info.loss, expected["loss"], **near)
    np.testing.assert_allclose(info.aux["residual"], expected["residual"], **near)
    if options["model_state"]:
        np.testing.assert_allclose(state.model_state["mean"], expected["mean"], **near)
        assert state.model_state["count"] == 5 and state.model_state["table"].tolist() == [np.inf, 1.0]
    for name in RECORD[:3]:
        found = getattr(info, name)
        assert (found is None) == (not options["record"])
        if found is not None:
            np.testing.assert_allclose(found, expected[name], **near)
    if options["record"]:
        assert any(np.allclose(info.noise_scale, noise, rtol=1e-4) for noise in noises), (info.noise_scale, noises)


def rows():
    """The rows, with each kind of mapped axis where there is one; and a row with all options."""
    ways, every = (
        itertools.cycle(["vmap", "shard_map", "pmap"]),
        {name: choices[-1] for name, choices in OPTIONS.items()},
    )
    found = [(options, next(ways) if options["axis_name"] else "jit") for options in covering_rows()]
    clipping = every | {"custom": "clipped", "batch_weight": False}
    return [*found, (clipping, "unchecked"), (every | {"custom": None, "axis_name": ("a", "d")}, "mesh of two axes")]


def identify(value):
    if isinstance(value, str):
        return value
    return ",".join(name for name, choice in value.items() if choice != OPTIONS[name][0]) or "none"


@pytest.mark.parametrize(("options", "mapped"), rows(), ids=identify)
def test_every_pair_of_options_equals_the_definition(options, mapped):
    check(options, MAPPED.get(mapped, quick_jit))


@pytest.mark.parametrize("parts", [{"axis_name": "d"}, {"microbatches": 2}])
def test_clipping_in_parts_is_refused_with_weights_other_than_examples(parts):
    options = {name: choices[0] for name, choices in OPTIONS.items()} | parts
    with pytest.raises(ValueError, match="batch_weight cannot be combined with this value_and_grad"):
        make(options | {"custom": "clipped", "batch_weight": True})
