"""The diagnosis of a run: evidence, checks, ranking."""

from collections.abc import Callable
from typing import Any, Literal

from nnlearn.diagnose import (
    answers,
    data,
    dynamics,
    fit,
    held_out,
    masks,
    network,
    outputs,
    pairs,
    program,
    sequences,
    singles,
)
from nnlearn.diagnose.checking import NamedCheck
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.ranking import rank
from nnlearn.diagnose.report import Report
from nnlearn.diagnose.subject import make_subject
from nnlearn.train.run import Train
from nnlearn.types import Key, PyTree

ROOMS = (data, pairs, sequences, masks, held_out, outputs, program, dynamics, answers, singles, network, fit)
CHECKS: tuple[NamedCheck, ...] = tuple(check for room in ROOMS for check in room.CHECKS)


def diagnose(
    train: Train[Any],
    hparams: PyTree,
    key: Key | int,
    *,
    predict: Callable[..., Any] | None = None,
    validation: tuple[Any, Any] | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] = "max",
) -> Report:
    """Find out why a run does not learn as it could.

    The run is a pure function, so it is run again: once with a record of its steps and states, and briefly with other
    learning rates, inputs and optimizers. All together costs about two to four times the run, plus compilation.

    Args:
      train: the run, from ``make_train``.
      hparams, key: the arguments of ``train`` that gave the result in question.
      predict: ``predict(params, inputs) -> outputs``, the network as it is evaluated, or ``predict(params, inputs,
        key)``, where a key means training mode. If it has an argument ``model_state``, it receives the running
        statistics by name: ``lambda params, x, model_state: net.apply(params, model_state, x)[0]``. None leaves out the
        checks of outputs and activations.
      validation: ``(inputs, targets)``, examples that are not trained on, or None. A dict or NamedTuple whose fields
        have such names, such as ``x`` and ``y``, serves as well.
      metric: the name of a metric of the run's ``evaluate``, or None.
      mode: whether a large (``"max"``) or a small (``"min"``) metric is better.

    Returns:
      A ``Report``: probable causes, most likely first, and every check with its numbers.

    Raises:
      TypeError: if ``train`` is not made by ``make_train``.
      ValueError: if ``mode`` or ``metric`` is unknown, ``predict`` fails on the inputs, or ``validation`` is no pair.
      Exception: what ``train(hparams, key)`` itself raises, such as a ``TypeError`` of the loss.

    >>> import jax.numpy as jnp, numpy as np, nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    >>> batches = nnlearn.shuffled({"x": x, "y": x @ np.float32([1.0, 2.0])}, 16, remainder="drop")
    >>> train = nnlearn.make_train(loss_fn, nnlearn.sgd(3.0), batches, jnp.zeros(2), steps=40)
    >>> diagnose(train, {}, 0).findings[0].name
    'learning_rate_too_high'
    """
    subject = make_subject(train, hparams, key, predict, validation, metric, mode)
    evidence = Evidence(subject)
    checks = tuple(each(evidence) for each in CHECKS)
    findings = rank(finding for check in checks for finding in check.findings)
    return Report(findings, checks, summary_of(evidence))


def summary_of(evidence: Evidence) -> dict[str, Any]:
    """The facts in the first line of a report."""
    try:
        return {"steps": evidence.subject.steps, "first loss": evidence.first_loss, "last loss": evidence.last_loss}
    except Exception:  # a run that cannot run; the checks say why
        return {"steps": evidence.subject.steps}


__all__ = ["CHECKS", "diagnose"]
