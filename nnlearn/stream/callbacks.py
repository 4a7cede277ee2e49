"""Functions that watch a host-driven run, and may end it or change its state."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from nnlearn.calls import check_takes
from nnlearn.checks import check_count
from nnlearn.stream.changed_state import changed_state
from nnlearn.stream.history import Row

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    State = TypeVar("State", default=Any)  # so that ``Event`` alone is a complete type
else:
    from typing import TypeVar

    State = TypeVar("State")


class Event(NamedTuple, Generic[State]):
    """The argument of a callback of ``fit``.

    Attributes:
      step: steps made so far.
      state: the state after them, of the type that ``fit`` was given. The next step overwrites its memory: keep a copy,
        ``jax.device_get(event.state)``.
      metrics: at a check, ``train_loss`` and the results of ``evaluate`` and ``host_metrics``, as Python floats;
        otherwise empty.
      rows: the rows recorded since the last call of this callback: dicts with ``step``, the scalars of ``info`` and, at
        checks, the metrics. A metric with the name of an earlier column, such as ``loss``, is ``check/loss``.
      final: whether the run has ended and this call is the last.
    """

    step: int
    state: State
    metrics: dict[str, float]
    rows: list[Row]
    final: bool


Callback = Callable[[Event[State]], Any]


class Every(NamedTuple, Generic[State]):
    """A callback with a period in steps; made by ``every``."""

    steps: int
    function: Callback[State]


def every(steps: int, callback: Callback[State]) -> Every[State]:
    """Have ``fit`` call a callback every ``steps`` steps, and at the end, instead of at every check.

    Args:
      steps: the period, >= 1: the callback is called when the state's step is a multiple of it. The steps in between
        go to the device together, so a small period costs speed.
      callback: ``callback(event)``. If it returns a state, the run continues with that state; any other true value ends
        the run. It is also called at the end, where a returned state is ignored.

    Raises:
      TypeError: if ``callback`` is not a function of one argument.

    >>> every(100, lambda event: print(event.step)).steps
    100
    """
    check_takes(callback, "callback", "event")
    return Every(check_count("steps", steps), callback)


class _Listener:
    """A callback, its period (None for every check) and the rows that it has not seen."""

    def __init__(self, callback: Callback | Every):
        self.period, self.function = callback if isinstance(callback, Every) else (None, callback)
        self._unseen: list[Row] = []
        check_takes(self.function, "a callback", "event")

    def add(self, rows: Sequence[Row]) -> None:
        self._unseen.extend(rows)

    def take(self) -> list[Row]:
        rows, self._unseen = self._unseen, []
        return rows


class Callbacks:
    """The callbacks of a run, each with the rows that it has not seen.

    >>> callbacks = Callbacks([lambda event: event.rows[-1]["loss"] < 0.1])
    >>> callbacks.write([{"step": 1, "loss": 0.01}])
    >>> callbacks.call(1, None, {}, checked=True, final=False)
    (None, True)
    """

    def __init__(self, callbacks: Callback | Every | Sequence[Callback | Every]):
        self._listeners = [_Listener(callback) for callback in _each(callbacks)]
        self.periods = tuple({each.period for each in self._listeners if each.period is not None})
        self._called_at: int | None = None

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows to the unseen rows of every callback."""
        for each in self._listeners:
            each.add(rows)

    def due(self, step: int, checked: bool) -> bool:
        """Whether any callback is due after this step."""
        return any(self._is_due(each.period, step, checked) for each in self._listeners)

    def call(self, step: int, state: Any, metrics: dict[str, float], *, checked: bool, final: bool) -> tuple[Any, bool]:
        """Call the callbacks that are due, or all at the end.

        Returns:
          The state, possibly replaced by a callback, and whether a callback ends the run.
        """
        ends = False
        for each in self._listeners:
            due = self._is_due(each.period, step, checked)
            if final or due:
                answer = each.function(Event(step, state, dict(metrics), each.take(), final))
                new = changed_state(answer, state)
                if new is None:
                    ends |= _wants_end(answer)
                elif due:  # not at the end alone: a run in two parts must equal one run
                    state = new
        self._called_at = step
        return state, ends

    def _is_due(self, period: int | None, step: int, checked: bool) -> bool:
        # The loop may ask twice about a step, once more when an epoch turns out to end there.
        return checked if period is None else step % period == 0 and step != self._called_at


def _each(callbacks: Callback | Every | Sequence[Callback | Every]) -> Iterator[Callback | Every]:
    if callable(callbacks) or isinstance(callbacks, Every):
        yield callbacks
    else:
        yield from callbacks


def _wants_end(answer: Any) -> bool:
    """Whether the result of a callback is true: Python's, NumPy's or JAX's True, or any other true value."""
    try:
        return answer is not None and bool(answer)
    except (TypeError, ValueError) as error:  # an array of several elements
        raise TypeError(
            f"a callback must return one true or false value, or None, to say whether the run ends; got {answer!r}"
        ) from error


__all__ = ["Callback", "Callbacks", "Event", "Every", "State", "every"]
