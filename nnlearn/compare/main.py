"""The comparison from start to end, for the console."""

import contextlib
import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nnlearn.compare.options import CompareOptions, make_writable
from nnlearn.compare.own import OWN_RUNNERS, OwnProblem, make_own_problem
from nnlearn.compare.problem import Problem, make_problem
from nnlearn.compare.runs import RUNNERS
from nnlearn.compare.summary import CurveTable, best_index, make_rows, make_table, plain, target_loss, write_results
from nnlearn.figures.comparison import Entry, draw_comparison
from nnlearn.figures.style import require_matplotlib


def compare(options: CompareOptions, console: Console | None = None) -> CurveTable:
    """Train, print the table, and write ``results.json`` and ``curves.png``.

    Args:
      options: the optimizers, the data and the sizes.
      console: where to print; None for the terminal.

    Returns:
      Curves by optimizer and library.

    Raises:
      ValueError: if an option is invalid or the folder cannot be written.
      ImportError: if a package for the data is missing. Without matplotlib, only the figure is left out.
      KeyboardInterrupt: if interrupted, after printing and writing the curves that are complete.
    """
    console = console or Console(quiet=options.json)
    options.check()
    make_writable(options.out)
    try:
        require_matplotlib()
    except ImportError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    problem = make_own_problem(options) if options.problem else make_problem(options)
    began, table = time.perf_counter(), {}
    try:
        _run_all(problem, options, console, table)
    except KeyboardInterrupt:
        done = ", ".join(f"{name} ({' and '.join(libraries)})" for name, libraries in table.items() if libraries)
        console.print(f"interrupted; complete until then: {done or 'nothing'}")
        _report(table, problem, options, console, complete=False)
        raise
    _report(table, problem, options, console, complete=True)
    console.print(f"{time.perf_counter() - began:.1f} s in total")
    return table


def _run_all(problem: Problem | OwnProblem, options: CompareOptions, console: Console, table: CurveTable) -> None:
    """Fill ``table``, one optimizer and library after the other."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runners: Any = OWN_RUNNERS if isinstance(problem, OwnProblem) else RUNNERS
    total = len(options.optimizers) * len(RUNNERS) * options.epochs
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for name in options.optimizers:
            for library, run in runners.items():
                progress.update(task, description=f"{name}, {library}")
                curves = run(name, problem, options, lambda: progress.advance(task))
                table.setdefault(name, {})[library] = curves


def _report(
    table: CurveTable, problem: Problem | OwnProblem, options: CompareOptions, console: Console, complete: bool
) -> None:
    """Print and write the curves that are complete."""
    if not table:
        return
    rows = make_rows(table, options)
    console.print(make_table(rows, problem.metric, target_loss(table), options, console.width, problem.loss))
    write_results(options.out / "results.json", table, rows, options, problem.metric, problem.loss, complete)
    entries = [
        Entry(optimizer, library, curves.train_sre, curves.validation_sre, best_index(curves))
        for optimizer, libraries in table.items()
        for library, curves in libraries.items()
    ]
    title = f"{options.problem or options.data}: {options.seeds} seeds of each optimizer and learning rate"
    written = str(options.out / "results.json")
    names = {"loss": problem.loss, "unit": "check" if options.problem else "epoch"}
    with contextlib.suppress(ImportError):  # of matplotlib; a line at the start has said so
        draw_comparison(entries, options.learning_rates, title, options.out / "curves.png", **names)
        written += f" and {options.out / 'curves.png'}"
    console.print(f"data: {problem.source}", style="dim", markup=False, emoji=False)
    if options.json:
        document = {"metric": problem.metric, "complete": complete, "table": [row._asdict() for row in rows]}
        print(json.dumps(plain(document)))
    console.print(f"wrote {written}")
