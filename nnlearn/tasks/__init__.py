"""Things to learn, each a small object of data, model, loss and target: images, text, speech, tables, and stand-ins."""

import importlib
from typing import Any

from nnlearn.tasks.task import Task as Task

# name -> the module of this package that has a function of that name (with _ for -) returning the task
TASKS = {
    "mnist": "images",
    "digits": "images",
    "shakespeare": "text",
    "king-james": "text",
    "speech": "speech",
    "diamonds": "tables",
    "breast-cancer": "tables",
    "masked-digits": "synthetic",
    "clicks": "synthetic",
    "graphs": "synthetic",
}


def load_task(name: str, **options: Any) -> Task:
    """A task by name.

    Args:
      name: one of ``TASKS``.
      **options: of the function that makes it, such as ``seed`` or the model's sizes.

    Returns:
      A ``Task``.

    Raises:
      ValueError: the name is unknown.
      ImportError, OSError: the package that holds the data is not installed or cannot be fetched.

    >>> task = load_task("graphs", examples=64)
    >>> task.name, task.metric, task.goal
    ('graphs', 'accuracy', 'max')
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}; got {name!r}")
    return getattr(importlib.import_module(f"nnlearn.tasks.{TASKS[name]}"), name.replace("-", "_"))(**options)
