"""An agreement of all processes on the step at which an interrupted run ends."""

import contextlib
import json

import jax

from nnlearn.distributed.store import client

_runs = 0


class StopTogether:
    """Turns the interruption of one process into an end of all at the same step.

    The process that is interrupted proposes a step that no process has reached yet, and all look for a proposal before
    each call of the program. With one process, the run ends at once.
    """

    def __init__(self) -> None:
        global _runs
        _runs += 1  # all processes make the same runs
        self._key, self._alone = f"nnlearn/stop/{_runs}", jax.process_count() == 1

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self._alone

    def reason(self, interrupted: str | None, step: int, ahead: int) -> str | None:
        """Why the run ends at this step, or None.

        Args:
          interrupted: why this process was interrupted, or None.
          step: the number of steps so far.
          ahead: the number of steps by which another process can be ahead.

        >>> StopTogether().reason("terminated", 10, 4)
        'terminated'
        """
        if self._alone:
            return interrupted
        if interrupted is not None:
            with contextlib.suppress(Exception):  # another process was first
                client().key_value_set(self._key, json.dumps([interrupted, step + ahead]))
        found = _get(self._key)
        if found is None:
            return None
        why, at = json.loads(found)
        return why if step >= at else None


def _get(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except Exception:  # there is none
        return None


__all__ = ["StopTogether"]
