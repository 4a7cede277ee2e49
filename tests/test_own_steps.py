"""Custom steps in every kind of run, and metrics from what steps record, compared with plain loops."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.sweeps import choice, successive_halving, train_population
from nnlearn.train.custom_step import as_info, check_step


class Pair(NamedTuple):
    """Two players, each with an optimizer: ``x`` descends and ``y`` ascends ``x * y + (x**2 - y**2) / 4``."""

    x: Any
    y: Any
    x_opt: Any
    y_opt: Any
    noise: Any


def players(hparams):
    return nnlearn.adam(hparams["rate"]), optax.sgd(0.1, momentum=0.5)


def init(key, hparams):
    x, y = jnp.ones(2), jnp.full(3, 2.0)
    x_tx, y_tx = players(hparams)
    return Pair(x, y, x_tx.init(x), y_tx.init(y), jnp.zeros([]))


def step(state, batch, key, hparams):
    x_tx, y_tx = players(hparams)

    def game(x, y):
        return jnp.sum(x) * jnp.sum(y) * batch + (jnp.sum(x**2) - jnp.sum(y**2)) / 4

    loss, (x_grad, y_grad) = jax.value_and_grad(game, (0, 1))(state.x, state.y)
    x_update, x_opt = x_tx.update(x_grad, state.x_opt, state.x)
    y_update, y_opt = y_tx.update(jax.tree.map(jnp.negative, y_grad), state.y_opt, state.y)
    noise = jax.random.normal(key)
    new = Pair(state.x + x_update, state.y + y_update, x_opt, y_opt, noise)
    return new, {"loss": loss, "size": jnp.sum(state.x**2), "noise": noise}


BATCHES = nnlearn.generated(lambda key, step: 0.01 * step)
STEPS, EVERY = 10, 4
OPTIONS = {"step": step, "batches": BATCHES, "init": init, "steps": STEPS, "check_every": EVERY}


def distance(state):
    return {"distance": jnp.sum(jnp.abs(state.x)) + jnp.sum(jnp.abs(state.y))}


def plain_loop(rate):
    """The same game by a Python loop, without the noise: states after each step, and their infos."""
    state, states, infos = init(None, {"rate": rate}), [], []
    for at in range(STEPS):
        state, info = jax.jit(step)(state, jnp.float32(0.01 * at), jax.random.key(at), {"rate": rate})
        states.append(state._replace(noise=0))
        infos.append(info)
    return states, infos


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-5} | tolerance)), one, other)


@pytest.fixture(scope="module")
def reference():
    return plain_loop(0.2)


@pytest.fixture(scope="module")
def game():
    rules = [nnlearn.keep_best("distance"), nnlearn.reached("aux/size", -1.0)]
    return nnlearn.make_train(**OPTIONS, evaluate=distance, stop=rules)


@pytest.fixture(scope="module")
def outcome(game):
    return jax.jit(game)({"rate": 0.2}, 0)


def test_two_optimizers_and_trees_equal_a_plain_loop(reference, outcome, tmp_path):
    (states, infos), (state, trace) = reference, outcome
    distances = [float(distance(states[at - 1])["distance"]) for at in (4, 8, 10)]
    best = int(np.argmin(distances))
    assert isinstance(state, Pair) and int(trace.best_step) == (4, 8, 10)[best]
    assert_same(state._replace(noise=0), states[(3, 7, 9)[best]])
    np.testing.assert_allclose(trace.loss, [info["loss"] for info in infos], rtol=1e-5)
    np.testing.assert_allclose(trace.metrics["distance"], distances, rtol=1e-5)
    sizes = np.array([float(info["size"]) for info in infos])
    np.testing.assert_allclose(
        trace.metrics["aux/size"], [sizes[:4].mean(), sizes[4:8].mean(), sizes[8:].mean()], rtol=1e-5
    )
    assert np.unique(trace.info.aux["noise"]).size == STEPS  # each step has another key
    np.testing.assert_allclose(trace.columns()["aux/size"], sizes, rtol=1e-5)
    trace.save(tmp_path / "trace.npz")
    np.testing.assert_array_equal(nnlearn.Trace.load(tmp_path / "trace.npz").info.aux["size"], trace.info.aux["size"])


def test_runs_in_parts_and_vmapped_runs_equal_the_whole_run(game, outcome):
    def in_parts(rate):
        hparams = {"rate": rate}
        run, first = game.advance(hparams, game.start(hparams, 0), 0, 8)
        run, second = game.advance(hparams, run, 8, 2)
        return game.finish(run), jnp.concatenate([first.loss, second.loss])

    parts = jax.jit(jax.vmap(in_parts))(jnp.array([0.4, 0.2]))
    assert_same(jax.tree.map(lambda leaf: leaf[1], parts), (outcome[0], outcome[1].loss))


def test_a_step_of_make_step_gives_the_standard_run():
    def loss_fn(params, batch, key):
        return jnp.mean((params - batch) ** 2) + jax.random.normal(key) * params, {"x": params}

    tx, examples = nnlearn.adam(0.1), nnlearn.shuffled(jnp.arange(8.0), 4, remainder="drop")
    ordinary = nnlearn.make_train(loss_fn, tx, examples, jnp.ones(()), epochs=2)

    def first_state(key):  # with the same key as the standard run
        return nnlearn.init_state(jnp.ones(()), tx, jax.random.split(jax.random.key(3), 3)[1])

    own = nnlearn.make_train(
        step=lambda hparams: nnlearn.make_step(loss_fn, tx), batches=examples, init=first_state, epochs=2,
        evaluate=lambda params: {"p": params},
    )  # fmt: skip
    (expected, trace), (state, own_trace) = jax.jit(lambda key: (ordinary({}, key), own({}, key)))(3)
    np.testing.assert_array_equal(state.params, expected.params)
    np.testing.assert_array_equal(own_trace.loss, trace.loss)
    assert int(state.step) == 4 and own_trace.metrics["p"][-1] == state.params


def counting(state, batch, key):
    return {**state, "w": state["w"] + batch, "drawn": jax.random.uniform(key)}, {"loss": state["w"] ** 2, "w": batch}


def test_fit_and_epochs_accept_the_same_step():
    first = {"w": 1.0, "drawn": 0.0, "key": jax.random.key(0)}
    saved = []
    result = nnlearn.fit(
        counting, first, [np.float32(1), np.float32(2)], epochs=3, evaluate=lambda state: {"w": state["w"]},
        stop=nnlearn.reached("aux/w", 1.4),
        save=lambda name, state, step: saved.append((name, float(state["w"]), step)),
    )  # fmt: skip
    assert float(result.state["w"]) == 10.0 and result.trace.loss.tolist() == [1, 4, 16, 25, 49, 64]
    assert result.trace.metrics["aux/w"].tolist() == [1.5] * 3 and result.trace.metrics["w"].tolist() == [4, 7, 10]
    assert saved == [("last", 4.0, 2), ("last", 7.0, 4), ("last", 10.0, 6)]
    expected = jax.random.uniform(jax.random.fold_in(jax.random.key(0), 5))
    assert float(result.state["drawn"]) == float(expected)
    epoch = nnlearn.make_epoch(lambda state, batch: (state, {"loss": state["w"]}), jnp.arange(4.0), 2)
    assert epoch({"w": 1.0}, jax.random.key(0))[1].loss.tolist() == [1.0, 1.0]
    assert nnlearn.fit(lambda s, b: (s + b, {"loss": s}), 0.0, [np.float32(1)] * 3).state == 3.0


def test_the_step_count_continues_from_the_state():
    def count(state, batch):
        return {"step": state["step"] + 1}, {"loss": batch}

    result = nnlearn.fit(count, {"step": jnp.int32(5)}, [np.float32(0)] * 3)
    assert result.trace.step.tolist() == [6, 7, 8] and int(result.state["step"]) == 8


def aux_train(**options):
    def loss_fn(params, batch, key, hparams):
        return (params - 1.0) ** 2, {"far": {"from": jnp.abs(params - hparams["goal"])}, "many": jnp.zeros(3)}

    return nnlearn.make_train(
        loss_fn, lambda h: nnlearn.sgd(h["rate"]), BATCHES, jnp.zeros(()), steps=6, check_every=3, **options
    )


def far_means(rate, goal):
    params = 1.0 - (1.0 - 2.0 * np.float64(rate)) ** np.arange(6)
    return np.abs(params - goal).reshape(2, 3).mean(axis=1)


def test_sweeps_and_halving_use_recorded_metrics():
    rates, goal, metric = [0.05, 0.15, 0.45], 0.3, "aux/far/from"
    results = nnlearn.sweep(aux_train(), {"rate": choice(*rates), "goal": goal}, metric=metric)
    expected = [far_means(rate, goal) for rate in rates]
    columns = results.columns()
    np.testing.assert_allclose(columns[metric], [means[-1] for means in expected], rtol=1e-5)
    np.testing.assert_allclose(columns[f"best_{metric}"], [means.min() for means in expected], rtol=1e-5)
    assert results.best().setting["rate"] == 0.05  # the loss would choose 0.45
    halving = successive_halving(aux_train(), results.settings, metric=metric, eta=2)
    assert halving.best["rate"] == rates[np.argmin([means[0] for means in expected])] != 0.45
    np.testing.assert_allclose(halving.columns()[metric][:3], [means[0] for means in expected], rtol=1e-5)
    population = train_population(
        aux_train(), {"rate": choice(*rates), "goal": goal}, 3, ready_every=3, metric=metric, replaced=0.0,
        resample=0.0, start=list(results.settings),
    )  # fmt: skip
    np.testing.assert_allclose(population.scores[0], [means[0] for means in expected], rtol=1e-5)
    with pytest.raises(ValueError, match=r"'aux/far'.*\['aux/far/from'\]"):
        nnlearn.sweep(aux_train(), {"rate": choice(0.1, 0.2), "goal": 0.1}, metric="aux/far")


def test_rules_use_aux_metrics_and_ignore_skipped_steps():
    def loss_fn(params, batch, key):
        return params * jnp.where(batch == 1, jnp.nan, 1.0), batch

    tx = nnlearn.apply_if_finite(nnlearn.sgd(0.1), 5)
    batches = [np.float32(at) for at in (0, 1, 5, 3, 3, 3)]
    state, step = nnlearn.init_state(jnp.ones(()), tx), nnlearn.make_step(loss_fn, tx)
    result = nnlearn.fit(step, state, batches, check_every=3, stop=nnlearn.patience("aux", 1, mode="min"))
    assert result.trace.metrics["aux"].tolist() == [2.5, 3.0]  # the mean of 0 and 5
    assert result.stopped_by == "patience(aux)" and int(result.state.step) == 3
    sampler = nnlearn.generated(lambda key, step: jnp.array(batches)[step])
    train = nnlearn.make_train(
        loss_fn, tx, sampler, jnp.ones(()), steps=6, check_every=3, stop=nnlearn.patience("aux", 1)
    )
    assert train({}, 0)[1].metrics["aux"].tolist() == [2.5, 3.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_fn": lambda p, b, k: p}, ValueError, "step makes whole steps, so loss_fn would be ignored"),
        ({"record": ("update_norm",), "microbatches": 2}, ValueError, "record and microbatches"),
        ({"init": None}, TypeError, "needs init, the state"),
        ({"step": lambda state, batch, key, more: None}, TypeError, r"step must take \(state, batch\)"),
        ({"step": 3}, TypeError, "got 3"),
        ({"step": lambda hparams: None}, TypeError, r"step\(hparams\) must return a function"),
        ({"step": lambda state, batch: state}, TypeError, r"return \(state, info\), got Pair|got Pair"),
        ({"step": lambda state, batch: (state, {"size": 1.0})}, TypeError, r"a loss.*\['size'\]"),
        ({"step": lambda state, batch: (state, {"loss": jnp.ones(2)})}, TypeError, r"scalar, got shape \(2,\)"),
        ({"step": lambda state, batch: (state[:2], {"loss": 1.0})}, TypeError, "structure of the one that"),
        (
            {"step": lambda state, batch: (state._replace(x=state.x.astype(jnp.float16)), {"loss": 1.0})},
            TypeError, r"leaf 'x' is float16\[2\], not float32\[2\]",
        ),
        ({"init": lambda key: {"f": "text"}}, TypeError, "leaf 'f' is a str"),
    ],
)  # fmt: skip
def test_errors_of_a_custom_step_name_the_fault(change, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(nnlearn.make_train(**(OPTIONS | change)), {"rate": 0.1}, jax.random.key(0))


def test_infos_and_state_forms():
    class Own(NamedTuple):
        loss: Any
        grad_norm: Any
        aux: Any
        extra: Any

    info = as_info(Own(1.0, 2.0, {"a": 1}, 3.0))
    assert (float(info.loss), float(info.grad_norm), info.aux["aux"]["a"], info.aux["extra"]) == (1, 2, 1, 3)
    assert as_info({"loss": 1.0, "aux": {"a": 1}}).aux == {"a": 1} and as_info({"loss": 1.0}).aux is None
    check_step(lambda s, b, rng: None, factory=False)
    with pytest.raises(TypeError, match="hparams"):
        check_step(lambda hparams: None, factory=False)
    with pytest.raises(TypeError, match="takes a key, but the state has none"):
        nnlearn.fit(lambda s, b, key: (s, {"loss": b}), {"w": 1.0}, [np.float32(1)])
    with pytest.raises(TypeError, match="needs make_tx"):
        nnlearn.make_train(lambda p, b, k: p, batches=BATCHES, init=1.0, steps=1)
