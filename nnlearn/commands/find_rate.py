"""``nnlearn find-lr``: a learning rate from short runs."""

import dataclasses
import json
import math
from typing import Annotated

import tyro

from nnlearn.commands.case import load_case
from nnlearn.sweeps import find_learning_rate
from nnlearn.sweeps.learning_rate import rate_name


@dataclasses.dataclass(frozen=True)
class FindRateOptions:
    """Find a learning rate from short runs at many rates."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK|FILE.py:train|MODULE:train")]
    """Name of a task, or a file or module and the name of a run in it."""
    low: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 1e-5
    """Lowest rate."""
    high: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 10.0
    """Highest rate."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the rate in hparams, if it is not rate, learning_rate or lr."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Epochs of a task; by default the task's own number."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Seed of the runs."""
    json: bool = False
    """Print one JSON object with all rates and losses."""


def find_rate(options: FindRateOptions) -> None:
    """Run the command.

    Raises:
      ValueError: if there is no such run, an option is invalid, or every run diverged.
    """
    case = load_case(options.run, options.epochs)
    hparams = case.hparams if case.hparams != {} else None
    found = find_learning_rate(
        case.train, options.low, options.high, hparams=hparams, name=options.name, key=options.seed
    )
    if not options.json:
        print(found)
        rate = float(f"{found.rate:.3g}")
        print(f"hparams = {rate if hparams is None else {**hparams, rate_name(hparams, options.name): rate}}")
        return
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(found).items()}
    print(json.dumps({name: _finite(value) for name, value in plain.items()}))


def _finite(value):
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


__all__ = ["FindRateOptions", "find_rate"]
