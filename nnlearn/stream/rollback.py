"""Return to the last good checkpoint when training fails, and skip the batches since."""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nnlearn.checkpoints import CheckpointError, Checkpoints, verify
from nnlearn.checks import check_count, check_number
from nnlearn.train.step import Info

TO_SIGMA, FLOOR = 1.4826, 1e-3  # as in ``skip_spikes``


class FaultError(RuntimeError):
    """Training failed again after all roll-backs that were allowed; the last good checkpoint is there."""


class RollBack(NamedTuple):
    """At a fault, ``fit`` and ``nnlearn.run`` return to the last good checkpoint, and skip the batches since.

    A fault is a recorded loss or gradient norm that is not finite, or a spike, unless a guard of the optimizer has
    skipped the step. The run looks for faults at every check and before every checkpoint. At a fault it takes the
    parameters, the optimizer's state and the memory of the rules from the last checkpoint. The steps since then count
    as made, and their batches are not used again. ``info.skipped`` is True for them in trace and history, and
    ``trace.rollbacks`` has the first and last of each such stretch. A resumed run rolls back at the same steps to the
    same checkpoints, if steps or checks decide when it is saved; with ``every_minutes`` the clock decides.

    Attributes:
      limit: how many roll-backs a run may need; the next fault raises ``FaultError``.
      sigmas: how many robust standard deviations above the last values a spike is, see ``skip_spikes``; None to look
        only for values that are not finite.
      window: the number of last values, without those of skipped steps.
      of: the recorded value, ``"loss"`` or ``"grad_norm"``.

    Source: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5.1.

    >>> RollBack(limit=5).sigmas
    6.0
    """

    limit: int = 3
    sigmas: float | None = 6.0
    window: int = 128
    of: Literal["loss", "grad_norm"] = "loss"

    def checked(self) -> "RollBack":
        """This policy.

        Raises:
          ValueError: if one of its settings is out of its range.
        """
        check_count("limit", self.limit, at_least=0)
        check_count("window", self.window, at_least=2)
        if self.sigmas is not None:
            check_number("sigmas", self.sigmas, low=0, low_open=True)
        if self.of not in ("loss", "grad_norm"):
            raise ValueError(f"of must be 'loss' or 'grad_norm', got {self.of!r}")
        return self


class Fault(NamedTuple):
    """The first fault since the last roll-back: its step, and what is wrong."""

    step: int
    why: str


class FaultFinder:
    """Looks for faults in the records of a run, in their order.

    >>> nothing = np.zeros(3, bool)
    >>> finder = FaultFinder(RollBack())
    >>> finder.add(np.arange(1, 4), Info(np.array([1.0, np.nan, 1.0]), None, None, None, None, skipped=nothing))
    >>> finder.fault
    Fault(step=2, why='the loss is nan')
    """

    def __init__(self, policy: RollBack):
        self.policy = policy.checked()
        self.fault: Fault | None = None
        self._last = np.zeros(0)  # the last values

    def restart(self, info: Info | None) -> None:
        """Forget the fault; the window has the last values of these records."""
        self.fault, self._last = None, np.zeros(0)
        if info is not None:
            self._last = self._usable(info)[-self.policy.window :]

    def require_another(self, rollbacks: Sequence[Any], target: int) -> None:
        """Raise ``FaultError`` if no other roll-back is allowed."""
        if len(rollbacks) >= self.policy.limit:
            fault = self.fault or Fault(0, "nothing")
            raise FaultError(
                f"training failed at step {fault.step}: {fault.why}. RollBack(limit={self.policy.limit}) permits no "
                f"other roll-back; the state of step {target} is good. Lower the learning rate, clip the gradient, "
                "look at the batches there, or permit more"
            )

    def add(self, steps: np.ndarray, info: Info) -> None:
        """Look at further records.

        Raises:
          ValueError: if the value that the policy looks at is not recorded.
        """
        skipped, loss = np.asarray(info.skipped), np.asarray(info.loss, np.float64)
        wrong = {"the loss is": loss}
        if info.grad_norm is not None:
            wrong["the gradient norm is"] = np.asarray(info.grad_norm, np.float64)
        elif self.policy.of == "grad_norm":
            raise ValueError("RollBack(of='grad_norm') needs the gradient norms: make_step(..., record=('grad_norm',))")
        found = []
        for words, values in wrong.items():
            bad = np.flatnonzero(~np.isfinite(values) & ~skipped)
            found += [Fault(int(steps[at]), f"{words} {values[at]}") for at in bad[:1]]
        usable = self._usable(info)
        if self.policy.sigmas is not None and usable.size:
            found += self._spikes(steps[self._is_usable(info)], usable)
        self._last = np.concatenate([self._last, usable])[-self.policy.window :]
        if self.fault is None:
            self.fault = min(found, key=lambda fault: fault.step, default=None)

    def _spikes(self, steps: np.ndarray, values: np.ndarray) -> list[Fault]:
        size, sigmas = self.policy.window, self.policy.sigmas or 0.0
        padded = np.concatenate([np.full(size - len(self._last), np.nan), self._last, values[:-1]])
        windows = np.lib.stride_tricks.sliding_window_view(padded, size)
        enough = len(self._last) + np.arange(len(values)) >= size // 2
        windows, steps, values = windows[enough], steps[enough], values[enough]
        middle = np.nanmedian(windows, axis=1)
        sigma = TO_SIGMA * np.nanmedian(np.abs(windows - middle[:, None]), axis=1)
        limit = middle + sigmas * np.maximum(sigma, FLOOR * np.abs(middle))
        return [
            Fault(int(steps[at]), f"the {self.policy.of} is {values[at]:.4g}, a spike above {limit[at]:.4g}")
            for at in np.flatnonzero(values > limit)[:1]
        ]

    def _is_usable(self, info: Info) -> np.ndarray:
        values: Any = getattr(info, self.policy.of)
        return np.isfinite(np.asarray(values, np.float64)) & ~np.asarray(info.skipped)

    def _usable(self, info: Info) -> np.ndarray:
        return np.asarray(getattr(info, self.policy.of), np.float64)[self._is_usable(info)]


def last_scheduled(checkpoints: Checkpoints) -> int | None:
    """The newest good checkpoint that was due, and not saved because a signal or an error ended a run; None without."""
    checkpoints.wait()
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(CheckpointError):
            if checkpoints.metadata(step).get("scheduled"):
                verify(checkpoints.path(step))
                return step
    return None


def with_skipped(info: Any) -> Any:
    """An info that tells for each of its steps whether it was skipped."""
    if info.skipped is not None:
        return info
    return info._replace(skipped=np.zeros(info.loss.shape, bool))


__all__ = ["Fault", "FaultError", "FaultFinder", "RollBack", "last_scheduled", "with_skipped"]
