"""Runs that are saved, killed and resumed: the bits are those of a run that nothing has interrupted."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.checkpoints import CheckpointError, Checkpoints, save
from nnlearn.stream.place import Place, iterator_state, resumed

RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(96, 5)).astype(np.float32)
TARGETS = INPUTS.sum(1)
HPARAMS = {"rate": 0.1}


def loss_fn(params, batch, key):
    inputs, targets = batch
    kept = jax.random.bernoulli(key, 0.9, inputs.shape)
    return jnp.mean((jnp.where(kept, inputs, 0) @ params["w"] + params["b"] - targets) ** 2)


def make(steps=60, targets=TARGETS, **options):
    batches = nnlearn.shuffled((INPUTS, targets), 20, remainder="drop")
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    settings = {"check_every": 5, "packed": True} | options
    make_tx = lambda hparams: nnlearn.adamw(hparams["rate"])  # noqa: E731
    return nnlearn.make_train(loss_fn, make_tx, batches, params, steps=steps, **settings)


def assert_same(one, other):
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


class Signalling(Checkpoints):
    """Sends this process a signal once a step is saved."""

    at, number = 20, signal.SIGTERM

    def save(self, step, *args, **settings):
        super().save(step, *args, **settings)
        if step == self.at:
            os.kill(os.getpid(), self.number)


OPTIONS = {
    "terminated": {"stop": nnlearn.patience("train_loss", 3)},
    "interrupted": {
        "evaluate": lambda params: {"norm": jnp.sum(params["w"] ** 2)},
        "record_every": 5,
        "packed": False,
        "record": ("grad_norm", "leaf_grad_norms"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("word", OPTIONS)
def test_a_resumed_run_is_the_run_that_nothing_interrupted(word, tmp_path):
    train = make(**OPTIONS[word])
    with Checkpoints(tmp_path / "whole", every_steps=20) as checkpoints:
        whole = nnlearn.run(train, HPARAMS, 0, checkpoints=checkpoints, history=tmp_path / "whole.csv", progress=False)
    assert_same(tuple(whole), jax.jit(train)(HPARAMS, 0))
    folder, history = tmp_path / "it", tmp_path / "it.csv"
    with Signalling(folder, every_steps=20) as checkpoints:
        checkpoints.number = signal.SIGINT if word == "interrupted" else signal.SIGTERM
        half = nnlearn.run(train, HPARAMS, 0, checkpoints=checkpoints, history=history, progress=False)
    assert half.stopped_by == word and half.trace.step[-1] == 20
    with Checkpoints(folder, every_steps=20) as checkpoints:
        result = nnlearn.run(train, HPARAMS, 0, checkpoints=checkpoints, history=history, progress=False)
    assert_same(tuple(result), tuple(whole))
    assert result.stopped_by == whole.stopped_by
    assert history.read_text() == (tmp_path / "whole.csv").read_text()


def test_a_run_that_has_ended_comes_back_at_once(tmp_path):
    train = make()
    first = nnlearn.run(train, HPARAMS, 0, checkpoints=tmp_path, progress=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_same(tuple(nnlearn.run(train, HPARAMS, 0, checkpoints=tmp_path, progress=False)), tuple(first))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same(tuple(nnlearn.run(train, HPARAMS, 0, progress=False)), tuple(first))


@pytest.mark.slow
def test_another_run_is_refused_and_told_apart(tmp_path):
    nnlearn.run(make(), HPARAMS, 0, checkpoints=tmp_path, progress=False)

    def refused(train, hparams=HPARAMS, key=0):
        with pytest.raises(CheckpointError, match="changed='accept'") as error:
            nnlearn.run(train, hparams, key, checkpoints=tmp_path, progress=False)
        return str(error.value)

    assert "hparams: rate was 0.1, is 0.2" in refused(make(), {"rate": 0.2})
    assert "key is another" in refused(make(), key=1)
    assert "settings: steps was 60, is 80" in refused(make(steps=80))
    assert "the program is another" in refused(make(targets=TARGETS + 1))
    assert "the program is another" in refused(make(stop=nnlearn.reached("train_loss", 0.0)))
    assert "shapes" in refused(make(packed=False))
    longer = nnlearn.run(make(steps=80), HPARAMS, 0, checkpoints=tmp_path, progress=False, changed="accept")
    assert_same(tuple(longer), jax.jit(make(steps=80))(HPARAMS, 0))


def test_what_is_no_run_is_refused(tmp_path):
    save(tmp_path / "step-00000003", {"w": jnp.ones(2)}, step=3)
    with pytest.raises(CheckpointError, match=r"not saved by nnlearn\.run"):
        nnlearn.run(make(), HPARAMS, 0, checkpoints=tmp_path)
    with pytest.raises(TypeError, match="make_train returns, got function"):
        nnlearn.run(loss_fn, HPARAMS, 0)
    with pytest.raises(ValueError, match="changed must be"):
        nnlearn.run(make(), HPARAMS, 0, changed="yes")


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, every_steps=10, metric="train_loss") as checkpoints:
        trace = nnlearn.run(make(), HPARAMS, 0, checkpoints=checkpoints, progress=False).trace
        saved = {
            int(step): float(loss) for step, loss in zip(trace.check_step, trace.metrics["train_loss"], strict=True)
        }
        best = min((step for step in saved if step % 10 == 0), key=saved.get)
        assert checkpoints.best() == best and checkpoints.metrics(best)["train_loss"] == saved[best]


PROGRAM = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_durable as it
    import nnlearn
    import nnlearn.checkpoints.manager as module
    from nnlearn.checkpoints import Checkpoints

    verify, seen = module.verify, []
    def kill(folder):
        seen.append(folder)
        if len(seen) == {kill}:
            os.kill(os.getpid(), signal.SIGKILL)
        return verify(folder)
    module.verify = kill
    with Checkpoints({folder!r}, every_steps=10) as checkpoints:
        result = nnlearn.run(it.make(), it.HPARAMS, 0, checkpoints=checkpoints, history={history!r}, progress=False)
    print(result.stopped_by)
"""


