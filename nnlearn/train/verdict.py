"""The checks of a run: its metrics, whether a rule stops it, and the best state so far."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.calls import hand
from nnlearn.train.custom_step import is_carried, own_state
from nnlearn.train.state import TrainState
from nnlearn.train.step import Skips
from nnlearn.train.stopping import LAST_MADE, SKIPPED, Metrics, StopRule, better, pick, worst
from nnlearn.types import PyTree


class Best(NamedTuple):
    """The best check so far: the metric's value and the state, without the random key, which never changes."""

    value: jax.Array
    state: TrainState

    @property
    def step(self) -> jax.Array:
        """The number of steps before that check; 0 before the first check."""
        return self.state.step


class Verdict(NamedTuple):
    """The state of the stopping rules between checks.

    Attributes:
      rules: the state of each rule.
      reason: the index of the rule that has stopped the run, counted from 1; 0 while the run continues.
      best: the best check so far, or None if no rule keeps the best state.
    """

    rules: tuple[PyTree, ...]
    reason: jax.Array
    best: Best | None


def kept_metric(rules: Sequence[StopRule]) -> tuple[str, str] | None:
    """The metric and mode by which a rule keeps the best state, or None if no rule does.

    Raises:
      ValueError: if several rules keep the best state by different metrics.

    >>> from nnlearn.train.stopping import keep_best
    >>> kept_metric([keep_best("loss")])
    ('loss', 'min')
    """
    kept = {rule.keep for rule in rules if rule.keep is not None}
    if len(kept) > 1:
        raise ValueError(
            f"stop: several rules keep the best parameters, by {sorted(kept)}; give restore_best=False to all but one"
        )
    return next(iter(kept), None)


def first_verdict(rules: Sequence[StopRule], state: TrainState) -> Verdict:
    """The verdict before the first check."""
    kept, best = kept_metric(rules), None
    if kept is not None:
        best = Best(worst(kept[1]), state._replace(step=jnp.zeros([], jnp.int32), key=None))
    return Verdict(tuple(rule.init() for rule in rules), jnp.zeros([], jnp.int32), best)


def require_guard(rules: Sequence[StopRule], info: Any) -> None:
    """Refuse a rule about skipped steps where nothing skips steps.

    Raises:
      ValueError: if there is such a rule, and ``info`` has no ``skipped``.
    """
    names = [rule.name for rule in rules if SKIPPED in rule.metrics]
    if names and getattr(info, "skipped", None) is None:
        raise ValueError(
            f"the rule {names[0]!r} counts skipped steps, but nothing in the optimizer skips any: put skip_spikes or "
            "apply_if_finite around it"
        )


def judge(verdict: Verdict, rules: Sequence[StopRule], state: TrainState, metrics: Metrics, skips: Skips) -> Verdict:
    """The verdict after a check with these metrics, and these skipped steps since the last one.

    Raises:
      ValueError: if a rule does not return one boolean.
    """
    reason, states = verdict.reason, []
    offered = metrics | {SKIPPED: skips.count, LAST_MADE: skips.last_made}
    for index, (rule, memory) in enumerate(zip(rules, verdict.rules, strict=True), start=1):
        memory, stop = rule.update(memory, offered, state.step)
        if jnp.shape(stop) != ():
            raise ValueError(
                f"the stop rule {rule.name!r} must return (state, stop) with one boolean; got a stop of shape "
                f"{jnp.shape(stop)}"
            )
        stop = jnp.asarray(stop).astype(bool)  # because 2 & True is 0
        reason = jnp.where((reason == 0) & stop, index, reason)
        states.append(memory)
    best, kept = verdict.best, kept_metric(rules)
    if best is not None and kept is not None:
        metric, mode = kept
        value = pick(metrics, metric, "the rule that keeps the best parameters")
        value = jnp.where(jnp.isnan(value), worst(mode), value)  # otherwise nothing would ever be better
        now = Best(value, state._replace(key=None))
        # The first check counts whatever its value, so that a run never ends with its initial parameters.
        gained = better(mode, value, best.value) | (best.step == 0)
        best = jax.tree.map(lambda new, old: jnp.where(gained, new, old), now, best)
    return Verdict(tuple(states), reason.astype(jnp.int32), best)


def best_state(verdict: Verdict, state: TrainState) -> TrainState:
    """The final state of a run: its last one, or the complete state of the best check if a rule keeps it."""
    if verdict.best is None:
        return state
    return verdict.best.state._replace(key=state.key)


def measure(evaluate: Callable[..., Mapping[str, Any]] | None, state: TrainState, **offered: Any) -> Metrics:
    """The metrics that ``evaluate`` computes from a state, as arrays.

    Raises:
      TypeError: if it does not return a dict of scalars.
      ValueError: if one of them has the name ``train_loss``.

    >>> import nnlearn
    >>> measure(lambda params: {"size": params}, nnlearn.init_state(jnp.ones(()), nnlearn.sgd(0.1)))
    {'size': Array(1., dtype=float32)}
    """
    if evaluate is None:
        return {}
    if is_carried(state):
        metrics = hand(evaluate, own_state(state), **offered)
    else:
        metrics = hand(evaluate, state.params, model_state=state.model_state, opt_state=state.opt_state, **offered)
    if not isinstance(metrics, Mapping) or any(jnp.shape(value) != () for value in metrics.values()):
        kinds = jax.tree.map(jnp.shape, metrics) if isinstance(metrics, Mapping) else type(metrics).__name__
        raise TypeError(f"evaluate must return a dict of scalars, such as {{'loss': loss}}; got {kinds}")
    if "train_loss" in metrics:
        raise ValueError("evaluate returns 'train_loss', which is the name of the training loss: rename it")
    return {name: jnp.asarray(value) for name, value in metrics.items()}


__all__ = ["Best", "Verdict", "best_state", "first_verdict", "judge", "kept_metric", "measure", "require_guard"]
