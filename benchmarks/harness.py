"""What every benchmark here shares: rivals timed in turns, compiling timed in parts, a table, and a JSON file.

Rivals run in one process and take turns, in a new order every round, so that what else the machine does falls on all of
them. A figure is the median over the rounds, with the quartiles beside it; a ratio is the median of the rounds'
ratios, because both sides of one round saw the same machine.
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from machine import machine_facts, peak_memory
from rich.console import Console
from rich.table import Table

jax.config.update("jax_enable_compilation_cache", False)  # a program read from disk says nothing about compiling

RESULTS = Path(__file__).parent / "results"
SETTLE_SECONDS = 0.003  # lets one library's idle threads stop spinning before the next library is timed
LONG_ENOUGH = 0.005  # seconds that a sample should last, far above what the clock and the last wait cost
TOO_LONG = 0.25  # seconds that a sample of the slowest rival may last
MAX_CALLS = 20

Seconds = dict[str, list[float]]  # rival -> seconds a call, one number a round


class Rival(Protocol):
    """Something to be timed: ``run(calls)`` makes so many steps and waits for the last."""

    def run(self, calls: int) -> None: ...


class Jitted:
    """A rival whose step is ``state = step(state, *inputs)``, compiled once; ``jitted`` says what it donates.

    Waiting is for one array: all results of a program are ready together, and waiting for thousands one by one would be
    charged to the rivals with many leaves.
    """

    def __init__(self, jitted: Any, state: Any, *inputs: Any):
        self.compiled, self.compile = compile_timed(jitted, state, *inputs)
        self.state, self.inputs = state, inputs

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.state = self.compiled(self.state, *self.inputs)
        jax.tree.leaves(self.state)[-1].block_until_ready()


class Compiled:
    """A rival that is a compiled function of unchanging arguments; it keeps the last ``result``."""

    def __init__(self, function: Any, *inputs: Any):
        self.compiled, self.compile = compile_timed(jax.jit(function), *inputs)
        self.inputs, self.result = inputs, None

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.result = self.compiled(*self.inputs)
        jax.block_until_ready(self.result)


class Thunk:
    """A rival that is a function of nothing, which waits for its own result."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.function()


def compile_timed(jitted: Any, *inputs: Any) -> tuple[Any, dict[str, float]]:
    """A compiled program, the seconds of its making, and the bytes of memory that it asks for.

    All of jax's caches are emptied first: a rival may not profit from what another has left there.
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
    facts = {name: after - before for name, before, after in zip(names, marks[:-1], marks[1:], strict=True)}
    facts["total_seconds"] = marks[-1] - marks[0]
    memory = compiled.memory_analysis()
    for name in ("temp", "output", "alias"):
        facts[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes", None)
    return compiled, facts


def race(rivals: dict[str, Rival], *, rounds: int, warmup: int = 3, seed: int = 0) -> tuple[Seconds, int]:
    """Seconds a call of every rival, round by round, and the number of calls in a sample.

    Before each sample comes a call that is not timed: it brings the rival's data and threads back.
    """
    spent = {}
    for _ in range(warmup):
        for name, rival in rivals.items():
            began = time.perf_counter()
            rival.run(1)
            spent[name] = time.perf_counter() - began
    wanted = math.ceil(LONG_ENOUGH / min(spent.values()))
    calls = max(1, min(wanted, MAX_CALLS, int(TOO_LONG / max(spent.values()))))
    seconds, order, shuffler = {name: [] for name in rivals}, list(rivals), random.Random(seed)
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
    """Milliseconds: the median, the quartiles as the spread, and the least."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "quartiles_ms": [quartile * 1e3 for quartile in _quartiles(seconds)],
        "min_ms": min(seconds) * 1e3,
        "rounds": len(seconds),
    }


def ratio(seconds: Seconds, above: str, below: str) -> dict[str, Any]:
    """How many times as long ``above`` takes as ``below``: over the rounds, the median and the quartiles."""
    ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return {"median": statistics.median(ratios), "quartiles": _quartiles(ratios)}


def ratios_to(seconds: Seconds, below: str, names: Iterable[str]) -> dict[str, Any]:
    """``ratio`` of every name to one of them, under ``"name / below"``."""
    return {f"{name} / {below}": ratio(seconds, name, below) for name in names if name != below}


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: to see that it runs")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each rival")
    parser.add_argument("--out", type=Path, default=None, help=f"where the JSON goes; results/{name}.json by default")
    parser.set_defaults(name=name)
    return parser


def output_path(options: argparse.Namespace) -> Path | None:
    """The JSON file; None for a quick run that names none, whose numbers must not replace real ones."""
    return options.out or (None if options.quick else RESULTS / f"{options.name}.json")


class Report:
    """The JSON document of one benchmark, written again after each part, so that a run cut short leaves its numbers."""

    def __init__(self, options: argparse.Namespace, **facts: Any):
        self.path = output_path(options)
        self.document = {
            "command": " ".join(["python", f"benchmarks/{options.name}.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine_facts(),
            **facts,
            "rows": [],
            "ratios": [],
        }

    def add(self, rows: list[dict], ratios: list[dict] = ()) -> None:
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
    """A table with the first ``left`` columns to the left and the numbers to the right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
