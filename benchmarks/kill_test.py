"""Runs that are killed at random moments, that run out of disk, and that are terminated; each is resumed until it ends.

    python benchmarks/kill_test.py --kills 200 --full 50 --signals 50

A child process makes a run and saves it every 10 steps: half of the runs are ``nnlearn.run`` of ``make_train``, with
kernels in C and without; half are ``fit``, on batches by the epoch, an iterator with a state, and a plain iterable.

- kills: SIGKILL at a random moment, from the start of the process to the end of the run. Each fsync takes some
  milliseconds longer than here, so that many hit a save. Afterwards every checkpoint is read, and the newest must be no
  older than the last that the child reported as written.
- full: the checkpoints are on a tmpfs of 4 MB, which other data fill at a random moment. With ``on_error="raise"`` the
  child must end with an OSError, and is started again once there is room; with ``"warn"`` it must go on to its end.
- signals: SIGTERM. The child must save the step at which it stops, and end within 5 seconds.

At the end of each run its state, trace and history are compared, to the bit, with those of a run that nobody disturbed.
Children are forked from a process that has imported JAX and not used it, and share a cache of compiled programs. Each
part is one row of the results; a part that is run again replaces its row.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from nnlearn.checkpoints import Checkpoints, save

STEPS, EVERY = 200, 10
SLOW_SYNC = 0.004  # seconds at most that a child's fsync takes longer
EARLY = 0.2  # share of the kills before the first save of a process
TIME_LIMIT = 300.0  # seconds, of a child that does not end
SAVED_WITHIN = 5.0
RUNS = {
    "run": ("run, kernels in C", "run, kernels off"),
    "fit": ("fit, by epoch", "fit, iterator with a state", "fit, plain iterable"),
}
KINDS = [kind for half in RUNS.values() for kind in half]
PARAMS = {"in": (16, 256), "out": (256, 4)}


def make_data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(512, 16)).astype(np.float32)
    return inputs, np.tanh(inputs @ generator.normal(size=(16, 4)).astype(np.float32))


def make_params() -> dict[str, jax.Array]:
    generator = np.random.default_rng(1)
    return {name: jnp.asarray(0.01 * generator.normal(size=shape), jnp.float32) for name, shape in PARAMS.items()}


def loss_fn(params, batch, key):
    """A small regression with dropout."""
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["in"])
    kept = jax.random.bernoulli(key, 0.9, hidden.shape)
    return jnp.mean((jnp.where(kept, hidden, 0) @ params["out"] - targets) ** 2)


def run_compiled(checkpoints: Checkpoints, history: Path) -> Any:
    """AdamW on packed parameters, and a rule that counts checks."""
    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adamw(hparams["rate"]),
        nnlearn.shuffled(make_data(), 64, remainder="drop"),
        make_params(),
        steps=STEPS,
        check_every=EVERY,
        packed=True,
        stop=nnlearn.patience("train_loss", 1000),
    )
    return nnlearn.run(train, {"rate": 0.01}, 0, checkpoints=checkpoints, history=history, progress=False)


def epoch_batches(epoch: int) -> Any:
    inputs, targets = make_data()
    order = np.random.default_rng(epoch).permutation(len(inputs))
    for rows in np.split(order, 8):
        yield inputs[rows], targets[rows]


class Stateful:
    """Batches with a position of their own, as the iterators of grain and torchdata have."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = list(epoch_batches(self.at // 8))[self.at % 8]
        self.at += 1
        return batch

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class Plain:
    """Batches that can only be read from the start."""

    def __iter__(self):
        return (batch for epoch in range(3) for batch in epoch_batches(epoch))


STREAMS: dict[str, Callable[[], Any]] = {
    "fit, by epoch": lambda: epoch_batches,
    "fit, iterator with a state": Stateful,
    "fit, plain iterable": Plain,
}


