"""Checks before training, in seconds: shapes, finite values, the gradient, the first loss, one batch by heart."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.diagnose import data, held_out, program
from nnlearn.diagnose.checking import NamedCheck, Seen, check
from nnlearn.diagnose.evidence import Evidence
from nnlearn.diagnose.parts import Unknown
from nnlearn.diagnose.plan import on_host, quick
from nnlearn.diagnose.ranking import rank
from nnlearn.diagnose.report import Report, found
from nnlearn.diagnose.rerun import Record, leaf_names
from nnlearn.diagnose.subject import make_subject, params_of
from nnlearn.train.run import Train
from nnlearn.types import Key, PyTree

STEPS = 100  # on one batch
DIRECTIONS = 3  # along which the gradient is compared with differences
TOLERANCE = 1e-3


@dataclasses.dataclass(eq=False)
class Before(Evidence):
    """The evidence before training: the run is replaced by its first states."""

    @property
    def batch(self) -> Any:
        """The first batch."""
        return self.subject.plan.batch(self.subject.plan.at(0))

    @property
    def state(self) -> Any:
        """The state before the first step."""
        return self.subject.start().state

    @functools.cached_property
    def run(self) -> Record:
        """The state before the first step, in place of a run."""
        states = jax.tree.map(lambda leaf: leaf[None], on_host(self.state._replace(key=None)))
        nothing = np.full(1, np.nan)
        return Record(nothing, nothing, nothing, None, None, np.zeros(1, int), states, self.state.key)

    def slope(self) -> tuple[float, Any]:
        """The first loss and its gradient."""
        state, key = self.state, self.subject.as_key(self.subject.keys[0])
        slope = jax.jit(jax.value_and_grad(self.subject.loss), compiler_options=quick())
        loss, grads = slope(params_of(state), self.batch, key, state.model_state)
        return float(loss), jax.tree.map(np.asarray, grads)


@check("values are finite")
def finite(before: Before) -> Seen:
    loss, grads = before.slope()
    parts = {"batch": before.batch, "parameters": params_of(before.state), "gradient": grads}
    bad = [
        f"{part}/{name}"
        for part, tree in parts.items()
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(np.asarray(leaf, np.float64)))
    ]
    values = {"loss": loss, "not finite": bad}
    if np.isfinite(loss) and not bad:
        return Seen(values, "the first batch, the parameters, the loss and the gradient are finite")
    text = f"Before the first step the loss is {loss:.3g}; not finite: {', '.join(bad[:4]) or 'the loss'}."
    finding = found("numerical_precision", text, values, strength=0.9, step=0)
    return Seen(values, "the first batch, the parameters, the loss and the gradient are finite", [finding])


@check("the first loss is that of chance")
def chance(before: Before) -> Seen:
    loss, _ = before.slope()
    if not before.program.of_kind("softmax") or before.data.labels is None:
        raise Unknown("the loss is no cross-entropy of classes")
    classes = len(np.unique(before.data.labels))
    expected = float(np.log(classes))
    values = {"loss": loss, "log(classes)": expected}
    rule = "the first loss is at most 3 times the logarithm of the number of classes"
    if not loss > 3 * expected:
        return Seen(values, rule)
    text = f"The first loss is {loss:.3g}; guessing among {classes} classes gives {expected:.3g}."
    name = "unnormalised_inputs" if np.abs(before.data.inputs).max() > 20 else "bad_initialisation"
    return Seen(values, rule, [found(name, text, values, strength=0.7, step=0)])


@check("the gradient is the slope of the loss")
def slopes(before: Before) -> Seen:
    subject, state, batch = before.subject, before.state, before.batch
    key = np.asarray(subject.keys[0])

    def wide(tree):
        return jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
        )

    params, batch = wide(jax.tree.map(np.asarray, params_of(state))), wide(jax.tree.map(np.asarray, batch))
    random = np.random.default_rng(0)
    worst, pairs = 0.0, []
    with jax.enable_x64(True):

        @jax.jit
        def both(params, direction, size):
            def along(amount):
                moved = jax.tree.map(lambda leaf, way: leaf + amount * way, params, direction)
                return subject.loss(moved, batch, subject.as_key(key), state.model_state)

            slope = jax.jvp(along, (0.0,), (1.0,))[1]
            return slope, (along(size) - along(-size)) / (2 * size)

        for _ in range(DIRECTIONS):
            direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params)
            slope, difference = (float(each) for each in both(params, direction, 1e-6))
            pairs.append([slope, difference])
            worst = max(worst, abs(slope - difference) / max(abs(slope), abs(difference), 1e-6))
    values = {"largest relative difference": worst, "slopes and differences": pairs}
    rule = f"finite differences in float64 agree to {TOLERANCE}"
    if not worst > TOLERANCE:
        return Seen(values, rule)
    text = f"Along a random direction the gradient gives {pairs[-1][0]:.4g}, a finite difference {pairs[-1][1]:.4g}."
    return Seen(values, rule, [found("blocked_gradient", text, values, strength=0.5)])


@check("every parameter gets a gradient")
def reached(before: Before) -> Seen:
    _, grads = before.slope()
    names = leaf_names(grads)
    none = [name for name, leaf in zip(names, jax.tree.leaves(grads), strict=True) if not np.any(leaf)]
    values = {"parameters": len(names), "zero gradient": none}
    rule = "no parameter has a gradient of zero in the first batch"
    if not none:
        return Seen(values, rule)
    first = dict(zip(names, jax.tree.leaves(params_of(before.state)), strict=True))
    zero = [name for name in names if first[name].ndim > 1 and not np.any(np.asarray(first[name]))]
    name = "symmetric_initialisation" if zero else "blocked_gradient"
    text = f"{len(none)} of {len(names)} parameters get a gradient of zero: {', '.join(none[:4])}."
    return Seen(values, rule, [found(name, text, values, strength=0.8, where=none[0], step=0)])


@check("one batch can be learned by heart")
def one_batch(before: Before) -> Seen:
    subject, batch = before.subject, before.batch
    step = subject.step()
    key = before.state.key

    def one(state, at):
        state, info = step(state._replace(key=key), batch, key=jax.random.fold_in(key, at))
        return state._replace(key=None), info.loss

    run = jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(STEPS))[1])
    losses = np.asarray(run(before.state._replace(key=None)), np.float64)
    values = {"first": float(losses[0]), "best": float(np.nanmin(losses)), "last": float(losses[-1]), "steps": STEPS}
    rule = f"the loss of one batch falls within {STEPS} steps"
    if np.all(np.isfinite(losses)) and losses[-1] < losses[0] - 1e-3 * abs(losses[0]):
        return Seen(values, rule)
    text = f"On one batch the loss is {losses[0]:.3g} at first and {losses[-1]:.3g} after {STEPS} steps."
    name = "learning_rate_too_high" if not losses[-1] <= 1.5 * abs(losses[0]) else "underfitting"
    return Seen(values, rule, [found(name, text, values, strength=0.6, severity="medium")])


CHECKS: tuple[NamedCheck, ...] = (
    finite,
    chance,
    slopes,
    reached,
    program.cut,
    program.broadcast,
    one_batch,
    data.class_numbers,
    held_out.separation,
)


def preflight(
    train: Train[Any],
    hparams: PyTree,
    key: Key | int,
    *,
    predict: Callable[..., Any] | None = None,
    validation: tuple[Any, Any] | None = None,
) -> Report:
    """Check a run before it is started, in seconds.

    It compares the first loss with chance and the gradient with finite differences in float64, looks for parameters
    without a gradient, silent broadcasts, values that are not finite and faults of the data, and trains on one batch.

    Args:
      train, hparams, key: the run, as for ``diagnose``.
      predict: as for ``diagnose``.
      validation: ``(inputs, targets)`` of examples that are not trained on, or None.

    Returns:
      A ``Report``.

    Raises:
      TypeError: if ``train`` is not made by ``make_train``.
      ValueError: if ``predict`` fails on the inputs, or ``validation`` is no pair.
      Exception: what ``train(hparams, key)`` itself raises, such as a ``TypeError`` of the loss.

    >>> import jax.numpy as jnp, numpy as np, nnlearn
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    >>> wrong = nnlearn.shuffled({"x": x, "y": x @ np.ones((2, 1), np.float32)}, 16, remainder="drop")
    >>> train = nnlearn.make_train(loss_fn, nnlearn.sgd(0.1), wrong, jnp.ones(2), steps=40)
    >>> with jax.numpy_rank_promotion("allow"):
    ...     preflight(train, {}, 0).findings[0].name
    'wrong_axis_or_reduction'
    """
    before = Before(make_subject(train, hparams, key, predict, validation))
    results = tuple(each(before) for each in CHECKS)
    findings = rank(finding for result in results for finding in result.findings)
    return Report(findings, results, {"steps": train.steps})


__all__ = ["preflight"]
