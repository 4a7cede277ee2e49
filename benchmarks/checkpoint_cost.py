"""What checkpoints cost: save and load beside other formats, the time that an asynchronous save blocks, a whole run.

    python benchmarks/checkpoint_cost.py --only 0.1      # likewise 10, 1000, asynchronous, run

- 0.1, 10, 1000: megabytes of float32 in 8, 16 and 100 arrays of JAX, saved to a new path and loaded back to the device.
  The rivals take turns, in a new random order every round. Every save waits for the disk, loads come from the page
  cache. ``safetensors + fsync`` writes a file in place: a process that is killed leaves half of it. ``safetensors +
  fsync, renamed`` writes a draft, renames it, and waits for the folder too, as a file must be to be complete or absent.
  nnlearn does that with a folder, and computes and checks a BLAKE3 hash of everything.
- asynchronous: seconds until ``Checkpoints.save`` of 1 GB returns, with and without a thread that writes, and those of
  the next step, to which the tree is donated: it needs new memory as long as the thread reads the old one.
- run: ``nnlearn.run`` for 1500 steps, with a checkpoint every 100 steps and without. The seconds that it needs once to
  hash the program, so that another run is refused, are given besides.

Each part is one row of the results; a part that is run again replaces its row.
"""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import Report, Seconds, argument_parser, ratios_to, show, summarize
from safetensors.flax import load_file, save_file

import nnlearn
from nnlearn import checkpoints
from nnlearn.stream.identity import identity_of

SIZES = {"0.1": (100_000, 8, 40), "10": (10_000_000, 16, 25), "1000": (1_000_000_000, 100, 7)}  # bytes, arrays, rounds
PARTS = (*SIZES, "asynchronous", "run")
BATCH, WIDTH, STEPS, EVERY = 256, 448, 1500, 100
Tree = dict[str, jax.Array]


def make_tree(size: int, count: int) -> Tree:
    shape = (size // 4 // count,)
    return {f"layer_{at}": jax.random.normal(jax.random.key(at), shape) for at in range(count)}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_in_place(path: Path, tree: Tree) -> None:
    save_file(tree, path)
    sync(path)


def save_renamed(path: Path, tree: Tree) -> None:
    draft = path.with_suffix(".draft")
    save_in_place(draft, tree)
    os.rename(draft, path)
    sync(path.parent)


class Format(NamedTuple):
    """One way to save a tree at a path, and to load it back."""

    save: Callable[[Path, Tree], Any]
    load: Callable[[Path, Tree], Tree]


def formats() -> dict[str, Format]:
    """nnlearn and its rivals; orbax if it is installed."""
    found = {
        "nnlearn": Format(checkpoints.save, checkpoints.load),
        "safetensors + fsync": Format(save_in_place, lambda path, like: load_file(path)),
        "safetensors + fsync, renamed": Format(save_renamed, lambda path, like: load_file(path)),
    }
    try:
        import orbax.checkpoint as orbax
    except ImportError:
        return found
    orbax_files = orbax.PyTreeCheckpointer()

    def load_orbax(path: Path, like: Tree) -> Tree:
        wanted = orbax.checkpoint_utils.construct_restore_args(like)
        return orbax_files.restore(path, item=like, restore_args=wanted)

    found["orbax"] = Format(orbax_files.save, load_orbax)
    return found


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_and_load(scratch: Path, size: str, rounds: int | None) -> dict[str, Any]:
    """The seconds of each rival to save, to load, and both."""
    number, count, usual = SIZES[size]
    tree, shuffler, rivals = make_tree(number, count), random.Random(0), formats()
    seconds: dict[str, Seconds] = {part: {name: [] for name in rivals} for part in ("save", "load", "both")}
    order, path = list(rivals), scratch / "it"
    for turn in range((rounds or usual) + 1):
        shuffler.shuffle(order)
        for name in order:
            marks = [time.perf_counter()]
            rivals[name].save(path, tree)
            marks.append(time.perf_counter())
            back = jax.block_until_ready(rivals[name].load(path, tree))
            marks.append(time.perf_counter())
            if turn == 0:  # the first turn is to warm up
                assert all(np.array_equal(back[leaf], tree[leaf]) for leaf in tree), name
            else:
                seconds["save"][name].append(marks[1] - marks[0])
                seconds["load"][name].append(marks[2] - marks[1])
                seconds["both"][name].append(marks[2] - marks[0])
            del back
            remove(path)
    return facts_of(seconds, [name for name in rivals if name != "nnlearn"])


def facts_of(seconds: dict[str, Seconds], below: list[str]) -> dict[str, Any]:
    """The times of each rival, and the ratios of nnlearn to the others."""
    times = {part: {name: summarize(found) for name, found in table.items()} for part, table in seconds.items()}
    ratios = {part: {} for part in seconds}
    for part, table in seconds.items():
        for name in below:
            ratios[part] |= ratios_to(table, name, ["nnlearn"])
    return {"times": times, "ratios": ratios}


def asynchronous(scratch: Path, rounds: int | None) -> dict[str, Any]:
    """The seconds for which ``save`` of 1 GB blocks its caller, of the next step, and until it is written."""
    tree = make_tree(*SIZES["1000"][:2])
    names = ("synchronous", "asynchronous", "until it is written", "step after synchronous", "step after asynchronous")
    seconds: Seconds = {name: [] for name in names}
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: 0.5 * leaf + 1, tree), donate_argnums=0)
    tree = jax.block_until_ready(step(tree))
    for turn in range((rounds or 7) + 1):
        for name, waits in (("synchronous", False), ("asynchronous", True)):
            folder = scratch / name
            with checkpoints.Checkpoints(folder, keep_last=None, asynchronous=waits) as it:
                began = time.perf_counter()
                it.save(turn, tree)
                blocked = time.perf_counter() - began
                tree = jax.block_until_ready(step(tree))
                stepped = time.perf_counter() - began - blocked
                it.wait()
                if turn:
                    seconds[name].append(blocked)
                    seconds[f"step after {name}"].append(stepped)
                if turn and waits:
                    seconds["until it is written"].append(time.perf_counter() - began)
            shutil.rmtree(folder)
    return {
        "times": {name: summarize(found) for name, found in seconds.items()},
        "ratios": ratios_to(seconds, "synchronous", ["asynchronous"]),
    }


