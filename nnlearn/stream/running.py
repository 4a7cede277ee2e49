"""A host-driven run under way: what lies on the device, what was made of it, and how it ends."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.stream.callbacks import Calls
from nnlearn.stream.dispatch import Carry, kept_on, make_block, make_check
from nnlearn.stream.host_metrics import HostMetrics
from nnlearn.stream.interrupt import Interrupt
from nnlearn.stream.record import Recorder
from nnlearn.stream.stream import Block, Plan, Prefetch
from nnlearn.sums import Total
from nnlearn.train.aux_metrics import aux_names
from nnlearn.train.custom_step import own_state, with_own_state
from nnlearn.train.state import TrainState
from nnlearn.train.trace import ALL_STEPS, Trace
from nnlearn.train.verdict import best_state, first_verdict

UNREAD = 2  # calls whose losses are not yet read back: the device has work while the host reads


class FitResult(NamedTuple):
    """How a run has ended; unpacks like what a ``Train`` returns, ``state, trace = fit(...)``.

    Attributes:
      state: the last state, or the whole state of the best check where a rule keeps that, of the type that ``fit`` was
        given; its ``step`` is then
        ``trace.best_step``, and a run that goes on from it makes the steps after that check again.
      trace: what was recorded.
    """

    state: Any
    trace: Trace

    @property
    def stopped_by(self) -> str:
        """A rule's name, ``"callback"``, ``"interrupted"`` (Ctrl-C), ``"terminated"`` (SIGTERM) or ``"all steps"``."""
        return self.trace.stopped_by


