"""Seconds to trace, lower and compile the optimizer step, by number of leaves.

    python benchmarks/compile_time.py                    # up to 2,000 leaves
    python benchmarks/compile_time.py --quick            # up to 100 leaves, writes nothing

Leaves have 20 elements each, because the number of leaves determines the compilation time. The step is ``update`` and
``apply_updates``, jitted with donation. All of jax's caches are cleared before each measurement, and none is on disk.
The packed rivals compile a step for parameters that are already packed. Packing happens once and has a separate row;
``train_step.py`` measures the cost of unpacking inside a loss.
"""

import random
import statistics
import time

import jax
from harness import Report, argument_parser, compile_timed, show
from recipes import RECIPES, draw, update_steps

import nnlearn

LEAVES = (1, 10, 100, 1000, 2000)
QUICK_LEAVES = (1, 10, 100)
RECIPES_HERE = ("adamw", "clip+adamw+schedule")
SLOW = 10.0  # seconds; slower compilations are measured once
PARTS = ("trace_seconds", "lower_seconds", "compile_seconds", "total_seconds")


def pack_seconds(params: dict) -> float:
    """Seconds of the first packing of a tree."""
    jax.clear_caches()
    began = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(nnlearn.pack(params)))
    return time.perf_counter() - began


def measure(leaves: int, recipe: str, rounds: int) -> list[dict]:
    """A row for each rival, with the medians of its stages; the rivals take turns."""
    shapes = [(20,)] * leaves
    params, grads = draw(shapes, 0), draw(shapes, 1)
    steps = update_steps(recipe, params, grads)
    steps.pop("nnlearn, packed, one leaf", None)  # equal to the row of one leaf
    found, shuffler = {name: [] for name in steps}, random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(steps), len(steps)):
            if not found[name] or found[name][0]["total_seconds"] < SLOW:
                found[name].append(compile_timed(*steps[name]())[1])
    head = {"leaves": leaves, "recipe": recipe}
    rows = []
    for name, facts in found.items():
        medians = {part: statistics.median(fact[part] for fact in facts) for part in PARTS}
        totals = [fact["total_seconds"] for fact in facts]
        spread = {"min_total_seconds": min(totals), "max_total_seconds": max(totals), "rounds": len(facts)}
        rows.append(head | {"rival": name} | medians | spread | {"temp_bytes": facts[0]["temp_bytes"]})
    return rows


def main() -> None:
    parser = argument_parser(__doc__, "compile_time")
    parser.add_argument("--leaves", nargs="*", type=int, default=None, help="numbers of leaves")
    parser.add_argument("--recipes", nargs="*", default=RECIPES_HERE, choices=list(RECIPES))
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 3)
    report = Report(options)
    for recipe in options.recipes:
        measure(1, recipe, 1)  # first uses cost more for every rival
        for leaves in options.leaves or (QUICK_LEAVES if options.quick else LEAVES):
            rows = measure(leaves, recipe, rounds)
            totals = {row["rival"]: row["total_seconds"] for row in rows}
            below = totals["nnlearn, packed"]
            ratios = {f"{name} / nnlearn, packed": total / below for name, total in totals.items()}
            report.add(rows, [{"leaves": leaves, "recipe": recipe, "ratios": ratios}])
            cells = [[row["rival"], *(f"{row[part]:.2f}" for part in PARTS)] for row in rows]
            show(f"{leaves} leaves, {recipe}: seconds", ("rival", "trace", "lower", "compile", "total"), cells)
            if hasattr(nnlearn, "pack"):
                seconds = pack_seconds(draw([(20,)] * leaves, 0))
                report.add(
                    [{"leaves": leaves, "recipe": None, "rival": "nnlearn.pack, once", "total_seconds": seconds}]
                )
                print(f"nnlearn.pack, once: {seconds:.2f} s")
    report.close()


if __name__ == "__main__":
    main()
