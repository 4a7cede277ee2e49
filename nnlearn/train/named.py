"""Runs by name: ``my_module:train`` or ``file.py:train``."""

import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nnlearn.train.run import Train


class NamedRun(NamedTuple):
    """A run of a module or file, and the other names there."""

    train: Train[Any]
    names: Mapping[str, Any]


def is_run_name(name: str) -> bool:
    """Whether a name can be that of a run.

    >>> is_run_name("file.py:train"), is_run_name("mnist")
    (True, False)
    """
    return ":" in name


def load_run(name: str) -> NamedRun:
    """Import the module, or run the file, and return the run of that name in it.

    Args:
      name: ``my_module:train`` or ``path/file.py:train``: a result of ``make_train``, an object with a method
        ``make_train`` such as a ``Task``, or a function without arguments that returns one of these.

    Raises:
      ValueError: if there is no such module, file or run.
    """
    place, _, variable = name.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(f"there is no file {place!r}")
        with _importing_from(Path(place).resolve().parent):
            names = runpy.run_path(place)
    else:
        with _importing_from(Path.cwd()):
            try:
                names = vars(importlib.import_module(place))
            except ModuleNotFoundError as error:
                if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                    raise
                raise ValueError(f"there is no module {place!r} here or among the installed packages") from error
    value: Any = names.get(variable)
    if callable(value) and not isinstance(value, Train | type) and not hasattr(value, "make_train"):
        value = value()
    if make := getattr(value, "make_train", None):
        value = make()
    if not isinstance(value, Train):
        runs = sorted(each for each, found in names.items() if isinstance(found, Train))
        raise ValueError(f"{place!r} has no run {variable!r}, made by make_train; its runs are {runs}")
    return NamedRun(value, names)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Import from a folder too, as Python does for a script in it."""
    path = os.fspath(folder)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(path)


__all__ = ["NamedRun", "is_run_name", "load_run"]