def make_train() -> nnlearn.Train:
    """A network of three layers whose step takes at least 5 ms on two cores."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4096, WIDTH)).astype(np.float32)

    def loss_fn(params, batch, key):
        hidden = batch
        for kernel in params:
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.mean((hidden - batch) ** 2)

    params = [jnp.asarray(generator.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32) for _ in range(3)]
    batches = nnlearn.shuffled(inputs, BATCH, remainder="drop")
    return nnlearn.make_train(loss_fn, nnlearn.adamw, batches, params, steps=STEPS, check_every=EVERY)


def whole_run(scratch: Path, rounds: int | None) -> dict[str, Any]:
    """The seconds of a run with checkpoints and without."""
    train, seconds = make_train(), {"with checkpoints": [], "without": []}
    began = time.perf_counter()
    identity_of(train, 1e-3, 0)
    hashing = time.perf_counter() - began
    for turn in range((rounds or 5) + 1):
        for name in sorted(seconds, reverse=bool(turn % 2)):
            began = time.perf_counter()
            if name == "without":
                nnlearn.run(train, 1e-3, 0, progress=False)
            else:
                with checkpoints.Checkpoints(scratch / "run", every_steps=EVERY) as it:
                    result = nnlearn.run(train, 1e-3, 0, checkpoints=it, progress=False)
                assert result.state.step == STEPS
            if turn:
                seconds[name].append(time.perf_counter() - began)
        shutil.rmtree(scratch / "run")
    return {
        "times": {name: summarize(found) for name, found in seconds.items()},
        "ratios": ratios_to(seconds, "without", ["with checkpoints"]),
        "seconds_to_hash_the_program": hashing,
        "step_ms": 1e3 * float(np.median(seconds["without"])) / STEPS,
        "saved_megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(result.state)) / 1e6,
    }


def keep_other_parts(report: Report, part: str) -> None:
    """Take the rows of the other parts from the results of an earlier call."""
    path = report.path
    if path is not None and path.exists():
        report.document["rows"] += [row for row in json.loads(path.read_text())["rows"] if row["part"] != part]


def print_part(part: str, facts: dict[str, Any]) -> None:
    tables = facts["times"] if part in SIZES else {"": facts["times"]}
    rows = [
        (action, name, f"{found['median_ms']:.2f}", f"{found['min_ms']:.2f}")
        for action, table in tables.items()
        for name, found in table.items()
    ]
    show(part, ["", "", "median ms", "least ms"], rows, left=2)
    print(json.dumps(facts["ratios"]))


def main() -> None:
    parser = argument_parser(__doc__, "checkpoint_cost")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run, all by default")
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    for part in options.only or PARTS:
        report = Report(options)
        keep_other_parts(report, part)
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            if part in SIZES:
                facts = save_and_load(Path(scratch), part, rounds)
            else:
                facts = (asynchronous if part == "asynchronous" else whole_run)(Path(scratch), rounds)
        report.add([{"part": part, "machine": report.document["machine"]} | facts])
        print_part(part, facts)


if __name__ == "__main__":
    main()
