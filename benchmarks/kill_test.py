"""Runs that are killed at random moments, also during a save, and resumed until they end.

    python benchmarks/kill_test.py --kills 200 --signals 50

A child process trains with ``nnlearn.run``, a checkpoint every 20 steps and a history file. It is killed with SIGKILL
after a random time and restarted until the run ends. Then its state, trace and history are compared bit for bit with
those of an uninterrupted run. After each kill every checkpoint is read; the newest must not be older than the last one
that the child reported as written. With ``--signals``, SIGTERM ends the child, and the seconds until its exit are
measured. Children are forked from a process that has imported JAX but not used it.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import RESULTS
from machine import machine_facts

import nnlearn
from nnlearn.checkpoints import Checkpoints, save

STEPS, EVERY = 400, 20


def make_run() -> nnlearn.Train:
    """A small regression with dropout, AdamW, packed parameters and a rule that counts checks."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(512, 16)).astype(np.float32)
    targets = np.tanh(inputs @ generator.normal(size=(16, 4)).astype(np.float32))

    def loss_fn(params, batch, key):
        inputs, targets = batch
        hidden = jnp.tanh(inputs @ params["in"])
        kept = jax.random.bernoulli(key, 0.9, hidden.shape)
        return jnp.mean((jnp.where(kept, hidden, 0) @ params["out"] - targets) ** 2)

    params = {"in": jnp.full((16, 256), 0.01), "out": jnp.full((256, 4), 0.01)}
    params = jax.tree.map(lambda leaf: leaf * jax.random.normal(jax.random.key(1), leaf.shape), params)
    batches = nnlearn.shuffled((inputs, targets), 64, remainder="drop")
    return nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adamw(hparams["rate"]),
        batches,
        params,
        steps=STEPS,
        check_every=EVERY,
        packed=True,
        stop=nnlearn.patience("train_loss", 1000),
    )


class Reporting(Checkpoints):
    """Appends each step to a file once it is saved, and slows the run down so that a kill can occur during it."""

    def _write(self, step, described, metadata):
        super()._write(step, described, metadata)
        with open(self.folder.parent / "written", "a") as file:
            file.write(f"{step}\n")


def child(folder: Path) -> None:
    """Run or resume; at the end, save the result."""
    with Reporting(folder / "checkpoints", every_steps=EVERY) as checkpoints:
        result = nnlearn.run(
            make_run(), {"rate": 0.01}, 0, checkpoints=checkpoints, history=folder / "it.csv", progress=False
        )
    if result.stopped_by == "all steps":
        save(folder / "result", tuple(result))


def fork(folder: Path) -> int:
    """Start a child; its output goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        child(folder)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def look(folder: Path) -> str:
    """The faults after a kill, or an empty string. It does not use JAX's devices, because a fork must not."""
    code = os.fork()
    if not code:
        try:
            reported = (folder / "written").read_text().split("\n")[:-1] if (folder / "written").exists() else []
            reader = Checkpoints(folder / "checkpoints", read_only=True)
            newest = max(reader.steps(), default=0)
            damaged = reader.verify()
            os._exit(1 if damaged else 2 if reported and newest < int(reported[-1]) else 0)
        except BaseException:
            os._exit(3)
    words = {0: "", 1: "a checkpoint is unreadable", 2: "a written checkpoint is lost", 3: "the folder is unreadable"}
    return words[os.waitstatus_to_exitcode(os.waitpid(code, 0)[1])]


def same_bits(folder: Path, other: Path) -> bool:
    """Whether the results and histories of two folders are equal bit for bit."""
    arrays = [next((path / "result").glob("arrays-*")).read_bytes() for path in (folder, other)]
    return arrays[0] == arrays[1] and (folder / "it.csv").read_bytes() == (other / "it.csv").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_test.json")
    arguments = parser.parse_args()
    chance, faults, began = random.Random(0), [], time.perf_counter()
    counts: dict[str, Any] = {"kills": 0, "signals": 0, "runs": 0, "equal": 0, "seconds_to_save": []}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        start = time.perf_counter()
        os.waitpid(fork(whole), 0)
        length = time.perf_counter() - start  # of a run, imports and compilation included
        while counts["kills"] < arguments.kills or counts["signals"] < arguments.signals:
            folder = Path(scratch) / f"run{counts['runs']}"
            folder.mkdir()
            counts["runs"] += 1
            for attempt in range(20):
                number = signal.SIGKILL if counts["kills"] < arguments.kills else signal.SIGTERM
                pid, deadline = fork(folder), time.perf_counter() + chance.uniform(0.3, 1.1) * length
                done = 0
                while time.perf_counter() < deadline and not done and attempt < 12:
                    done = os.waitpid(pid, os.WNOHANG)[0]
                    time.sleep(0.005)
                if attempt == 12:
                    done = os.waitpid(pid, 0)[0]
                if not done:
                    os.kill(pid, number)
                    sent = time.perf_counter()
                    os.waitpid(pid, 0)
                    name = "kills" if number == signal.SIGKILL else "signals"
                    counts[name] += 1
                    if name == "signals":
                        counts["seconds_to_save"].append(time.perf_counter() - sent)
                if wrong := look(folder):
                    faults.append(f"{folder.name}, attempt {attempt}: {wrong}")
                if (folder / "result").exists():
                    break
            if not (folder / "result").exists():
                faults.append(f"{folder.name}: never ended; its log: {(folder / 'log').read_text()[-500:]}")
            elif same_bits(folder, whole):
                counts["equal"] += 1
            else:
                faults.append(f"{folder.name}: its bits differ")
    waits = counts.pop("seconds_to_save")
    if waits:
        counts["seconds_to_save"] = {"median": float(np.median(waits)), "most": max(waits)}
    facts = {"machine": machine_facts(), "seconds": time.perf_counter() - began, "run_seconds": length}
    arguments.out.write_text(json.dumps(facts | counts | {"faults": faults}, indent=1))
    print(json.dumps(counts | {"faults": faults}, indent=1))


if __name__ == "__main__":
    main()