def run_fit(kind: str, checkpoints: Checkpoints, history: Path) -> Any:
    """Gradients accumulated over two steps, a metric, a rule that counts, and one that keeps the best."""
    tx = nnlearn.MultiSteps(nnlearn.adamw(0.01), 2)
    return nnlearn.fit(
        nnlearn.make_step(loss_fn, tx),
        nnlearn.init_state(make_params(), tx, key=0),
        STREAMS[kind](),
        steps=STEPS,
        check_every=EVERY,
        evaluate=lambda params: {"norm": jnp.sum(params["in"] ** 2)},
        stop=[nnlearn.patience("norm", 1000, restore_best=False), nnlearn.keep_best("train_loss")],
        checkpoints=checkpoints,
        history=history,
        progress=False,
    )


class Reporting(Checkpoints):
    """Appends to a file what it does, outside of the folder of the run."""

    def save(self, step, tree, **settings):
        report(self.log, f"begun {step}")
        super().save(step, tree, **settings)

    def _write(self, step, described, metadata):
        report(self.log, f"saving {step}")
        super()._write(step, described, metadata)
        report(self.log, f"written {step}")


def report(log: Path, line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


def child(kind: str, folder: Path, on_error: str) -> None:
    """Run or resume; at the end, save the result."""
    sync, chance = os.fsync, random.Random()

    def slow_sync(handle: int) -> None:
        time.sleep(chance.uniform(0, SLOW_SYNC))
        sync(handle)

    os.fsync = slow_sync
    log, history = folder / "events", folder / "it.csv"
    with Reporting(folder / "disk" / "checkpoints", every_steps=EVERY, on_error=on_error) as checkpoints:
        checkpoints.log = log
        with nnlearn.native_kernels(kind != "run, kernels off"):
            result = run_fit(kind, checkpoints, history) if "fit" in kind else run_compiled(checkpoints, history)
    if result.stopped_by == "terminated":
        report(log, f"terminated {int(result.trace.step[-1])}")
    else:
        save(folder / "result", tuple(result))


def fork(function: Callable[..., Any], folder: Path, *inputs: Any) -> int:
    """Call a function in a child; its output goes to a file. The status is 28 for a full disk."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        function(*inputs)
        status = 0
    except OSError as error:
        traceback.print_exc()
        status = error.errno if error.errno == 28 else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def events(folder: Path) -> list[tuple[str, int]]:
    """What the children have reported, complete lines only."""
    path = folder / "events"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def check_folder(folder: Path) -> None:
    """Read every checkpoint. Runs in a child, so that the parent does not use JAX's devices."""
    reader = Checkpoints(folder / "disk" / "checkpoints", read_only=True)
    written = [step for word, step in events(folder) if word == "written"]
    if damaged := reader.verify():
        raise ValueError(f"unreadable: {damaged}")
    if written and max(reader.steps(), default=0) < max(written):
        raise ValueError(f"step {max(written)} was written, and there are {reader.steps()}")
    last = events(folder)[-1:]
    if last and last[0][0] == "terminated" and max(reader.steps(), default=0) != last[0][1]:
        raise ValueError(f"stopped at {last[0][1]}, and there are {reader.steps()}")


def wait(pid: int, seconds: float, done: Callable[[], bool] = lambda: False) -> tuple[int | None, float]:
    """The status of a child, None if it has not ended after some seconds or once ``done``; and the seconds it took.

    A gap between two looks is a pause of this process and its children, and does not count.
    """
    awake, before = 0.0, time.perf_counter()
    while awake < seconds and not done():
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), awake
        time.sleep(0.001)
        now = time.perf_counter()
        awake, before = awake + min(now - before, 1.0), now
    return None, awake


def end(pid: int) -> tuple[int, float]:
    """Wait for a child to the end, or kill it after ``TIME_LIMIT``; its status and the seconds that it took."""
    status, seconds = wait(pid, TIME_LIMIT)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return (-9 if status is None else status), seconds


