"""The folder of a sweep: ``sweep.json`` says which one it is, and every finished batch is a file of its own.

Each file is complete or not there, so that a sweep may be killed at any moment and taken up again.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnlearn.files import replacing
from nnlearn.train.trace import Trace

FORMAT = "nnlearn sweep 1"
HEADER = "sweep.json"
BATCH = "batch-{static}-{setting}-{seed}.npz"
BATCH_NAME = re.compile(r"batch-(\d+)-(\d+)-(\d+)\.npz")


class Store:
    """A folder that takes the batches of one sweep.

    Args:
      folder: made if it is not there.
      header: what tells the sweep from others, of ``jsonable`` values.

    Raises:
      ValueError: the folder holds another sweep, or other files.
    """

    def __init__(self, folder: str | Path, header: dict[str, Any]):
        self.folder = Path(folder)
        header = {"format": FORMAT, "fingerprint": fingerprint(header), **header}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / HEADER).exists():
            _refuse_another(self.folder, read_header(self.folder), header)
            return
        if any(self.folder.iterdir()):
            raise ValueError(f"{str(folder)!r} holds files that are no sweep's: give a new or an empty folder")
        with replacing(self.folder / HEADER) as file:
            json.dump(header, file, indent=1)

    def write(self, static: int, setting: int, seed: int, batch: Trace) -> Trace:
        """Keep a batch whose first run has these places, and return it as it will be read."""
        path = self.folder / BATCH.format(static=static, setting=setting, seed=seed)
        batch.save(path)
        return Trace.load(path)


def read_header(folder: str | Path) -> dict[str, Any]:
    """What ``sweep.json`` says.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = Path(folder) / HEADER
    try:
        header = json.loads(path.read_text())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        body = {name: value for name, value in header.items() if name not in ("format", "fingerprint")}
        if header["fingerprint"] != fingerprint(body):
            raise ValueError("its fingerprint does not fit what it holds")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no header of a sweep that can be read: {error}") from error
    return header


def read_batches(folder: str | Path) -> Iterator[tuple[int, int, int, Trace]]:
    """Every batch: the places of its first run (static choice, setting, seed), and its trace."""
    for path in sorted(Path(folder).iterdir()):
        name = BATCH_NAME.fullmatch(path.name)
        if name:
            yield *map(int, name.groups()), Trace.load(path)


def fingerprint(header: dict[str, Any]) -> str:
    """A hash of what ``jsonable`` returned.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def jsonable(value: Any) -> Any:
    """Numbers, strings and nestings of them as they are; arrays by their type and a hash, anything else by its name.

    >>> jsonable({"rate": np.float32(0.5), "act": (1, "relu"), "tx": print})
    {'rate': 0.5, 'act': [1, 'relu'], 'tx': '<print>'}
    """
    if isinstance(value, dict):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "biuf":
            return array.item()
        return f"<{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}>"
    return f"<{getattr(value, '__qualname__', type(value).__name__)}>"


def _refuse_another(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["fingerprint"] == wanted["fingerprint"]:
        return
    differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    differ.remove("fingerprint")
    raise ValueError(
        f"{str(folder)!r} holds another sweep, which differs in {', '.join(differ)}: give another folder, or delete it"
    )


__all__ = ["Store", "fingerprint", "jsonable", "read_batches", "read_header"]
