"""The options of ``nnlearn compare``, checked before anything runs."""

import dataclasses
import inspect
import os
import tempfile
from pathlib import Path
from typing import Annotated

import optax
import tyro

from nnlearn import optimizers
from nnlearn.checks import check_number, near
from nnlearn.datasets import LOADERS


def _is_rival(name: str, value: object) -> bool:
    """Whether both libraries have this optimizer, and a learning rate is all that it needs."""
    return (
        inspect.isfunction(value) and hasattr(optax, name) and next(iter(inspect.signature(value).parameters)) == RATE
    )


RATE = "learning_rate"
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
KNOWN = tuple(sorted(name for name, value in vars(optimizers).items() if _is_rival(name, value)))


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Train a small network with several optimizers of nnlearn and optax, and compare them.

    nnlearn runs each optimizer over all seeds and learning rates as one vmapped program. Optax runs as its users
    usually run it, with a jitted step in a Python loop, from the same parameters and on the same batches.
    """

    problem: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODULE:train|FILE.py:train")] = None
    """Your own run, made by make_train: its model, loss, batches and evaluation, with the optimizers of the comparison.
    By default a small network on --data."""
    optimizers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("sgd", "rmsprop", "adamw", "lion")
    """Names of the optimizers to compare, such as adamw."""
    seeds: Annotated[int, tyro.conf.arg(metavar="INT")] = 5
    """Number of random initialisations."""
    epochs: Annotated[int, tyro.conf.arg(metavar="INT")] = 20
    """Passes over the training examples. With a problem of your own, the number of checks, after equally many steps."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="INT")] = 64
    """Examples in a mini-batch."""
    learning_rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...")] = RATES
    """Learning rates to try."""
    data: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits"
    """Data set: digits, mnist, breast-cancer, diabetes or xor."""
    hidden: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (128,)
    """Widths of the network's hidden layers."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("nnlearn-compare")
    """Folder for results.json and curves.png, which nnlearn report reads."""
    json: bool = False
    """Print the table as one JSON object."""

    def check(self) -> None:
        """Raise ``ValueError`` for the first invalid option; the message names the valid values."""
        if not self.optimizers:
            raise ValueError(f"optimizers must name at least one of {', '.join(KNOWN)}")
        for name in self.optimizers:
            if name not in KNOWN:
                raise ValueError(f"optimizers: unknown name {name!r}{near(name, KNOWN)}; known are {', '.join(KNOWN)}")
        if len(set(self.optimizers)) < len(self.optimizers):
            raise ValueError(f"optimizers names one twice: {' '.join(self.optimizers)}")
        if self.data not in LOADERS:
            known = ", ".join(LOADERS)
            raise ValueError(f"data: unknown name {self.data!r}{near(self.data, LOADERS)}; known are {known}")
        for name in ("seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rates:
            raise ValueError("learning_rates must hold at least one number")
        for rate in self.learning_rates:
            check_number("learning_rates", rate, low=0.0, low_open=True, high_open=True)
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must hold widths of at least 1, got {self.hidden}")


def make_writable(folder: Path) -> None:
    """Create the folder for results, and check before a long run that a file can be written there.

    Raises:
      ValueError: if the folder cannot be created or written to; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise ValueError(f"out: cannot write to {str(folder)!r} ({error.strerror}); choose another folder") from error
