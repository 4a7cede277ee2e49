"""The console command: every command, its help, its errors and its JSON."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from nnlearn import cli

FILE = """
import jax.numpy as jnp, nnlearn
batches = nnlearn.generated(lambda key, step: step)
loss_fn = lambda p, b, key: jnp.sum((p["w"] - 1) ** 2)
train = nnlearn.make_train(loss_fn, lambda h: nnlearn.sgd(h["rate"]), batches, {"w": jnp.zeros(3)}, steps=66)
hparams = {"rate": 0.1}
def make(): return train
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_run.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    yield "own_run:train"
    sys.modules.pop("own_run", None)


def output(capsys, *words, status=0):
    assert cli.main(list(words)) == status
    return capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    text = output(capsys, "--help")
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert output(capsys, status=2) == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_examples_and_fits_60_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "\x1b" not in text
    assert [line for line in text.splitlines() if line.startswith("  nnlearn ")] == [
        f"  nnlearn {example}" for example in cli.COMMANDS[name].examples
    ]
    copied = ("  nnlearn ", "usage:")  # a command is one line, to be copied
    assert [line for line in text.splitlines() if len(line) > 60 and not line.startswith(copied)] == []


def test_the_examples_in_the_help_have_known_options():
    import dataclasses
    import importlib

    for command in cli.COMMANDS.values():
        options = getattr(importlib.import_module(f"nnlearn.{command.module}"), command.options)
        known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(options)}
        used = {word for example in command.examples for word in example.split() if word.startswith("--")}
        assert used <= known, used - known


def test_unknown_names_suggest_the_nearest(capsys):
    for words, hint in (
        (["comapre"], "did you mean 'compare'?"),
        (["learn", "digist"], "did you mean 'digits'?"),
        (["sweep", "digist", "--space", "a=1,2"], "did you mean 'digits'?"),
        (["compare", "--optimizers", "adamz"], "did you mean 'adam'?"),
    ):
        assert cli.main(words) == 2
        assert hint in capsys.readouterr().err


def test_a_sweep_and_its_report(own, tmp_path, capsys):
    space = ["--space", "rate=0.01,0.4", "other=2"]
    text = output(capsys, "sweep", own, *space, "--seeds", "2", "--out", "kept")
    assert text.split()[:3] == ["rate", "train_loss", "failed"] and text.split()[3] == "0.4"
    answer = json.loads(output(capsys, "sweep", own, *space, "--json"))
    assert answer["metric"] == "train_loss" and answer["ranking"][0]["setting"] == {"rate": 0.4, "other": 2}
    output(capsys, "report", "kept", "--out", "kept.html")
    assert "rate" in (tmp_path / "kept.html").read_text()
    assert cli.main(["sweep", own, "--space", "rate=log:1"]) == 2
    assert "log:LOW:HIGH" in capsys.readouterr().err


def test_find_lr(own, capsys):
    answer = json.loads(output(capsys, "find-lr", "own_run:make", "--low", "1e-3", "--high", "10", "--json"))
    assert 0.01 < answer["rate"] < 1.0 and len(answer["rates"]) == len(answer["losses"])
    shown = output(capsys, "find-lr", "own_run:make", "--low", "1e-3", "--high", "10").splitlines()
    assert re.fullmatch(r"rate \S+ \(.*; (diverges from|no rate).*\); cost: \d+ steps", shown[0])
    assert shown[1] == f"hparams = {{'rate': {answer['rate']:.3g}}}"


@pytest.mark.slow
def test_compare_runs_a_model_of_ones_own(own, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rates = ("--learning-rates", "0.05", "0.1")
    words = ("--optimizers", "sgd", "--seeds", "2", "--epochs", "3", "--out", "compared", "--json")
    answer = json.loads(output(capsys, "compare", "own_run.py:train", *rates, *words))
    ours, theirs = answer["table"]
    assert ours["best_rate"] == theirs["best_rate"] == 0.1 and ours["difference"] < 1e-6
    curves = json.loads((tmp_path / "compared" / "results.json").read_text())["curves"]["sgd"]["optax"]
    # gradient descent on a quadratic: the loss of step t is 3 * (1 - 2 * rate) ** (2 * t)
    want = sum(3 * 0.8 ** (2 * (44 + t)) for t in range(22))
    np.testing.assert_allclose(curves["train_sre"][0][1][-1], want / 22, rtol=1e-2)
    output(capsys, "report", "compared", "--out", "compared.html")
    assert "train_loss" in (tmp_path / "compared.html").read_text()


def test_checkpoints(tmp_path, capsys):
    import jax.numpy as jnp

    from nnlearn.checkpoints import Checkpoints

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jnp.arange(1000.0), metrics={"loss": 0.5})
        checkpoints.wait()
        file = max((path for path in checkpoints.path(3).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    assert "loss 0.5" in output(capsys, "checkpoints", str(tmp_path))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    answer = json.loads(output(capsys, "checkpoints", str(tmp_path), "--json", status=1))
    assert answer["checkpoints"][0]["damage"]
    assert cli.main(["checkpoints", str(tmp_path / "none")]) == 2


def test_tasks(capsys):
    assert "digits" in json.loads(output(capsys, "tasks", "--json"))


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_error():
    command = [sys.executable, "-m", "nnlearn.cli", "tasks"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in errors
