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
    keys = jax.random.split(jax.random.key(0), options.seeds)
    programs, faults = load(options.group)
    table: list[dict] = []
    healthy = {}
    wanted = {f.program for f in faults if options.only in f.title}
    for name, program in programs.items():
        if options.only in name or name in wanted:
            healthy[name] = measure(program, keys)
            table.append({"program": name, "kind": program.kind, "fault": None, **healthy[name]})
            print(f"{np.mean(healthy[name]['true']):6.3f} {' ' * 13} {healthy[name]['seconds']:6.1f} s  {name}")
    for fault in faults:
        if options.only not in fault.title:
            continue
        try:
            found = measure(fault.change(programs[fault.program]), keys)
        except Exception as error:  # a broken case must not hide the others
            print(f"broken: {fault.title}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        cost = damage(healthy[fault.program], found, fault.hides)
        row = {"program": fault.program, "fault": fault.name, "how": fault.how, "also": list(fault.also)}
        table.append({**row, "hides": fault.hides, "damage": round(cost, 4), "hurts": cost >= HURTS, **found})
        mark = "" if cost >= HURTS else "  DOES NOT HURT"
        true, reported = np.mean(found["true"]), np.mean(found["reported"])
        print(f"{true:6.3f} {reported:6.3f} {cost:6.3f} {found['seconds']:6.1f} s  {fault.title}{mark}", flush=True)
    if options.out or not options.only:
        path = options.out or RESULTS / f"faults_{options.group}_verified.json"
        document = {"command": " ".join(sys.argv), "machine": machine_facts(), "hurts": HURTS, "rows": table}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
