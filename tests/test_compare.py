"""The command ``nnlearn compare``, end to end and in its parts."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import nnlearn
from nnlearn import cli
from nnlearn.compare import CompareOptions, compare
from nnlearn.compare.options import KNOWN
from nnlearn.compare.own import make_own_problem
from nnlearn.compare.runs import Curves
from nnlearn.compare.summary import best_index, make_rows, target_loss

QUICK = {"seeds": 2, "epochs": 3, "learning_rates": (0.003, 0.03), "hidden": (16,)}


def run(tmp_path, **settings):
    console = Console(file=io.StringIO(), record=True, width=80)
    results = compare(CompareOptions(out=tmp_path, **(QUICK | settings)), console)
    return results, console.export_text()


@pytest.mark.slow
def test_digits_compared_with_optax(tmp_path):
    results, text = run(tmp_path, optimizers=("adamw", "sgd"))
    for name in ("adamw", "sgd"):
        ours, theirs = results[name]["nnlearn"], results[name]["optax"]
        assert ours.validation_sre.shape == (2, 2, 3)
        assert ours.steps == theirs.steps == 2 * 2 * 3 * 20
        np.testing.assert_allclose(ours.validation_sre, theirs.validation_sre, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.train_sre, theirs.train_sre, rtol=1e-3, atol=1e-4)
        assert np.all(np.diff(ours.seconds_e) > 0)
    assert results["adamw"]["nnlearn"].test_sre.max() > 0.85
    for word in ("adamw", "sgd", "nnlearn", "optax", "accuracy", "compile", "steps/s", "Optical Recognition"):
        assert word in text
    assert "…" not in text  # no cell is cut off at 80 columns

    document = json.loads((tmp_path / "results.json").read_text())
    assert document["complete"] and document["settings"]["seeds"] == 2
    assert [row["library"] for row in document["table"]] == ["nnlearn", "optax"] * 2
    assert np.shape(document["curves"]["adamw"]["optax"]["validation_sre"]) == (2, 2, 3)
    assert document["machine"]["versions"]["optax"]
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.slow
@pytest.mark.parametrize(("data", "metric"), [("diabetes", "mse"), ("breast-cancer", "accuracy"), ("xor", "accuracy")])
def test_other_data(tmp_path, data, metric):
    results, _ = run(tmp_path, optimizers=("adam",), data=data, learning_rates=(0.03,), epochs=2)
    np.testing.assert_allclose(
        results["adam"]["nnlearn"].validation_sre, results["adam"]["optax"].validation_sre, rtol=1e-4
    )
    assert json.loads((tmp_path / "results.json").read_text())["metric"] == metric


@pytest.mark.slow
def test_diverged_runs_are_reported(tmp_path):
    _, text = run(tmp_path, optimizers=("sgd",), learning_rates=(1e30, 1e36), epochs=2, seeds=1)
    assert "diverged" in text and "nan" not in text and "inf" not in text and "10.0" not in text
    row = json.loads((tmp_path / "results.json").read_text())["table"][0]
    assert row["best_rate"] is None and row["metric_mean"] is None and row["metric_sd"] is None
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_seed_has_no_spread_and_one_rate_has_no_edge(tmp_path):
    _, text = run(tmp_path, optimizers=("sgd",), data="diabetes", learning_rates=(0.01,), seeds=1, epochs=1)
    assert "1 seed x 1 learning rate x 1 epoch" in text and "*" not in text
    assert json.loads((tmp_path / "results.json").read_text())["table"][0]["metric_sd"] is None


@pytest.mark.parametrize("name", KNOWN)
def test_every_optimizer_can_be_compared(tmp_path, name):
    CompareOptions(optimizers=(name,), out=tmp_path).check()


def make_curves(last_losses_sr, seconds=1.0):
    losses_sre = np.stack([np.full_like(last_losses_sr, 1.0), last_losses_sr], axis=-1)
    return Curves(losses_sre, losses_sre, 1 - losses_sre / 10, np.array([seconds, 2 * seconds]), 0.5, 100)


def test_the_best_rate_has_the_lowest_mean_validation_loss_without_divergence():
    assert best_index(make_curves(np.array([[0.1, 0.2, np.nan], [0.4, 0.2, 0.0]]))) == 1


def test_rows_summarise_the_curves():
    settings = CompareOptions(optimizers=("adam",), learning_rates=(0.1, 0.2))
    fast = make_curves(np.array([[0.9, 0.4], [0.9, 0.6]]))
    slow = make_curves(np.array([[0.9, 0.4], [0.9, 0.5]]), seconds=4.0)
    results = {"adam": {"nnlearn": fast, "optax": slow}}
    assert target_loss(results) == pytest.approx(1.5 * 0.45)
    ours, theirs = make_rows(results, settings)
    assert (ours.best_rate, ours.seconds_to_target, ours.steps_per_second) == (0.2, 2.0, 50.0)
    assert ours.metric_mean == pytest.approx(0.95) and ours.metric_sd == pytest.approx(0.1 * 0.2 / 2**0.5)
    assert theirs.seconds_to_target == 8.0
    assert ours.difference == pytest.approx(0.1)


BAD = [
    (["--optimizers", "sgd", "adm"], "'adm'; did you mean 'adam'?; known are adabelief, adadelta"),
    (["--data", "imagenet"], "'imagenet'; known are digits, mnist, breast-cancer, diabetes, xor"),
    (["--seeds", "0"], "seeds"),
    (["--learning-rates", "-1.0"], "learning_rates"),
    (["--learning-rates", "0.0"], "learning_rates"),
    (["--optimizers", "sgd", "sgd"], "twice"),
    (["--hidden", "0"], "hidden"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_errors_for_invalid_arguments_list_the_valid_ones(tmp_path, capsys, arguments, message):
    assert cli.main(["compare", *arguments, "--out", str(tmp_path / "never")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_an_unwritable_folder_is_an_error_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    began = time.process_time()
    assert cli.main(["compare", "--out", str(tmp_path / "file" / "results")]) == 2
    assert time.process_time() - began < 5
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    few = ("--optimizers", "sgd", "--seeds", "1", "--epochs", "1", "--learning-rates", "0.1", "--json")
    assert cli.main(["compare", "--data", "xor", "--out", str(tmp_path), *few]) == 0
    shown = capsys.readouterr()
    assert 'no curves.png: drawing needs matplotlib: pip install "nnlearn[plot]"' in shown.err
    assert json.loads(shown.out)["table"] and not (tmp_path / "curves.png").exists()


def test_a_comparison_of_an_own_run_takes_its_held_out_loss_and_its_score(tmp_path, monkeypatch):
    lines = (
        "import jax.numpy as jnp, nnlearn",
        "batches = nnlearn.generated(lambda key, step: jnp.ones(2))",
        "def train(*names):",
        "    evaluate = lambda params: dict.fromkeys(names, params)",
        "    tx = nnlearn.sgd(0.1)",
        "    return nnlearn.make_train(lambda p, b, k: p**2, tx, batches, jnp.ones(()), steps=4, evaluate=evaluate)",
        "scored, plain, bare = train('accuracy', 'val_loss'), train('size', 'validation/loss'), train('size')",
    )
    (tmp_path / "mine.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    chosen = [make_own_problem(CompareOptions(f"mine.py:{name}")) for name in ("scored", "plain", "bare")]
    pairs = [(problem.loss, problem.metric) for problem in chosen]
    assert pairs == [("val_loss", "accuracy"), ("validation/loss", "validation/loss"), ("train_loss", "train_loss")]


def test_versions(capsys):
    assert cli.main(["versions"]) == 0
    assert "jaxlib" in capsys.readouterr().out
    assert cli.main(["versions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["nnlearn"] == nnlearn.__version__
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nnlearn {nnlearn.__version__}\n"


@pytest.mark.slow
def test_an_interrupt_reports_complete_curves_and_exits_with_130(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nnlearn.cli", "compare", "--out", str(out), "--optimizers", "sgd", "adam"]
    command += ["--seeds", "2", "--epochs", "100000", "--learning-rates", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not out.exists() and process.poll() is None:  # imports are slow on a busy machine
            time.sleep(0.5)
        time.sleep(15)  # in the middle of the first of four very long runs
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()  # without the interrupt the process would run for hours
    assert process.returncode == 130, output
    assert "interrupted; complete until then: nothing" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_later_interrupt_writes_complete_curves(tmp_path, monkeypatch, capsys):
    from nnlearn.compare import runs

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(runs.RUNNERS, "optax", interrupted)
    arguments = ["--epochs", "1", "--seeds", "1", "--learning-rates", "0.1", "--optimizers", "sgd", "adam"]
    assert cli.main(["compare", "--out", str(tmp_path), *arguments]) == 130
    assert "complete until then: sgd (nnlearn)" in capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert not document["complete"] and list(document["curves"]) == ["sgd"]
