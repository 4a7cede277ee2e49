"""Diagnose programs after public reports, broken and mended, and after tutorials; count what is found.

``python -m benchmarks.faults.reports.run --seeds 2``

A finding is right if it is among the names of its pair. Results are lines of ``--log``; a case that is there already
is not run again.
"""

import argparse
import json
import time
import traceback

import jax

from benchmarks.faults.reports import Report, reports
from benchmarks.faults.results import RESULTS, add_options, append, part_of, read_log, share, use_cache, write_document


def one(pair: Report, kind: str, seed: int) -> dict:
    """The row of one program; an exception becomes a ``crash``."""
    row: dict = {"name": pair.name, "kind": kind, "seed": seed, "names": list(pair.names)}
    began = time.perf_counter()
    try:
        case = pair.mended() if kind == "mended" else pair.broken()
        row["found"] = [finding.name for finding in case.diagnose(seed).findings]
    except Exception:
        row["crash"] = traceback.format_exc(limit=-4)
    row["seconds"] = time.perf_counter() - began
    jax.clear_caches()  # a hundred programs would fill the memory
    return row


def verdict(row: dict) -> str:
    if "crash" in row:
        return "crash: " + row["crash"].splitlines()[-1]
    found = ", ".join(row["found"]) or "nothing"
    if row["kind"] == "mended":
        return "healthy" if not row["found"] else f"FALSE ALARM: {found}"
    right = [name in row["names"] for name in row["found"][:3]]
    said = "missed" if not right else "first" if right[0] else "among three" if any(right) else "flagged"
    return f"{said}: {found}"


def summary(rows: list[dict]) -> dict:
    """Counts with intervals. A crash of a broken program counts as a miss."""
    broken = [row for row in rows if row["kind"] == "broken"]
    mended = [row for row in rows if row["kind"] == "mended" and "crash" not in row]

    def named(row, first):
        return any(name in row["names"] for name in row.get("found", ())[:first])

    return {
        "programs": len({row["name"] for row in rows}),
        "crashes": sum("crash" in row for row in rows),
        "flagged": share(sum(bool(row.get("found")) for row in broken), len(broken)),
        "named_first": share(sum(named(row, 1) for row in broken), len(broken)),
        "named_in_three": share(sum(named(row, 3) for row in broken), len(broken)),
        "false_alarms": share(sum(bool(row["found"]) for row in mended), len(mended)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="parts of the names of pairs")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of every mended program; broken ones have one")
    add_options(parser)
    options = parser.parse_args()
    use_cache(options.cache)
    known = {(row["name"], row["kind"], row["seed"]): row for row in read_log(options.log)}
    kinds = [("broken", 0), *(("mended", seed) for seed in range(options.seeds))]
    rows = []
    for pair in part_of(reports(), options.part):
        if not any(part in pair.name for part in options.only):
            continue
        for kind, seed in kinds:
            if kind == "broken" and not pair.names:
                continue
            row = known.get((pair.name, kind, seed)) or one(pair, kind, seed)
            rows.append(row)
            if (pair.name, kind, seed) not in known:
                append(options.log, row)
            print(f"{pair.name} {kind} [{seed}]: {verdict(row)}", flush=True)
    counts = summary(rows)
    print(json.dumps(counts, indent=1))
    whole = options.only == [""] and options.part == "0/1"
    path = options.out or (RESULTS / "faults_reports.json" if whole else None)
    if path:
        write_document(path, "benchmarks.faults.reports.run", counts, rows)


if __name__ == "__main__":
    main()
