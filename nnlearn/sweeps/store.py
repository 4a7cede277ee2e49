"""The folder of a sweep: ``sweep.json`` identifies the sweep, and every finished batch has its own file.

Files appear only when complete, so a sweep can be killed at any moment and resumed.
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

from nnlearn.files import LOCK, explaining_full_disk, only_one, replacing
from nnlearn.train.trace import Trace

FORMAT = "nnlearn sweep 2"
OLD_FORMAT = "nnlearn sweep 1"  # lacks a hash of the program: it can be read but not resumed
HEADER = "sweep.json"
BATCH = "batch-{static}-{setting}-{seed}.npz"
BATCH_NAME = re.compile(r"batch-(\d+)-(\d+)-(\d+)\.npz")


class Store:
    """A folder for the batches of one sweep, as a context manager that locks it against other processes.

    Args:
      folder: created if it does not exist.
      header: a description that distinguishes the sweep from others, made of ``jsonable`` values.

    Raises:
      ValueError: on entry, if the folder holds another sweep or other files, or if another process is using it.
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

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _open(self) -> None:
        for path in self.folder.glob("*.part"):  # left by a killed process: the lock excludes live ones
            if path.name.startswith((HEADER, "batch-")):
                path.unlink(missing_ok=True)
        if (self.folder / HEADER).exists():
            _refuse_another(self.folder, read_header(self.folder), self._header)
            return
        if others := sorted(path.name for path in self.folder.iterdir() if path.name != LOCK):
            raise ValueError(
                f"{str(self.folder)!r} holds files that belong to no sweep, such as {others[0]!r}: give a new or an "
                "empty folder"
            )
        with replacing(self.folder / HEADER) as file:
            json.dump(self._header, file, indent=1)

    def write(self, static: int, setting: int, seed: int, batch: Trace) -> Trace:
        """Write a batch, given the indices of its first run, and return it in the form that reading gives."""
        path = self.folder / BATCH.format(static=static, setting=setting, seed=seed)
        safe = "The finished batches are safe, and a sweep in this folder continues from them"
        with explaining_full_disk(path, safe):
            batch.save(path)
        return Trace.load(path)


def read_header(folder: str | Path) -> dict[str, Any]:
    """The content of ``sweep.json``.

    Raises:
      ValueError: if the file does not exist or is damaged.
    """
    path = Path(folder) / HEADER
    try:
        header = json.loads(path.read_text())
        if header["format"] not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        body = {name: value for name, value in header.items() if name not in ("format", "fingerprint")}
        if header["fingerprint"] != fingerprint(body):
            raise ValueError("its fingerprint does not match its content")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read the header of a sweep in {str(path)!r}: {error}") from error
    return header


def read_batches(folder: str | Path) -> Iterator[tuple[int, int, int, Trace]]:
    """Yield every batch: the indices of its first run (static choice, setting, seed), and its trace."""
    for path in sorted(Path(folder).iterdir()):
        name = BATCH_NAME.fullmatch(path.name)
        if name:
            try:
                batch = Trace.load(path)
            except ValueError as error:
                raise ValueError(f"{error}; delete it, and a sweep in this folder repeats its runs") from error
            static, setting, seed = map(int, name.groups())
            yield static, setting, seed, batch


def fingerprint(header: dict[str, Any]) -> str:
    """A hash of values that ``jsonable`` returned.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def jsonable(value: Any) -> Any:
    """Convert a value to JSON types: numbers and strings stay, arrays become text of their type and a hash, and other
    objects their name.

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
            f"{str(folder)!r} was written by an older nnlearn, which did not record what was trained, so the sweep "
            "cannot be resumed: read it with Results.load, or give another folder"
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
        return "what train computes (one of them has no record of it)"
    versions = [{program.partition(":")[0] for program in programs} for programs in (old, new)]
    if versions[0] != versions[1]:
        before, now = (" and ".join(sorted(version)) for version in versions)
        return f"the version of JAX (it used {before}, this is {now}, and their programs cannot be compared)"
    pairs = list(zip(old, new, strict=False))
    changed = [at for at, (before, now) in enumerate(pairs) if before != now]
    where = ""
    if changed and wanted["statics"] != [{}] and found["statics"] == wanted["statics"]:
        where = " for the static choice " + ", ".join(json.dumps(wanted["statics"][at]) for at in changed)
    return f"what train computes{where} (its loss, optimizer, model, data, rules or records)"


__all__ = ["Store", "fingerprint", "jsonable", "read_batches", "read_header"]
