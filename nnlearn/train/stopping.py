"""Stopping rules, which examine the metrics of a compiled run at every check, inside the program.

A rule consists of two pure functions, like an optimizer. For a custom rule, make a ``StopRule``.
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
SKIPPED = "skipped/steps"  # how many of the steps since the last check were skipped
LAST_MADE = "skipped/last_made"  # the last of them that was not; 0 if all were


class StopRule(NamedTuple):
    """When a run stops, and with which state it ends.

    Attributes:
      name: the name in ``Trace.stopped_by``.
      init: ``init() -> state``, the state of the rule before the first check.
      update: ``update(state, metrics, step) -> (state, stop)``, called at every check. ``metrics`` contains the results
        of ``evaluate`` and ``train_loss``, the mean over the steps since the last check that were not skipped (NaN if
        all were). ``skipped/steps`` is the number of those that were, and ``skipped/last_made`` the last step that was
        not, or 0. ``stop`` is a boolean scalar.
      keep: ``(metric, mode)`` if the run should end with the state of its best check, else None.
      metrics: the names of metrics that ``update`` uses. Only names like ``aux/accuracy`` are required here: the mean
        of that scalar in ``info.aux`` over the steps since the last check that were not skipped. It is computed only if
        a rule names it.
    """

    name: str
    init: Callable[[], PyTree]
    update: Callable[[PyTree, Metrics, jax.Array], tuple[PyTree, jax.Array]]
    keep: tuple[str, str] | None = None
    metrics: tuple[str, ...] = ()


def pick(metrics: Metrics, name: str, rule: str) -> jax.Array:
    """A metric by name, as float32.

    Raises:
      ValueError: if there is no such metric.
    """
    if name not in metrics:
        known = sorted(set(metrics) - {SKIPPED, LAST_MADE})  # those two are for skip_budget
        raise ValueError(f"{rule}: there is no metric {name!r} among train_loss and the results of evaluate: {known}")
    return jnp.asarray(metrics[name], jnp.float32)


def check_mode(mode: Any) -> None:
    """Raise ``ValueError`` if ``mode`` is neither ``"min"`` (small is better) nor ``"max"`` (large is better).

    >>> check_mode("least")
    Traceback (most recent call last):
    ValueError: mode must be 'min' or 'max', got 'least'
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")


def better(mode: str, value: jax.Array, than: jax.Array, by: Scalar = 0.0) -> jax.Array:
    """Whether ``value`` is better than ``than`` by more than ``by``; NaN is never better."""
    return value < than - by if mode == "min" else value > than + by


def worst(mode: str) -> jax.Array:
    """The value that every finite value is better than."""
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
    """Early stopping: stop when a metric has not improved for ``checks`` consecutive checks.

    Args:
      metric: the name of a metric of ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``StopRule``.
      checks: the number of consecutive checks without improvement, >= 1.
      mode: whether small or large values are better.
      min_delta: an improvement must be larger than this, >= 0.
      restore_best: whether the run ends with the state of its best check, even if another rule stops it or none does:
        parameters, optimizer state (including averages and moments), model state and ``step``. This needs the memory
        of one more state: for Adam three times that of the parameters.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``mode`` is unknown, ``checks`` is below 1, or ``min_delta`` is negative or not finite. When the
        run is traced, if there is no such metric.

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
    """Stop when a metric has changed by at most ``tolerance`` at ``checks`` consecutive checks.

    Args:
      tolerance: the largest change between two checks, >= 0, in the unit of the metric.
      checks: the number of consecutive changes, >= 1.
      metric: the name of a metric of ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``StopRule``.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``tolerance`` is negative or not finite, or ``checks`` is below 1. When the run is traced, if there
        is no such metric.

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
    """Stop when a metric reaches its target.

    Args:
      metric: the name of a metric of ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``StopRule``.
      target: the value to reach, in the unit of the metric.
      mode: ``"min"`` stops at ``metric <= target``, ``"max"`` at ``metric >= target``.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``mode`` is unknown, or ``target`` is NaN. When the run is traced, if there is no such metric.

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
    """Stop when a metric is not finite or exceeds a limit.

    Args:
      limit: the largest value at which the run continues, in the unit of the metric.
      metric: the name of a metric of ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``StopRule``.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``limit`` is NaN. When the run is traced, if there is no such metric.

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
    """Never stop, but end the run with the state of its best check.

    The rule keeps a copy of the whole state: parameters, optimizer state, model state and ``step``.

    Args:
      metric: the name of a metric of ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``StopRule``.
      mode: whether small or large values are better.

    Returns:
      A ``StopRule``.

    Raises:
      ValueError: if ``mode`` is unknown. When the run is traced, if there is no such metric.

    >>> keep_best("accuracy", "max").keep
    ('accuracy', 'max')
    """
    check_mode(mode)

    def update(state, metrics, step):
        return state, jnp.array(False)

    return StopRule(f"keep_best({metric})", lambda: (), update, (metric, mode), (metric,))


@comparable
def skip_budget(*, total: Scalar | None = None, in_a_row: Scalar | None = None) -> StopRule:
    """Stop a run whose guards, such as ``skip_spikes`` or ``apply_if_finite``, skip too many steps.

    Args:
      total: stop once this many steps of the run were skipped, >= 1; None for no limit.
      in_a_row: stop at a check if at least this many last steps were skipped, >= 1; None for no limit.

    Raises:
      ValueError: if both are None or one is below 1; and when the run is traced, if its optimizer has no guard.

    >>> rule = skip_budget(in_a_row=3)
    >>> state, _ = rule.update(rule.init(), {"skipped/steps": 2, "skipped/last_made": 8}, 10)
    >>> bool(rule.update(state, {"skipped/steps": 2, "skipped/last_made": 0}, 12)[1])
    True
    """
    limits = {name: value for name, value in (("total", total), ("in_a_row", in_a_row)) if value is not None}
    if not limits:
        raise ValueError("skip_budget needs total or in_a_row, the number of skipped steps that ends the run")
    for name, value in limits.items():
        check_number(name, value, low=1)

    def update(state, metrics, step):
        skipped, last_made = metrics[SKIPPED], metrics[LAST_MADE]
        counts = {"total": state["total"] + skipped}
        counts["in_a_row"] = jnp.where(last_made > 0, step - last_made, state["in_a_row"] + skipped)
        stops = [counts[name] >= value for name, value in limits.items()]
        return counts, jnp.any(jnp.stack(stops))

    def init():
        return {name: jnp.zeros([], jnp.int32) for name in ("total", "in_a_row")}

    return StopRule("skip_budget", init, update, metrics=(SKIPPED, LAST_MADE))


__all__ = [
    "LAST_MADE",
    "SKIPPED",
    "StopRule",
    "better",
    "check_mode",
    "converged",
    "diverged",
    "keep_best",
    "patience",
    "pick",
    "reached",
    "skip_budget",
    "worst",
]
