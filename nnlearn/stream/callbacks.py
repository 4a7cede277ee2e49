"""Functions that look at a host-driven run while it goes on, and may end it or change its state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nnlearn.calls import check_takes
from nnlearn.checks import check_count
from nnlearn.stream.changed_state import changed_state
from nnlearn.stream.history import Row


class Event(NamedTuple):
    """What a callback of ``fit`` is told.

    Attributes:
      step: steps made so far.
      state: the state after them, of the type that ``fit`` was given. The next step takes its memory: of what you want
        to keep, ``jax.device_get`` a copy.
      metrics: at a check, ``train_loss`` and what ``evaluate`` and ``host_metrics`` returned, as Python floats; else
        empty.
      rows: what was recorded since this callback was last called: dicts with ``step``, the scalars of ``info`` and, at
        checks, the metrics, ``check/loss`` for one that is called ``loss`` like a column before it.
      final: whether the run has ended, and this call is the last.
    """

    step: int
    state: Any
    metrics: dict[str, float]
    rows: list[Row]
    final: bool


Callback = Callable[[Event], Any]


class Every(NamedTuple):
    """A callback that is called every so many steps; made by ``every``."""

    steps: int
    function: Callback


def every(steps: int, callback: Callback) -> Every:
    """Have ``fit`` call a callback after every so many steps, and at the end, instead of at every check.

    Args:
      steps: >= 1; it is called where the state's step is a multiple of them. Steps in between go to the device
        together, so a small number costs speed.
      callback: ``callback(event)``; a state that it returns is gone on with, any other true value ends the run. At the
        end it is called out of its period, too; a state that it returns then is not used.

    Raises:
      TypeError: ``callback`` is no function of one argument.

    >>> every(100, lambda event: print(event.step)).steps
    100
    """
    check_takes(callback, "callback", "event")
    return Every(check_count("steps", steps), callback)


class Calls:
    """The callbacks of a run, each with the rows that it has not seen.

    >>> calls = Calls([lambda event: event.rows[-1]["loss"] < 0.1])
    >>> calls.write([{"step": 1, "loss": 0.01}])
    >>> calls.at(1, None, {}, checked=True, final=False)
    (None, True)
    """

    def __init__(self, callbacks: Callback | Every | Sequence[Callback | Every]):
        callbacks = [callbacks] if callable(callbacks) or isinstance(callbacks, Every) else callbacks
        self._callbacks: list[tuple[int | None, Callback, list[Row]]] = []
        for callback in callbacks:
            steps, function = callback if isinstance(callback, Every) else (None, callback)
            check_takes(function, "a callback", "event")
            self._callbacks.append((steps, function, []))
        self.periods = tuple({steps for steps, _, _ in self._callbacks if steps is not None})
        self._called_at: int | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def write(self, rows: Sequence[Row]) -> None:
        """Keep rows for every callback."""
        for _, _, unseen in self._callbacks:
            unseen.extend(rows)

    def due(self, step: int, checked: bool) -> bool:
        """Whether any callback is to be called after this step."""
        return any(self._is_due(steps, step, checked) for steps, _, _ in self._callbacks)

    def at(self, step: int, state: Any, metrics: dict[str, float], *, checked: bool, final: bool) -> tuple[Any, bool]:
        """Call those whose turn it is: the state, as they have changed it, and whether one wants the run to end."""
        ends = False
        for steps, function, unseen in self._callbacks:
            due = self._is_due(steps, step, checked)
            if final or due:
                rows = unseen.copy()
                unseen.clear()
                answer = function(Event(step, state, dict(metrics), rows, final))
                new = changed_state(answer, state)
                if new is None:
                    ends |= _wants_end(answer)
                elif due:  # a run in two parts has its states changed where one run has
                    state = new
        self._called_at = step
        return state, ends

    def _is_due(self, steps: int | None, step: int, checked: bool) -> bool:
        """A period has its turn once, though it may only be known later that an epoch, too, has ended at the step."""
        return checked if steps is None else step % steps == 0 and step != self._called_at


def _wants_end(answer: Any) -> bool:
    """Whether what a callback returned is true: Python's, NumPy's or JAX's True, or anything else that ``if`` takes."""
    try:
        return answer is not None and bool(answer)
    except (TypeError, ValueError) as error:  # an array of several numbers
        raise TypeError(
            f"a callback must return one true or false value, or None, to say whether the run ends; got {answer!r}"
        ) from error


__all__ = ["Callback", "Calls", "Event", "Every", "every"]