def test_killed_in_the_middle_of_a_save_and_resumed(tmp_path):
    settings = {"tests": os.path.dirname(__file__), "folder": str(tmp_path / "it"), "history": str(tmp_path / "it.csv")}
    codes = []
    for kill in (2, 99):
        program = textwrap.dedent(PROGRAM.format(**settings, kill=kill))
        codes.append(subprocess.run([sys.executable, "-c", program], env=os.environ).returncode)
    assert codes == [-9, 0]
    whole = nnlearn.run(make(), HPARAMS, 0, history=tmp_path / "whole.csv", progress=False)
    with Checkpoints(tmp_path / "it") as checkpoints:
        result = nnlearn.run(make(), HPARAMS, 0, checkpoints=checkpoints, progress=False)
    assert_same(tuple(result), tuple(whole))
    assert (tmp_path / "it.csv").read_text() == (tmp_path / "whole.csv").read_text()


STEP = nnlearn.make_step(loss_fn, nnlearn.MultiSteps(nnlearn.adamw(0.1), 2))


class Stateful:
    """Batches with a position of their own, as grain's iterators and torchdata's loaders have."""

    def __init__(self):
        self.at = self.reads = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 30:
            raise StopIteration
        self.at, self.reads = self.at + 1, self.reads + 1
        rows = np.random.default_rng(self.at).permutation(96)[:20]
        return INPUTS[rows], TARGETS[rows]

    def get_state(self):
        return {"at": self.at, "seen": b"bytes"}

    def set_state(self, state):
        assert state["seen"] == b"bytes"
        self.at = state["at"]


def shuffled_anew(epoch):
    order = np.random.default_rng(epoch).permutation(96)
    for rows in np.split(order[:80], 4):
        yield INPUTS[rows], TARGETS[rows]


