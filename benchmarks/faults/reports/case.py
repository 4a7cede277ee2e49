"""A broken training program from a public report, and the same program mended."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

import nnlearn


class Case(NamedTuple):
    """The arguments of ``nnlearn.diagnose``."""

    train: nnlearn.Train
    hparams: dict[str, Any]
    predict: Callable | None
    validation: tuple | None
    metric: str | None
    mode: str = "max"

    def diagnose(self, seed: int) -> nnlearn.diagnose.Report:
        """What the diagnosis says of the run with this seed."""
        options = {"predict": self.predict, "validation": self.validation, "metric": self.metric, "mode": self.mode}
        return nnlearn.diagnose(self.train, self.hparams, jax.random.key(seed), **options)


class Report(NamedTuple):
    """A broken program and its mended form. Data are loaded when one of them is called."""

    name: str
    source: str  # the address of the report, and what it says in a line
    names: tuple[str, ...]  # the findings that are right, most fitting first; none if both forms are healthy
    broken: Callable[[], Case]
    mended: Callable[[], Case]  # with the report's accepted answer, and what else it needs to be healthy


def report(reports: list[Report], source: str, *names: str) -> Callable:
    """A decorator: add a pair to ``reports``, named like the function, which takes ``mended`` and returns a case."""

    def add(build: Callable[[bool], Case]) -> Callable[[bool], Case]:
        reports.append(Report(build.__name__, source, names, partial(build, False), partial(build, True)))
        return build

    return add
