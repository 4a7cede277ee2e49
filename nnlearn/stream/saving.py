"""Checkpoints of a host-driven run: everything that it needs to continue, and a check that it is the same run."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnlearn.checkpoints import CheckpointError, Checkpoints
from nnlearn.checkpoints.folder import load_parts
from nnlearn.stream.blocks import Block
from nnlearn.stream.dispatch import Dispatcher
from nnlearn.stream.identity import refuse_another, shapes_by_path
from nnlearn.stream.place import START, Place
from nnlearn.stream.record import Recorder
from nnlearn.stream.rollback import FaultFinder, last_scheduled


class RunSaver:
    """Saves and restores a run of ``fit``.

    Args:
      checkpoints: where it is saved.
      settings: the settings that a resumed run must share, as JSON values.
      changed: ``"error"`` refuses to resume another run, ``"accept"`` does not.
    """

    def __init__(self, checkpoints: Checkpoints, settings: dict[str, Any], changed: Literal["error", "accept"]):
        self.checkpoints, self._settings, self._changed = checkpoints, settings, changed
        self.rollbacks: list[tuple[int, int]] = []  # the stretches that were undone
        self._first: tuple[Any, Any] | None = None  # the beginning, until a checkpoint is there
        self._saved: dict[str, Any] | None = None  # the metadata of the run that is resumed
        self._step: int | None = None
        self._program: dict[str, str] = {}
        newest = checkpoints.latest()
        if newest is not None:
            self._step, metadata = newest, checkpoints.metadata(newest)
            if "fit" not in metadata:
                raise CheckpointError(checkpoints.path(newest), "it was not saved by nnlearn.fit: give another folder")
            self._saved = metadata["fit"]
            self.rollbacks = [(first, last) for first, last in metadata["rollbacks"]]

    @property
    def _keeps_good(self) -> bool:
        """Whether a roll-back may need the last good checkpoint."""
        return "on_fault" in self._settings

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint, or None if there is none."""
        return self._step

    @property
    def place(self) -> Place:
        """Where that run was in its stream."""
        return START if self._saved is None else Place(*self._saved["place"])

    def restore(self, dispatcher: Dispatcher, recorder: Recorder) -> None:
        """Put the newest checkpoint in place of the present state and records.

        Raises:
          CheckpointError: if it is of another run.
        """
        if self._keeps_good:
            self._first = jax.tree.map(jnp.copy, (dispatcher.carry, dispatcher.verdict))
            self.checkpoints.pin(last_scheduled(self.checkpoints))
        if self._saved is None or self._step is None:
            return
        path = self.checkpoints.path(self._step)
        like = {"carry": dispatcher.carry, "verdict": dispatcher.verdict}
        now = {"settings": self._settings, "shapes": shapes_by_path(like)}
        self._refuse_another({name: self._saved[name] for name in now}, now)
        parts, records = load_parts(path, like, "records")
        dispatcher.restore(parts["carry"], parts["verdict"], self._saved["steps_since_check"])
        recorder.restore(records)

    def roll_back(self, step: int, dispatcher: Dispatcher, recorder: Recorder, finder: FaultFinder) -> None:
        """Return to the last checkpoint that was due, or to the beginning, as if the steps since had been skipped.

        Raises:
          FaultError: if the policy permits no other roll-back.
        """
        good = last_scheduled(self.checkpoints)
        first = self._settings["first"] if good is None else good
        finder.require_another(self.rollbacks, first)
        if good is None:
            (carry, verdict), since = jax.tree.map(jnp.copy, self._first), 0
        else:
            like = {"carry": dispatcher.carry, "verdict": dispatcher.verdict}
            parts = self.checkpoints.load(like, good, unexpected="ignore")
            since = self.checkpoints.metadata(good)["fit"]["steps_since_check"]
            carry, verdict = parts["carry"], parts["verdict"]
        carry = (carry[0]._replace(step=jnp.array(step, jnp.int32)), *carry[1:])
        dispatcher.restore(carry, verdict, since)
        self.rollbacks.append((first + 1, step))
        recorder.undo(first)

    def check_program(self, dispatcher: Dispatcher, block: Block) -> None:
        """Compare the step with that of the run that is resumed, once a batch has been seen.

        Raises:
          CheckpointError: if its program is another.
        """
        if not self._program:
            self._program = {"jax": jax.__version__, "hash": dispatcher.program_hash(block)}
            if self._saved is not None and self._saved["program"]:
                self._refuse_another({"program": self._saved["program"]}, {"program": self._program})

    def _refuse_another(self, saved: dict[str, Any], now: dict[str, Any]) -> None:
        refuse_another(self.checkpoints.path(self._step or 0), saved, now, self._changed)

    def is_due(self, step: int, checked: bool) -> bool:
        """Whether to save now: as the checkpoints say, or else after each check."""
        timed = self.checkpoints.every_steps is not None or self.checkpoints.every_minutes is not None
        return self.checkpoints.is_due(step) if timed else checked

    def save_last(self, step: int, place: Place, dispatcher: Dispatcher, recorder: Recorder) -> None:
        """Save the run as it is after ``step`` unless the disk has it already, and wait for that."""
        if step == self._step:
            self.checkpoints.wait()
            if step not in self.checkpoints.steps():  # it could not be written
                self._step = None
        self.save(step, place, dispatcher, recorder)
        self.checkpoints.wait()

    def save(
        self, step: int, place: Place, dispatcher: Dispatcher, recorder: Recorder, scheduled: bool = False
    ) -> None:
        """Save the run as it is after ``step``; nothing if that is saved already.

        ``scheduled``: whether it was due; a roll-back returns to no other, so that a signal does not change the run.
        """
        if step == self._step:
            return
        recorder.read()
        like = {"carry": dispatcher.carry, "verdict": dispatcher.verdict}
        facts = {
            "settings": self._settings,
            "shapes": shapes_by_path(like),
            "program": self._program,
            "steps_since_check": dispatcher.steps_since_check,
            "place": list(place),
        }
        tree = like | {"records": recorder.records()}
        if scheduled and self._keeps_good:
            self.checkpoints.pin(step)
        metadata = {"fit": facts, "scheduled": scheduled, "rollbacks": list(map(list, self.rollbacks))}
        self.checkpoints.save(step, tree, metrics=recorder.latest, metadata=metadata)
        self._step = step


__all__ = ["RunSaver"]