@contextlib.contextmanager
def small_disk(path: Path):
    """A tmpfs of 4 MB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True)
    try:
        yield path / "other data"
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


class Reference(NamedTuple):
    """An undisturbed run: its folder, and its seconds before and after the beginning of its first save."""

    folder: Path
    start: float
    rest: float


class Test:
    """All runs of one kind of disturbance.

    Args:
      scratch: the folder for the runs.
      seed: for the moments.
    """

    def __init__(self, scratch: Path, seed: int):
        self.scratch, self.chance = scratch, random.Random(seed)
        self.counts, self.faults, self.waits = Counter(), [], []
        self.references = {kind: self.reference(kind) for kind in KINDS}

    def new_folder(self) -> Path:
        folder = self.scratch / f"run{self.counts['folders']}"
        (folder / "disk").mkdir(parents=True)
        self.counts["folders"] += 1
        return folder

    def reference(self, kind: str) -> Reference:
        """An undisturbed run, the second of two: its programs come from the cache."""
        for _ in range(2):
            folder, began = self.new_folder(), time.perf_counter()
            pid = fork(child, folder, kind, folder, "raise")
            status, _ = wait(pid, TIME_LIMIT, lambda folder=folder: bool(events(folder)))
            start = time.perf_counter() - began
            if status or end(pid)[0]:
                raise RuntimeError(f"{kind}: {(folder / 'log').read_text()[-2000:]}")
        return Reference(folder, start, time.perf_counter() - began - start)

    def look(self, folder: Path, what: str) -> None:
        if end(fork(check_folder, folder, folder))[0]:
            self.faults.append(f"{what}, {folder.name}: {(folder / 'log').read_text()[-500:]}")

    def compare(self, folder: Path, kind: str, what: str) -> None:
        """The result and history of a run with those of the undisturbed one, to the bit."""
        other = self.references[kind].folder
        self.counts[f"runs, {what}"] += 1
        if not (folder / "result").exists():
            self.faults.append(f"{what}, {folder.name}: never ended; {(folder / 'log').read_text()[-800:]}")
            return
        arrays = [next((path / "result").glob("arrays-*")).read_bytes() for path in (folder, other)]
        if arrays[0] == arrays[1] and (folder / "it.csv").read_bytes() == (other / "it.csv").read_bytes():
            self.counts[f"equal, {what}"] += 1
        else:
            self.faults.append(f"{what}, {folder.name}, {kind}: its bits differ")

    def moment(self, folder: Path, kind: str, begun: bool) -> Callable[[], bool]:
        """True from a random moment on: after the start of the process, or of its first save."""
        if not begun:
            moment = time.perf_counter() + self.chance.uniform(0, 1) * self.references[kind].start
            return lambda: time.perf_counter() > moment
        before, delay, began = len(events(folder)), self.chance.uniform(0, 1) * self.references[kind].rest, []

        def passed() -> bool:
            if not began and len(events(folder)) > before:
                began.append(time.perf_counter())
            return bool(began) and time.perf_counter() > began[0] + delay

        return passed

    def disturbed(self, kind: str, number: signal.Signals, what: str, most: int) -> None:
        """One run, sent a signal again and again until it ends, or until ``most`` were sent in all."""
        folder = self.new_folder()
        while not (folder / "result").exists():
            pid = fork(child, folder, kind, folder, "raise")
            early = number == signal.SIGKILL and self.chance.random() < EARLY
            disturbs = self.counts[what] < most
            status, _ = wait(pid, TIME_LIMIT, self.moment(folder, kind, not early)) if disturbs else end(pid)
            if status is None:
                os.kill(pid, number)
                _, seconds = end(pid)
                self.counts[what] += 1
                self.counts[f"{what}: {kind}"] += 1
                found = events(folder)
                self.counts[f"{what}, during a save"] += bool(found) and found[-1][0] == "saving"
                if number == signal.SIGTERM:
                    self.waits.append(seconds)
                    ended = (folder / "result").exists() or ("written", STEPS) in found  # before the signal came
                    if not ended and found[-1][0] != "terminated":
                        self.faults.append(f"{what}, {folder.name}: it did not end by itself")
            elif status:
                self.faults.append(f"{what}, {folder.name}: status {status}; {(folder / 'log').read_text()[-500:]}")
                break
            self.look(folder, what)
        self.compare(folder, kind, what)

    def full(self, kind: str, on_error: str) -> None:
        """One run on a disk that fills at a random moment."""
        folder = self.new_folder()
        with small_disk(folder / "disk") as ballast:
            pid = fork(child, folder, kind, folder, on_error)
            status, _ = wait(pid, TIME_LIMIT, self.moment(folder, kind, True))
            if status is None:
                fill(ballast)
                status, _ = end(pid)
            self.look(folder, "full")
            ballast.unlink(missing_ok=True)
            if "No space left" not in (folder / "log").read_text():
                return  # it ended before
            self.counts["full"] += 1
            self.counts[f"full, {on_error}"] += 1
            if status != (28 if on_error == "raise" else 0):
                self.faults.append(f"full, {folder.name}, {on_error}: status {status}")
            if not (folder / "result").exists():
                end(fork(child, folder, kind, folder, on_error))
                self.look(folder, "full")
        self.compare(folder, kind, "full")


def machine() -> dict[str, Any]:
    """``machine_facts`` from another process: it uses JAX's devices, which one that forks must not have."""
    code = "import json; from machine import machine_facts; print(json.dumps(machine_facts()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    return json.loads(found.stdout)


