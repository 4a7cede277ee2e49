"""The comparison from start to end, for the console."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nnlearn.compare.problem import Problem, make_problem
from nnlearn.compare.runs import RUNNERS
from nnlearn.compare.settings import Settings, make_writable
from nnlearn.compare.summary import Results, best_index, make_rows, make_table, target_loss, write_results
from nnlearn.figures.comparison import draw_comparison
from nnlearn.figures.curves import require_matplotlib


def compare(settings: Settings, console: Console | None = None) -> Results:
    """Train, print the table, write ``results.json`` and ``curves.png``.

    Args:
      settings: what to run.
      console: where to print; None for the terminal.

    Returns:
      Curves by optimizer and library.

    Raises:
      ValueError: a setting cannot work, or the folder cannot be written.
      ImportError: a package for the data or the picture is missing.
      KeyboardInterrupt: interrupted; what was complete by then has been printed and written.
    """
    console = console or Console()
    settings.check()
    make_writable(settings.out)
    require_matplotlib()
    problem = make_problem(settings)
    began, results = time.perf_counter(), {}
    try:
        _run_all(problem, settings, console, results)
    except KeyboardInterrupt:
        done = ", ".join(f"{name} ({' and '.join(libraries)})" for name, libraries in results.items() if libraries)
        console.print(f"interrupted; complete until then: {done or 'nothing'}")
        _report(results, problem, settings, console, complete=False)
        raise
    _report(results, problem, settings, console, complete=True)
    console.print(f"{time.perf_counter() - began:.1f} s in all")
    return results


def _run_all(problem: Problem, settings: Settings, console: Console, results: Results) -> None:
    """Fill ``results``, one optimizer and library after the other."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(settings.optimizers) * len(RUNNERS) * settings.epochs
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        for name in settings.optimizers:
            for library, run in RUNNERS.items():
                progress.update(task, description=f"{name}, {library}")
                curves = run(name, problem, settings, lambda: progress.advance(task))
                results.setdefault(name, {})[library] = curves


def _report(results: Results, problem: Problem, settings: Settings, console: Console, complete: bool) -> None:
    """Print the table and write the files, of as much as there is."""
    if not results:
        return
    rows = make_rows(results, settings)
    console.print(make_table(rows, problem.metric, target_loss(results), settings, console.width))
    write_results(settings.out / "results.json", results, rows, settings, problem.metric, complete)
    title = f"{settings.data}: {settings.seeds} seeds of each optimizer and learning rate"
    draw_comparison(settings.out / "curves.png", results, settings.learning_rates, best_index, title)
    console.print(f"data: {problem.bundle.source}", style="dim")
    console.print(f"wrote {settings.out / 'results.json'} and {settings.out / 'curves.png'}")
