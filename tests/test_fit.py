"""The host-driven run equals the compiled run, for any stream of batches and any way to end."""

import csv
import functools
import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import nnlearn
from nnlearn.data import Examples, MaskedBatch
from nnlearn.datasets import load
from nnlearn.models import mlp
from nnlearn.stream.callbacks import every
from nnlearn.stream.dispatch import make_block
from nnlearn.stream.fit import fit
from nnlearn.stream.loggers import tensorboard, wandb_offline
from nnlearn.sums import zero_total
from nnlearn.train.step import Skips

MODEL = mlp((6, 8, 3))
TX = nnlearn.adamw(1e-2)


def loss_fn(params, batch, key):
    return nnlearn.cross_entropy(MODEL.apply(params, batch.inputs), batch.targets), {"first": batch.targets[0]}


STEP = nnlearn.make_step(loss_fn, TX)


def start(key=0):
    return nnlearn.init_state(MODEL.init(jax.random.key(7)), TX, key)


def batches_of(count, size=5, seed=0):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(count, size, 6)).astype(np.float32)
    targets = random.integers(0, 3, (count, size)).astype(np.int32)
    return [Examples(*pair) for pair in zip(inputs, targets, strict=True)]


def stacked(batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


@functools.cache
def scan_of(step):
    return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))


def scanned(batches, step=STEP, state=None):
    return scan_of(step)(state or start(), stacked(batches))


def assert_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def quiet():
    """Wait until no thread of a run is left."""
    deadline = time.monotonic() + 5
    while any(thread.name == "nnlearn-prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Results


@pytest.mark.parametrize(("k", "count"), [(1, 23), (4, 23), (7, 23), (None, 23), (4, 1)])
def test_results_equal_a_scan_for_any_block_size(k, count):
    batches = batches_of(count)
    expected, infos = scanned(batches)
    state, trace = fit(STEP, start(), iter(batches), steps_per_dispatch=k)
    assert_bits(state.params, expected.params)
    assert_bits(state.opt_state, expected.opt_state)
    assert_bits(trace.info, infos)
    assert int(state.step) == count and trace.stopped_by == "all steps"
    np.testing.assert_array_equal(trace.step, np.arange(1, count + 1))


def test_results_equal_a_scan_with_a_static_step_count(monkeypatch):
    batches = batches_of(11)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where full blocks have a separate program
    state, _ = fit(STEP, start(), batches, steps_per_dispatch=4)
    assert_bits(state.params, scanned(batches)[0].params)


def test_results_equal_make_train():
    batches = batches_of(40)
    data = jax.tree.map(jnp.asarray, stacked(batches))
    validation = batches_of(1, 50, seed=1)[0]

    def evaluate(params):
        return {"loss": loss_fn(params, validation, None)[0]}

    sampler = nnlearn.generated(lambda key, step: jax.tree.map(lambda leaf: leaf[step], data))
    train = nnlearn.make_train(
        loss_fn, TX, sampler, start().params, steps=40, evaluate=evaluate, check_every=8, record_every=2
    )
    expected, expected_trace = jax.jit(train)(None, 3)
    state, trace = fit(STEP, start(), batches, steps=40, evaluate=evaluate, check_every=8, record_every=2)
    assert_bits(state.params, expected.params)
    assert jax.tree.structure(trace) == jax.tree.structure(expected_trace)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trace, expected_trace)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), trace, expected_trace)


def test_epochs_read_the_stream_again():
    batches = batches_of(7)
    expected = scanned(batches * 3)[0].params
    assert_bits(fit(STEP, start(), batches, epochs=3, steps_per_dispatch=4).state.params, expected)
    assert_bits(fit(STEP, start(), batches, steps=21, steps_per_dispatch=4).state.params, expected)
    seen, steps = [], []
    look = lambda event: steps.append((event.step, event.final))  # noqa: E731
    fit(STEP, start(), lambda epoch: seen.append(epoch) or batches, epochs=3, callbacks=look)
    assert seen == [0, 1, 2] and steps == [(7, False), (14, False), (21, True)]
    trace = fit(STEP, start(), batches, steps=17, evaluate=lambda params: {"one": 1.0}).trace
    assert trace.check_step.tolist() == [7, 14, 17]


