"""What a command runs: a task of nnlearn, or a run of a user's file or module."""

from typing import Any, NamedTuple

from nnlearn.checks import check_count, near
from nnlearn.tasks import TASKS, load_task
from nnlearn.tasks.task import Task
from nnlearn.train.named import is_run_name, load_run
from nnlearn.train.run import Train
from nnlearn.types import StatefulModel

NAMES = ("predict", "validation", "metric", "mode")


class Case(NamedTuple):
    """A run with its hyper-parameters.

    Attributes:
      train, hparams: the run.
      facts: those of ``predict``, ``validation``, ``metric`` and ``mode`` that are known.
    """

    train: Train[Any]
    hparams: Any
    facts: dict[str, Any]


def load_case(name: str, epochs: int | None = None) -> Case:
    """The run of a name: a task, ``file.py:train`` or ``my_module:train``.

    Args:
      name: the name. The file or module may also define ``hparams``, ``predict``, ``validation``, ``metric`` and
        ``mode``.
      epochs: of a task; None for its own number.

    Raises:
      ValueError: if there is no such task, file, module or run, or ``epochs`` is given for a run of a file.
    """
    if is_run_name(name):
        if epochs is not None:
            raise ValueError("epochs is for tasks: a run of a file has its own number of steps")
        found = load_run(name)
        facts = {key: found.names[key] for key in NAMES if key in found.names}
        return Case(found.train, found.names.get("hparams", {}), facts)
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise ValueError(f"there is no task {name!r}{near(name, TASKS)}; give one of {known}, or FILE.py:train")
    task = load_task(name) if epochs is None else load_task(name, epochs=check_count("epochs", epochs))
    validation = task.validation
    has_parts = hasattr(validation, "inputs") and hasattr(validation, "targets")
    facts = {"predict": _predict(task), "metric": task.metric, "mode": task.mode}
    facts["validation"] = (validation.inputs, validation.targets) if has_parts else None
    return Case(task.make_train(), dict(task.hparams), facts)


def _predict(task: Task) -> Any:
    model = task.model

    def predict(params, inputs, key=None, model_state=None):
        if isinstance(model, StatefulModel):
            return model.apply(params, model_state, inputs, key)[0]
        return model.apply(params, inputs, key)

    return predict


__all__ = ["Case", "load_case"]
