"""Successive halving: train many settings for a few steps and the better ones for longer, inside one program."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import as_key, check_count
from nnlearn.sweeps.members import (
    advance_runs,
    goodness,
    last_scores,
    stack_settings,
    start_runs,
    take_run,
    take_runs,
)
from nnlearn.sweeps.space import Setting
from nnlearn.train import Train, TrainState
from nnlearn.train.stopping import check_mode
from nnlearn.types import Key


class Rung(NamedTuple):
    """A number of members that continue, and the step that they reach."""

    members: int
    steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class Halving:
    """The outcome of successive halving.

    Attributes:
      settings: all settings that were tried.
      rungs: the members and steps of each rung.
      members: for each rung, the indices into ``settings`` of its members, shape (members,).
      scores: for each rung, the metric of its members at its end, shape (members,).
      metric: the metric that was compared.
      mode: whether a small ("min") or a large ("max") metric is better.
      state: the final state of the best member.
    """

    settings: tuple[Setting, ...]
    rungs: tuple[Rung, ...]
    members: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    metric: str
    mode: Literal["min", "max"]
    state: TrainState

    @property
    def best_index(self) -> int:
        """The index into ``settings`` of the best member of the last rung."""
        return int(self.members[-1][np.argmax(goodness(self.scores[-1], self.mode, np))])

    @property
    def best(self) -> Setting:
        """The best setting."""
        return self.settings[self.best_index]

    @property
    def steps(self) -> int:
        """The total number of steps over all members."""
        before = [0, *(rung.steps for rung in self.rungs)]
        return sum(rung.members * (rung.steps - start) for rung, start in zip(self.rungs, before, strict=False))

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each rung and member: its steps, its metric, and whether it was kept."""
        names = [name for name, value in self.settings[0].items() if np.ndim(value) == 0]
        after = [*self.members[1:], np.array([self.best_index])]
        counts = [len(members) for members in self.members]
        rows = np.concatenate(self.members)
        table = {"rung": np.repeat(np.arange(len(counts)), counts), "member": rows}
        table |= {name: np.array([self.settings[row][name] for row in rows]) for name in names}
        table["steps"] = np.repeat([rung.steps for rung in self.rungs], counts)
        table[self.metric] = np.concatenate(self.scores)
        table["kept"] = np.concatenate([np.isin(ran, on) for ran, on in zip(self.members, after, strict=True)])
        return table