class Running:
    """Takes blocks of batches from a stream until something ends the run.

    Args:
      step, evaluate, save: see ``fit``.
      state: as loops carry it; its memory is taken.
      host: what is computed on the host at checks.
      rules: the stopping rules.
      calls: the callbacks.
      plan: where blocks end.

    Raises:
      TypeError, ValueError: ``evaluate`` returns no dict of scalars, or a rule asks for what is not in it.
    """

    def __init__(self, step, state, evaluate, rules, calls: Calls, save, plan: Plan, host: HostMetrics):
        self.rules, self.calls, self.save, self.plan, self.host = rules, calls, save, plan, host
        self.sums = aux_names(rules)
        self.block = kept_on(step, "block", self.sums, lambda: make_block(step, self.sums))
        self.check = kept_on(step, "check", (evaluate, rules), lambda: make_check(evaluate, rules))
        # An accelerator asks the host at every turn of a loop whether there is another, unless the number is compiled
        # in. A CPU does not care, and is spared a second program for incomplete blocks.
        self.compile_full = jax.default_backend() != "cpu"
        self.carry: Carry = (state, *_nothing(self.sums))
        # a copy, as the check takes its memory, and the next step takes the state's
        self.verdict = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), first_verdict(rules, state))
        self.at = self.checked_at = plan.first
        self.saved_at: int | None = None
        self.ended_by = ""
        self.told = False  # whether the callbacks know of the end
        self.recorder: Recorder
        # What is wrong with evaluate or the rules is said now, not at the first check.
        found = self.host(own_state(state))
        self.metrics = list(self.check.eval_shape(self.verdict, self.carry, np.float32(1), found)[0])

    @property
    def state(self) -> TrainState:
        return self.carry[0]

    def train(self, ahead: Prefetch, interrupt: Interrupt, check_every: int | None) -> FitResult:
        """Steps and checks until something ends the run."""
        while not (self.ended_by or self.told):
            item = ahead.get(lambda: interrupt.reason is not None)
            if interrupt.reason is not None:
                self.ended_by = interrupt.reason
            elif item is None:
                self.ended_by = ALL_STEPS
            elif isinstance(item, Block):
                self.make_steps(item)
                last = self.at == self.plan.last or (item.end is not None and item.end.last)
                at_epoch_end = item.end is not None and self.plan.epoch_ends
                at_period = check_every is not None and self.at % check_every == 0
                self.look(last or at_epoch_end or at_period, last)
            elif item.last or self.plan.epoch_ends:
                self.look(self.at > self.checked_at, item.last)
        return self.finish()

    def make_steps(self, block: Block) -> None:
        """The steps of a block; does not wait for them."""
        count = None if self.compile_full and block.count == block.size else np.int32(block.count)
        self.carry, infos = self.block(self.carry, block.batches, count, block.size)
        self.recorder.add(self.at, block.count, infos)
        self.at += block.count
        self.recorder.read(leave=UNREAD)

    def look(self, checks: bool, last: bool) -> None:
        """Check, save and call back, where it is time to."""
        if checks:
            self.make_check()
        final = checks and (last or bool(self.ended_by))
        if final or self.calls.due(self.at, checks):
            self.call_back(checks, final)

    def make_check(self) -> None:
        """Evaluate, ask the rules, save."""
        count = np.float32(self.at - self.checked_at)
        found = self.host(own_state(self.state))
        metrics, self.verdict = self.check(self.verdict, self.carry, count, found)
        self.carry = (self.state, *_nothing(self.sums))
        self.checked_at = self.at
        self.recorder.add_check(self.at, metrics)
        if self.rules and int(self.verdict.reason):
            self.ended_by = self.rules[int(self.verdict.reason) - 1].name
        if self.save is not None:
            if self.verdict.best is not None and int(self.verdict.best.step) == self.at:
                self.save("best", own_state(self.state), self.at)
            self.save_last()

    def save_last(self) -> None:
        if self.save is not None and self.saved_at != self.at:
            self.saved_at = self.at  # before the call: what fails is not tried again on the way out
            self.save("last", own_state(self.state), self.at)

    def call_back(self, checks: bool, final: bool) -> None:
        self.recorder.read()
        metrics = self.recorder.latest if checks or final else {}
        before = own_state(self.state)
        state, wants_end = self.calls.at(self.at, before, metrics, checked=checks, final=final)
        self.told = final
        if state is not before:
            self.carry = (with_own_state(self.state, state), *self.carry[1:])
            if self.saved_at == self.at:  # what is saved is what the run goes on from
                self.saved_at = None
                self.save_last()
        if wants_end and not final:
            self.ended_by = "callback"

    def finish(self) -> FitResult:
        """The last check, the last callbacks, the last save; then the result."""
        interrupted = self.ended_by in ("interrupted", "terminated")
        checks = not interrupted and self.at > self.checked_at
        if checks:
            self.make_check()
        self.save_last()
        if not self.told:
            self.call_back(checks, final=True)
        self.recorder.read()
        best_step = None if self.verdict.best is None else self.verdict.best.step
        unchecked = best_step is not None and not int(best_step)  # a run that was interrupted before its first check
        state = self.state if unchecked else best_state(self.verdict, self.state)
        names = [rule.name for rule in self.rules]
        trace = self.recorder.trace(self.at, int(self.verdict.reason), best_step, names, self.ended_by or ALL_STEPS)
        return FitResult(own_state(state), trace)

    def rescue(self, error: BaseException) -> None:
        """Write and save what there is, on the way out with an error; nothing here may hide that."""
        with contextlib.suppress(Exception):
            self.recorder.read()
        gone = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        if isinstance(error, Exception) and self.at > self.plan.first and not gone:
            try:
                self.save_last()
            except Exception as another:
                error.add_note(f"the last state could not be saved either: {another!r}")


def _nothing(names: Sequence[str] = ()) -> tuple[Total, jax.Array, dict[str, Total]]:
    """The sum of no losses, the number of no skipped steps and other empty sums, in new memory: the steps take it."""
    dtype = jax.dtypes.canonicalize_dtype(np.float64)

    def nothing():
        return Total(np.zeros([], dtype), np.zeros([], dtype))

    return jax.device_put((nothing(), np.int32(0), {name: nothing() for name in names}))


__all__ = ["FitResult", "Running"]
