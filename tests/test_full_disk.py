"""A disk that fills: files are whole or as they were, the error says what to do, and runs go on or end as one chose."""

import os
import resource
import subprocess
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_durable import INPUTS, TARGETS, assert_same, loss_fn

import nnlearn
from nnlearn.checkpoints import Checkpoints, export_msgpack, export_safetensors, load, save
from nnlearn.figures.style import save_figure
from nnlearn.files import FullDiskError, replacing
from nnlearn.stream.history import History
from nnlearn.sweeps.store import Store
from nnlearn.train.trace import Trace

SMALL = 8192  # bytes that a full disk still takes


class Tmpfs:
    """A small disk that a file fills."""

    def __init__(self, folder):
        self.folder = folder
        words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        self.works = subprocess.run(words, capture_output=True).returncode == 0

    def fill(self):
        left = os.statvfs(self.folder)
        with open(self.folder / ".filler", "wb") as file:
            file.write(bytes(left.f_bavail * left.f_frsize - SMALL))

    def clear(self):
        (self.folder / ".filler").unlink(missing_ok=True)

    def close(self):
        if self.works:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


class Limit:
    """A limit on the size of files, which needs no permission."""

    works = True

    def __init__(self, folder):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, self.before[1]))

    def clear(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    close = clear


@pytest.fixture(params=[Tmpfs, Limit])
def disk(request, tmp_path):
    found = request.param(tmp_path)
    if not found.works:
        pytest.skip("only root can mount a small disk")
    yield found
    found.clear()
    found.close()


RANDOM = np.random.default_rng(0).normal(size=5000).astype(np.float32)  # does not compress


def a_trace():
    steps = jnp.arange(1, len(RANDOM) + 1)
    info = nnlearn.train.Info(jnp.asarray(RANDOM), None, None, None, None)
    return Trace(steps, info, steps[:0], {}, steps[-1], jnp.array(0))


def a_text(path):
    with replacing(path) as file:
        file.write(str(RANDOM.tolist()))


def a_figure(path):
    from nnlearn.figures.style import new_figure

    figure = new_figure(8, 4)
    figure.subplots().plot(RANDOM)
    save_figure(figure, path, dpi=100)


def a_batch(path):
    store = Store(path.parent, {})
    store.write(0, 0, 0, a_trace())


WRITERS = {
    "text.json": a_text,
    "trace.npz": lambda path: a_trace().save(path),
    "batch-0-0-0.npz": a_batch,
    "w.safetensors": lambda path: export_safetensors(path, {"w": RANDOM}),
    "w.msgpack": lambda path: export_msgpack(path, {"w": RANDOM}),
    "figure.png": a_figure,
}


def test_what_was_there_stays_and_the_error_names_the_cure(disk, tmp_path):
    for name in WRITERS:
        (tmp_path / name).write_text("before")
    save(tmp_path / "step", {"w": np.ones(3)})
    before = sorted(path.name for path in tmp_path.iterdir())
    disk.fill()
    for name, write in WRITERS.items():
        with pytest.raises(FullDiskError, match=rf"{name}' could not be written.*or write elsewhere"):
            write(tmp_path / name)
        assert (tmp_path / name).read_text() == "before"
    with pytest.raises(FullDiskError, match=r"20\.0 kB needed; .* free\). The checkpoint that was there is unchanged"):
        save(tmp_path / "step", {"w": RANDOM})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".filler") == before
    disk.clear()
    assert np.all(load(tmp_path / "step")["w"] == 1)
    for name, write in WRITERS.items():
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_size > SMALL


@pytest.mark.parametrize("name", ["run.csv", "run.jsonl"])
def test_the_rows_of_a_history_wait(disk, tmp_path, name):
    rows = [{"step": step, "loss": float(loss)} for step, loss in enumerate(RANDOM[:600], start=1)]
    whole, path = tmp_path / f"whole{Path(name).suffix}", tmp_path / name
    with History(whole, ["step", "loss", "norm"]) as history:
        history.write([*rows, {"step": 600, "norm": 2.0}, {"step": 601, "loss": 1.0}][:600])
        history.write([{"step": 600, "norm": 2.0}, {"step": 601, "loss": 1.0}])
    with warnings.catch_warnings(record=True) as caught, History(path, ["step", "loss", "norm"]) as history:
        history.write(rows[:100])
        begun = path.read_text()
        disk.fill()
        for at in range(100, 600, 50):
            history.write(rows[at : at + 50])
        assert path.read_text().startswith(begun) and path.read_text().endswith("\n")
        history.write([{"step": 600, "norm": 2.0}])
        disk.clear()
        history.write([{"step": 601, "loss": 1.0}])
    assert [str(each.message)[:30] for each in caught] == [f"history '{path}' could not be written"[:30]]
    assert path.read_text() == whole.read_text()
    disk.fill()
    with warnings.catch_warnings(record=True) as caught, History(path, ["step", "loss", "norm"], 601) as history:
        history.write([{"step": step, "loss": 0.5} for step in range(602, 2000)])
    assert "could not be written" in str(caught[0].message) and "lacks the last rows" in str(caught[1].message)