def write_result(path: Path, part: str, test: Test, facts: dict[str, Any]) -> None:
    """The counts of a part so far, as an interrupted test leaves them, in place of earlier ones."""
    found = (
        {"part": part}
        | facts
        | {
            "seconds": time.time() - datetime.datetime.fromisoformat(facts["date"]).timestamp(),
            "run_seconds": {kind: run.start + run.rest for kind, run in test.references.items()},
            "counts": dict(sorted(test.counts.items())),
            "faults": test.faults + [f"SIGTERM took {most:.1f} s" for most in test.waits if most > SAVED_WITHIN],
        }
    )
    if test.waits:
        found["seconds_to_end"] = {"median": float(np.median(test.waits)), "most": max(test.waits)}
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["part"] != part] + [found]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def disturb_all(test: Test, number: signal.Signals, what: str, wanted: int) -> Iterator[None]:
    """Runs that get a signal, half of them of each sort, until so many were sent."""
    for kinds, most in zip(RUNS.values(), (wanted // 2, wanted), strict=True):
        for kind in itertools.cycle(kinds):
            if test.counts[what] >= most:
                break
            test.disturbed(kind, number, what, most)
            yield


def fill_all(test: Test, wanted: int) -> Iterator[None]:
    """Runs whose disk fills, until so many have found it full."""
    for kind, on_error in itertools.cycle(itertools.product(KINDS, ("raise", "warn"))):
        if test.counts["full"] >= wanted:
            break
        test.full(kind, on_error)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_test.json")
    arguments = parser.parse_args()
    facts = {
        "command": " ".join(["python", "benchmarks/kill_test.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        jax.config.update("jax_compilation_cache_dir", f"{scratch}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        test = Test(Path(scratch), arguments.seed)
        parts = {
            "kills": disturb_all(test, signal.SIGKILL, "kills", arguments.kills),
            "signals": disturb_all(test, signal.SIGTERM, "signals", arguments.signals),
            "full": fill_all(test, arguments.full),
        }
        for part, turns in parts.items():
            test.counts, test.faults, test.waits = Counter(folders=test.counts["folders"]), [], []
            for _ in turns:
                write_result(arguments.out, part, test, facts)
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
