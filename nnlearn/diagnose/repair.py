"""Try the remedies of a report: which of them makes the run better, on validation data and over seeds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import check_count
from nnlearn.diagnose.examples import as_data
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.probes import quality
from nnlearn.diagnose.remedies import REMEDIES, Changed, Remedy
from nnlearn.diagnose.report import Report
from nnlearn.diagnose.subject import Subject, make_subject, params_of
from nnlearn.train.run import Train
from nnlearn.types import Key, PyTree

PERFECT = 0.995  # a score from which nothing more is tried
LEAST = 0.005  # gain of a remedy that is kept
TRIALS = 8


class Trial(NamedTuple):
    """A remedy that was tried.

    Attributes:
      finding: the finding that it belongs to.
      line: the change, in words.
      scores: of the changed run, by seed.
      gain: mean difference to the run before the change, on the same seeds.
      interval: 95 % interval of the gain over seeds (Student's t).
      kept: whether the repaired run has the change.
      reason: why it could not be tried, or "".
    """

    finding: str
    line: str
    scores: tuple[float, ...]
    gain: float
    interval: tuple[float, float]
    kept: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"not tried  {self.finding}: {self.line}: {self.reason}"
        low, high = self.interval
        verdict = "helps" if self.kept else "no help"
        return f"{verdict:10} {self.finding}: {self.line}: {self.gain:+.3f} ({low:+.3f} to {high:+.3f})"


@dataclasses.dataclass(frozen=True)
class Repair:
    """The result of ``repair``.

    Attributes:
      train, hparams: the repaired run; the given ones if nothing helped.
      predict: ``predict`` for the repaired run, which differs if inputs or targets are standardised.
      before, after: scores by seed: accuracy or explained share on validation, else the metric or the negative loss.
      tried: every remedy that was tried.
      advice: for findings that need a change by hand, the change.
    """

    train: Train
    hparams: PyTree
    predict: Callable[..., Any] | None
    before: tuple[float, ...]
    after: tuple[float, ...]
    tried: tuple[Trial, ...]
    advice: tuple[str, ...]

    @property
    def worked(self) -> tuple[str, ...]:
        """The changes that help."""
        return tuple(trial.line for trial in self.tried if trial.kept)

    def __str__(self) -> str:
        lines = [f"repair: score {np.mean(self.before):.3f} -> {np.mean(self.after):.3f} over {len(self.after)} seeds"]
        lines += [f"  {trial}" for trial in self.tried]
        lines += [f"  by hand    {each}" for each in self.advice]
        return "\n".join(lines)


def repair(
    train: Train[Any],
    hparams: PyTree,
    key: Key | int,
    report: Report,
    *,
    predict: Callable[..., Any] | None = None,
    validation: tuple[Any, Any] | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] = "max",
    seeds: int = 3,
) -> Repair:
    """Try the remedies of a report and return the run with those that help.

    The remedies of the first findings are tried: learning rate, schedule and optimizer, clipping, weight decay, initial
    scale, standardised inputs or targets, order, batch size, precision, steps, early stopping. All values of a remedy
    and all seeds run in one vmapped program. A change is kept if it gains on average over seeds, and the next one is
    tried with it. Where inputs or targets are standardised, the run's ``evaluate`` receives parameters into which this
    is folded, if the first or last layer allows it; else its metrics are those of raw inputs, and ``after`` counts.

    Args:
      train, hparams, key, predict, validation, metric, mode: as in ``diagnose``.
      report: what ``diagnose`` returned.
      seeds: the number of runs of each candidate; the first has ``key``.

    Returns:
      A ``Repair``. What cannot be changed automatically, such as a wrong loss or labels, is in its ``advice``.

    Raises:
      TypeError: if ``train`` is not made by ``make_train``.
      ValueError: if ``seeds`` is below 1, or as in ``diagnose``.

    >>> import numpy as np, nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    >>> batches = nnlearn.shuffled({"x": x, "y": x @ np.float32([1.0, 2.0])}, 16, remainder="drop")
    >>> train = nnlearn.make_train(loss_fn, nnlearn.sgd(3.0), batches, jnp.zeros(2), steps=40)
    >>> fixed = repair(train, {}, 0, nnlearn.diagnose(train, {}, 0), seeds=1)
    >>> len(fixed.worked) > 0, fixed.after[0] > fixed.before[0]
    (True, True)
    """
    check_count("seeds", seeds)
    subject = make_subject(train, hparams, key, predict, validation, metric, mode)
    keys = jnp.stack([subject.key, *(jax.random.fold_in(subject.key, seed) for seed in range(1, seeds))])
    current = Changed(train, hparams, predict)
    before = _scores(subject, Remedy("", "", (0.0,), lambda s, _: current), keys)[0]
    best, tried, advice = before, [], []
    useless: set[str] = set()  # remedies that were tried on the current run
    for finding in report.findings:
        if finding.name not in REMEDIES:
            advice.append(f"{finding.name}: {finding.remedies[0]}")
            if finding is report.findings[0]:
                break  # what follows is probably caused by it
            continue
        for remedy in REMEDIES[finding.name]:
            if len(tried) >= TRIALS or np.mean(best) > PERFECT:
                break
            if remedy.name in useless:
                continue
            current, best, trial = _try(subject, current, best, remedy, finding.name, keys)
            tried.append(trial)
            useless = {remedy.name} if trial.kept else {*useless, remedy.name}
    return Repair(*current, tuple(map(float, before)), tuple(map(float, best)), tuple(tried), tuple(advice))


def _try(
    subject: Subject, current: Changed, best: np.ndarray, remedy: Remedy, finding: str, keys: jax.Array
) -> tuple[Changed, np.ndarray, Trial]:
    """Try one remedy on top of the current run."""
    now = dataclasses.replace(subject, train=current.train, hparams=current.hparams, predict=current.predict)
    try:
        scores = _scores(now, remedy, keys)
    except Unknown as reason:
        return current, best, Trial(finding, remedy.name, (), 0.0, (0.0, 0.0), False, str(reason))
    except Exception as error:  # an odd program must not end the repair
        reason = f"it failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        return current, best, Trial(finding, remedy.name, (), 0.0, (0.0, 0.0), False, reason)
    at = int(np.argmax(scores.mean(1)))
    value, reached = remedy.values[at], scores[at]
    gains = reached - best
    low, high = interval(gains)
    kept = bool(gains.mean() > LEAST)
    line = remedy.line.format(value=value)
    trial = Trial(finding, line, tuple(map(float, reached)), float(gains.mean()), (low, high), kept)
    return (remedy.make(now, value), reached, trial) if kept else (current, best, trial)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t; unbounded for one value.

    >>> interval(np.array([1.0, 1.0, 1.0]))
    (1.0, 1.0)
    """
    count = len(values)
    if count < 2:
        return (-np.inf, np.inf)
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(count, 2.2)
    middle, half = float(np.mean(values)), quantile * float(np.std(values, ddof=1) / np.sqrt(count))
    return middle - half, middle + half


def _scores(subject: Subject, remedy: Remedy, keys: jax.Array) -> np.ndarray:
    """The scores of every value of a remedy, shape (values, seeds)."""
    validation = subject.validation if subject.predict is not None else None

    def run(value, key):
        return outcome(remedy.make(subject, value), key)

    def outcome(changed, key):
        state, trace = changed.train(changed.hparams, key)
        metrics = {name: each[-1] for name, each in trace.metrics.items()} if trace.metrics else {}
        tail = jnp.mean(trace.loss[-max(1, trace.loss.shape[0] // 10) :])
        outputs = None
        if validation is not None:
            outer = dataclasses.replace(subject, predict=changed.predict)
            outputs = outer.outputs(params_of(state), validation[0], None, getattr(state, "model_state", None))
        return outputs, metrics, tail

    over_seeds = jax.vmap(run, (None, 0))
    if remedy.apart:
        each = [remedy.make(subject, value) for value in remedy.values]
        found = [jax.jit(jax.vmap(functools.partial(outcome, changed)))(keys) for changed in each]
        found = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *found)
    else:
        found = jax.jit(jax.vmap(over_seeds, (0, None)))(jnp.asarray(remedy.values, jnp.float32), keys)
    outputs, metrics, tail = jax.tree.map(np.asarray, found)
    scores = None
    if outputs is not None and validation is not None:
        scores = _qualities(outputs, *validation)
    if scores is None and subject.metric in metrics:
        scores = metrics[subject.metric] * (1.0 if subject.mode == "max" else -1.0)
    if scores is None:
        scores = -tail
    return np.nan_to_num(np.asarray(scores, np.float64), nan=-1e30, posinf=-1e30, neginf=-1e30)


def _qualities(outputs: np.ndarray, inputs: Any, targets: Any) -> np.ndarray | None:
    kind = as_data(inputs, targets, outputs.shape[3:]).kind
    found = np.array([[quality(each, targets, kind) for each in row] for row in outputs])
    return None if np.any(np.isnan(found)) else found


__all__ = ["Repair", "Trial", "repair"]
