"""The folder of a sweep: ``sweep.json`` says which one it is, and every finished batch is a file of its own.

Each file is complete or not there, so that a sweep may be killed at any moment and taken up again.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nnlearn.files import LOCK, only_one, replacing
from nnlearn.train.trace import Trace

FORMAT = "nnlearn sweep 2"
OLD_FORMAT = "nnlearn sweep 1"  # did not say what was trained: it can be read, and not gone on with
HEADER = "sweep.json"
BATCH = "batch-{static}-{setting}-{seed}.npz"
BATCH_NAME = re.compile(r"batch-(\d+)-(\d+)-(\d+)\.npz")


class Store:
    """A folder that takes the batches of one sweep; a context, in which no other process can open it.

    Args:
      folder: made if it is not there.
      header: what tells the sweep from others, of ``jsonable`` values.

    Raises:
      ValueError: on entry: the folder holds another sweep, or other files, or another process is using it.
    """

    def __init__(self, folder: str | Path, header: dict[str, Any]):
        self.folder = Path(folder)
        self._header = {"format": FORMAT, "fingerprint": fingerprint(header), **header}
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Store":
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(only_one(self.folder, "running a sweep"))
            self._open()
            self._held = held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._held.close()

    def _open(self) -> None:
        for path in self.folder.glob("*.part"):  # of a process that was killed: no other one is here
            if path.name.startswith((HEADER, "batch-")):
                path.unlink(missing_ok=True)
        if (self.folder / HEADER).exists():
            _refuse_another(self.folder, read_header(self.folder), self._header)
            return
        if others := sorted(path.name for path in self.folder.iterdir() if path.name != LOCK):
            raise ValueError(
                f"{str(self.folder)!r} holds files that are no sweep's, such as {others[0]!r}: give a new or an empty "
                "folder"
            )
        with replacing(self.folder / HEADER) as file:
            json.dump(self._header, file, indent=1)

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
        if header["format"] not in (FORMAT, OLD_FORMAT):
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
            try:
                batch = Trace.load(path)
            except ValueError as error:
                raise ValueError(f"{error}; delete it, and a sweep in this folder makes its runs again") from error
            yield *map(int, name.groups()), batch


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
    if found["format"] == OLD_FORMAT:
        raise ValueError(
            f"{str(folder)!r} was written by an older nnlearn, which did not record what was trained, so it cannot be "
            "gone on with: read it with Results.load, or give another folder"
        )
    if found["fingerprint"] == wanted["fingerprint"]:
        return
    differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    differ.remove("fingerprint")
    words = [_how_programs_differ(found, wanted) if name == "programs" else name for name in differ]
    raise ValueError(
        f"{str(folder)!r} holds another sweep, which differs in {', '.join(words)}: give another folder, or delete it"
    )


def _how_programs_differ(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old, new = found["programs"], wanted["programs"]
    if not old or not new:
        return "what train computes (one of them does not say)"
    versions = [{program.partition(":")[0] for program in programs} for programs in (old, new)]
    if versions[0] != versions[1]:
        before, now = (" and ".join(sorted(version)) for version in versions)
        return f"the version of JAX (it is of {before}, this is {now}, and their programs cannot be compared)"
    pairs = list(zip(old, new, strict=False))
    changed = [at for at, (before, now) in enumerate(pairs) if before != now]
    where = ""
    if changed and wanted["statics"] != [{}] and found["statics"] == wanted["statics"]:
        where = " for the static choice " + ", ".join(json.dumps(wanted["statics"][at]) for at in changed)
    return f"what train computes{where} (its loss, optimizer, model, data, rules or records)"


__all__ = ["Store", "fingerprint", "jsonable", "read_batches", "read_header"]
