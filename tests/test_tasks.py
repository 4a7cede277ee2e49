"""Every task runs, gives the same results alone and vmapped, learns, and beats its baselines."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnlearn import cli
from nnlearn.data import Examples, MaskedBatch
from nnlearn.models import convnet
from nnlearn.models.embedding import embedding, factorization_machine
from nnlearn.tasks import TASKS, Task, load_task
from nnlearn.tasks.objectives import classification


def table(size=200):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(size, 5)).astype(np.float32)
    return Examples(inputs, np.exp(inputs @ np.ones((5, 1), np.float32) + 0.1))


SMALL = {
    "diamonds": lambda: load_task("diamonds", data=table(), hidden=(8,), epochs=2),
    "breast-cancer": lambda: load_task("breast-cancer", hidden=(8,), epochs=1),
    "digits": lambda: load_task("digits", hidden=(8,), epochs=1),
    "masked-digits": lambda: load_task("masked-digits", hidden=16, epochs=1),
    "clicks": lambda: load_task("clicks", examples=600, values=20, epochs=1),
    "graphs": lambda: load_task("graphs", examples=100, nodes=8, hidden=8, epochs=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_task_vmapped_over_seeds_and_learning_rates_equals_its_single_runs(name):
    task = SMALL[name]()
    assert isinstance(task, Task) and task.name == name
    train = task.make_train(steps=4, evaluate=None)
    rates, seeds = jnp.array([0.5, 1.5]) * task.hparams["learning_rate"], jnp.array([0, 1])

    def run(rate, seed):
        return train({**task.hparams, "learning_rate": rate}, seed)

    alone = jax.jit(run)
    states, traces = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(rates, seeds)
    for i, rate in enumerate(rates):
        for j, seed in enumerate(seeds):
            state, trace = alone(rate, seed)
            np.testing.assert_allclose(traces.loss[i, j], trace.loss, rtol=1e-4)
            for many, one in zip(jax.tree.leaves(states.params), jax.tree.leaves(state.params), strict=True):
                np.testing.assert_allclose(many[i, j], one, rtol=1e-3, atol=1e-5)
    assert np.all(np.isfinite(traces.loss)) and np.ptp(traces.loss[:, 0, -1]) > 0
    metrics = jax.eval_shape(task.evaluation("test"), state.params)
    assert task.metric in metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graphs", "clicks", "breast-cancer", "masked-digits"])
def test_a_task_is_learned_and_beats_its_baseline(name):
    options = {"graphs": {"examples": 800, "epochs": 20}, "clicks": {"examples": 10_000, "epochs": 8}}
    task = load_task(name, **options.get(name, {}))
    state, trace = jax.jit(task.make_train(record_every=1))(task.hparams, 0)
    reached, naive = task.evaluate(state.params)[task.metric], next(iter(task.baselines.values()))
    assert (reached - naive) * (1 if task.mode == "max" else -1) > 0.1 * abs(naive) * (name != "clicks")
    assert trace.metrics["train_loss"][-1] < 0.9 * trace.metrics["train_loss"][0]
    if name != "clicks":
        assert task.solved(task.evaluate(state.params)), (reached, task.target)


def test_an_unknown_task_is_rejected_and_every_known_task_has_a_function():
    with pytest.raises(ValueError, match="name must be one of mnist, .*'chess'"):
        load_task("chess")
    import importlib

    for name, module in TASKS.items():
        assert callable(getattr(importlib.import_module(f"nnlearn.tasks.{module}"), name.replace("-", "_")))


@pytest.mark.slow
def test_a_factorization_machine_equals_its_sum_over_pairs_and_updates_only_rows_in_use():
    model = factorization_machine((4, 3, 5), 2)
    params = model.init(jax.random.key(0))
    params["weights"] = {"embedding": jax.random.normal(jax.random.key(1), (12, 1))}
    values = jnp.array([[3, 0, 4], [1, 2, 0]])
    rows = np.asarray(values) + np.array([0, 4, 7])
    vectors, weights = np.asarray(params["vectors"]["embedding"], np.float64), params["weights"]["embedding"]
    expected = [
        float(np.sum(weights[row])) + sum(vectors[row[f]] @ vectors[row[g]] for f in range(3) for g in range(f + 1, 3))
        for row in rows
    ]
    np.testing.assert_allclose(model.apply(params, values), expected, rtol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, values)))(params)
    touched = np.flatnonzero(np.any(np.asarray(grads["vectors"]["embedding"]) != 0, axis=1))
    assert set(touched) == set(rows.ravel().tolist())


def test_an_index_out_of_range_gives_nan():
    model = embedding(3, 2)
    params = model.init(jax.random.key(0))
    assert np.isnan(model.apply(params, jnp.array([-1, 3]))).all()
    assert np.isnan(factorization_machine((3, 3), 2).apply(
        factorization_machine((3, 3), 2).init(jax.random.key(0)), jnp.array([3, 0])))  # fmt: skip
    with pytest.raises(TypeError, match="integers, got float32"):
        model.apply(params, jnp.zeros(2))


def test_learn_trains_and_reports(capsys, tmp_path):
    arguments = ["breast-cancer", "--epochs", "3", "--checks", "2", "--out", str(tmp_path / "new")]
    assert cli.main(["learn", *arguments]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["metrics"]["accuracy"] > 0.8 and result["settings"]["epochs"] == 3 and len(result["checks"]) == 2
    assert f"accuracy {result['metrics']['accuracy']:.4g}" in printed
    assert "breast-cancer" in printed and "target accuracy 0.95" in printed and "majority" in printed
    assert printed.count("  step ") == 2


@pytest.mark.slow
def test_learn_saves_and_resumes(capsys, tmp_path, monkeypatch):
    import signal

    from nnlearn.checkpoints import Checkpoints

    arguments = ["learn", "graphs", "--epochs", "2", "--checks", "4"]
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    saved = Checkpoints.save

    def save(self, step, *args, **settings):
        saved(self, step, *args, **settings)
        if len(self.steps()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--out", str(tmp_path / "it")])
    assert end.value.code == 143 and "--resume continues from step" in capsys.readouterr().out
    monkeypatch.setattr(Checkpoints, "save", saved)
    assert cli.main([*arguments, "--out", str(tmp_path / "it")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(tmp_path / "it"), "--resume"]) == 0
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "it"))
    assert one["checks"] == other["checks"] and one["metrics"] == other["metrics"]
    assert cli.main([*arguments, "--resume"]) == 2


def test_learn_rejects_invalid_options(capsys):
    assert cli.main(["learn", "chess"]) == 2
    assert "name must be one of mnist" in capsys.readouterr().err
    for name in ("checks", "epochs"):
        assert cli.main(["learn", "graphs", f"--{name}", "0"]) == 2
        assert f"{name} must be an int >= 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="epochs must be an int >= 1, got 0"):
        load_task("clicks", epochs=0, examples=100)


@pytest.mark.slow
def test_masked_examples_do_not_affect_batch_statistics():
    model = convnet(1, 3, widths=(4,))
    loss_fn, _ = classification(model)
    params, model_state = jax.jit(model.init)(jax.random.key(0))
    images, where = jax.random.normal(jax.random.key(1), (4, 4, 4, 1)), jnp.array([True, True, True, False])

    def run(last):
        examples = Examples(images.at[3].set(last), jnp.array([0, 1, 2, 0]))
        return jax.jit(loss_fn)(params, MaskedBatch(examples, where), jax.random.key(2), model_state)

    jax.tree.map(np.testing.assert_array_equal, run(0.0), run(100.0))
