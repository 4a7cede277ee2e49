"""Common parts of the benchmarks: alternating timing of rivals, timing of compilation, a table, and a JSON file.

Rivals run in one process and take turns, in a new random order every round, so that other load on the machine affects
all of them. A reported time is the median over the rounds, with quartiles. A ratio is the median of the rounds' ratios,
because both sides of one round ran under the same conditions.
"""

import argparse
import datetime
import gc
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from machine import machine_facts, peak_memory
from rich.console import Console
from rich.table import Table

jax.config.update("jax_enable_compilation_cache", False)  # a program read from disk is not compiled

RESULTS = Path(__file__).parent / "results"
SETTLE_SECONDS = 0.003  # lets one library's idle threads stop spinning before the next library is timed
LONG_ENOUGH = 0.005  # seconds of a sample, far above the cost of the clock and of the final wait
TOO_LONG = 0.25  # seconds, the upper limit for a sample of the slowest rival
MAX_CALLS = 20

Seconds = dict[str, list[float]]  # by rival, the seconds per call of each round


class Rival(Protocol):
    """A rival to time: ``run(calls)`` makes ``calls`` steps and waits for the last."""

    def run(self, calls: int) -> None: ...


class Jitted:
    """A rival whose step is ``state = step(state, *inputs)``, compiled once; ``jitted`` determines what is donated.

    It waits for one array: all results of a program are ready together, and waiting for thousands of arrays would add
    to the time of rivals with many leaves.
    """

    def __init__(self, jitted: Any, state: Any, *inputs: Any):
        self.compiled, self.compile = compile_timed(jitted, state, *inputs)
        self.state, self.inputs = state, inputs

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.state = self.compiled(self.state, *self.inputs)
        jax.tree.leaves(self.state)[-1].block_until_ready()


class Compiled:
    """A rival that is a compiled function of constant arguments; it keeps the last ``result``."""

    def __init__(self, function: Any, *inputs: Any):
        self.compiled, self.compile = compile_timed(jax.jit(function), *inputs)
        self.inputs = inputs
        self.result: Any = None

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.result = self.compiled(*self.inputs)
        jax.block_until_ready(self.result)


class Thunk:
    """A rival that is a function without arguments, which waits for its own result."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.function()


def compile_timed(jitted: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
    """Compile a program; returns it with the seconds of each stage and the bytes of memory that it needs.

    All of jax's caches are cleared first, so that no rival profits from the work of another.
    """
    jax.clear_caches()
    gc.collect()
    marks = [time.perf_counter()]
    traced = jitted.trace(*inputs)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    names = ("trace_seconds", "lower_seconds", "compile_seconds")
    facts: dict[str, Any] = {
        name: after - before for name, before, after in zip(names, marks[:-1], marks[1:], strict=True)
    }
    facts["total_seconds"] = marks[-1] - marks[0]
    memory = compiled.memory_analysis()
    for name in ("temp", "output", "alias"):
        facts[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes", None)
    return compiled, facts


def race(rivals: Mapping[str, Rival], *, rounds: int, warmup: int = 3, seed: int = 0) -> tuple[Seconds, int]:
    """Time the rivals; returns the seconds per call of every rival and round, and the number of calls in a sample.

    Each sample follows an untimed call, which loads the rival's data and threads again.
    """
    spent: dict[str, float] = {}
    for _ in range(warmup):
        for name, rival in rivals.items():
            began = time.perf_counter()
            rival.run(1)
            spent[name] = time.perf_counter() - began
    wanted = math.ceil(LONG_ENOUGH / min(spent.values()))
    calls = max(1, min(wanted, MAX_CALLS, int(TOO_LONG / max(spent.values()))))
    seconds: Seconds = {name: [] for name in rivals}
    order, shuffler = list(rivals), random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            time.sleep(SETTLE_SECONDS)
            rivals[name].run(1)
            began = time.perf_counter()
            rivals[name].run(calls)
            seconds[name].append((time.perf_counter() - began) / calls)
    return seconds, calls


def _quartiles(numbers: Sequence[float]) -> list[float]:
    return statistics.quantiles(numbers, n=4, method="inclusive")[::2] if len(numbers) > 1 else [numbers[0]] * 2


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """The median, the quartiles and the minimum, in milliseconds."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "quartiles_ms": [quartile * 1e3 for quartile in _quartiles(seconds)],
        "min_ms": min(seconds) * 1e3,
        "rounds": len(seconds),
    }


def ratio(seconds: Seconds, above: str, below: str) -> dict[str, Any]:
    """The time of ``above`` divided by the time of ``below``: the median and the quartiles over the rounds."""
    ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return {"median": statistics.median(ratios), "quartiles": _quartiles(ratios)}


def ratios_to(seconds: Seconds, below: str, names: Iterable[str]) -> dict[str, Any]:
    """``ratio`` of every other name to ``below``, by ``"name / below"``."""
    return {f"{name} / {below}": ratio(seconds, name, below) for name in names if name != below}


def argument_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, as a check that it runs")
    parser.add_argument("--rounds", type=int, default=None, help="number of samples of each rival")
    parser.add_argument("--out", type=Path, default=None, help=f"path of the JSON file; by default results/{name}.json")
    parser.set_defaults(name=name)
    return parser


def output_path(options: argparse.Namespace) -> Path | None:
    """The path of the JSON file; None for a quick run without ``--out``, which must not replace real results."""
    return options.out or (None if options.quick else RESULTS / f"{options.name}.json")


class Report:
    """The JSON document of one benchmark, written after each part, so that an interrupted run leaves its results."""

    def __init__(self, options: argparse.Namespace, **facts: Any):
        self.path = output_path(options)
        self.document: dict[str, Any] = {
            "command": " ".join(["python", f"benchmarks/{options.name}.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine_facts(),
            **facts,
            "rows": [],
            "ratios": [],
        }

    def add(self, rows: Sequence[dict], ratios: Sequence[dict] = ()) -> None:
        """Append rows and ratios, and write the file."""
        self.document["rows"] += rows
        self.document["ratios"] += ratios
        self.document["peak_memory_bytes"] = peak_memory()
        self.document["load_at_end"] = list(os.getloadavg())
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".json.part")
        draft.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(draft, self.path)

    def close(self) -> None:
        print(f"wrote {self.path}" if self.path else "wrote nothing: a quick run without --out")


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table with the first ``left`` columns aligned left and the others right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
