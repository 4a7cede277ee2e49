"""Results of both fault benches: a log that is continued, shares with intervals, and the document."""

import argparse
import datetime
import json
import math
import sys
from pathlib import Path

import jax

from benchmarks.machine import machine_facts

RESULTS = Path(__file__).parent.parent / "results"


def wilson(hits: int, total: int, z: float = 1.96) -> list[float] | None:
    """The interval of a share, Wilson 1927.

    >>> wilson(9, 10)
    [0.596, 0.982]
    """
    if not total:
        return None
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return [round(middle - half, 3), round(middle + half, 3)]


def share(hits: int, total: int) -> dict:
    return {
        "hits": hits,
        "of": total,
        "share": round(hits / total, 3) if total else None,
        "interval": wilson(hits, total),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of both benches."""
    parser.add_argument("--part", default="0/1", help="i/n: of n processes, the i-th, each with its own log")
    parser.add_argument("--log", type=Path, default=None, help="a file of JSON lines, which is continued")
    parser.add_argument("--cache", default=None, help="a folder for compiled programs")
    parser.add_argument("--out", type=Path, default=None, help="the document; default: in benchmarks/results")


def use_cache(folder: str | None) -> None:
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def part_of(cases: list, part: str) -> list:
    """The cases of process ``i`` of ``n``.

    >>> part_of(["a", "b", "c"], "0/2")
    ['a', 'c']
    """
    first, count = map(int, part.split("/"))
    return cases[first::count]


def read_log(log: Path | None) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []


def append(log: Path | None, row: dict) -> None:
    if log:
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")


def write_document(path: Path, module: str, summary: dict, rows: list[dict]) -> None:
    document = {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "summary": summary,
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
