"""When a compiled run stops: rules that look at its metrics at every check, inside of the program.

A rule is two pure functions, like an optimizer; a rule of your own is a ``StopRule`` of yours.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.settings import comparable
from nnlearn.types import PyTree, Scalar

Metrics = dict[str, jax.Array]
MODES = ("min", "max")


class StopRule(NamedTuple):
    """When to stop, and which state to keep.

    Attributes:
      name: what stopped the run, for people.
      init: ``init() -> state`` before the first check.
      update: ``update(state, metrics, step) -> (state, stop)`` at every check; ``metrics`` holds ``train_loss``, the
        mean over the steps since the last check without those that were skipped, NaN if all were, and what
        ``evaluate`` returned; ``stop`` is a boolean scalar.
      keep: ``(metric, mode)`` if the run is to end with the state of its best check, else None.
      metrics: the names that ``update`` asks for. Needed for names like ``aux/accuracy`` only: the mean of that scalar
        in ``info.aux`` over the steps since the last check that were not skipped. It is computed if a rule names it.
    """

    name: str
    init: Callable[[], PyTree]
    update: Callable[[PyTree, Metrics, jax.Array], tuple[PyTree, jax.Array]]
    keep: tuple[str, str] | None = None
    metrics: tuple[str, ...] = ()


def pick(metrics: Metrics, name: str, rule: str) -> jax.Array:
    """A metric by name as float32.

    Raises:
      ValueError: there is none of that name; the message lists those there are.
    """
    if name not in metrics:
        raise ValueError(
            f"{rule}: there is no metric {name!r}; evaluate returns, besides train_loss: {sorted(metrics)}"
        )
    return jnp.asarray(metrics[name], jnp.float32)


def check_mode(mode: Any) -> None:
    """Raise ``ValueError`` unless small (``"min"``) or large (``"max"``) is better.

    >>> check_mode("least")
    Traceback (most recent call last):
    ValueError: mode must be 'min' or 'max', got 'least'
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")


def better(mode: str, value: jax.Array, than: jax.Array, by: Scalar = 0.0) -> jax.Array:
    """Whether a metric is better than another by more than ``by``; NaN is never better."""
    return value < than - by if mode == "min" else value > than + by


def worst(mode: str) -> jax.Array:
    """What every number is better than."""
    return jnp.array(jnp.inf if mode == "min" else -jnp.inf, jnp.float32)


@comparable
def patience(
    metric: str,
    checks: Scalar,
    *,
    mode: Literal["min", "max"] = "min",
    min_delta: Scalar = 0.0,
    restore_best: bool = True,
) -> StopRule:
    """Stop once a metric has not become better for so many checks in a row: early stopping.

    Args:
      metric: its name among what ``evaluate`` returns, ``train_loss``, or ``aux/<path>``, see ``StopRule``.
      checks: checks in a row without a better value, >= 1.
      mode: whether small or large is better.
      min_delta: how much better counts, >= 0.
      restore_best: whether the run ends with the state of its best check, whatever ends it: parameters, optimizer
        state (averages and moments with it), model state and ``step``, all of that check. Keeping it takes the memory
        of one more state: for Adam three times that of the parameters.

    Source: Prechelt 1998, "Early Stopping - But When?".

    >>> rule = patience("loss", 2)
    >>> state, stops = rule.init(), []
    >>> for loss in (3.0, 2.0, 2.5, 2.1):
    ...     state, stop = rule.update(state, {"loss": loss}, 0)
    ...     stops.append(bool(stop))
    >>> stops
    [False, False, False, True]
    """
    check_mode(mode)
    check_number("checks", checks, low=1)
    check_nonnegative("min_delta", min_delta)

    def update(state, metrics, step):
        best, waited = state
        value = pick(metrics, metric, "patience")
        gained = better(mode, value, best, by=min_delta)
        waited = jnp.where(gained, 0, waited + 1)
        return (jnp.where(gained, value, best), waited), waited >= checks

    keep = (metric, mode) if restore_best else None
    return StopRule(f"patience({metric})", lambda: (worst(mode), jnp.zeros([], jnp.int32)), update, keep, (metric,))


@comparable
def converged(tolerance: Scalar, checks: Scalar = 1, *, metric: str = "train_loss") -> StopRule:
    """Stop once a metric has changed by no more than ``tolerance`` for so many checks in a row.

    Args:
      tolerance: the largest change from check to check, >= 0, in the metric's own unit.
      checks: such changes in a row, >= 1.
      metric: its name; the training loss by default.

    >>> rule = converged(0.1)
    >>> state, _ = rule.update(rule.init(), {"train_loss": 1.0}, 0)
    >>> bool(rule.update(state, {"train_loss": 0.95}, 0)[1])
    True
    """
    check_nonnegative("tolerance", tolerance)
    check_number("checks", checks, low=1)

    def update(state, metrics, step):
        last, still = state
        value = pick(metrics, metric, "converged")
        still = jnp.where(jnp.abs(value - last) <= tolerance, still + 1, 0)
        return (value, still), still >= checks

    def init():
        return worst("min"), jnp.zeros([], jnp.int32)

    return StopRule(f"converged({metric})", init, update, metrics=(metric,))


@comparable
def reached(metric: str, target: Scalar, *, mode: Literal["min", "max"] = "min") -> StopRule:
    """Stop once a metric is at its target or beyond it.

    Args:
      metric: its name among what ``evaluate`` returns, or ``train_loss``.
      target: the value to reach.
      mode: ``"min"`` stops at ``metric <= target``, ``"max"`` at ``metric >= target``.

    >>> bool(reached("accuracy", 0.9, mode="max").update((), {"accuracy": 0.95}, 0)[1])
    True
    """
    check_mode(mode)
    check_number("target", target)

    def update(state, metrics, step):
        value = pick(metrics, metric, "reached")
        return state, value <= target if mode == "min" else value >= target

    return StopRule(f"reached({metric})", lambda: (), update, metrics=(metric,))


@comparable
def diverged(limit: Scalar = float("inf"), *, metric: str = "train_loss") -> StopRule:
    """Stop once a metric is not finite, or above a limit: this run is lost.

    Args:
      limit: the largest value that a healthy run has.
      metric: its name; the training loss by default.

    >>> [bool(diverged(100.0).update((), {"train_loss": loss}, 0)[1]) for loss in (1.0, 1e3, float("nan"))]
    [False, True, True]
    """
    check_number("limit", limit)

    def update(state, metrics, step):
        value = pick(metrics, metric, "diverged")
        return state, ~(value <= limit) | ~jnp.isfinite(value)

    return StopRule(f"diverged({metric})", lambda: (), update, metrics=(metric,))


@comparable
def keep_best(metric: str, mode: Literal["min", "max"] = "min") -> StopRule:
    """Never stop, and end with the state of the best check.

    The whole state is kept: parameters, optimizer state, model state and ``step``, in memory of its own.

    Args:
      metric: its name among what ``evaluate`` returns, or ``train_loss``.
      mode: whether small or large is better.

    >>> keep_best("accuracy", "max").keep
    ('accuracy', 'max')
    """
    check_mode(mode)

    def update(state, metrics, step):
        return state, jnp.array(False)

    return StopRule(f"keep_best({metric})", lambda: (), update, (metric, mode), (metric,))


__all__ = [
    "StopRule",
    "better",
    "check_mode",
    "converged",
    "diverged",
    "keep_best",
    "patience",
    "pick",
    "reached",
    "worst",
]
