"""``nnlearn tasks`` and ``nnlearn versions``."""

import dataclasses
import importlib
import inspect
import json
import textwrap

from rich.console import Console

from nnlearn.machine import describe_machine
from nnlearn.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class TasksOptions:
    """List the tasks that learn, sweep, find-lr and diagnose know."""

    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class VersionsOptions:
    """Print hardware and versions for a bug report."""

    json: bool = False
    """Print one JSON object."""


def list_tasks(options: TasksOptions) -> None:
    """Run ``nnlearn tasks``."""
    tasks = {name: _summary(name) for name in TASKS}
    if options.json:
        print(json.dumps(tasks))
        return
    width = max(map(len, tasks)) + 2
    for name, text in tasks.items():
        print(textwrap.fill(text, Console().width, initial_indent=name.ljust(width), subsequent_indent=" " * width))


def _summary(name: str) -> str:
    """The first paragraph of the docstring of a task, without its markup."""
    function = getattr(importlib.import_module(f"nnlearn.tasks.{TASKS[name]}"), name.replace("-", "_"))
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].replace("``", "").split())


def print_versions(options: VersionsOptions) -> None:
    """Run ``nnlearn versions``."""
    machine = describe_machine()
    print(json.dumps(machine) if options.json else "\n".join(f"{name}: {value}" for name, value in machine.items()))


__all__ = ["TasksOptions", "VersionsOptions", "list_tasks", "print_versions"]
