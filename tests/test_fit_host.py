"""Python code inside a host-driven run: host metrics, and callbacks that change the state."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.train import every

TX = nnlearn.inject_hyperparams(nnlearn.sgd)(0.1)
STEP = nnlearn.make_step(lambda params, batch, key: jnp.sum(params["w"] * batch), TX)
ONES = [np.float32(1)] * 6


def start():
    return nnlearn.init_state({"w": jnp.zeros(2)}, TX)


def with_rate(state, rate):
    return state._replace(opt_state=nnlearn.set_hyperparams(state.opt_state, learning_rate=rate))


# Metrics


def test_a_host_metric_drives_patience_and_is_recorded(tmp_path):
    scores = iter([9.0, 1.0, 5.0, 2.0, 3.0])  # the first call comes before the run
    seen, events = [], []

    def on_host(state):
        seen.append((int(state.step), type(np.asarray(state.params["w"]))))
        return {"score": np.float64(next(scores)), "steps": int(state.step), "ok": np.bool_(True)}

    result = nnlearn.fit(
        STEP, start(), ONES, check_every=1, evaluate=lambda params: {"w": params["w"][0]}, host_metrics=on_host,
        stop=nnlearn.patience("score", 2, mode="max"), history=tmp_path / "run.csv", callbacks=events.append,
        steps_per_dispatch=4,
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4] and all(kind is np.ndarray for _, kind in seen)
    assert result.stopped_by == "patience(score)" and int(result.trace.stop_step) == 4
    assert int(result.trace.best_step) == int(result.state.step) == 2
    np.testing.assert_allclose(result.state.params["w"], -0.2, rtol=1e-6)
    assert result.trace.metrics["score"].tolist() == [1, 5, 2, 3] and result.trace.metrics["ok"].tolist() == [1] * 4
    assert [event.metrics["score"] for event in events] == [1, 5, 2, 3]
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [1, 5, 2, 3] and "w" in rows[0]


def test_host_metrics_alone_check_after_each_epoch():
    calls = []
    nnlearn.fit(STEP, start(), ONES, epochs=2, host_metrics=lambda state: {"calls": calls.append(0) or len(calls)})
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda state: {"train_loss": 1.0}, ValueError, r"\['train_loss'\], names of other metrics"),
        (lambda state: {"loss": 1.0}, ValueError, r"\['loss'\]"),
        (lambda state: 1.0, TypeError, "dict of numbers by name, got float"),
        (lambda state: {1: 1.0}, TypeError, "dict of numbers by name"),
        (lambda state: {"a": [1.0, 2.0]}, TypeError, r"'a' is of shape \(2,\)"),
        (lambda state: {"a": "0.5"}, TypeError, "'a' is '0.5'"),
        (lambda state: {"a": None}, TypeError, "'a' is None"),
        (lambda state: {"a": 1j}, TypeError, "complex128"),
        (lambda state: {"a": 1.0} if state.step < 2 else {"b": 1.0}, ValueError, r"\['a'\] before, now \['b'\]"),
        (lambda: {"a": 1.0}, TypeError, r"host_metrics must take \(state\)"),
    ],
)
def test_wrong_host_metrics_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        nnlearn.fit(
            STEP, start(), ONES, check_every=2, evaluate=lambda params: {"loss": jnp.float32(0)}, host_metrics=function
        )


# Callbacks that change the state


@pytest.mark.parametrize("k", [1, 4, None])
def test_a_rate_set_by_a_callback_takes_effect_at_the_next_step(k):
    def decay(event):
        return None if event.final else with_rate(event.state, 0.1 / (1 + event.step))

    callbacks = [every(3, decay), every(1, lambda event: event.state)] if k == 1 else every(3, decay)
    result = nnlearn.fit(STEP, start(), ONES, steps=11, callbacks=callbacks, steps_per_dispatch=k)
    rates = np.repeat([0.1, 0.1 / 4, 0.1 / 7, 0.1 / 10], 3)[:11]
    np.testing.assert_allclose(result.state.params["w"], -rates.sum(), rtol=1e-5)
    np.testing.assert_allclose(result.trace.info.learning_rate, rates, rtol=1e-6)


def test_a_run_in_two_parts_changes_its_state_like_one_run():
    def reset(event):
        return event.state.with_params({"w": np.full(2, event.step, np.float32)})

    whole = nnlearn.fit(STEP, start(), ONES, steps=10, callbacks=every(4, reset)).state
    for at in (3, 4, 7):
        part = nnlearn.fit(STEP, start(), ONES, steps=at, callbacks=every(4, reset)).state
        part = nnlearn.fit(STEP, part, ONES, steps=10 - at, callbacks=every(4, reset)).state
        np.testing.assert_array_equal(part.params["w"], whole.params["w"])
    np.testing.assert_allclose(whole.params["w"], 8 - 0.2, rtol=1e-6)


def test_callbacks_chain_and_the_saved_state_is_the_changed_one():
    seen, saved = [], []

    def one(event):
        return event.state.with_params({"w": jnp.full(2, 7.0)})

    def two(event):
        seen.append(float(event.state.params["w"][0]))
        return event.step == 4

    def save(name, state, step):
        saved.append((name, step, float(state.params["w"][0])))

    result = nnlearn.fit(
        STEP, start(), ONES, check_every=2, callbacks=[one, two], save=save, stop=nnlearn.keep_best("train_loss")
    )
    assert seen[:2] == [7.0, 7.0] and result.stopped_by == "callback"
    last = [entry for entry in saved if entry[0] == "last"]
    np.testing.assert_allclose([w for *_, w in last], [-0.2, 7.0, 6.8, 7.0], rtol=1e-6)
    np.testing.assert_allclose(result.state.params["w"], -0.2, rtol=1e-6)  # the best check precedes the change


def test_a_change_compiles_nothing_and_copies_the_returned_state():
    kept = start().with_params({"w": jnp.ones(2)})
    compiled = []

    def listen(event, seconds, **facts):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def back(event):
        if event.step == 6:
            jax.monitoring.register_event_duration_secs_listener(listen)
        return kept._replace(step=event.state.step)

    try:
        nnlearn.fit(STEP, start(), ONES, steps=12, callbacks=every(3, back))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled and kept.params["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda state: state._replace(stored={"v": jnp.zeros(2)}), TypeError, "structure of event.state.*with_params"),
        (lambda state: state._replace(stored={"w": jnp.zeros(3)}), TypeError, r"leaf 'stored/w' is float32\[3\], not"),
        (lambda state: state._replace(stored={"w": jnp.zeros(2, jnp.bfloat16)}), TypeError, r"bfloat16\[2\]"),
        (lambda state: state._replace(step=0), ValueError, r"step 0 at step 2.*_replace\(step=event.state.step\)"),
    ],
)
def test_a_state_of_another_form_is_refused(answer, error, message):
    with pytest.raises(error, match=message):
        nnlearn.fit(STEP, start(), ONES, callbacks=every(2, lambda event: answer(event.state)))


def test_a_donated_state_is_refused():
    states = []

    def old(event):
        states.append(event.state)
        return states[0]._replace(step=event.state.step)

    with pytest.raises(ValueError, match="lost the memory of leaf"):
        nnlearn.fit(STEP, start(), ONES, callbacks=every(2, old))


def test_a_custom_state_can_be_changed():
    def step(state, batch):
        return {"w": state["w"] - state["rate"] * batch, "rate": state["rate"]}, {"loss": state["w"]}

    def halve(event):
        return {**event.state, "rate": event.state["rate"] / 2}

    result = nnlearn.fit(step, {"w": 0.0, "rate": 1.0}, ONES, callbacks=every(2, halve))
    assert float(result.state["w"]) == -2 * (1 + 0.5 + 0.25) and float(result.state["rate"]) == 0.125
