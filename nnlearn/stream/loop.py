"""The host loop of a run: takes blocks of batches, checks, saves, calls back, and ends the run."""

import contextlib
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax

from nnlearn.distributed import check_equal
from nnlearn.distributed.start import announce_failure
from nnlearn.distributed.stop import StopTogether
from nnlearn.stream.blocks import Block, Boundaries, EpochEnd
from nnlearn.stream.callbacks import Callbacks, State
from nnlearn.stream.dispatch import Dispatcher
from nnlearn.stream.interrupt import REASONS, Interrupt
from nnlearn.stream.place import START
from nnlearn.stream.prefetch import Prefetch
from nnlearn.stream.record import Recorder
from nnlearn.stream.rollback import FaultFinder
from nnlearn.stream.saving import RunSaver
from nnlearn.train.trace import ALL_STEPS, Trace

UNREAD = 2  # calls whose losses are not yet read back, so that the device has work while the host reads


class FitResult(NamedTuple, Generic[State]):
    """The result of ``fit``; unpacks like that of a ``Train``: ``state, trace = fit(...)``.

    Attributes:
      state: the last state, or the whole state of the best check if a rule keeps that, of the type that ``fit`` was
        given. The ``step`` of a best state is ``trace.best_step``: a run that continues from it repeats the steps after
        that check.
      trace: the recorded values.
    """

    state: State
    trace: Trace

    @property
    def stopped_by(self) -> str:
        """A rule's name, ``"callback"``, ``"interrupted"`` (Ctrl-C), ``"terminated"`` (SIGTERM) or ``"all steps"``."""
        return str(self.trace.stopped_by)


