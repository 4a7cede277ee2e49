"""The table and ``results.json`` of a comparison, computed from its curves."""

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nnlearn.compare.options import CompareOptions
from nnlearn.compare.runs import Curves
from nnlearn.files import replacing
from nnlearn.machine import describe_machine

CurveTable = dict[str, dict[str, Curves]]
"""Curves by optimizer and library."""


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      optimizer, library: the names.
      best_rate: the learning rate with the lowest mean validation loss after the last epoch; None if a seed diverged at
        every rate.
      metric_mean: mean over seeds of the test accuracy or mean squared error at the best rate; None without a best
        rate.
      metric_sd: its standard deviation over seeds, with n - 1; None without a best rate or with one seed.
      seconds_to_target: seconds until the mean validation loss at the best rate reached the target, for the whole grid,
        without compilation; None if it never did.
      steps_per_second: optimizer steps per second over the whole grid, without compilation.
      compile_seconds: seconds to trace and compile.
      difference: largest difference between the validation losses of the two libraries, over seeds and epochs, at
        nnlearn's best rate; None if one library is missing.
    """

    optimizer: str
    library: str
    best_rate: float | None
    metric_mean: float | None
    metric_sd: float | None
    seconds_to_target: float | None
    steps_per_second: float
    compile_seconds: float
    difference: float | None


def _last_loss_r(curves: Curves) -> np.ndarray:
    """Mean validation loss over seeds after the last epoch, per learning rate; infinite where a seed diverged."""
    losses = curves.validation_sre[:, :, -1].astype(np.float64).mean(axis=0)
    return np.where(np.isfinite(losses), losses, np.inf)


def best_index(curves: Curves) -> int:
    """Index of the learning rate with the lowest validation loss; the test part is not used."""
    return int(np.argmin(_last_loss_r(curves)))


def target_loss(table: CurveTable) -> float:
    """The target for the time to target: 1.5 times the lowest final validation loss of any optimizer and library."""
    lowest = [np.min(_last_loss_r(curves)) for libraries in table.values() for curves in libraries.values()]
    return 1.5 * float(min(lowest))


def make_rows(table: CurveTable, options: CompareOptions) -> list[Row]:
    """The rows of the table, one optimizer after the other."""
    target, rows = target_loss(table), []
    for optimizer, libraries in table.items():
        for library, curves in libraries.items():
            best = best_index(curves)
            diverged = not np.isfinite(_last_loss_r(curves)[best])
            metric_s = curves.test_sre[:, best, -1].astype(np.float64)
            reached = np.flatnonzero(curves.validation_sre[:, best].mean(axis=0) <= target)
            rows.append(
                Row(
                    optimizer,
                    library,
                    best_rate=None if diverged else options.learning_rates[best],
                    metric_mean=None if diverged else float(metric_s.mean()),
                    metric_sd=None if diverged or len(metric_s) < 2 else float(metric_s.std(ddof=1)),
                    seconds_to_target=None if diverged or not len(reached) else float(curves.seconds_e[reached[0]]),
                    steps_per_second=curves.steps / float(curves.seconds_e[-1]),
                    compile_seconds=curves.compile_seconds,
                    difference=None if diverged else _difference(libraries),
                )
            )
    return rows


def _difference(libraries: dict[str, Curves]) -> float | None:
    if len(libraries) < 2:
        return None
    ours, theirs = libraries["nnlearn"], libraries["optax"]
    best = best_index(ours)
    return float(np.max(np.abs(ours.validation_sre[:, best] - theirs.validation_sre[:, best])))


NOT_OF_OWN = ("batch_size", "data", "hidden")  # options that a run of the user's own does not use
WIDE = 80  # columns of a terminal that are wide enough for the whole table


def make_table(
    rows: list[Row],
    metric: str,
    target: float,
    options: CompareOptions,
    width: int = WIDE,
    loss: str = "validation loss",
) -> Group:
    """The table to print; below a width of 80 columns two tables, results and speed, that fit into 60."""
    runs = f"{_counted(options.seeds, 'seed')} x {_counted(len(options.learning_rates), 'learning rate')}"
    rates = options.learning_rates
    edges = (min(rates), max(rates)) if len(rates) > 1 else ()
    caption = (
        f"rate: the best by {loss}; +- is the sd over seeds\n"
        + (f"target: time of the whole grid until that loss is {target:.4g}\n" if np.isfinite(target) else "")
        + "diff: largest difference of that loss between the libraries at that rate"
    )
    if any(row.best_rate in edges for row in rows):
        caption += "\n*: at the edge of the grid; a better rate may lie beyond it"
    results = {
        "rate": lambda row: "-" if row.best_rate is None else f"{row.best_rate:.4g}" + "*" * (row.best_rate in edges),
        {"accuracy": "accuracy %", "mse": "test MSE"}.get(metric, metric): lambda row: _score(row, metric),
    }
    speed = {
        "target": lambda row: "-" if row.seconds_to_target is None else f"{row.seconds_to_target:.2f} s",
        "steps/s": lambda row: f"{row.steps_per_second:,.0f}",
        "compile": lambda row: f"{row.compile_seconds:.1f} s",
    }
    difference = {"diff": lambda row: "-" if row.difference is None else f"{row.difference:.1e}"}
    parts = [results | speed | difference] if width >= WIDE else [results | difference, speed]
    tables = [_table_of(rows, columns) for columns in parts]
    lengths = _counted(options.epochs, "check" if options.problem else "epoch")
    tables[0].title = Text(f"{options.problem or options.data}: {runs} x {lengths}")  # a Text knows no markup or emoji
    tables[-1].caption = caption
    return Group(*tables)


def _table_of(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    for heading in ("optimizer", "library"):
        table.add_column(heading, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        last_of_optimizer = index + 1 == len(rows) or rows[index + 1].optimizer != row.optimizer
        cells = (cell(row) for cell in columns.values())
        table.add_row(row.optimizer, row.library, *cells, end_section=last_of_optimizer)
    return table


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _score(row: Row, metric: str) -> str:
    if row.metric_mean is None:
        return "diverged"
    factor, form = (100, ".2f") if metric == "accuracy" else (1, ".4g")
    spread = "" if row.metric_sd is None else f" +- {factor * row.metric_sd:{form}}"
    return f"{factor * row.metric_mean:{form}}{spread}"


def plain(value: Any) -> Any:
    """Convert a value to JSON types; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_results(
    path: Path, table: CurveTable, rows: list[Row], options: CompareOptions, metric: str, loss: str, complete: bool
) -> None:
    """Write ``results.json``: options, machine, table and all curves.

    Args:
      metric, loss: the names of the values in ``test_sre`` and ``validation_sre``.
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    if options.problem:
        settings = {name: value for name, value in settings.items() if name not in NOT_OF_OWN}
    document = {
        "command": " ".join(["nnlearn", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "settings": settings,
        "metric": metric,
        "loss": loss,
        "target_validation_loss": target_loss(table),
        "machine": describe_machine(),
        "table": [row._asdict() for row in rows],
        "curves": {name: {lib: curves._asdict() for lib, curves in libs.items()} for name, libs in table.items()},
    }
    with replacing(path) as file:
        file.write(json.dumps(plain(document), indent=1) + "\n")
