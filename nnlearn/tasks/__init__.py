"""Tasks of data, model, loss and target: images, text, speech, tables and synthetic data."""

import importlib
from typing import Any

from nnlearn.checks import near
from nnlearn.tasks.task import Task as Task

# By name, the module of this package with a function of that name (with _ for -) that returns the task.
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
    """Load a task by name.

    Args:
      name: one of ``TASKS``: mnist, digits, shakespeare, king-james, speech, diamonds, breast-cancer, masked-digits,
        clicks or graphs.
      **options: arguments of the function of that name, such as ``seed`` or the model's sizes.

    Returns:
      A ``Task``.

    Raises:
      ValueError: if the name is unknown.
      ImportError: if the package that holds the data is not installed.
      OSError: if the data cannot be fetched.

    >>> task = load_task("graphs", examples=64)
    >>> task.name, task.metric, task.mode
    ('graphs', 'accuracy', 'max')
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}; got {name!r}{near(name, TASKS)}")
    return getattr(importlib.import_module(f"nnlearn.tasks.{TASKS[name]}"), name.replace("-", "_"))(**options)
