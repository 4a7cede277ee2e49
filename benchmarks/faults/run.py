"""Diagnose healthy and faulty programs, count what is found, and compare with simple and published rules.

``python -m benchmarks.faults.run --group development --seeds 1``

Cases run in a fixed random order, so that an interrupted run has a fair sample. Every result is a line of ``--log``;
a case that is there already is not run again.
"""

import argparse
import json
import math
import random
import statistics
import time
import traceback

import jax
import numpy as np

import nnlearn
from benchmarks.faults.case import Fault, Program, build
from benchmarks.faults.registry import GROUPS, load
from benchmarks.faults.results import RESULTS, add_options, append, part_of, read_log, share, use_cache, write_document
from benchmarks.faults.rules import autotrainer, loss_fell, record

NEAR = 0.02  # a repaired run is within two points of the healthy one
COMPILED = [0.0]  # seconds of tracing and compilation so far


def _count(event: str, seconds: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
        COMPILED[0] += seconds


def spread(program: Program) -> float | None:
    """The variance of the validation targets, for a metric that is an error."""
    return (
        None if program.mode == "max" else float(np.mean((program.validation[1] - np.mean(program.validation[1])) ** 2))
    )


def points(program: Program, metric: float) -> float:
    """A reported metric as a score, of which larger is better and 1 the best."""
    scale = spread(program)
    value = metric if scale is None else 1 - metric / scale
    return float(np.clip(np.nan_to_num(value, nan=0.0), 0.0, 1.0))


def diagnose_case(program: Program, seed: int, with_repair: bool) -> dict:
    case = build(program, seed)
    run = record(case, spread(program))
    jax.block_until_ready(run(case.key))
    began = time.perf_counter()
    found = jax.tree.map(np.asarray, jax.block_until_ready(run(case.key)))
    row: dict = {"run_seconds": time.perf_counter() - began}
    row["rules"] = {"loss_fell": loss_fell(found), "autotrainer": autotrainer(found)}
    row["score"] = float(np.clip(np.nan_to_num(found["accuracy"][-1], nan=0.0), 0.0, 1.0))
    options = {"predict": case.predict, "validation": case.validation, "metric": case.metric, "mode": case.mode}
    began, compiled = time.perf_counter(), COMPILED[0]
    report = nnlearn.diagnose(case.train, case.hparams, case.key, **options)
    row["diagnose_seconds"] = time.perf_counter() - began
    row["compile_seconds"] = COMPILED[0] - compiled
    row["found"] = [finding.name for finding in report.findings]
    row["steps"] = [finding.step for finding in report.findings]
    row["healthy"] = bool(report.healthy)
    if with_repair and hasattr(nnlearn, "repair"):
        row |= repair_case(case, program, report, options)
    return row


def repair_case(case, program: Program, report, options: dict) -> dict:
    """What ``nnlearn.repair`` makes of the run: its score on the validation part."""
    began = time.perf_counter()
    try:
        fixed = nnlearn.repair(case.train, case.hparams, case.key, report, **options)
        if fixed.train is case.train and fixed.hparams == case.hparams:
            return {"repair": "nothing to try", "repair_seconds": time.perf_counter() - began}
        _, trace = jax.jit(fixed.train)(fixed.hparams, case.key)
        score = points(program, float(trace.metrics[case.metric][-1]))
        return {"repair": score, "repair_seconds": time.perf_counter() - began}
    except Exception as error:
        return {"repair": f"crash: {type(error).__name__}: {error}"[:300]}


def cases(group: str, seeds: int, fault_seeds: int, only: str):
    """``(title, program, fault, seed)`` of all cases, in a fixed random order; healthy ones are spread evenly."""
    programs, faults = load(group)
    unsound = _unsound(group)
    sound = [(p.name, p, None, s) for s in range(seeds) for p in programs.values()]
    faulty = [
        (f.title, programs[f.program], f, s) for s in range(fault_seeds) for f in faults if f.title not in unsound
    ]
    shuffler = random.Random(16)
    shuffler.shuffle(sound)
    shuffler.shuffle(faulty)
    placed = [((i + 0.5) / len(part), case) for part in (sound, faulty) for i, case in enumerate(part)]
    return [case for _, case in sorted(placed, key=lambda pair: pair[0]) if only in case[0]]


def _unsound(group: str) -> set[str]:
    """Faults that did not hurt when they were verified."""
    path = RESULTS / f"faults_{group}_verified.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {f"{row['program']} / {row['fault']} / {row['how']}" for row in rows if row["fault"] and not row["hurts"]}


def summary(rows: list[dict]) -> dict:
    """Counts with intervals."""
    done = [row for row in rows if "crash" not in row]
    sound, faulty = [r for r in done if not r["fault"]], [r for r in done if r["fault"]]

    def named(row, first):
        return any(name in (row["fault"], *row["also"]) for name in row["found"][:first])

    seen = [row for row in faulty if not row["healthy"]]
    steps = [row["steps"][0] for row in seen if row["steps"] and row["steps"][0] is not None]
    ratios = [(r["diagnose_seconds"] - r["compile_seconds"]) / r["run_seconds"] for r in done]
    healthy = {
        p: statistics.fmean(r["score"] for r in sound if r["program"] == p) for p in {r["program"] for r in sound}
    }
    tried = [row for row in faulty if isinstance(row.get("repair"), float) and row["program"] in healthy]
    rules = {
        rule: {
            "flagged": share(sum(bool(row["rules"][rule]) for row in faulty), len(faulty)),
            "false_alarms": share(sum(bool(row["rules"][rule]) for row in sound), len(sound)),
            "named": share(
                sum(any(n in (row["fault"], *row["also"]) for n in row["rules"][rule]) for row in faulty), len(faulty)
            ),
        }
        for rule in ("loss_fell", "autotrainer")
    }
    return {
        "programs": len({row["program"] for row in sound}),
        "crashes": len(rows) - len(done),
        "flagged": share(len(seen), len(faulty)),
        "false_alarms": share(sum(not row["healthy"] for row in sound), len(sound)),
        "named_first": share(sum(named(row, 1) for row in faulty), len(faulty)),
        "named_in_three": share(sum(named(row, 3) for row in faulty), len(faulty)),
        "steps_to_alarm": statistics.median(steps) if steps else None,
        "cost": {"median": statistics.median(ratios), "largest": max(ratios)} if ratios else None,
        "seconds": statistics.median(r["diagnose_seconds"] for r in done) if done else None,
        "repaired": share(sum(row["repair"] >= healthy[row["program"]] - NEAR for row in tried), len(tried)),
        "rules": rules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="development")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of every healthy program")
    parser.add_argument("--fault-seeds", type=int, default=1, help="seeds of every faulty program")
    parser.add_argument("--only", default="", help="part of a case's title")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after this time")
    parser.add_argument("--repair", type=int, default=0, help="also repair every so many-th of the faulty runs")
    add_options(parser)
    options = parser.parse_args()
    use_cache(options.cache)
    jax.monitoring.register_event_duration_secs_listener(_count)
    rows = read_log(options.log)
    known = {(row["title"], row["seed"]) for row in rows}
    began = time.monotonic()
    chosen = cases(options.group, options.seeds, options.fault_seeds, options.only)
    for title, program, fault, seed in part_of(chosen, options.part):
        if (title, seed) in known:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        faulty = sum(row["fault"] is not None for row in rows)
        row = one(title, program, fault, seed, options.repair > 0 and faulty % options.repair == 0)
        rows.append(row)
        append(options.log, row)
        said = row.get("crash", "").splitlines()[-1:] or row["found"][:3] or ["healthy"]
        print(f"{title} [{seed}]: {', '.join(said)}", flush=True)
    counts = summary(rows)
    print(json.dumps(counts, indent=1))
    path = options.out or RESULTS / f"faults_{options.group}.json"
    write_document(path, "benchmarks.faults.run", counts, rows)


def one(title: str, program: Program, fault: Fault | None, seed: int, with_repair: bool) -> dict:
    """The row of one case; an exception becomes a ``crash``."""
    row = {"title": title, "program": program.name, "kind": program.kind, "seed": seed}
    row |= {"fault": fault.name if fault else None, "also": list(fault.also) if fault else []}
    try:
        changed = fault.change(program) if fault else program
        row |= diagnose_case(changed, seed, with_repair and fault is not None)
    except Exception:
        row["crash"] = traceback.format_exc(limit=-4)
    jax.clear_caches()  # hundreds of programs would fill the memory
    return row


if __name__ == "__main__":
    main()