def plan_rungs(members: int, steps: int, check_every: int, eta: int = 3, rungs: int | None = None) -> tuple[Rung, ...]:
    """Plan rungs whose members decrease and whose steps increase by a factor of ``eta``; the last ends with the run.

    Args:
      members: number of members in the first rung.
      steps: number of steps of a whole run.
      check_every: steps between two checks; every rung ends at a check.
      eta: one member in ``eta`` continues; >= 2.
      rungs: number of rungs; None for as many as members and checks allow.

    Returns:
      The rungs in order, each with its number of members and the step at which it ends.

    Raises:
      ValueError: if a number is out of range.

    >>> plan_rungs(27, 90, 10)
    (Rung(members=27, steps=10), Rung(members=9, steps=30), Rung(members=3, steps=90))
    """
    members, eta = check_count("members", members), check_count("eta", eta)
    if eta < 2:
        raise ValueError(f"eta must be at least 2, because one member in eta continues, got {eta}")
    checks = max(1, steps // check_every)
    most = 1 + math.floor(
        math.log(min(members, checks), eta) + 1e-9
    )  # rounding may put the logarithm just below an integer
    count = most if rungs is None else check_count("rungs", rungs)
    if count > most:
        raise ValueError(
            f"rungs={rungs}, but {members} members and {steps} steps with a check every {check_every} allow {most}"
        )
    plan = []
    for at in range(count):
        until = steps if at == count - 1 else check_every * max(1, round(steps / eta ** (count - 1 - at) / check_every))
        plan.append(Rung(members // eta**at, until))
    return tuple(plan)


def successive_halving(
    train: Train,
    settings: Sequence[Setting],
    key: Key | int = 0,
    *,
    metric: str,
    mode: Literal["min", "max"] = "min",
    eta: int = 3,
    rungs: int | Sequence[tuple[int, int]] | None = None,
) -> Halving:
    """Run all settings for a few steps, the better ones for more steps, and the best few to the end.

    Members share the key, and so their batches. They are ranked by the metric at their last check; NaN is the worst.
    Whole runs continue, not only parameters, so the winner equals the same run on its own. Everything is one program
    that runs all members of a rung together, so the first rung must fit into memory.

    Args:
      train: a run of ``make_train``.
      settings: dicts with the same names, such as those of ``list_settings``; values that differ must be numbers.
      key: the key of all runs.
      metric: the metric to compare: a name from ``evaluate``, ``train_loss``, or ``aux/<path>``, see ``sweep``.
      mode: whether a small ("min") or a large ("max") metric is better.
      eta: one member in ``eta`` continues to the next rung.
      rungs: the number of rungs, or the rungs as ``(members, steps)``; see ``plan_rungs``.

    Returns:
      A ``Halving``.

    Raises:
      ValueError: if there are fewer than two settings, if the metric is unknown, or if the rungs do not fit the run.

    Source: Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"; the
    rungs are those of Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning".

    >>> import nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(
    ...     lambda p, b, k: p**2, lambda h: nnlearn.sgd(h["rate"]), batches, jnp.ones(()), steps=18, check_every=2
    ... )
    >>> halving = successive_halving(train, [{"rate": 0.04 * n} for n in range(9)], metric="train_loss")
    >>> halving.best, halving.rungs[1], halving.steps
    ({'rate': 0.32}, Rung(members=3, steps=6), 42)
    """
    columns, fixed = stack_settings(settings)
    check_mode(mode)
    train = train.with_metrics(metric)
    if isinstance(rungs, Sequence):
        plan = _check_rungs(rungs, len(settings), train)
    else:
        plan = plan_rungs(len(settings), train.steps, train.check_every, eta, rungs)

    @jax.jit
    def program(columns: dict[str, jax.Array], key: Key) -> tuple[list[tuple[jax.Array, jax.Array]], Any]:
        members, scores = jnp.arange(len(settings)), jnp.full(len(settings), jnp.nan)
        runs, history, start = start_runs(train, columns, fixed, key), [], 0
        for rung in plan:
            if rung.members < len(scores):
                _, kept = jax.lax.top_k(goodness(scores, mode), rung.members)
                members, scores, columns = jax.tree.map(lambda leaf, at=kept: leaf[at], (members, scores, columns))
                runs = take_runs(runs, kept)
            runs, trace = advance_runs(train, columns, fixed, runs, start, rung.steps - start)
            scores, start = last_scores(trace, metric, scores), rung.steps
            history.append((members, scores))
        return history, train.finish(take_run(runs, jnp.argmax(goodness(scores, mode))))

    history, state = program(columns, as_key(key))
    members, scores = (tuple(map(np.asarray, part)) for part in zip(*history, strict=True))
    return Halving(tuple(settings), plan, members, scores, metric, mode, state)


def _check_rungs(rungs: Sequence[tuple[int, int]], members: int, train: Train) -> tuple[Rung, ...]:
    plan = tuple(Rung(check_count("members", count), check_count("steps", steps)) for count, steps in rungs)
    shrinks = all(after.members <= before.members for before, after in itertools.pairwise(plan))
    grows = all(after.steps > before.steps for before, after in itertools.pairwise(plan))
    if not plan or plan[0].members != members or not shrinks or not grows or plan[-1].steps > train.steps:
        raise ValueError(
            f"rungs must begin with all {members} settings and then have fewer members and more steps, up to "
            f"{train.steps}, got {[tuple(rung) for rung in plan]}"
        )
    return plan


__all__ = ["Halving", "Rung", "plan_rungs", "successive_halving"]
