"""Successive halving: give many settings a little, and the better ones more and more, inside one program."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

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
    take_runs,
)
from nnlearn.sweeps.space import Setting
from nnlearn.train import Train, TrainState
from nnlearn.train.stopping import check_mode
from nnlearn.types import Key


class Rung(NamedTuple):
    """How many members run on to how many steps."""

    members: int
    steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class Halving:
    """What successive halving found.

    Attributes:
      settings: all that were tried.
      rungs: the plan.
      members: for each rung, the places in ``settings`` of those that ran in it, shape (members,).
      scores: for each rung, their metric at its end, shape (members,).
      metric, mode: what was compared, and whether small or large is better.
      state: how the best member has ended.
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
        """The place in ``settings`` of the best member of the last rung."""
        return int(self.members[-1][np.argmax(goodness(self.scores[-1], self.mode, np))])

    @property
    def best(self) -> Setting:
        """The best setting."""
        return self.settings[self.best_index]

    @property
    def steps(self) -> int:
        """Steps made by all members together."""
        before = [0, *(rung.steps for rung in self.rungs)]
        return sum(rung.members * (rung.steps - begun) for rung, begun in zip(self.rungs, before, strict=False))

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each rung and member: the metric, the steps made, whether it was kept."""
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
    """Rungs whose members shrink and whose steps grow by a factor of ``eta``, the last at the end of the run.

    Args:
      members: in the first rung.
      steps: of a whole run.
      check_every: all steps are multiples of it, or the end.
      eta: which part of the members goes on, one in ``eta``; >= 2.
      rungs: how many; as many as members and checks allow if None.

    Raises:
      ValueError: a number is out of range.

    >>> plan_rungs(27, 90, 10)
    (Rung(members=27, steps=10), Rung(members=9, steps=30), Rung(members=3, steps=90))
    """
    members, eta = check_count("members", members), check_count("eta", eta)
    if eta < 2:
        raise ValueError("eta must be at least 2: one member in eta goes on")
    checks = max(1, steps // check_every)
    most = 1 + math.floor(math.log(min(members, checks), eta) + 1e-9)  # log may fall just short of a whole number
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
    """Run all settings for a few steps, the best part of them for more, and the best few to the end.

    Members share the key, and so their batches. They are ordered by the metric at their last check (NaN is worst), and
    whole runs go on, not parameters alone: the winner is as it would be had it run alone. All of it is one program;
    every member of a rung runs at once, so memory must hold the first rung.

    Args:
      train: made by ``make_train``, with an ``evaluate`` or ``train_loss`` as the metric.
      settings: dicts with the same names, as ``list_settings`` makes them; what differs must be numbers.
      key: of all runs.
      metric: what to compare, see ``sweep``; ``aux/<path>`` goes by what steps recorded in ``info.aux``.
      mode: whether small or large is better.
      eta: one member in ``eta`` goes on.
      rungs: how many rungs, or the rungs themselves as ``(members, steps)``; see ``plan_rungs``.

    Returns:
      A ``Halving``.

    Raises:
      ValueError: fewer than two settings, an unknown metric, or rungs that do not fit.

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
    def program(columns, key):
        places, scores = jnp.arange(len(settings)), jnp.full(len(settings), jnp.nan)
        runs, found, begun = start_runs(train, columns, fixed, key), [], 0
        for rung in plan:
            if rung.members < len(scores):
                _, kept = jax.lax.top_k(goodness(scores, mode), rung.members)
                places, scores, columns = jax.tree.map(lambda leaf, at=kept: leaf[at], (places, scores, columns))
                runs = take_runs(train, runs, kept)
            runs, trace = advance_runs(train, columns, fixed, runs, begun, rung.steps - begun)
            scores, begun = last_scores(trace, metric, scores), rung.steps
            found.append((places, scores))
        winner = take_runs(train, runs, jnp.argmax(goodness(scores, mode)))
        return found, train.finish(winner)

    found, state = program(columns, as_key(key))
    members, scores = (tuple(map(np.asarray, part)) for part in zip(*found, strict=True))
    return Halving(tuple(settings), plan, members, scores, metric, mode, state)


def _check_rungs(rungs: Sequence[tuple[int, int]], members: int, train: Train) -> tuple[Rung, ...]:
    plan = tuple(Rung(check_count("members", count), check_count("steps", steps)) for count, steps in rungs)
    shrinks = all(after.members <= before.members for before, after in itertools.pairwise(plan))
    grows = all(after.steps > before.steps for before, after in itertools.pairwise(plan))
    if not plan or plan[0].members != members or not shrinks or not grows or plan[-1].steps > train.steps:
        raise ValueError(
            f"rungs must begin with all {members} settings, then have fewer members and more steps, up to "
            f"{train.steps}, got {[tuple(rung) for rung in plan]}"
        )
    return plan


__all__ = ["Halving", "Rung", "plan_rungs", "successive_halving"]
