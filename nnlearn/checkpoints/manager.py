"""The checkpoints of one run: numbered folders, written by a thread, of which the newest and the best are kept."""

import contextlib
import math
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.folder import check_options, fit_tree, read_all, verify, write
from nnlearn.checkpoints.manifest import read_manifest
from nnlearn.checkpoints.nodes import Arrays, Node, check_leaf, describe, total_bytes
from nnlearn.checkpoints.pieces import unpacked
from nnlearn.checkpoints.restore import LoadReport, Missing, Names, Rename, Unexpected
from nnlearn.checks import check_count
from nnlearn.files import FullDiskError, explaining_full_disk, only_one
from nnlearn.types import PyTree

STEP = re.compile(r"step-(\d{8,})")
METRICS = "metrics"  # where the metadata of a step has them


class Checkpoints:
    """The checkpoints of a run in one folder.

    ``save`` copies the arrays and returns; a thread writes them. An error of the thread is raised by the next call.
    One run at a time may hold a folder; the lock ends with the process, however that ends. With several processes, all
    make the same calls: each writes the parts of arrays that it has, and process 0 the rest.

    Args:
      folder: where the checkpoints are; it is made if it is not there.
      keep_last: how many of the newest checkpoints are kept, at least 1; None for all.
      keep_best: how many of the best by ``metric`` are kept besides.
      metric: the name of a metric in ``save(metrics=...)``.
      mode: ``"min"`` or ``"max"``, which values of the metric are better.
      every_steps: for runs, how many steps lie between two checkpoints; see ``is_due``.
      every_minutes: for runs, how many minutes do.
      asynchronous: whether a thread writes; False to wait for the disk in ``save``.
      on_error: what to do if a checkpoint cannot be written, as on a full disk: ``"raise"``, or ``"warn"`` and continue
        without it. Earlier checkpoints stay in either case.
      read_only: do not lock the folder, and do not save; to inspect a run in progress.

    Raises:
      ValueError: if an argument is out of its range, or another process or object holds the folder.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Checkpoints(folder.name, keep_last=2) as checkpoints:
    ...     for step in (10, 20, 30):
    ...         checkpoints.save(step, {"w": jnp.full(2, step)})
    ...     checkpoints.wait()
    ...     checkpoints.steps(), checkpoints.load(like={"w": jnp.zeros(2, int)})["w"]
    ((20, 30), Array([30, 30], dtype=int32))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = 3,
        keep_best: int = 1,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_steps: int | None = None,
        every_minutes: float | None = None,
        asynchronous: bool = True,
        on_error: Literal["raise", "warn"] = "raise",
        read_only: bool = False,
    ):
        self.keep_last = keep_last if keep_last is None else check_count("keep_last", keep_last)
        self.keep_best = check_count("keep_best", keep_best, at_least=0)
        self.every_steps = every_steps if every_steps is None else check_count("every_steps", every_steps)
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes must be > 0, got {every_minutes!r}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error must be 'raise' or 'warn', got {on_error!r}")
        self.folder, self.metric, self.mode = Path(folder), metric, mode
        self.every_minutes, self.asynchronous, self.on_error = every_minutes, asynchronous, on_error
        self.read_only = read_only
        self._written: Future | None = None
        self._last_step, self._last_time = -1, time.monotonic()
        self._pinned: int | None = None
        self._held = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nnlearn-checkpoints")
        self._guard = threading.Lock()
        self._first = jax.process_index() == 0
        if every_minutes is not None and jax.process_count() > 1:
            raise ValueError("every_minutes needs one clock, and there are several processes: give every_steps")
        if not read_only and self._first:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(only_one(self.folder, "saving checkpoints"))
            except ValueError as error:
                raise ValueError(
                    f"{error}; in one process, close() the other Checkpoints first; to look only, read_only=True"
                ) from error

    def save(
        self,
        step: int,
        tree: PyTree,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a step. The tree may be donated or changed as soon as this returns.

        Args:
          step: the step, >= 0; one that was saved before is replaced.
          tree: see ``nnlearn.checkpoints.save``.
          metrics: numbers by name; the rule for the best goes by one of them.
          metadata: JSON values to record.

        Raises:
          TypeError: if a leaf cannot be saved.
          ValueError: if this object is read-only or closed, or ``metrics`` lacks the metric of the rule.
          OSError: if this or the last checkpoint could not be written, and ``on_error`` is ``"raise"``;
            ``nnlearn.files.FullDiskError`` if the disk is full.
        """
        if self.read_only:
            raise ValueError(f"{str(self.folder)!r} was opened with read_only=True: nothing can be saved")
        step = check_count("step", step, at_least=0)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self.metric is not None and numbers and self.metric not in numbers:
            raise ValueError(f"metrics has no {self.metric!r}, by which the best are kept; it has {sorted(numbers)}")
        # JSON has no infinite numbers and no NaN.
        facts = dict(metadata or {}) | {METRICS: {name: value.hex() for name, value in numbers.items()}}
        self.wait()  # at most one copy of the tree waits for the disk
        self._last_step, self._last_time = step, time.monotonic()
        described = snapshot(tree) if self.asynchronous else describe(tree)
        self._written = self._pool.submit(self._write, step, described, facts)
        if not self.asynchronous:
            self.wait()

    def _write(self, step: int, described: tuple[Node, Arrays], metadata: dict[str, Any]) -> None:
        node, arrays = described
        # this run holds the folder: all drafts are of killed ones
        for pattern in (".step-*.draft", ".step-*.deleted") if self._first else ():
            for old in self.folder.glob(pattern):
                shutil.rmtree(old, ignore_errors=True)
        steps = [str(each) for each in self.steps()]
        safe = f"Earlier checkpoints are safe, of step {', '.join(steps)}" if steps else "It was the first checkpoint"
        with explaining_full_disk(self.path(step), safe, total_bytes(arrays)):
            write(self.path(step), node, arrays, metadata, step)
            self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        """Delete what no rule keeps, once the newest has been read back."""
        if self.keep_last is None or not self._first:
            return
        steps = self.steps()
        kept = {*steps[-self.keep_last :], newest, self._pinned, *self._ranked(steps)[: self.keep_best]}
        old = [step for step in steps if step not in kept]
        if old:
            verify(self.path(newest))
        for step in old:
            grave = self.folder / f".{self.path(step).name}.deleted"
            self.path(step).rename(grave)  # killed while it deletes, no half of a checkpoint is seen
            shutil.rmtree(grave, ignore_errors=True)

    def pin(self, step: int | None) -> None:
        """Keep a step whatever the rules say, in place of the one that was pinned before."""
        self._pinned = step

    def path(self, step: int) -> Path:
        """The folder of a step; ``nnlearn.checkpoints.load`` reads it."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> tuple[int, ...]:
        """The saved steps, from the first to the newest, damaged ones included."""
        if not self.folder.is_dir():
            return ()
        found = (STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match))

    def latest(self) -> int | None:
        """The newest step that is not damaged; None if there is none. Damaged ones are named in a warning."""
        self.wait()
        return next((step for step in reversed(self.steps()) if self._is_good(step)), None)

    def best(self) -> int | None:
        """The step with the best value of ``metric`` that is not damaged; None if there is none.

        Raises:
          ValueError: if this object has no ``metric``.
        """
        if self.metric is None:
            raise ValueError("best() needs a metric: Checkpoints(folder, metric='validation_loss', mode='min')")
        self.wait()
        return next((step for step in self._ranked(self.steps()) if self._is_good(step)), None)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step.

        Raises:
          FileNotFoundError: if the step was not saved.
          CheckpointError: if its manifest is damaged.
        """
        return {name: float.fromhex(value) for name, value in self._manifest(step).metadata.get(METRICS, {}).items()}

    def _ranked(self, steps: tuple[int, ...]) -> list[int]:
        """The steps that have the metric, the best first, a later one before an equal earlier one."""
        if self.metric is None:
            return []
        values: dict[int, float] = {}
        for step in steps:
            with contextlib.suppress(CheckpointError, FileNotFoundError):
                value = self.metrics(step).get(self.metric, math.nan)
                if math.isfinite(value):
                    values[step] = value if self.mode == "min" else -value
        return sorted(values, key=lambda step: (values[step], -step))

    def _manifest(self, step: int) -> Any:
        manifest = read_manifest(self.path(step))
        if manifest.step != step:
            raise CheckpointError(self.path(step), f"its manifest is of step {manifest.step}: the folder was renamed")
        return manifest

    def _damage(self, step: int) -> str | None:
        """Why a step cannot be used; None if every byte is right."""
        try:
            self._manifest(step)
            verify(self.path(step))
        except (CheckpointError, FileNotFoundError) as error:
            return str(error)
        return None

    def _is_good(self, step: int) -> bool:
        damage = self._damage(step)
        if damage is not None:
            _warn_of_damage(step, damage)
        return damage is None

    def load(
        self,
        like: PyTree | None = None,
        step: int | None = None,
        *,
        only: Names | None = None,
        rename: Rename | None = None,
        missing: Missing = "error",
        unexpected: Unexpected = "error",
        report: Callable[[LoadReport], Any] | None = None,
    ) -> PyTree:
        """The tree of a step.

        Args:
          like, only, rename, missing, unexpected, report: see ``nnlearn.checkpoints.load``.
          step: a saved step; None for the newest that is not damaged.

        Raises:
          FileNotFoundError: if nothing was saved, or not that step.
          CheckpointError: if the step is damaged, or does not fit ``like``.
        """
        check_options(like, missing, unexpected, any(option is not None for option in (only, rename, report)))
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{str(self.folder)!r} has no step {step}; it has {list(steps)}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest = self._manifest(candidate)
                arrays = read_all(self.path(candidate), manifest)
            except (CheckpointError, FileNotFoundError) as error:
                if step is not None:
                    raise
                _warn_of_damage(candidate, error)
                continue
            path = self.path(candidate)
            return fit_tree(path, manifest.tree, arrays, like, only, rename, missing, unexpected, report)
        raise FileNotFoundError(f"{str(self.folder)!r} has no checkpoint that can be used")

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata that was saved with a step, without its metrics.

        Raises:
          FileNotFoundError: if the step was not saved.
          CheckpointError: if its manifest is damaged.
        """
        return {name: value for name, value in self._manifest(step).metadata.items() if name != METRICS}

    def verify(self) -> dict[int, str]:
        """Check every byte of every step; the reasons of those that are damaged, by step.

        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(1, jnp.ones(3))
        ...     checkpoints.wait()
        ...     checkpoints.verify()
        {}
        """
        self.wait()
        found = {step: self._damage(step) for step in self.steps()}
        return {step: damage for step, damage in found.items() if damage is not None}

    def is_due(self, step: int) -> bool:
        """Whether a run saves after ``step`` steps, by ``every_steps`` and ``every_minutes``; without both, always."""
        if self.every_steps is None and self.every_minutes is None:
            return True
        every = self.every_steps
        by_steps = every is not None and step // every > max(self._last_step, 0) // every
        passed = (time.monotonic() - self._last_time) / 60
        return by_steps or (self.every_minutes is not None and passed >= self.every_minutes)

    def wait(self) -> None:
        """Wait until the last ``save`` is on the disk.

        Raises:
          OSError: if it could not be written, and ``on_error`` is ``"raise"``.
        """
        with self._guard:
            written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
        except OSError as error:
            message = f"step {self._last_step} could not be saved: {error.strerror or error}"
            if not isinstance(error, FullDiskError):
                message += f"; earlier checkpoints are safe in {str(self.folder)!r}"
            if self.on_error == "raise":
                kind = FullDiskError if isinstance(error, FullDiskError) else OSError
                raise kind(error.errno, f"{message}; on_error='warn' continues without it") from error
            warnings.warn(message, stacklevel=3)

    def close(self) -> None:
        """Wait for the last save, and release the folder."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._held.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, steps={list(self.steps())})"


def _warn_of_damage(step: int, damage: str | Exception) -> None:
    warnings.warn(f"skipped the damaged checkpoint of step {step}: {damage}", stacklevel=4)


def snapshot(tree: PyTree) -> tuple[Node, Arrays]:
    """``describe`` of a tree, whose arrays no donation and no change in place can reach.

    Arrays of JAX on a CPU are viewed, not copied: XLA does not reuse memory that NumPy views, and gives a program to
    which such an array is donated other memory. Arrays on other devices are fetched. NumPy arrays are copied.

    Raises:
      TypeError: if a leaf cannot be saved.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        check_leaf(leaf, path)
    tree = unpacked(tree)
    for leaf in jax.tree.leaves(tree):
        addressable = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        if addressable and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf.copy_to_host_async()
    return describe(jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree))


__all__ = ["Checkpoints"]
