"""Diagnosis: small runs with one fault each, odd programs, the report, the rerun and the optimizer alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn import cli
from nnlearn.diagnose import Check, Report
from nnlearn.diagnose.folding import fold_inputs, fold_outputs
from nnlearn.diagnose.names import FAULTS
from nnlearn.diagnose.optimizer import ask, forgets
from nnlearn.diagnose.ranking import EXPLAINS, rank
from nnlearn.diagnose.report import found
from nnlearn.diagnose.rerun import rerun
from nnlearn.diagnose.subject import Subject, make_subject

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def as_users_do():
    with jax.numpy_rank_promotion("allow"):
        yield


CENTRES = RANDOM.normal(size=(3, 4)) * 2


def blobs(count):
    labels = RANDOM.integers(0, 3, count)
    return (CENTRES[labels] + RANDOM.normal(size=(count, 4))).astype(np.float32) / 2, labels.astype(np.int32)


TRAIN, VALIDATION = blobs(192), blobs(96)


def init(key):
    first, second = jax.random.split(key)
    return {
        "first": {"w": jax.random.normal(first, (4, 16)) * 0.7, "b": jnp.zeros(16)},
        "second": {"w": jax.random.normal(second, (16, 3)) * 0.35, "b": jnp.zeros(3)},
    }


def predict(params, inputs):
    hidden = jax.nn.relu(inputs @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]["w"] + params["second"]["b"]


def entropy(params, batch, key):
    inputs, labels = batch
    return nnlearn.cross_entropy(predict(params, inputs), labels)


def train_with(tx=None, data=TRAIN, loss_fn=entropy, init=init, steps=96):
    batches = nnlearn.shuffled(data, 16, remainder="drop")
    return nnlearn.make_train(loss_fn, optax.adam(0.02) if tx is None else tx, batches, init, steps=steps)


def never_cleared():
    def update(grads, total, params=None):
        total = jax.tree.map(jnp.add, total, grads)
        return jax.tree.map(lambda leaf: -0.02 * leaf, total), total

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def forgetful():
    tx = optax.sgd(0.001, momentum=0.9)
    return optax.GradientTransformation(tx.init, lambda g, s, p=None: (tx.update(g, tx.init(p), p)[0], s))


CASES = {
    "learning_rate_too_high": lambda: train_with(optax.sgd(300.0)),
    "learning_rate_too_low": lambda: train_with(optax.sgd(1e-5)),
    "schedule_mistimed": lambda: train_with(nnlearn.adam(nnlearn.exponential_decay(0.02, 1, 0.5))),
    "clipping_too_tight": lambda: train_with(optax.chain(optax.clip_by_global_norm(1e-4), optax.sgd(0.3))),
    "excessive_regularisation": lambda: train_with(optax.adamw(0.02, weight_decay=40.0)),
    "sign_error": lambda: train_with(optax.chain(optax.scale_by_adam(), optax.scale(0.02))),
    "gradient_accumulation": lambda: train_with(never_cleared()),
    "optimizer_state_reset": lambda: train_with(forgetful()),
    "symmetric_initialisation": lambda: train_with(init=lambda key: jax.tree.map(jnp.zeros_like, init(key))),
    "unnormalised_inputs": lambda: train_with(optax.sgd(0.1), (TRAIN[0] * 1000 + 3000, TRAIN[1])),
    "blocked_gradient": lambda: train_with(
        loss_fn=lambda p, b, k: nnlearn.cross_entropy(jnp.round(predict(p, b[0])), b[1])
    ),
    "misaligned_labels": lambda: train_with(data=(TRAIN[0], np.roll(TRAIN[1], 1))),
    "underfitting": lambda: train_with(optax.adam(0.005), steps=8),
    "wrong_axis_or_reduction": lambda: train_with(
        optax.sgd(10.0), loss_fn=lambda p, b, k: jnp.sum((jax.nn.one_hot(b[1], 3) - predict(p, b[0])) ** 2)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_found(name):
    validation = (VALIDATION[0] * 1000 + 3000, VALIDATION[1]) if name == "unnormalised_inputs" else VALIDATION
    report = nnlearn.diagnose(CASES[name](), {}, 0, predict=predict, validation=validation)
    assert name in [finding.name for finding in report.findings[:3]], report
    assert not [check for check in report.checks if check.reason.startswith("it failed")]


@pytest.mark.parametrize("key", [0, 1, 2])
def test_a_healthy_run_is_healthy(key):
    report = nnlearn.diagnose(train_with(), {}, key, predict=predict, validation=VALIDATION)
    assert report.healthy, report
    assert Report.from_json(report.to_json()) == report


@pytest.mark.slow
def test_a_state_that_is_cut_between_time_steps_is_found():
    signs = RANDOM.choice([-1.0, 1.0], (160, 10, 1)).astype(np.float32)
    data = (signs, (signs.sum((1, 2)) > 0).astype(np.int32))

    def predict(params, inputs):
        def step(hidden, row):
            return jnp.tanh(jax.lax.stop_gradient(hidden) @ params["h"] + row @ params["x"]), None

        return jax.lax.scan(step, jnp.zeros((len(inputs), 6)), jnp.moveaxis(inputs, 1, 0))[0] @ params["out"]

    start = {"h": jnp.eye(6), "x": RANDOM.normal(size=(1, 6)) / 4, "out": RANDOM.normal(size=(6, 2)) / 3}
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    loss_fn = lambda params, batch, key: nnlearn.cross_entropy(predict(params, batch[0]), batch[1])  # noqa: E731
    train = train_with(optax.adam(0.003), data, loss_fn, start, steps=60)
    report = nnlearn.diagnose(train, {}, 0, predict=predict)
    assert report.findings[0].name == "blocked_gradient" and report.findings[0].where == "time", report


def own_step(state, batch):
    inputs, labels = batch
    loss, grads = jax.value_and_grad(lambda p: nnlearn.cross_entropy(predict(p, inputs), labels))(state["params"])
    return {"params": jax.tree.map(lambda p, g: p - 0.3 * g, state["params"], grads)}, {"loss": loss}


def with_state(params, batch, key, model_state):
    loss = nnlearn.cross_entropy(predict(params, batch["x"]), batch["y"])
    return loss, {"size": loss}, jax.tree.map(lambda leaf: leaf + 1, model_state)


ODD = {
    "own step": lambda: nnlearn.make_train(
        step=own_step, batches=nnlearn.shuffled(TRAIN, 16), init=lambda key: {"params": init(key)}, steps=40
    ),
    "state, aux, dict": lambda: nnlearn.make_train(
        with_state,
        nnlearn.adam(0.02),
        nnlearn.shuffled(dict(zip("xy", TRAIN, strict=True)), 16, remainder="drop"),
        lambda key: (init(key), jnp.zeros(())),
        steps=40,
    ),
    "parameters named params": lambda: nnlearn.make_train(
        lambda p, batch, key: entropy(p["params"], batch, key),
        nnlearn.adam(0.02),
        nnlearn.shuffled(TRAIN, 16, remainder="drop"),
        lambda key: {"params": init(key)},
        steps=96,
    ),
    "no targets": lambda: nnlearn.make_train(
        lambda p, batch, key: jnp.mean((batch.examples - p) ** 2),
        nnlearn.sgd(0.1),
        nnlearn.shuffled(TRAIN[0], 20),
        jnp.zeros(4),
        steps=30,
    ),
    "scalars": lambda: nnlearn.make_train(
        lambda p, batch, key: (p - batch) ** 2, nnlearn.sgd(0.1), nnlearn.generated(lambda key, step: step * 0.0 + 1),
        jnp.zeros(()), steps=7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_programs_are_diagnosed(name):
    if name == "own step":  # batches with a mask
        train = nnlearn.make_train(
            step=lambda state, batch: own_step(state, batch.examples),
            batches=nnlearn.shuffled(TRAIN, 16),
            init=lambda key: {"params": init(key)},
            steps=40,
        )
    else:
        train = ODD[name]()
    report = nnlearn.diagnose(train, {}, 0)
    assert report.healthy, report
    assert [check for check in report.checks if check.status == "not run"] and str(report)
    assert not [check for check in report.checks if check.reason.startswith("it failed")], report


SAMPLERS = {
    "mask": lambda: nnlearn.shuffled(np.arange(10.0), 4),
    "drop": lambda: nnlearn.shuffled(np.arange(10.0), 4, remainder="drop"),
    "poisson": lambda: nnlearn.poisson_sampled(np.arange(40.0), 5),
    "generated": lambda: nnlearn.generated(lambda key, step: jax.random.normal(key, (4,)) + step),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_rerun_is_the_run(name):
    def loss_fn(params, batch, key):
        values, where = batch if isinstance(batch, tuple) else (batch, None)
        return jnp.mean((values - params + 0.1 * jax.random.normal(key)) ** 2, where=where)

    train = nnlearn.make_train(loss_fn, nnlearn.adam, SAMPLERS[name](), jnp.ones(()), steps=23)
    subject = Subject(train, 0.1, jax.random.key(3))
    record = rerun(subject, subject.plan, subject.start())
    state, trace = jax.jit(train)(0.1, jax.random.key(3))
    np.testing.assert_allclose(record.loss, trace.loss, rtol=2e-6)
    np.testing.assert_allclose(record.last.stored, state.params, rtol=2e-6)
    np.testing.assert_allclose(record.rate, trace.info.learning_rate)


def alone(tx, steps=60):
    """A run of an optimizer, first parameters, and a gradient."""
    params = {"w": jnp.ones((3, 2))}
    train = nnlearn.make_train(
        lambda p, b, k: jnp.sum(p["w"]), tx, nnlearn.generated(lambda k, step: step), params, steps=steps
    )
    return Subject(train, {}, jax.random.key(0)), params, {"w": np.full((3, 2), 0.5, np.float32)}


def answer(tx, steps=60):
    return ask(*alone(tx, steps), steps)


def cleared(inner, every):
    """An accumulation whose buffer is cleared before every step, not after every update."""
    held = optax.MultiSteps(inner, every).gradient_transformation()

    def update(grads, state, params=None):
        return held.update(grads, state._replace(acc_grads=jax.tree.map(jnp.zeros_like, state.acc_grads)), params)

    return optax.GradientTransformation(held.init, update)


def test_gradients_of_micro_batches_that_have_no_effect():
    kept = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    assert not forgets(*alone(kept), 4) and not forgets(*alone(optax.apply_every(4)), 4)
    assert forgets(*alone(cleared(optax.adam(0.1), 4)), 4)


def test_the_optimizer_alone_shows_what_it_does():
    plain = answer(optax.sgd(0.1))
    np.testing.assert_allclose(plain.pace, 0.1 * 0.5 * 6**0.5, rtol=1e-5)
    assert np.all(plain.along > 0.999) and plain.drift == 0 and not np.any(plain.coasting)
    decayed = answer(optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1)))
    np.testing.assert_allclose(decayed.drift, -0.03, rtol=1e-5)
    momentum = answer(optax.sgd(0.1, momentum=0.9))
    np.testing.assert_allclose(momentum.coasting[1] / momentum.coasting[0], 0.9, rtol=1e-4)
    clipped = answer(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1)))
    np.testing.assert_allclose(clipped.response[:4], 0.001, rtol=1e-5)


def test_a_cause_comes_before_what_it_explains():
    symptom, cause = found("learning_rate_too_high", "seen", strength=0.9), found("unnormalised_inputs", "seen")
    assert [each.name for each in rank([symptom, cause])] == ["unnormalised_inputs", "learning_rate_too_high"]
    assert {name for pair in EXPLAINS.items() for name in (pair[0], *pair[1])} - {"*"} <= set(FAULTS)


def test_a_report_is_saved_and_refused(tmp_path):
    report = Report(
        (found("overfitting", "Seen.", {"gap": np.float32(0.5), "worst": np.inf}),), (Check("a", "passed"),)
    )
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report and not report.healthy
    (tmp_path / "report.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"report\.json.*format is 'other'"):
        Report.load(tmp_path / "report.json")


@pytest.mark.slow
def test_a_trace_alone():
    _, trace = jax.jit(train_with(optax.sgd(300.0)))({}, 0)
    assert nnlearn.diagnose_trace(trace).findings[0].name == "learning_rate_too_high"
    assert nnlearn.diagnose_trace(jax.jit(train_with())({}, 0)[1]).healthy


def test_a_predict_that_fails_and_an_unknown_validation_are_errors():
    def with_validation(validation, predict=predict):
        return make_subject(train_with(), {}, 0, predict, validation)

    x, y = VALIDATION
    pair = with_validation({"label": y, "image": x}).validation
    assert pair is not None and pair[0] is x and pair[1] is y
    with pytest.raises(ValueError, match=r"validation must be a pair .* got a dict with the keys \['a', 'b'\]"):
        with_validation({"a": x, "b": y})
    with pytest.raises(ValueError, match="validation must be a pair .* got a tuple with 3 parts"):
        with_validation((x, x, y))
    with pytest.raises(ValueError, match=r"predict\(params, inputs\) failed .*: KeyError: 'third'.*model_state"):
        with_validation(VALIDATION, lambda params, inputs: params["third"])
    with pytest.raises(ValueError, match="predict.* failed on two inputs: TypeError"):
        nnlearn.preflight(train_with(), {}, 0, predict=lambda params, inputs, key, more: inputs)
    in_numpy = with_validation(VALIDATION, lambda params, inputs: np.asarray(inputs) @ np.ones((4, 3), np.float32))
    assert in_numpy.predict is not None  # what works on arrays, but not in a program, is accepted
    judged = dataclasses.replace(train_with(), evaluate=lambda params: {"accuracy": jnp.zeros(())}, check_every=96)
    with pytest.raises(ValueError, match="metric must be one of the metrics of evaluate, .*; got 'acuracy'"):
        make_subject(judged, {}, 0, predict, VALIDATION, "acuracy")
    for look in (nnlearn.diagnose, nnlearn.preflight):
        with pytest.raises(KeyError, match="'z'") as failure:  # no report of 60 checks that failed
            look(train_with(loss_fn=lambda params, batch, key: params["z"]), {}, 0)
        assert "raises this by itself" in failure.value.__notes__[-1]
    with pytest.raises(TypeError, match="got function; for a run of fit, .* nnlearn.diagnose_trace"):
        nnlearn.diagnose(predict, {}, 0)  # pyright: ignore[reportArgumentType]


def convolution(params, images):
    over = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.tanh(over), axis=(1, 2)) @ params["out"] + params["bias"][None]


def test_standardised_inputs_and_targets_are_folded_into_the_weights():
    x, params = VALIDATION[0][:8], init(jax.random.key(1))
    shift, size = np.array([1, 2, 3, 4], np.float32), np.array([2, 0.5, 1, 4], np.float32)
    fold = fold_inputs(predict, params, x, shift, size)
    assert fold is not None
    np.testing.assert_allclose(predict(fold(params), x), predict(params, (x - shift) / size), rtol=1e-4, atol=1e-5)
    fold = fold_outputs(predict, params, x, np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32))
    assert fold is not None
    wanted = predict(params, x) * jnp.array([[4.0, 5.0, 6.0]]) + jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(predict(fold(params), x), wanted, rtol=1e-4, atol=1e-5)
    images = np.random.default_rng(5).normal(size=(4, 5, 5, 2)).astype(np.float32)
    params = {"kernel": jnp.ones((3, 3, 2, 6)), "out": jnp.ones((6, 1)), "bias": jnp.zeros(1)}
    assert fold_inputs(convolution, params, images, np.ones(2), np.ones(2)) is None  # padding is 0, not the shift
    fold = fold_inputs(convolution, params, images, np.zeros(2), np.array([2, 4], np.float32))
    assert fold is not None
    np.testing.assert_allclose(
        fold(params)["kernel"], params["kernel"] / jnp.array([2, 4], np.float32)[:, None], rtol=1e-6
    )


@pytest.mark.slow
def test_the_metrics_of_a_repaired_run_are_right():
    """Its evaluation knows nothing of the standardised inputs that the repair gives to the loss."""
    x, y = VALIDATION[0] * 200 + 3000, VALIDATION[1]

    def evaluate(params):
        return {"accuracy": jnp.mean(jnp.argmax(predict(params, x), -1) == y)}

    train = train_with(optax.sgd(0.1), data=(TRAIN[0] * 200 + 3000, TRAIN[1]), steps=200)
    train = dataclasses.replace(train, evaluate=evaluate, check_every=200)
    finding = found("unnormalised_inputs", "seen")
    fixed = nnlearn.repair(
        train, {}, 0, Report((finding,), ()), predict=predict, validation=(x, y), metric="accuracy", seeds=2
    )
    state, trace = jax.jit(fixed.train)(fixed.hparams, jax.random.key(0))
    assert fixed.predict is not None
    said = np.argmax(fixed.predict(state.params, x), -1)
    assert fixed.worked and np.mean(said == y) > 0.9 > np.mean(fixed.before)
    np.testing.assert_allclose(trace.metrics["accuracy"][-1], np.mean(said == y), atol=0.02)


def test_the_words_of_a_report():
    finding = found("learning_rate_too_high", "Seen.", remedies=["divide the learning rate by 10"])
    assert [each for each in finding.remedies if "divide" in each] == ["divide the learning rate by 10"]
    checks = Check("a", "passed"), Check("b", "not run", reason="no predict was given")
    report = Report((), (*checks, Check("c", "not run", reason="it failed: KeyError: 'x'")))
    assert str(report).splitlines()[2:] == [
        "1 check ran, 1 could not, 1 failed: report.text(all_checks=True) says why",
        "  failed   c: it failed: KeyError: 'x'",
    ]
    assert report.text(all_checks=True).splitlines()[3:] == [
        "  passed   a", "  not run  b: no predict was given", "  failed   c: it failed: KeyError: 'x'",
    ]  # fmt: skip


@pytest.mark.slow
def test_preflight():
    data = TRAIN[0], TRAIN[1] + 1
    report = nnlearn.preflight(train_with(data=data), {}, 0, predict=predict, validation=(TRAIN[0][:50], TRAIN[1][:50]))
    assert {"label_encoding", "leaky_validation"} <= {finding.name for finding in report.findings}, report
    assert not [check for check in report.checks if check.reason.startswith("it failed")]
    assert nnlearn.preflight(train_with(), {}, 0, predict=predict, validation=VALIDATION).healthy


FILE = """
import jax.numpy as jnp, nnlearn
batches = nnlearn.generated(lambda key, step: step)
train = nnlearn.make_train(lambda p, b, key: (p - 1) ** 2, nnlearn.sgd, batches, jnp.zeros(()), steps=40)
hparams = {rate}
"""


def test_the_command(tmp_path, capsys):
    path = tmp_path / "program.py"
    path.write_text(FILE.replace("{rate}", "3.0"))
    assert cli.main(["diagnose", f"{path}:train", "--json"]) == 1
    assert Report.from_json(capsys.readouterr().out).findings[0].name == "learning_rate_too_high"
    assert cli.main(["diagnose", f"{path}:other"]) == 2
    assert "its runs are ['train']" in capsys.readouterr().err