STREAMS = {
    "function": (lambda: shuffled_anew, {"epochs": 8, "check_every": 5}),
    "epoch_ends": (lambda: list(shuffled_anew(0)), {"epochs": 8}),
    "generator": (lambda: iter([*shuffled_anew(0)] * 8), {"check_every": 4, "record_every": 3}),
    "stateful": (Stateful, {"steps": 30, "check_every": 3}),
}


@pytest.mark.parametrize(
    "kind", ["function", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(STREAMS)[1:])]
)
def test_a_resumed_fit_is_the_fit_that_nothing_interrupted(kind, tmp_path):
    make_batches, options = STREAMS[kind]
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    state = nnlearn.init_state(params, nnlearn.MultiSteps(nnlearn.adamw(0.1), 2), key=0)
    options = options | {
        "stop": [nnlearn.patience("norm", 30, restore_best=False), nnlearn.keep_best("train_loss")],
        "progress": False,
    }
    options["evaluate"] = lambda params: {"norm": jnp.sum(params["w"] ** 2)}

    def fit(name, batches, **others):
        history = tmp_path / f"{name}.jsonl"
        return nnlearn.fit(STEP, state, batches, history=history, **options, **others)

    whole = fit("whole", make_batches())
    with Signalling(tmp_path / "it", every_steps=7) as checkpoints:
        checkpoints.at, checkpoints.number = 14, signal.SIGTERM
        assert fit("it", make_batches(), checkpoints=checkpoints).stopped_by == "terminated"
        assert checkpoints.latest() < 30
    if kind == "function":
        other = nnlearn.make_step(loss_fn, nnlearn.MultiSteps(nnlearn.adamw(0.2), 2))
        with pytest.raises(CheckpointError, match="settings: epochs was 8, is 9"):
            nnlearn.fit(STEP, state, shuffled_anew, checkpoints=tmp_path / "it", **options | {"epochs": 9})
        with pytest.raises(CheckpointError, match="the program is another"):
            nnlearn.fit(other, state, shuffled_anew, checkpoints=tmp_path / "it", **options)
    again = make_batches()
    with Checkpoints(tmp_path / "it", every_steps=7) as checkpoints:
        assert_same(tuple(fit("it", again, checkpoints=checkpoints)), tuple(whole))
    assert (tmp_path / "it.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    if kind == "stateful":
        assert again.reads <= 17  # it was not read from the start


@pytest.mark.parametrize("kind", ["signal", "error"])
def test_a_fit_that_ends_in_the_middle_of_a_check_resumes_after_the_batches_that_it_used(kind, tmp_path):
    state = nnlearn.init_state(
        {"w": jnp.zeros(5), "b": jnp.zeros(())}, nnlearn.MultiSteps(nnlearn.adamw(0.1), 2), key=0
    )

    def fit(callback, **others):
        settings = {"epochs": 4, "check_every": 5, "progress": False}
        return nnlearn.fit(STEP, state, shuffled_anew, callbacks=[callback], **settings, **others)

    def end_at_10(event):
        if event.step == 10 and kind == "error":
            raise RuntimeError("in a callback")
        if event.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = fit(lambda event: None)
    with Checkpoints(tmp_path, every_steps=5) as checkpoints:
        if kind == "error":
            with pytest.raises(RuntimeError, match="in a callback"):
                fit(end_at_10, checkpoints=checkpoints)
        else:
            assert fit(end_at_10, checkpoints=checkpoints).stopped_by == "terminated"
        assert checkpoints.latest() == 10
        assert_same(tuple(fit(lambda event: None, checkpoints=checkpoints)), tuple(whole))


class Rows:
    """A source of examples for the loaders of other libraries."""

    def __len__(self):
        return 96

    def __getitem__(self, at):
        return INPUTS[at], TARGETS[at]

    def __repr__(self):
        return "Rows()"  # grain compares it when it is resumed


def grain_dataset():
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(Rows()).seed(0).shuffle().batch(8).to_iter_dataset()


def grain_loader():
    grain = pytest.importorskip("grain")
    sampler = grain.samplers.IndexSampler(96, grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=0)
    return grain.DataLoader(data_source=Rows(), sampler=sampler, operations=[grain.transforms.Batch(8)])


def torch_loader():
    torch, torchdata = pytest.importorskip("torch"), pytest.importorskip("torchdata.stateful_dataloader")
    generator = torch.Generator().manual_seed(4)
    return torchdata.StatefulDataLoader(Rows(), batch_size=8, shuffle=True, generator=generator)


@pytest.mark.parametrize("make_loader", [grain_dataset, grain_loader, torch_loader])
def test_the_loaders_of_other_libraries_continue_by_their_own_state(make_loader):
    loader = make_loader()
    iterator = iter(loader)
    used = list(itertools.islice(iterator, 5))
    state = json.loads(json.dumps(iterator_state(iterator, loader)))
    assert state is not None
    rest = list(resumed(make_loader(), Place(0, 5, state)))
    seen = np.concatenate([np.asarray(targets) for _, targets in used + rest])
    assert sorted(seen) == sorted(TARGETS)
    for one, other in zip(rest, iterator, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    with Checkpoints(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of every fork
        ready, started = os.pipe()
        worker = os.fork()
        if not worker:
            os.write(started, b"1")
            signal.pause()
    try:
        assert os.read(ready, 1) == b"1"  # the child has let the folder go
        Checkpoints(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_minutes_between_two_checkpoints(tmp_path, monkeypatch):
    """With a clock of its own: each check takes a minute."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr("nnlearn.checkpoints.manager.time", clock)
    monkeypatch.setattr("nnlearn.stream.durable.time", clock)

    def pass_a_minute(_):
        now[0] += 60

    with Checkpoints(tmp_path / "alone", every_minutes=2.5, every_steps=100) as checkpoints:
        due = []
        for step in (10, 20, 30, 40, 100, 110):
            due.append(checkpoints.is_due(step))
            if due[-1]:
                checkpoints.save(step, jnp.ones(1))
            pass_a_minute(None)
        assert due == [False, False, False, True, True, False]
    train = make(steps=60)
    with Checkpoints(tmp_path / "run", every_minutes=3, keep_last=None) as checkpoints:
        nnlearn.run(train, HPARAMS, 0, checkpoints=checkpoints, watch=pass_a_minute, progress=False)
        assert checkpoints.steps() == (15, 30, 45, 60)
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    state = nnlearn.init_state(params, nnlearn.MultiSteps(nnlearn.adamw(0.1), 2), key=0)
    options = {"callbacks": pass_a_minute, "check_every": 5, "progress": False}
    with Checkpoints(tmp_path / "fit", every_minutes=3, keep_last=None) as checkpoints:
        nnlearn.fit(STEP, state, list(shuffled_anew(0)) * 10, checkpoints=checkpoints, **options)
        assert checkpoints.steps() == (15, 30, 40)


@pytest.mark.slow
def test_long_stretches_become_shorter_than_the_minutes_between_checkpoints(tmp_path, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr("nnlearn.checkpoints.manager.time", clock)
    monkeypatch.setattr("nnlearn.stream.durable.time", clock)
    monkeypatch.setattr("nnlearn.stream.durable.STRETCHES", 3)
    stretches = []

    def slow(part):
        stretches.append(len(part.step))
        now[0] += 60.0 * len(part.step)

    train = make()
    with Checkpoints(tmp_path, every_minutes=6) as checkpoints:
        result = nnlearn.run(train, HPARAMS, 0, checkpoints=checkpoints, watch=slow, progress=False)
    assert stretches == [20, 20, 5, 5, 5, 5]
    assert_same(tuple(result), jax.jit(train)(HPARAMS, 0))
