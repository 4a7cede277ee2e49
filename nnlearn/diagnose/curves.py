"""Checks of a record alone: ``diagnose_trace`` for a run that exists, and ``watch`` for a ``fit`` that goes on."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.ranking import rank
from nnlearn.diagnose.report import Report, found
from nnlearn.stream.callbacks import Event
from nnlearn.train.stopping import check_mode
from nnlearn.train.trace import Trace

FEWEST = 20  # records below which nothing is said about a tendency
LOSSES = ("loss", "validation_loss", "val_loss", "check/loss")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The record of a run.

    Attributes:
      step, loss: of every record.
      columns: other values of every record by name: ``grad_norm``, ``learning_rate``, ``leaf_grad_norms/<name>``.
      check_step: the steps of the checks.
      metrics: metrics at the checks by name.
      metric, mode: the metric of success, if it is known, and whether large values are better.
    """

    step: np.ndarray
    loss: np.ndarray
    columns: Mapping[str, np.ndarray]
    check_step: np.ndarray
    metrics: Mapping[str, np.ndarray]
    metric: str | None = None
    mode: str = "max"

    def column(self, name: str) -> np.ndarray:
        if name not in self.columns or not np.any(np.isfinite(self.columns[name])):
            raise Unknown(f"{name} was not recorded")
        return self.columns[name]

    def enough(self) -> None:
        if len(self.loss) < FEWEST:
            raise Unknown(f"fewer than {FEWEST} steps were recorded")

    @property
    def ends(self) -> tuple[float, float]:
        """The mean loss of the first and of the last tenth of the records."""
        tenth = max(1, len(self.loss) // 10)
        return float(np.mean(self.loss[:tenth])), float(np.mean(self.loss[-tenth:]))


@check("the loss stays finite")
def finite(curve: Curve) -> Seen:
    bad = np.flatnonzero(~np.isfinite(curve.loss))
    values = {"records": len(curve.loss), "not finite": len(bad)}
    if not len(bad):
        return Seen(values, "every loss is finite")
    at = int(bad[0])
    before = curve.loss[max(at - 1, 0)]
    rising = at > 2 and curve.loss[at - 1] > 3 * np.min(curve.loss[:at])
    name = "learning_rate_too_high" if rising else "numerical_precision"
    text = f"The loss was {before:.3g} and then {curve.loss[at]} at step {curve.step[at]}."
    return Seen(values, "every loss is finite", [found(name, text, values, strength=0.8, step=int(curve.step[at]))])


@check("the loss falls")
def falls(curve: Curve) -> Seen:
    curve.enough()
    first, last = curve.ends
    noise = float(np.std(np.diff(curve.loss))) if np.all(np.isfinite(curve.loss)) else np.inf
    values = {"first tenth": first, "last tenth": last, "change from step to step": noise}
    rule = "the last tenth is below 0.95 of the first, and the loss is not higher than at the start"
    if not np.isfinite(last) or last < 0.95 * first or (first <= 0 and last < first):
        return Seen(values, rule)
    if last > 1.2 * abs(first) or noise > 0.5 * abs(first):
        text = f"The loss was {first:.3g} at the start and {last:.3g} at the end; it changes by {noise:.2g} per step."
        return Seen(values, rule, [found("learning_rate_too_high", text, values, strength=0.7)])
    text = f"The loss was {first:.3g} at the start and is still {last:.3g} at the end."
    return Seen(values, rule, [found("learning_rate_too_low", text, values, strength=0.5)])


@check("the learning rate is not spent")
def rates(curve: Curve) -> Seen:
    curve.enough()
    rate = np.abs(curve.column("learning_rate"))
    low = float(np.mean(rate < 0.02 * np.nanmax(rate)))
    values = {"share of steps below 2 % of the largest rate": low, "largest": float(np.nanmax(rate))}
    rule = "the rate is above 2 % of its largest value in half of the steps"
    first, last = curve.ends
    if low <= 0.5 or last < 0.5 * first:
        return Seen(values, rule)
    text = f"The rate is below 2 % of its largest value in {low:.0%} of the steps."
    return Seen(values, rule, [found("schedule_mistimed", text, values, strength=0.8)])


@check("gradients keep their size")
def gradients(curve: Curve) -> Seen:
    curve.enough()
    norm = curve.column("grad_norm")
    middle, top = float(np.nanmedian(norm)), float(np.nanmax(norm))
    values = {"first": float(norm[0]), "median": middle, "largest": top}
    rule = "the largest gradient is below 1,000 times the median, and gradients are not zero"
    first, last = curve.ends
    grows = np.all(np.isfinite(curve.loss)) and not last < 0.5 * first
    if top > 1e3 * max(middle, 1e-30) and grows and np.argmax(norm) < 0.9 * len(norm):
        at = int(curve.step[int(np.nanargmax(norm))])
        text = f"The gradient norm is {middle:.2g} in the median and {top:.2g} at step {at}."
        return Seen(values, rule, [found("exploding_gradients", text, values, strength=0.75, step=at)])
    if middle < 1e-7 and not last < 0.5 * first:
        text = f"The gradient norm is {middle:.2g} in the median, while the loss stays at {last:.3g}."
        return Seen(values, rule, [found("vanishing_gradients", text, values, strength=0.75)])
    return Seen(values, rule)


@check("validation does not get worse")
def worsening(curve: Curve) -> Seen:
    name = next((each for each in LOSSES if each in curve.metrics), None)
    if name is None or len(curve.check_step) < 3 or "train_loss" not in curve.metrics:
        raise Unknown("there are no three checks with a validation loss")
    loss, train = curve.metrics[name], curve.metrics["train_loss"]
    best = int(np.nanargmin(loss))
    values = {"best": float(loss[best]), "last": float(loss[-1]), "training": float(train[-1])}
    rule = "the last validation loss is below 1.3 times the best, or above it the training loss does not fall"
    if not (loss[best] > 0 and loss[-1] > 1.3 * loss[best] and train[-1] < train[best] and best < len(loss) - 2):
        return Seen(values, rule)
    at = int(curve.check_step[best])
    text = f"{name} was {loss[best]:.3g} at step {at} and is {loss[-1]:.3g}; the training loss fell to {train[-1]:.3g}."
    return Seen(values, rule, [found("overfitting", text, values, strength=0.75, step=at)])


CHECKS: tuple[NamedCheck, ...] = (finite, falls, rates, gradients, worsening)


def diagnose_trace(trace: Trace, *, metric: str | None = None, mode: Literal["min", "max"] = "max") -> Report:
    """What the record of a run says about it. ``diagnose`` finds far more, because it runs again.

    Args:
      trace: the record of one run.
      metric: the name of a metric of ``trace.metrics`` that measures success, or None.
      mode: whether a large (``"max"``) or a small (``"min"``) metric is better.

    Returns:
      A ``Report``.

    Raises:
      ValueError: if ``mode`` is unknown or the trace holds many runs.

    >>> import jax.numpy as jnp, nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd(1.5), batches, jnp.ones(()), steps=40)
    >>> nnlearn.diagnose_trace(train({}, 0)[1]).findings[0].name
    'learning_rate_too_high'
    """
    check_mode(mode)
    if trace.runs:
        raise ValueError(f"the trace holds runs of shape {trace.runs}; give one: trace.run(0)")
    made = np.asarray(trace.made)
    table = trace.columns()
    kept = np.isin(table["step"], np.asarray(trace.step)[made])
    columns = {
        name: np.asarray(column, np.float64)[kept] for name, column in table.items() if column.dtype.kind in "fiu"
    }
    checks = np.asarray(trace.check_step) <= int(trace.stop_step)
    curve = Curve(
        columns.pop("step"),
        columns.pop("loss"),
        columns,
        np.asarray(trace.check_step)[checks],
        {name: np.asarray(values, np.float64)[checks] for name, values in trace.metrics.items()},
        metric,
        mode,
    )
    return report_on(curve)


def report_on(curve: Curve) -> Report:
    """The report of a curve."""
    results = tuple(each(curve) for each in CHECKS)
    first, last = curve.ends if len(curve.loss) else (np.nan, np.nan)
    summary = {"records": len(curve.loss), "first loss": first, "last loss": last}
    return Report(rank(finding for result in results for finding in result.findings), results, summary)


def watch(warn: Callable[[str], Any] | None = None) -> Callable[[Event], None]:
    """A callback for ``fit`` that warns when a check of the record trips.

    Args:
      warn: what to call with the text of a finding, once for each name; None for ``warnings.warn``.

    >>> import jax.numpy as jnp, nnlearn
    >>> said = []
    >>> step = nnlearn.make_step(lambda p, b, k: p**2, nnlearn.sgd(1.5))
    >>> state = nnlearn.init_state(jnp.ones(()), nnlearn.sgd(1.5))
    >>> callbacks = nnlearn.stream.every(20, watch(said.append))
    >>> _ = nnlearn.fit(step, state, [jnp.zeros(1)] * 40, callbacks=callbacks, progress=False)
    >>> said[0].splitlines()[0]
    'learning_rate_too_high (high)'
    """
    rows: list[dict[str, Any]] = []
    known: set[str] = set()

    def callback(event: Event) -> None:
        rows.extend(event.rows)
        for finding in report_on(_curve_of(rows)).findings:
            if finding.name not in known:
                known.add(finding.name)
                (warn or _warn)(str(finding))

    return callback


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _curve_of(rows: list[dict[str, Any]]) -> Curve:
    """The curve of the rows that callbacks receive."""
    recorded = [row for row in rows if row.get("loss") is not None]
    checks = [row for row in rows if row.get("train_loss") is not None]

    def column(name, of):
        return np.array([np.nan if row.get(name) is None else float(row[name]) for row in of])

    names = {name for row in recorded for name, value in row.items() if isinstance(value, int | float)}
    columns = {name: column(name, recorded) for name in names - {"step", "loss"}}
    metrics = {name: column(name, checks) for row in checks[:1] for name in row if name != "step"}
    return Curve(column("step", recorded), column("loss", recorded), columns, column("step", checks), metrics)


__all__ = ["Curve", "diagnose_trace", "report_on", "watch"]