def test_microbatches_model_state_and_random_numbers():
    def noisy(params, batch, key, model_state):
        inputs = batch.inputs + 0.1 * jax.random.normal(key, batch.inputs.shape)
        state = {"mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(batch.inputs, 0)}
        return nnlearn.cross_entropy(MODEL.apply(params, inputs), batch.targets), None, state

    step = nnlearn.make_step(noisy, TX, microbatches=2)
    state = nnlearn.init_state(start().params, TX, 5, model_state={"mean": jnp.zeros(6)})
    batches = batches_of(9, 4)
    expected, _ = scanned(batches, step, state)
    got, trace = fit(
        step, state, batches, steps_per_dispatch=4, evaluate=lambda params, model_state: {"m": model_state["mean"][0]}
    )
    assert_bits((got.params, got.model_state), (expected.params, expected.model_state))
    np.testing.assert_array_equal(trace.metrics["m"][-1], expected.model_state["mean"][0])


def test_packed_parameters():
    state, batches = nnlearn.init_state(start().params, TX, packed=True), batches_of(5)
    got, trace = fit(STEP, state, batches, check_every=2, stop=nnlearn.keep_best("train_loss"))
    best = int(trace.best_step)
    assert best == trace.check_step[jnp.argmin(trace.metrics["train_loss"])]
    assert_bits(got.stored, scanned(batches[:best], state=state)[0].stored)


def test_fit_works_without_jit():
    tx = nnlearn.sgd(0.1)
    step = nnlearn.make_step(lambda params, batch, key: jnp.sum((params - batch) ** 2), tx)
    with jax.disable_jit():
        state, _ = fit(step, nnlearn.init_state(jnp.zeros(()), tx), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(state.params, 0.8 * (0.8 * 0.2 + 0.4) + 0.6, rtol=1e-6)


def test_a_state_continues_its_run():
    batches = batches_of(20)
    whole = fit(STEP, start(), batches, check_every=6, record_every=3)
    middle = fit(STEP, start(), batches[:10], check_every=6, record_every=3)
    end = fit(STEP, middle.state, batches[10:], check_every=6, record_every=3)
    assert_bits(end.state.params, whole.state.params)
    assert end.trace.step.tolist() == [12, 15, 18] and end.trace.check_step.tolist() == [12, 18, 20]
    assert middle.trace.check_step.tolist() == [6, 10]
    assert not middle.state.step.is_deleted()  # the caller's state is copied
    fit(STEP, middle.state, batches[10:], donate=True)
    assert middle.state.step.is_deleted()


def test_fit_compiles_once_for_all_block_lengths():
    traces = []

    def counting(params, batch, key):
        traces.append("loss")
        return loss_fn(params, batch, key)

    def evaluate(params):
        traces.append("evaluate")
        return {"loss": jnp.sum(params[0]["bias"] ** 2) if isinstance(params, list) else jnp.float32(0)}

    step = nnlearn.make_step(counting, TX)
    options = {"evaluate": evaluate, "check_every": 10, "steps_per_dispatch": 4, "epochs": 3}
    result = fit(step, start(), batches_of(23), callbacks=every(5, lambda event: None), **options)
    assert traces == ["evaluate", "loss"]
    fit(step, result.state, batches_of(23), **options)
    assert traces == ["evaluate", "loss"]
    block = make_block(step)
    carry = (start(), zero_total(), Skips(jnp.int32(0), jnp.int32(0)), {})
    for count in (1, 3, 2):
        carry, _ = block(carry, stacked(batches_of(4)), np.int32(count), 4)
    assert block._cache_size() == 1


def test_cached_programs_are_freed_with_their_step():
    """A cached program must not keep its step, or the arrays in the step's closure, in memory."""
    step = nnlearn.make_step(loss_fn, TX)
    fit(step, start(), batches_of(3), evaluate=lambda params: {"zero": jnp.float32(0)})
    alive = weakref.ref(step)
    del step
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_second_run_compiles_nothing(evaluated):
    step, evaluate = nnlearn.make_step(loss_fn, TX), (lambda params: {"zero": jnp.float32(0)}) if evaluated else None
    fit(step, start(), batches_of(6), evaluate=evaluate)
    compiled = []

    def listen(event, seconds, **facts):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(0)
        assert len(compiled) == 1  # the listener works
        fit(step, start(), batches_of(6), evaluate=evaluate)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1


# The stream


def test_the_stream_is_not_read_far_ahead():
    read = []

    def stream():
        for batch in batches_of(60):
            read.append(batch)
            yield batch

    for prefetch in (0, 1, 3):
        read.clear()
        ahead = []

        def look(event, ahead=ahead):
            time.sleep(0.005)
            ahead.append(len(read) - event.step)

        fit(STEP, start(), stream(), steps=40, steps_per_dispatch=4, prefetch=prefetch, callbacks=every(4, look))
        assert len(read) == 40 and ahead[-1] == 0 and 0 <= max(ahead) <= prefetch * 4
        quiet()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_stream_is_raised_after_the_preceding_steps(prefetch):
    def stream():
        yield from batches_of(9)
        raise OSError("disk gone")

    saved = {}
    with pytest.raises(OSError, match="disk gone"):
        fit(
            STEP,
            start(),
            stream(),
            prefetch=prefetch,
            steps_per_dispatch=4,
            save=lambda name, state, step: saved.update({name: (step, jax.device_get(state.params))}),
        )
    quiet()
    assert saved["last"][0] == 9
    assert_bits(saved["last"][1], scanned(batches_of(9))[0].params)


def test_a_batch_that_differs_from_the_first_is_refused():
    good = batches_of(6)
    short = Examples(good[5].inputs[:2], good[5].targets[:2])
    cases = [
        (short, r"'inputs' of the batch of step 6 has shape \(2, 6\), but the first batch had \(5, 6\).*drop_last"),
        (good[0]._replace(targets=good[0].targets.astype(np.float32)), "'targets' of the batch of step 6 has dtype"),
        (tuple(good[0]), "the batch of step 6 is PyTreeDef"),
        (good[0]._replace(inputs="cat.png"), "'inputs' of the batch of step 6 holds str"),
        (good[0]._replace(inputs=object()), "'inputs' of the batch of step 6 "),
        (good[0]._replace(inputs=good[0].inputs[:, :3]), r"has shape \(5, 3\), but the first batch had \(5, 6\)"),
    ]
    for bad, message in cases:
        seen = []
        with pytest.raises((ValueError, TypeError), match=message):
            fit(STEP, start(), [*good[:5], bad], callbacks=every(5, lambda event, seen=seen: seen.append(event.step)))
        assert seen == [5]
        quiet()
    fine = good[0]._replace(inputs=good[0].inputs.astype(np.float64))  # the same dtype on the device
    assert_bits(fit(STEP, start(), [good[1], fine]).state.params, scanned([good[1], good[0]])[0].params)


def test_impossible_arguments_are_refused():
    batches = batches_of(3)
    spent = iter(batches)
    cases = [
        ({"batches": []}, "epoch 0 of batches is empty"),
        ({"batches": iter([])}, "epoch 0 of batches is empty"),
        ({"batches": iter(batches), "epochs": 2}, "batches can be read only once"),
        ({"batches": iter(batches), "steps": 5}, "batches ended after 3 of steps=5"),
        ({"batches": lambda epoch: spent, "epochs": 2}, "epoch 1 of batches is empty"),
        ({"batches": batches, "epochs": 2, "steps": 3}, "give one of steps and epochs"),
        ({"batches": batches, "steps": 0}, "steps must be an int >= 1"),
        ({"batches": batches, "prefetch": -1}, "prefetch must be"),
        ({"batches": batches, "ragged": "drop"}, "ragged must be"),
        ({"batches": batches, "history": "run.txt"}, "history must be a file name"),
        ({"batches": batches, "state": jax.tree.map(lambda leaf: leaf[None], start())}, "fit makes one run"),
        ({"batches": 3}, "batches must be an iterable"),
        ({"batches": np.zeros(3)}, "batches must be an iterable of batches"),
        ({"batches": nnlearn.shuffled(jnp.zeros(3), 1)}, "use make_train"),
        ({"batches": batches, "evaluate": lambda params: 3.0}, "evaluate must return a dict"),
        ({"batches": batches, "stop": nnlearn.patience("accuracy", 2)}, "there is no metric 'accuracy'"),
        ({"batches": batches, "callbacks": [lambda: None]}, "a callback must take"),
        ({"batches": batches, "progress": "yes"}, "progress must be"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            fit(STEP, **{"state": start(), **options})
        quiet()


def test_an_iterator_may_reuse_its_arrays():
    batches = batches_of(10)

    def stream():
        own = jax.tree.map(np.empty_like, batches[0])
        for batch in batches:
            jax.tree.map(np.copyto, own, batch)
            yield own

    assert_bits(fit(STEP, start(), stream(), steps_per_dispatch=4).state.params, scanned(batches)[0].params)


def masked_loss(params, batch, key):
    examples, where = batch
    return nnlearn.cross_entropy(MODEL.apply(params, examples.inputs), examples.targets, where=where)


@pytest.mark.slow
def test_padding_makes_masked_batches():
    batches = batches_of(6)
    batches[3] = Examples(batches[3].inputs[:2], batches[3].targets[:2])
    batches[5] = Examples(batches[5].inputs[:2], batches[5].targets[:2])
    step = nnlearn.make_step(masked_loss, TX)
    state, trace = fit(step, start(), batches, ragged="pad", steps_per_dispatch=4)
    plain, losses, plain_step = start(), [], jax.jit(STEP)
    for batch in batches:
        plain, info = plain_step(plain, batch)
        losses.append(info.loss)
    np.testing.assert_allclose(trace.loss, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, plain.params)
    for bad, message in [
        ([batches[3], batches[0]], "let the first be the largest"),
        (
            [batches[0], Examples(batches[0].inputs[:2], batches[0].targets)],
            "'targets' .* has 5 examples, and 'inputs'",
        ),
        ([batches[0], Examples(batches[0].inputs[:0], batches[0].targets[:0])], "none empty"),
        ([MaskedBatch(batches[0], np.ones(5, bool))], "are MaskedBatch already"),
        ([np.float32(3)], "share a leading axis"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(step, start(), bad, ragged="pad")


def test_arrays_of_other_libraries():
    batches = batches_of(9)
    expected = scanned(batches)[0].params
    on_device = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    assert_bits(fit(STEP, start(), on_device, steps_per_dispatch=4).state.params, expected)
    lists = [jax.tree.map(lambda leaf: memoryview(leaf), batch) for batch in batches]
    assert_bits(fit(STEP, start(), lists, steps_per_dispatch=4).state.params, expected)

    def with_key(params, batch, key):
        return jnp.sum(params * jax.random.normal(batch["key"])) + batch["scale"]

    tx = nnlearn.sgd(0.1)
    step = nnlearn.make_step(with_key, tx)
    keys = [{"key": jax.random.key(at), "scale": 0.5 * at} for at in range(6)]
    state, trace = fit(step, nnlearn.init_state(jnp.ones(()), tx), keys, steps_per_dispatch=4)
    np.testing.assert_allclose(
        state.params, 1 - 0.1 * sum(jax.random.normal(batch["key"]) for batch in keys), rtol=1e-5
    )
    nothing = nnlearn.make_step(lambda params, batch, key: params**2, tx)
    assert int(fit(nothing, nnlearn.init_state(jnp.ones(()), tx), [None] * 5).state.step) == 5


def test_double_precision_reaches_the_thread():
    tx = nnlearn.sgd(0.1)
    step = nnlearn.make_step(lambda params, batch, key: jnp.sum((params - batch) ** 2), tx)
    with jax.enable_x64(True):
        state, trace = fit(step, nnlearn.init_state(jnp.zeros((), jnp.float64), tx), [np.float64(1 / 3)] * 3)
        assert trace.loss.dtype == jnp.float64 and trace.loss[0] == np.float64(1 / 3) ** 2


def test_a_rule_may_start_from_a_closed_over_array():
    own = jnp.zeros((), jnp.int32)
    update = lambda count, metrics, step: (count + 1, count + 1 >= 3)  # noqa: E731
    rule = nnlearn.StopRule("three", lambda: own, update)
    for _ in range(2):
        result = fit(STEP, start(), batches_of(20), check_every=5, stop=[rule, rule])
        assert result.stopped_by == "three" and int(result.state.step) == 15


def test_a_sharded_batch_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batches = batches_of(7, 8)
    state = jax.device_put(start(), replicated)
    state, _ = fit(STEP, state, batches, sharding=sharding, steps_per_dispatch=4)
    expected = scanned(batches)[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)
    assert len(jax.tree.leaves(state.params)[0].devices()) == 4


def test_torch_loaders():
    torch = pytest.importorskip("torch")
    arrays = stacked(batches_of(8))
    flat = [torch.from_numpy(leaf.reshape(-1, *leaf.shape[2:])) for leaf in arrays]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*flat), batch_size=5)
    step = nnlearn.make_step(lambda params, batch, key: loss_fn(params, Examples(*batch), key), TX)
    expected = scanned(batches_of(8) * 2)[0].params
    assert_bits(fit(step, start(), loader, epochs=2).state.params, expected)
    half = torch.arange(4.0, requires_grad=True).to(torch.bfloat16)
    tx = nnlearn.sgd(1.0)
    step = nnlearn.make_step(lambda params, batch, key: jnp.sum(params * batch), tx)
    state, _ = fit(step, nnlearn.init_state(jnp.zeros(4), tx), [half])
    np.testing.assert_array_equal(state.params, -np.arange(4.0))


def test_grain_loaders():
    grain = pytest.importorskip("grain")
    batches = batches_of(8)
    data = grain.MapDataset.source(list(range(40))).map(
        lambda at: Examples(batches[at // 5].inputs[at % 5], batches[at // 5].targets[at % 5])
    )
    loader = data.batch(5, drop_remainder=True).to_iter_dataset()
    assert_bits(fit(STEP, start(), loader, epochs=2).state.params, scanned(batches * 2)[0].params)


# Checks, rules, callbacks


@functools.cache
def overfit():
    """60 digits, a third of them with random labels: the validation loss falls, and then rises."""
    digits = load("digits")
    random = np.random.default_rng(0)
    inputs, targets = (np.asarray(leaf)[:60] for leaf in digits.train)
    targets = np.where(random.random(60) < 0.3, random.integers(0, 10, 60), targets).astype(np.int32)
    model = mlp((64, 64, 10))

    def digits_loss(params, batch, key):
        return nnlearn.cross_entropy(model.apply(params, batch.inputs), batch.targets)

    def epoch(number):
        order = np.random.default_rng(number).permutation(60)
        return (Examples(inputs[rows], targets[rows]) for rows in order.reshape(6, 10))

    def evaluate(params):
        return {"loss": digits_loss(params, Examples(*map(jnp.asarray, digits.validation)), None)}

    tx = nnlearn.adam(3e-3)
    state = nnlearn.init_state(model.init(jax.random.key(0)), tx)
    return nnlearn.make_step(digits_loss, tx), state, epoch, jax.jit(evaluate)


def test_early_stopping_restores_the_best_state_exactly():
    step, state, epoch, evaluate = overfit()
    saved, events = {}, []

    def save(name, state, step):
        saved.setdefault(name, []).append((step, jax.device_get(state.params)))

    result = fit(
        step,
        state,
        epoch,
        epochs=300,
        evaluate=evaluate,
        stop=nnlearn.patience("loss", 4),
        save=save,
        callbacks=events.append,
    )
    losses = np.asarray(result.trace.metrics["loss"])
    best = int(np.argmin(losses))
    assert result.stopped_by == "patience(loss)" and 2 < best < len(losses) - 1 and len(losses) < 100
    assert best == len(losses) - 5
    assert int(result.trace.best_step) == result.trace.check_step[best] == saved["best"][-1][0]
    assert result.trace.stop_step == saved["last"][-1][0] == events[-1].step
    assert_bits(result.state.params, saved["best"][-1][1])
    shorter = fit(step, state, epoch, epochs=best + 1).state  # the whole state is that of the check
    assert int(result.state.step) == int(shorter.step) == result.trace.best_step
    assert_bits(result.state.params, shorter.params)
    assert_bits(result.state.opt_state, shorter.opt_state)
    np.testing.assert_allclose(evaluate(result.state.params)["loss"], losses.min(), rtol=1e-6)
    assert [event.final for event in events] == [False] * (len(losses) - 1) + [True]
    np.testing.assert_array_equal([event.metrics["loss"] for event in events], losses)


def test_divergence_is_recorded_and_stops():
    tx = nnlearn.sgd(1e30)
    step = nnlearn.make_step(loss_fn, tx)
    state = nnlearn.init_state(start().params, tx)
    result = fit(step, state, batches_of(30), check_every=10, stop=[nnlearn.diverged()])
    assert result.stopped_by == "diverged(train_loss)" and int(result.state.step) == 10
    assert not np.isfinite(np.asarray(result.trace.loss)).all()
    assert fit(step, state, batches_of(30)).stopped_by == "all steps"


def test_callbacks_see_rows_and_may_stop():
    batches, checks, often = batches_of(20), [], []

    def at_checks(event):
        checks.append(event)
        return event.step >= 12

    result = fit(STEP, start(), batches, check_every=6, callbacks=[at_checks, every(5, often.append)])
    assert result.stopped_by == "callback" and int(result.state.step) == 12
    assert [(event.step, event.final) for event in checks] == [(6, False), (12, False), (12, True)]
    assert [(event.step, event.final) for event in often] == [(5, False), (10, False), (12, True)]
    rows = [row for event in checks for row in event.rows]
    assert rows == [row for event in often for row in event.rows]
    assert [row["step"] for row in rows] == list(range(1, 13))
    np.testing.assert_array_equal(np.float32([row["loss"] for row in rows]), result.trace.loss)
    assert rows[0].keys() == {"step", "loss", "grad_norm", "learning_rate", "aux/first"}
    np.testing.assert_allclose(rows[5]["train_loss"], np.mean([row["loss"] for row in rows[:6]]), rtol=1e-5)
    assert often[0].metrics == {} and checks[0].metrics == {"train_loss": rows[5]["train_loss"]}


class Unknown:
    """Batches of unknown length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
@pytest.mark.parametrize("check_every", [None, 5])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (list, {"prefetch": 0, "epochs": 3}),
        (list, {"steps": 15}),
        (lambda batches: lambda epoch: batches, {"epochs": 3}),
        (Unknown, {"steps_per_dispatch": 2, "epochs": 3}),
        (lambda batches: lambda epoch: iter(batches), {"epochs": 3}),
    ],
)
def test_a_period_a_check_and_the_end_at_one_step_give_one_call_and_one_row(tmp_path, name, check_every, kind, options):
    often, checks, path = [], [], tmp_path / name
    callbacks = [every(5, often.append), checks.append]
    data, options = kind(batches_of(5)), {"check_every": check_every, "history": path, **options}
    trace = fit(STEP, start(), data, callbacks=callbacks, **options).trace
    assert trace.check_step.tolist() == [5, 10, 15]
    for events in (often, checks):
        assert [(event.step, event.final) for event in events] == [(5, False), (10, False), (15, True)]
        found = np.float32([event.metrics["train_loss"] for event in events])
        np.testing.assert_array_equal(found, trace.metrics["train_loss"])
        assert [[row["step"] for row in event.rows] for event in events] == np.arange(1, 16).reshape(3, 5).tolist()
        assert [event.rows[-1]["train_loss"] for event in events] == [event.metrics["train_loss"] for event in events]
    rows = read_history(path)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert [row["step"] for row in rows if "train_loss" in row] == [5, 10, 15]


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_metrics_computed_after_a_callback_are_in_the_same_row(tmp_path, name):
    """Without reading ahead, the end of an epoch is known only after the callback, which may also end the run."""
    path, often = tmp_path / name, []
    options = {"history": path, "prefetch": 0}
    fit(STEP, start(), Unknown(batches_of(5)), epochs=2, callbacks=every(5, often.append), **options)
    assert [(event.step, event.final) for event in often] == [(5, False), (10, False), (10, True)]
    rows = read_history(path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "train_loss" in row] == [5, 10] and rows[-1].keys() == rows[4].keys()
    often.clear()
    fit(STEP, start(), batches_of(9), callbacks=every(3, lambda event: often.append(event) or True), **options)
    assert [(event.step, event.final) for event in often] == [(3, False), (3, True)]
    rows = read_history(path)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1].keys() == {*rows[0], "train_loss"}


def test_a_batch_is_read_early_only_to_find_the_end_of_an_epoch():
    read, ahead = [], []

    def stream(count):
        def of_epoch(epoch):
            read.clear()
            for batch in batches_of(count):
                read.append(batch)
                yield batch

        return of_epoch

    for prefetch, check_every, most in ((0, None, 0), (1, None, 3), (1, 2, 2)):
        ahead.clear()

        def look(event):
            time.sleep(0.005)
            ahead.append(len(read) - event.step)

        options = {"epochs": 1} if check_every is None else {"steps": 10, "check_every": check_every}
        fit(STEP, start(), stream(10), callbacks=every(2, look), prefetch=prefetch, steps_per_dispatch=2, **options)
        assert ahead[-1] == 0 and 0 <= max(ahead) <= most
        quiet()


def test_an_error_in_a_callback_or_a_step_cleans_up(tmp_path):
    def broken(event):
        raise RuntimeError("mine")

    path, saved = tmp_path / "run.csv", []
    with pytest.raises(RuntimeError, match="mine"):
        fit(
            STEP,
            start(),
            batches_of(20),
            steps_per_dispatch=3,
            history=path,
            callbacks=every(9, broken),
            save=lambda name, state, step: saved.append((name, step)),
        )
    quiet()
    assert len(path.read_text().splitlines()) == 10 and saved == [("last", 9)]
    with pytest.raises(ValueError, match="bad loss"):
        fit(nnlearn.make_step(raises, TX), start(), batches_of(20))
    quiet()

    def full_disk(name, state, step):
        saved.append("tried")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fit(STEP, start(), batches_of(20), check_every=5, save=full_disk)
    assert saved.count("tried") == 1


def raises(params, batch, key):
    raise ValueError("bad loss")


# Files, signals, the terminal


def test_history_can_be_parsed(tmp_path):
    tx = nnlearn.sgd(1e30)
    step, state = nnlearn.make_step(loss_fn, tx), nnlearn.init_state(start().params, tx)
    options = {"check_every": 4, "evaluate": lambda params: {"norm": nnlearn.train.step.global_norm(params)}}
    for name in ("run.csv", "deep/run.jsonl"):
        trace = fit(step, state, batches_of(10), history=tmp_path / name, **options).trace
        rows = read_history(tmp_path / name)
        assert [row["step"] for row in rows] == list(range(1, 11))
        np.testing.assert_array_equal(np.float32([row["loss"] for row in rows]), trace.loss)
        assert math.isnan(rows[-1]["loss"])
        checked = {row["step"]: row["norm"] for row in rows if "norm" in row}
        assert list(checked) == trace.check_step.tolist() == [4, 8, 10]
        np.testing.assert_array_equal(np.float32(list(checked.values())), trace.metrics["norm"])


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_metrics_named_like_columns_get_separate_columns(tmp_path, name):
    def evaluate(params):
        return {"loss": 2.0, "step": 3.0, "learning_rate": 4.0, "check/step": 5.0, "own": 6.0}

    events, path = [], tmp_path / name
    options = {"evaluate": evaluate, "check_every": 3, "record_every": 2}
    trace = fit(STEP, start(), batches_of(6), history=path, callbacks=events.append, **options).trace
    metrics = {"check/loss": 2.0, "check/check/step": 3.0, "check/learning_rate": 4.0, "check/step": 5.0, "own": 6.0}
    rows = read_history(path)
    assert rows == [row for event in events for row in event.rows]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    np.testing.assert_array_equal(np.float32([row["loss"] for row in rows if "loss" in row]), trace.loss)
    for row in (rows[1], rows[3]):
        assert {column: row[column] for column in metrics} == metrics
    assert {**events[0].metrics, "train_loss": 0} == {**evaluate(None), "train_loss": 0}
    table = trace.columns()
    np.testing.assert_array_equal(table["step"], [2, 3, 4, 6])
    np.testing.assert_array_equal(table["loss"], [trace.loss[0], np.nan, *trace.loss[1:]])
    for column, value in metrics.items():
        np.testing.assert_array_equal(table[column], [np.nan, value, np.nan, value])
    assert trace.metrics["loss"].tolist() == [2.0, 2.0]
    if name == "run.csv":
        header = path.read_text().splitlines()[0].split(",")
        assert len(set(header)) == len(header) and set(header) == set(table)


def read_history(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_history_continues_with_the_state(tmp_path, name):
    path, batches = tmp_path / name, batches_of(20)
    middle = fit(STEP, start(), batches[:10], history=path).state
    fit(STEP, middle, batches[10:15], history=path)
    with open(path, "a") as file:
        file.write("16,0.1,0.2,0" if name == "run.csv" else '{"step": 16, "lo')  # an incomplete line, as after a crash
    fit(STEP, middle, batches[10:], history=path, check_every=5)  # repeats steps 11 to 15
    rows = read_history(path)
    assert [row["step"] for row in rows] == list(range(1, 21))
    whole = fit(STEP, start(), batches, history=path, record_every=4)
    assert [row["step"] for row in read_history(path)] == [4, 8, 12, 16, 20]
    older = read_history(path.with_name(f"run.1{path.suffix}"))
    assert older == rows and whole.trace.step.tolist() == [4, 8, 12, 16, 20]
    if name == "run.csv":
        with pytest.raises(ValueError, match="has the columns"):
            fit(STEP, middle, batches, history=path, evaluate=lambda params: {"other": 1.0})
        assert [row["step"] for row in read_history(path)] == [4, 8, 12, 16, 20]


SIGNALLED = """
import sys, time, signal, threading, numpy as np, jax.numpy as jnp, nnlearn
from nnlearn.stream.fit import fit
tx = nnlearn.sgd(0.1)
step = nnlearn.make_step(lambda params, batch, key: jnp.mean((params - batch) ** 2), tx)
hang = {hang}
def stream():
    for number in range(10**9):
        if number == 40:
            print("ready", flush=True)
        while hang and number == 40:
            time.sleep(0.05)
        yield np.ones(3, np.float32)
        time.sleep(0.001)
def save(name, state, step):
    print(name, step, int(state.step), flush=True)
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
result = fit(step, nnlearn.init_state(jnp.zeros(()), tx), stream(), save=save, history=sys.argv[1])
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
print(result.stopped_by, int(result.state.step), len(result.trace.loss), flush=True)
"""


def signalled(tmp_path, *signals, hang=False):
    code = SIGNALLED.format(hang=hang)
    command = [sys.executable, "-c", code, str(tmp_path / "run.csv")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(1.0)  # the first block has been requested
        os.kill(process.pid, number)
    out, errors = process.communicate(timeout=60)
    return out.split("\n"), errors, process.returncode


@pytest.mark.parametrize(
    ("number", "reason", "hang"),
    [
        (signal.SIGTERM, "terminated", False),
        (signal.SIGINT, "interrupted", True),
    ],
)
def test_a_signal_ends_the_run_with_everything_saved(tmp_path, number, reason, hang):
    out, errors, status = signalled(tmp_path, number, hang=hang)
    assert status == 0, errors
    name, at, step = out[0].split()
    assert (name, at) == ("last", step) and int(step) >= 32
    assert out[1].split() == [reason, step, step]
    assert [row["step"] for row in read_history(tmp_path / "run.csv")] == list(range(1, int(step) + 1))


def test_no_signal_handlers_outside_the_main_thread():
    before, during, results = signal.getsignal(signal.SIGINT), [], []

    def run():
        look = lambda event: during.append(signal.getsignal(signal.SIGINT))  # noqa: E731
        results.append(fit(STEP, start(), batches_of(3), callbacks=look))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == [before] and results[0].stopped_by == "all steps"


def test_a_second_interrupt_raises():
    def twice(event):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(STEP, start(), batches_of(30), callbacks=every(2, twice))
    assert signal.getsignal(signal.SIGINT) is before
    quiet()


def test_progress_is_silent_without_a_terminal(capfd):
    fit(STEP, start(), batches_of(5))
    fit(STEP, start(), batches_of(5), progress=False)
    assert capfd.readouterr() == ("", "")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    fit(STEP, start(), batches_of(5), steps=20, progress=console)
    for part in ("20/20", "loss", "lr 0.01", "00:00"):
        assert part in text.getvalue()
    with pytest.raises(ValueError, match="shape"):  # the bar is removed after an error too
        fit(STEP, start(), [*batches_of(3), *batches_of(1, 4)], progress=console)
    assert console._live_stack == [] if hasattr(console, "_live_stack") else console._live is None


def test_tensorboard_writes_every_row(tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

        def flush(self):
            pass

        def close(self):
            closed.append(self.folder)

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    trace = fit(STEP, start(), batches_of(10), check_every=5, callbacks=tensorboard(tmp_path)).trace
    losses = [(value, step) for _, name, value, step in written if name == "loss"]
    assert losses == [(loss, step) for step, loss in enumerate(trace.loss.tolist(), start=1)]
    assert [step for _, name, _, step in written if name == "train_loss"] == [5, 10]
    assert closed == [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"nnlearn\[tensorboard\]"):
        tensorboard(tmp_path)


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    fit(STEP, start(), batches_of(3), callbacks=tensorboard(tmp_path))
    assert [path for path in tmp_path.iterdir() if "tfevents" in path.name and path.stat().st_size > 100]


def test_wandb_stays_offline(tmp_path, monkeypatch):
    logged, settings, finished = [], {}, []

    def init(**given):
        settings.update(given)
        log = lambda values, step: logged.append((step, values))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: finished.append(True))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    fit(STEP, start(), batches_of(4), callbacks=wandb_offline("digits", tmp_path, name="first"))
    assert settings == {"project": "digits", "dir": str(tmp_path), "mode": "offline", "name": "first"}
    assert [step for step, _ in logged] == [1, 2, 3, 4] and "train_loss" in logged[-1][1] and finished == [True]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"nnlearn\[wandb\]"):
        wandb_offline("digits")