class Filling(Checkpoints):
    """The disk fills once step 20 is saved, and has space again at step 40."""

    disk, clears = None, True

    def save(self, step, *args, **settings):
        super().save(step, *args, **settings)
        if step == 20 or (step == 40 and self.clears):
            self.wait()
            self.disk.fill() if step == 20 else self.disk.clear()


PARAMS = {"w": jnp.zeros(5), "b": jnp.zeros(()), "large": jnp.zeros(3000)}
BATCHES = nnlearn.shuffled((INPUTS, TARGETS), 20, remainder="drop")
TRAIN = nnlearn.make_train(loss_fn, nnlearn.adamw, BATCHES, PARAMS, steps=60, check_every=5)
TX = nnlearn.adamw(0.1)
STEP = nnlearn.make_step(loss_fn, TX)


def run(**options):
    return nnlearn.run(TRAIN, 0.1, 0, progress=False, **options)


def fit(**options):
    batches = [(INPUTS[at : at + 20], TARGETS[at : at + 20]) for at in range(60)]
    return nnlearn.fit(STEP, nnlearn.init_state(PARAMS, TX, key=0), batches, check_every=5, progress=False, **options)


@pytest.mark.parametrize("drive", [run, fit])
def test_training_goes_on_or_ends_as_one_chooses(disk, tmp_path, drive):
    Filling.disk = disk
    whole = drive(history=tmp_path / "whole.csv")
    settings = {"every_steps": 10, "keep_last": 2}
    options = {"history": tmp_path / "it.csv"}
    with Filling(tmp_path / "it", on_error="warn", **settings) as checkpoints:
        with pytest.warns(
            UserWarning, match="step 30 could not be saved.*of step 10, 20. Free space on that disk|ulimit"
        ):
            result = drive(checkpoints=checkpoints, **options)
        assert checkpoints.steps() == (50, 60) and not checkpoints.verify()
    assert_same(tuple(result), tuple(whole))
    assert (tmp_path / "it.csv").read_text() == (tmp_path / "whole.csv").read_text()

    with Filling(tmp_path / "ended", **settings) as checkpoints:
        with pytest.raises(FullDiskError, match="step 30 could not be saved.*on_error='warn' continues without it"):
            drive(checkpoints=checkpoints)
        assert checkpoints.steps() == (10, 20) and checkpoints.latest() == 20
    disk.clear()
    with Checkpoints(tmp_path / "ended", **settings) as checkpoints:
        assert_same(tuple(drive(checkpoints=checkpoints)), tuple(whole))


@pytest.mark.parametrize("drive", [run, fit])
def test_the_last_checkpoint_is_tried_again(disk, tmp_path, drive):
    """Training ends while the disk is full; a second call goes on from the last good checkpoint."""
    Filling.disk, options = disk, {"every_steps": 20, "on_error": "warn"}
    with Filling(tmp_path / "it", **options) as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints.clears = False
        whole = drive(checkpoints=checkpoints, history=tmp_path / "it.csv")
        assert checkpoints.steps() == (20,)
    assert [str(each.message)[:28] for each in caught if "could not be saved" in str(each.message)] == [
        "step 40 could not be saved: ",
        "step 60 could not be saved: ",
        "step 60 could not be saved: ",
    ]
    disk.clear()
    with Checkpoints(tmp_path / "it", **options) as checkpoints:
        assert_same(tuple(drive(checkpoints=checkpoints, history=tmp_path / "it.csv")), tuple(whole))
    assert (
        drive(history=tmp_path / "whole.csv")
        and (tmp_path / "it.csv").read_text() == (tmp_path / "whole.csv").read_text()
    )
