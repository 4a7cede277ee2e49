"""Train all programs, healthy and faulty, and write a table of what each fault costs.

``python -m benchmarks.faults.verify --group development``
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.faults.case import Program, scores
from benchmarks.faults.registry import GROUPS, load
from benchmarks.machine import machine_facts

RESULTS = Path(__file__).parent.parent / "results"
HURTS = 0.03  # the smallest loss of score, or the smallest error of the reported score, that makes a fault


def measure(program: Program, keys: jax.Array) -> dict:
    began = time.perf_counter()
    found = scores(program, keys)
    numbers = {name: [round(float(value), 4) for value in values] for name, values in found.items()}
    return numbers | {"seconds": round(time.perf_counter() - began, 2)}


def damage(healthy: dict, faulty: dict, hides: bool) -> float:
    """How much score a fault costs, or by how much it falsifies the reported one."""
    if hides:
        return float(abs(np.mean(faulty["true"]) - np.mean(faulty["reported"])))
    return float(np.mean(healthy["true"]) - np.mean(faulty["true"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", choices=GROUPS, default="development")
    parser.add_argument("--only", default="", help="part of a case's title")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", default=None, help="a folder for compiled programs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", options.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    path = options.out or RESULTS / f"faults_{options.group}_verified.json"
    table = Table(path, jax.random.split(jax.random.key(0), options.seeds))
    programs, faults = load(options.group)
    faults = [fault for fault in faults if options.only in fault.title]
    wanted = {fault.program for fault in faults}
    for name, program in programs.items():
        if options.only in name or name in wanted:
            table.add({"program": name, "kind": program.kind, "fault": None, "how": None}, program)
    for fault in faults:
        row = {"program": fault.program, "fault": fault.name, "how": fault.how, "also": list(fault.also)}
        table.add(row | {"hides": fault.hides}, fault.change(programs[fault.program]))


class Table:
    """The rows of a file of results, which is written after each row; a row that is there is not measured again."""

    def __init__(self, path: Path, keys: jax.Array):
        self.path, self.keys = path, keys
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, program: str, fault: str | None, how: str | None) -> dict | None:
        same = [row for row in self.rows if (row["program"], row["fault"], row["how"]) == (program, fault, how)]
        return same[0] if same else None

    def add(self, row: dict, program: Program) -> None:
        if self.find(row["program"], row["fault"], row["how"]):
            return
        title = " / ".join(filter(None, (row["program"], row["fault"], row["how"])))
        try:
            row |= measure(program, self.keys)
            if row["fault"]:
                cost = damage(self.find(row["program"], None, None), row, row["hides"])
                row |= {"damage": round(cost, 4), "hurts": cost >= HURTS}
        except Exception as error:  # a broken case must not stop the others
            print(f"broken: {title}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            return
        self.rows.append(row)
        numbers = [float(np.mean(row["true"])), float(np.mean(row["reported"])), row.get("damage", 0.0)]
        mark = "" if row.get("hurts", True) else "  DOES NOT HURT"
        print(" ".join(f"{x:6.3f}" for x in numbers), f"{row['seconds']:6.1f} s  {title}{mark}", flush=True)
        document = {"command": " ".join(sys.argv), "machine": machine_facts(), "hurts": HURTS, "rows": self.rows}
        self.path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