class HostLoop:
    """Takes blocks of batches from a stream until something ends the run.

    Args:
      dispatcher: the state of the run, and its programs.
      recorder: records infos and metrics.
      callbacks: the callbacks.
      save: see ``fit``.
      boundaries: where blocks end.
      check_every: steps between two checks, or None for checks at the ends of epochs.
      saver: saves the run in checkpoints, or None.
      finder: looks for faults, at which the run returns to a checkpoint, or None.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        recorder: Recorder,
        callbacks: Callbacks,
        save: Callable[[str, Any, int], Any] | None,
        boundaries: Boundaries,
        check_every: int | None,
        saver: RunSaver | None = None,
        finder: FaultFinder | None = None,
    ):
        self._dispatcher, self._recorder, self._callbacks, self._save = dispatcher, recorder, callbacks, save
        self._boundaries, self._check_every = boundaries, check_every
        self._saver, self._place = saver, START if saver is None else saver.place
        self._finder = finder
        self._step = boundaries.first  # steps made so far
        self._longest = 0  # steps of the longest block so far; 0 before the first
        self._saved_at: int | None = None
        self._ended_by = ""
        self._final_called = False  # whether the callbacks have seen the final event

    def run(self, ahead: Prefetch[Block | EpochEnd], interrupt: Interrupt) -> FitResult[Any]:
        """Make steps and checks until something ends the run."""
        if self._dispatcher.reason:  # a rule has stopped the run that is resumed
            self._ended_by = self._dispatcher.rule_names[self._dispatcher.reason - 1]
        together = StopTogether()
        while not (self._ended_by or self._final_called):
            item = ahead.get(lambda: together.alone and interrupt.reason is not None)
            reason = together.reason(interrupt.reason, self._step, (UNREAD + 2) * self._longest)
            if reason is not None:
                self._ended_by = reason
                break
            if item is None:
                self._ended_by = ALL_STEPS
                break
            self._use(item)
            checked = self._dispatcher.steps_since_check == 0
            if self._saver is not None and self._saver.is_due(self._step, checked):
                self._save_run(scheduled=True)
        return self._finish()

    def _use(self, item: Block | EpochEnd) -> None:
        """The steps of a block, and what is due after them or at the end of an epoch."""
        if isinstance(item, Block):
            self._make_steps(item)
        self._place = item.place  # now: a signal or an error in what follows must save the place of these steps
        if isinstance(item, Block):
            last = self._step == self._boundaries.last or (item.end is not None and item.end.last)
            at_epoch_end = item.end is not None and self._boundaries.epoch_ends
            at_period = self._check_every is not None and self._step % self._check_every == 0
            checks = last or at_epoch_end or at_period
            self._after_steps(checks and not self._undo_fault(checks), last)
        elif item.last or self._boundaries.epoch_ends:
            checks = self._dispatcher.steps_since_check > 0
            self._after_steps(checks and not self._undo_fault(checks), item.last)

    def rescue(self, error: BaseException) -> None:
        """Write the records and save the state after an error, without hiding that error."""
        if jax.process_count() > 1:  # values and checkpoints may wait for processes that do not come
            announce_failure(error)
            return
        with contextlib.suppress(Exception):
            self._recorder.read()
        made_steps = self._step > self._boundaries.first
        if isinstance(error, Exception) and made_steps and not (self._dispatcher.is_lost() or self._has_failed()):
            try:
                self._save_last()
                self._save_run()
            except Exception as another:
                error.add_note(f"the last state could not be saved either: {another!r}")

    def _save_run(self, scheduled: bool = False) -> None:
        """Save when that is due, or at the end of this run."""
        if self._saver is None:
            return
        self._undo_fault(scheduled)
        what = (self._step, self._place, self._dispatcher, self._recorder)
        self._saver.save(*what, scheduled=True) if scheduled else self._saver.save_last(*what)

    def _has_failed(self) -> bool:
        """Whether there was a fault that is not undone: then nothing may be saved."""
        return self._finder is not None and self._finder.fault is not None

    def _undo_fault(self, due: bool) -> bool:
        """Return to the last good checkpoint if there was a fault; whether there was one."""
        if self._finder is None or self._saver is None or not due:
            return False
        self._recorder.read()
        failed = self._has_failed()
        if failed:
            self._saver.roll_back(self._step, self._dispatcher, self._recorder, self._finder)
        return failed

    def _make_steps(self, block: Block) -> None:
        if self._saver is not None:
            self._saver.check_program(self._dispatcher, block)
        if not self._longest and jax.process_count() > 1:
            check_equal("the program of the step", self._dispatcher.program_hash(block))
        self._longest = max(self._longest, block.size)
        infos = self._dispatcher.make_steps(block)
        self._recorder.add(self._step, block.steps, infos)
        self._step += block.steps
        self._recorder.read(leave=UNREAD)

    def _after_steps(self, checks: bool, last: bool) -> None:
        """Check, save and call back if due."""
        if checks:
            self._check()
        final = checks and (last or bool(self._ended_by))
        if final or self._callbacks.due(self._step, checks):
            self._call_back(checks, final)

    def _check(self) -> None:
        """Evaluate, apply the rules, save."""
        self._recorder.add_check(self._step, self._dispatcher.check())
        if self._dispatcher.reason:
            self._ended_by = self._dispatcher.rule_names[self._dispatcher.reason - 1]
        if self._save is not None:
            best = self._dispatcher.best_step
            if best is not None and int(best) == self._step:
                self._save("best", self._dispatcher.user_state, self._step)
            self._save_last()

    def _save_last(self) -> None:
        if self._save is not None and self._saved_at != self._step:
            self._saved_at = self._step  # before the call: ``rescue`` must not repeat a save that failed
            self._save("last", self._dispatcher.user_state, self._step)

    def _call_back(self, checks: bool, final: bool) -> None:
        self._recorder.read()
        metrics = self._recorder.latest if checks or final else {}
        before = self._dispatcher.user_state
        state, wants_end = self._callbacks.call(self._step, before, metrics, checked=checks, final=final)
        self._final_called = final
        if state is not before:
            self._dispatcher.replace_state(state)
            if self._saved_at == self._step:  # save again: a resumed run must continue from the new state
                self._saved_at = None
                self._save_last()
        if wants_end and not final:
            self._ended_by = "callback"

    def _finish(self) -> FitResult[Any]:
        """The last check, save and callbacks; then the result."""
        interrupted = self._ended_by in REASONS.values()
        checks = not interrupted and self._dispatcher.steps_since_check > 0
        checks = checks and not self._undo_fault(checks)
        if checks:
            self._check()
        self._recorder.read()
        failed = self._has_failed()
        if not failed:
            self._save_last()
        if not self._final_called:
            self._call_back(checks, final=True)
        self._recorder.read()
        if not failed:
            self._save_run()
        dispatcher = self._dispatcher
        trace = self._recorder.trace(
            self._step,
            dispatcher.reason,
            dispatcher.best_step,
            dispatcher.rule_names,
            self._ended_by or ALL_STEPS,
            () if self._saver is None else self._saver.rollbacks,
        )
        return FitResult(dispatcher.result(), trace)


__all__ = ["FitResult", "HostLoop"]
