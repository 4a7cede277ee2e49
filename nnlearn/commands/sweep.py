"""``nnlearn sweep``: many settings and seeds of a run as one program."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nnlearn.commands.case import Case, load_case
from nnlearn.sweeps import Results, choice, log_uniform, sweep, uniform
from nnlearn.sweeps.space import Choice

SHOWN = 10  # settings in the table


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Train many settings and seeds of a run side by side, and rank the settings."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK|FILE.py:train|MODULE:train")]
    """Name of a task, or a file or module and the name of a run in it. Its hparams must be a dict."""
    space: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUES ...")]
    """What to vary: NAME=log:LOW:HIGH, NAME=uniform:LOW:HIGH, NAME=A,B,C or NAME=VALUE. Other hyper-parameters keep
    their values."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Settings to draw; 16 by default if an interval is given, otherwise all combinations."""
    seeds: Annotated[int, tyro.conf.arg(metavar="INT")] = 1
    """Seeds of each setting."""
    metric: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Metric that ranks the settings; by default the task's, or train_loss."""
    mode: Literal["min", "max"] | None = None
    """Whether a small or a large metric is better."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Epochs of a task; by default the task's own number."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for the runs, which nnlearn report reads; an interrupted sweep continues from it."""
    json: bool = False
    """Print one JSON object with all settings in order."""


def run_sweep(options: SweepOptions) -> None:
    """Run the command.

    Raises:
      ValueError: if there is no such run, or an option is invalid.
    """
    case = load_case(options.run, options.epochs)
    space = {**_hparams(case), **dict(map(_axis, options.space))}
    is_grid = all(not _is_axis(value) or isinstance(value, Choice) for value in space.values())
    samples = options.samples if options.samples is not None or is_grid else 16
    mode = options.mode or ("min" if options.metric else case.facts.get("mode", "min"))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=options.json or not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=None)
        results = sweep(
            case.train,
            space,
            options.seeds,
            metric=options.metric or case.facts.get("metric", "train_loss"),
            mode=mode,
            samples=samples,
            method="grid" if samples is None else "quasi",
            folder=options.out,
            full=options.out is not None,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _print(results, options)


def _print(results: Results, options: SweepOptions) -> None:
    ranking = results.ranking()
    if options.json:
        rows = [
            {"setting": score.setting, results.metric: _or_none(score.mean)}
            | {"standard_error": _or_none(score.standard_error), "failed": score.failed, "seeds": score.seeds}
            for score in ranking
        ]
        print(json.dumps({"metric": results.metric, "mode": results.mode, "ranking": rows}))
        return
    table = Table(box=None, pad_edge=False)
    for name in (*results.varied, results.metric, "failed"):
        table.add_column(name, justify="right", overflow="fold")
    for score in ranking[:SHOWN]:
        spread = "" if math.isnan(score.standard_error) else f" +- {score.standard_error:.2g}"
        cells = [f"{score.setting[name]:.4g}" for name in results.varied]
        table.add_row(*cells, f"{score.mean:.4g}{spread}", f"{score.failed}/{score.seeds}")
    console = Console(highlight=False)
    console.print(table)
    if len(ranking) > SHOWN:
        console.print(f"{len(ranking) - SHOWN} more settings are worse")
    if options.out is not None:
        console.print(f"written: {options.out}; nnlearn report {options.out} --out report.html", soft_wrap=True)


def _hparams(case: Case) -> dict[str, Any]:
    if not isinstance(case.hparams, dict):
        raise ValueError(f"the run's hparams must be a dict to be swept by name, got {type(case.hparams).__name__}")
    return case.hparams


def _is_axis(value: Any) -> bool:
    return not isinstance(value, int | float | bool | str)


def _axis(text: str) -> tuple[str, Any]:
    """The name and the values of an option.

    >>> _axis("rate=log:0.001:1"), _axis("decay=0,0.5"), _axis("b1=0.9")
    (('rate', Interval(low=0.001, high=1.0, log=True)), ('decay', Choice(values=(0.0, 0.5))), ('b1', 0.9))
    """
    name, equals, values = text.partition("=")
    kind, *ends = values.split(":")
    try:
        if not (name and equals):
            raise ValueError("it has no name")
        if ends:
            if kind not in ("log", "uniform") or len(ends) != 2:
                raise ValueError("an interval is log:LOW:HIGH or uniform:LOW:HIGH")
            return name, (log_uniform if kind == "log" else uniform)(float(ends[0]), float(ends[1]))
        numbers = [_number(part) for part in values.split(",")]
        return name, choice(*numbers) if len(numbers) > 1 else numbers[0]
    except ValueError as error:
        raise ValueError(f"space: {text!r} is not NAME=VALUES, such as rate=log:1e-4:1e-1 ({error})") from error


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["SweepOptions", "run_sweep"]
