"""A process that is killed while writing leaves every folder usable, and concurrent writers do not mix."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.files import only_one, replacing
from nnlearn.stream.history import History
from nnlearn.sweeps import Results, choice, sweep
from nnlearn.sweeps.batches import Runner
from nnlearn.sweeps.store import fingerprint

SPACE = {"rate": choice(0.01, 0.1)}
OPTIONS = {"metric": "train_loss", "width": 1, "workers": 1}


class Killed(BaseException):
    """Simulates the end of the process, after which no cleanup runs."""


def make(target=3.0, rate=1.0, data=None, steps=4):
    def loss_fn(params, batch, key):
        return jnp.mean((params - target) ** 2 + 0.1 * params * batch)

    data = np.arange(8, dtype=np.float32) if data is None else data
    batches = nnlearn.shuffled(data, 4, remainder="drop")
    return nnlearn.make_train(loss_fn, lambda h: nnlearn.sgd(rate * h["rate"]), batches, jnp.zeros(()), steps=steps)


def one_device(**options):
    return OPTIONS | {"devices": jax.devices()[:1]} | options


def die_at(monkeypatch, call):
    """End the process at the n-th replacement of a file: the draft remains, and nothing is renamed."""
    counted, real_replace, real_unlink = [0], os.replace, Path.unlink

    def replace(source, target):
        counted[0] += 1
        if counted[0] == call:
            raise Killed
        real_replace(source, target)

    def unlink(path, missing_ok=False):
        if counted[0] < call:  # no cleanup runs after the end
            real_unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory):
    """A folder and its content after a sweep was killed while writing sweep.json and the first batch."""
    folder = tmp_path_factory.mktemp("sweep")
    for call in (1, 2):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
            die_at(patched, call)
            sweep(make(), SPACE, folder=folder, **one_device())
        assert any(path.suffix == ".part" for path in folder.iterdir())
    return folder, sweep(make(), SPACE, folder=folder, **one_device())


@pytest.fixture
def finished(killed_twice, tmp_path):
    """A copy of the folder of a finished sweep."""
    return shutil.copytree(killed_twice[0], tmp_path / "sweep")


def test_a_sweep_killed_at_any_write_can_be_resumed(killed_twice):
    folder, found = killed_twice
    assert found.done.all() and found.execution.batches == 2
    assert not any(path.suffix == ".part" for path in folder.iterdir())
    np.testing.assert_array_equal(Results.load(folder).values("train_loss"), found.values("train_loss"))
    assert found.best().setting == {"rate": 0.1}  # four steps towards 3


HOLD = """
import os, signal, sys
from nnlearn.files import only_one
with only_one(sys.argv[1], "running a sweep"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_is_refused_until_the_first_has_ended(finished):
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(finished)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout.readline().strip() == "held"
        with pytest.raises(ValueError, match="another process is running a sweep there; wait until it has ended"):
            sweep(make(), SPACE, folder=finished, **one_device())
    finally:
        job.kill()
        job.communicate()
    found = sweep(make(), SPACE, folder=finished, **one_device())
    with pytest.raises(ValueError, match="differs in seeds"):  # a refused process holds no lock
        sweep(make(), SPACE, 2, folder=finished, **one_device())
    found.save(finished)
    with only_one(finished, "looking"), pytest.raises(ValueError, match="is in use"):  # threads cannot share it either
        found.save(finished)


OTHERS = {
    "loss": lambda: make(target=-7.0),
    "optimizer": lambda: make(rate=0.5),
    "data": lambda: make(data=np.arange(8, dtype=np.float32)[::-1].copy()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_train_is_refused(finished, what):
    with pytest.raises(ValueError, match="differs in what train computes .its loss, optimizer, model, data"):
        sweep(OTHERS[what](), SPACE, folder=finished, **one_device())


def test_static_functions_are_distinguished_by_what_they_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "finish", lambda runner, at, resources: None)  # only the header matters

    def of(static):
        return make(rate=static["by"](1.0))

    doubled, halved = (lambda x: 2 * x), (lambda x: x / 2)
    sweep(of, SPACE, static={"by": [doubled, halved]}, folder=tmp_path, **one_device())
    with pytest.raises(ValueError, match="for the static choice"):
        sweep(of, SPACE, static={"by": [halved, doubled]}, folder=tmp_path, **one_device())
    like = [lambda number: number * 2, lambda number: number / 2]  # other functions that compute the same
    sweep(of, SPACE, static={"by": like}, folder=tmp_path, **one_device())


def test_folders_of_other_versions_are_refused(finished):
    path = finished / "sweep.json"
    header = json.loads(path.read_text())

    def write(changes, without=()):
        body = {name: part for name, part in (header | changes).items() if name not in without}
        facts = {name: part for name, part in body.items() if name not in ("format", "fingerprint")}
        path.write_text(json.dumps(body | {"fingerprint": fingerprint(facts)}))

    write({"programs": ["jax 0.0.1:abc"]})
    with pytest.raises(ValueError, match="differs in the version of JAX .it used jax 0.0.1, this is jax"):
        sweep(make(), SPACE, folder=finished, **one_device())
    write({"format": "nnlearn sweep 1"}, without=("programs",))
    with pytest.raises(ValueError, match="older nnlearn, which did not record what was trained"):
        sweep(make(), SPACE, folder=finished, **one_device())
    assert Results.load(finished).done.all()  # its results can still be read


def test_the_error_names_a_damaged_batch_and_the_cure(finished):
    batch = sorted(finished.glob("batch-*"))[0]
    batch.write_bytes(batch.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{batch.name}.*delete it, and a sweep in this folder repeats its runs"):
        sweep(make(), SPACE, folder=finished, **one_device())


def test_a_file_is_complete_or_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(Killed), replacing(path) as file:
        file.write("half")
        raise Killed
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


class TestHistory:
    @pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
    def test_history_continues_after_an_incomplete_line(self, tmp_path, name):
        path = tmp_path / name
        for cut in ("", "st", None):
            if cut is not None:
                path.write_text(cut)
            with History(path, ["step", "loss"], 5) as history:
                history.write([{"step": 6, "loss": 0.5}])
            assert path.read_text().splitlines()[-1] in ("6,0.5", '{"step": 6, "loss": 0.5}')
            path.unlink()

    def test_two_runs_cannot_write_one_file(self, tmp_path):
        path = tmp_path / "run.csv"
        with History(path, ["step", "loss"], 0) as history:
            history.write([{"step": 1, "loss": 0.5}])
            for first in (0, 1):
                with pytest.raises(ValueError, match="is being written by another run: give it another file"):
                    History(path, ["step", "loss"], first)
            history.write([{"step": 2, "loss": 0.25}])
        assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25"]
        with History(path, ["step", "loss"], 1) as history:
            history.write([{"step": 2, "loss": 0.125}])
        assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.125"]
        assert os.listdir(tmp_path) == ["run.csv"]
