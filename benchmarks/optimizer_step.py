"""The optimizer alone, nnlearn beside optax: seconds to compile and microseconds a step, for every optimizer.

    python benchmarks/optimizer_step.py                  # all optimizers, about 5 minutes on 2 cores
    python benchmarks/optimizer_step.py --quick          # two of them, one shape

The step is ``update`` and ``apply_updates``, jitted, parameters and state donated. Rivals take turns within one process
after a warm-up; a figure is the median of the rounds. Writes ``benchmarks/results/optimizer_step.json``.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import nnlearn
from nnlearn.compare.settings import KNOWN
from nnlearn.compare.summary import describe_machine

SHAPES = {"30 x 40,000": (30, 40_000), "1 x 4,000,000": (1, 4_000_000)}
RIVALS = {"nnlearn": nnlearn, "optax": optax}


def make_tree(leaves: int, size: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), leaves)
    return {f"leaf{index}": jax.random.normal(key, (size,)) for index, key in enumerate(keys)}


def compile_step(tx, params):
    """The compiled step, the state that it starts from, and the seconds that compiling took."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return compiled, state, time.perf_counter() - began


def measure(name: str, shape: str, rounds: int, calls: int) -> dict:
    """One optimizer at one shape: medians for both rivals, measured in turns."""
    grads = make_tree(*SHAPES[shape])
    entrants, times = {}, {rival: [] for rival in RIVALS}
    for rival, library in RIVALS.items():
        step, state, compile_seconds = compile_step(getattr(library, name)(1e-3), grads)
        params = jax.tree.map(jnp.copy, grads)
        params, state = jax.block_until_ready(step(params, state, grads))
        entrants[rival] = [step, params, state, compile_seconds]
    for _ in range(rounds):
        for rival, entrant in entrants.items():
            step, params, state, _ = entrant
            began = time.perf_counter()
            for _ in range(calls):
                params, state = step(params, state, grads)
            jax.block_until_ready((params, state))
            times[rival].append((time.perf_counter() - began) / calls * 1e6)
            entrant[1:3] = params, state
    row = {"optimizer": name, "leaves": shape}
    for rival, entrant in entrants.items():
        row[f"{rival}_us"] = statistics.median(times[rival])
        row[f"{rival}_us_quartiles"] = statistics.quantiles(times[rival], n=4)[::2]
        row[f"{rival}_compile_seconds"] = entrant[3]
    row["optax_over_nnlearn"] = row["optax_us"] / row["nnlearn_us"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two optimizers, one shape, few rounds; writes nothing")
    parser.add_argument("--optimizers", nargs="*", default=KNOWN, help="names; all by default")
    quick = parser.parse_args().quick
    names = ("sgd", "adamw") if quick else parser.parse_args().optimizers
    shapes = list(SHAPES)[:1] if quick else list(SHAPES)
    rows = [measure(name, shape, 5 if quick else 21, 5) for name in names for shape in shapes]

    table = Table(title="optimizer step: median microseconds, and seconds to compile")
    for heading in ("optimizer", "leaves", "nnlearn", "optax", "optax / nnlearn", "compile nnlearn", "compile optax"):
        table.add_column(heading, justify="left" if heading in ("optimizer", "leaves") else "right")
    for row in rows:
        numbers = (row["nnlearn_us"], row["optax_us"])
        compiles = (row["nnlearn_compile_seconds"], row["optax_compile_seconds"])
        ratio = f"{row['optax_over_nnlearn']:.2f}"
        table.add_row(
            row["optimizer"], row["leaves"], *(f"{n:,.0f}" for n in numbers), ratio, *(f"{c:.2f}" for c in compiles)
        )
    Console(width=110).print(table)
    if not quick:
        document = {
            "command": " ".join(["python", "benchmarks/optimizer_step.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "rows": rows,
        }
        path = Path(__file__).parent / "results" / "optimizer_step.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
