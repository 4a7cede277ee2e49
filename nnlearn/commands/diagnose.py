"""``nnlearn diagnose``: a task of nnlearn, or a run that a Python file defines."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from nnlearn.commands.case import load_case
from nnlearn.diagnose import Report, diagnose


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """Find out why a run does not learn. The exit status is 1 if something was found."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK|FILE.py:train|MODULE:train")]
    """Name of a task, or a file or module and the name of a run in it, made by make_train. It may also define
    hparams, predict, validation, metric and mode, the arguments of nnlearn.diagnose."""
    json: bool = False
    """Print the report as one JSON object."""
    all_checks: bool = False
    """List every check with its numbers, or the reason why it could not run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """File for the report, which nnlearn report reads."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Seed of the run."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Epochs of a task; by default the task's own number."""


def diagnose_run(options: DiagnoseOptions) -> int:
    """Run the command, print the report and return the exit status.

    Raises:
      ValueError: if there is no such task, file or run.
    """
    case = load_case(options.run, options.epochs)
    report: Report = diagnose(case.train, case.hparams, options.seed, **case.facts)
    if options.out is not None:
        report.save(options.out)
    print(report.to_json() if options.json else report.text(all_checks=options.all_checks))
    return 0 if report.healthy else 1


__all__ = ["DiagnoseOptions", "diagnose_run"]
