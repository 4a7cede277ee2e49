"""Damaged checkpoints: how often each format silently loads wrong numbers.

    python benchmarks/damage_test.py --copies 2000 --rivals 400

Each copy of a checkpoint of 4 arrays of 5,000 float32 is damaged in one way: a bit or a byte is flipped, a file is
truncated or missing, a page is zeroed, a file or the manifest comes from another step, or a header is forged.
A load is ``refused`` (an error), ``harmless`` (the right numbers) or ``wrong``; ``unnamed`` counts the refusals of
nnlearn that do not name the path. ``memory`` is the peak allocation of a load of nnlearn, by tracemalloc.
"""

import argparse
import json
import shutil
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from damage import KINDS, damage
from harness import RESULTS
from machine import machine_facts
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from nnlearn import checkpoints

Tree = dict[str, np.ndarray]


def make_tree(seed: int) -> Tree:
    """Four arrays of random numbers."""
    random = np.random.default_rng(seed)
    return {f"layer_{at}": random.normal(size=5000).astype(np.float32) for at in range(4)}


class Format:
    """One way to save and load.

    Args:
      save: ``save(path, tree)``.
      load: ``load(path, like)``.
    """

    def __init__(self, save: Callable[[Path, Tree], Any], load: Callable[[Path, Tree], Tree]):
        self.save, self.load = save, load


def formats() -> dict[str, Format]:
    """nnlearn and the rivals that are installed."""
    found = {
        "nnlearn": Format(checkpoints.save, checkpoints.load),
        "safetensors": Format(
            lambda path, tree: (path.mkdir(), save_file(tree, path / "it.safetensors")),
            lambda path, like: load_file(path / "it.safetensors"),
        ),
    }
    try:
        import flax.serialization as flax

        found["flax msgpack"] = Format(
            lambda path, tree: (path.mkdir(), (path / "it.msgpack").write_bytes(flax.to_bytes(tree))),
            lambda path, like: flax.from_bytes(like, (path / "it.msgpack").read_bytes()),
        )
    except ImportError:
        pass
    try:
        import orbax.checkpoint as orbax

        checkpointer = orbax.PyTreeCheckpointer()
        found["orbax"] = Format(
            lambda path, tree: checkpointer.save(path, tree), lambda path, like: checkpointer.restore(path, item=like)
        )
    except ImportError:
        pass
    return found


def judge(load: Callable[[Path, Tree], Tree], path: Path, like: Tree, tree: Tree, named: bool) -> str:
    """The outcome of loading a damaged copy."""
    try:
        got = load(path, like)
    except Exception as error:
        return "refused" if not named or str(path) in str(error) else "unnamed"
    try:
        same = all(np.asarray(got[name]).tobytes() == value.tobytes() for name, value in tree.items())
        return "harmless" if same and set(got) == set(tree) else "wrong"
    except (KeyError, TypeError):
        return "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=2000, help="damaged copies for nnlearn")
    parser.add_argument("--rivals", type=int, default=400, help="damaged copies for each other format")
    parser.add_argument("--out", type=Path, default=RESULTS / "damage_test.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    tree, other = make_tree(0), make_tree(1)
    like = jax.tree.map(np.zeros_like, tree)
    table = Table("format", "damage", "copies", "refused", "harmless", "wrong", "unnamed")
    results: dict[str, Any] = {}
    began, most = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, form in formats().items():
            clean, second, copy = (Path(scratch) / name.replace(" ", "_") / part for part in ("a", "b", "copy"))
            clean.parent.mkdir()
            form.save(clean, tree)
            form.save(second, other)
            others = sorted(path for path in second.rglob("*") if path.is_file())
            random, counts = np.random.default_rng(0), {kind: Counter() for kind in KINDS}
            total = arguments.copies if name == "nnlearn" else arguments.rivals
            for index in range(10 * total):
                if sum(map(Counter.total, counts.values())) >= total:
                    break
                kind = KINDS[index % len(KINDS)]
                shutil.copytree(clean, copy)
                files = sorted(path for path in copy.rglob("*") if path.is_file())
                if damage(kind, files, others, random):
                    if name == "nnlearn":  # the threads of other libraries crash under tracemalloc
                        tracemalloc.start()
                    counts[kind][judge(form.load, copy, like, tree, name == "nnlearn")] += 1
                    if name == "nnlearn":
                        most = max(most, tracemalloc.get_traced_memory()[1])
                        tracemalloc.stop()
                shutil.rmtree(copy)
            results[name] = {kind: dict(count) for kind, count in counts.items() if count}
            whole = sum(counts.values(), Counter())
            for kind, count in [*counts.items(), ("all", whole)]:
                words = [str(count[word]) for word in ("refused", "harmless", "wrong", "unnamed")]
                if count:
                    table.add_row(name, kind, str(count.total()), *words)
    Console().print(table)
    facts = {"machine": machine_facts(), "seconds": time.perf_counter() - began, "memory_bytes": most}
    arguments.out.write_text(json.dumps(facts | {"counts": results}, indent=1))
    print(f"most memory that a load of nnlearn allocated: {most / 1e6:.1f} MB; written: {arguments.out}")


if __name__ == "__main__":
    main()
