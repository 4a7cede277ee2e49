"""``nnlearn diagnose``: a task of nnlearn, or a run that a Python file defines."""

import dataclasses
import runpy
from pathlib import Path
from typing import Annotated, Any

import tyro

from nnlearn.checks import check_count
from nnlearn.diagnose.engine import diagnose
from nnlearn.diagnose.report import Report
from nnlearn.tasks import TASKS, load_task
from nnlearn.train.run import Train
from nnlearn.types import StatefulModel


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """Find out why a run does not learn. The exit status is 1 if something was found."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK|FILE.py:train")]
    """Name of a task, or a Python file and the name of a run in it, made by make_train. The file may also define
    hparams, predict, validation, metric and mode, the arguments of nnlearn.diagnose."""
    json: bool = False
    """Print the report as one JSON object."""
    seed: int = 0
    """Seed of the run."""
    epochs: int | None = None
    """Epochs of a task; by default the task's own number."""


def diagnose_run(options: DiagnoseOptions) -> int:
    """Run the command, print the report and return the exit status.

    Raises:
      ValueError: if there is no such task, file or run.
    """
    name, found, variable = options.run.rpartition(".py:")
    case = _from_file(Path(name + ".py"), variable) if found else _from_task(options.run, options.epochs)
    report: Report = diagnose(case.pop("train"), case.pop("hparams"), options.seed, **case)
    print(report.to_json() if options.json else report)
    return 0 if report.healthy else 1


def _from_file(path: Path, variable: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    names = runpy.run_path(str(path))
    if not isinstance(names.get(variable), Train):
        runs = sorted(name for name, value in names.items() if isinstance(value, Train))
        raise ValueError(f"{str(path)!r} has no run {variable!r}, made by make_train; its runs are {runs}")
    case = {name: names[name] for name in ("predict", "validation", "metric", "mode") if name in names}
    return {"train": names[variable], "hparams": names.get("hparams", {}), **case}


def _from_task(name: str, epochs: int | None) -> dict[str, Any]:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; give one of {', '.join(TASKS)}, or FILE.py:train")
    task = load_task(name) if epochs is None else load_task(name, epochs=check_count("epochs", epochs))
    model = task.model

    def predict(params, inputs, key=None, model_state=None):
        if isinstance(model, StatefulModel):
            return model.apply(params, model_state, inputs, key)[0]
        return model.apply(params, inputs, key)

    validation = task.validation
    known = hasattr(validation, "inputs") and hasattr(validation, "targets")
    return {
        "train": task.make_train(),
        "hparams": task.hparams,
        "predict": predict,
        "validation": (validation.inputs, validation.targets) if known else None,
        "metric": task.metric,
        "mode": task.mode,
    }


__all__ = ["DiagnoseOptions", "diagnose_run"]
