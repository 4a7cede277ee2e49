"""Population-based training: poor members copy good ones and continue with changed hyper-parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import as_key, check_count, check_number
from nnlearn.sweeps.members import advance_runs, goodness, last_scores, start_runs, take_run, take_runs
from nnlearn.sweeps.space import Axis, Choice, Setting, axes_of, list_settings
from nnlearn.train import Train, TrainState
from nnlearn.train.stopping import check_mode
from nnlearn.types import Key

EXPLORE_STREAM = 0x9B7  # an arbitrary constant that separates the population's random numbers from those of the runs


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """The outcome of population-based training. A generation is the interval between two exchanges.

    Attributes:
      hparams: by name, the values of the hyper-parameters that vary, shape (generations, members).
      scores: the metric at the end of each generation, shape (generations, members).
      parents: the member of the previous generation that each member continues, shape (generations, members).
      ready_every: number of steps of a generation.
      fixed: the hyper-parameters that do not vary.
      metric: the metric that was compared.
      mode: whether a small ("min") or a large ("max") metric is better.
      state: the final state of the best member.
    """

    hparams: dict[str, np.ndarray]
    scores: np.ndarray
    parents: np.ndarray
    ready_every: int
    fixed: Setting
    metric: str
    mode: Literal["min", "max"]
    state: TrainState

    @property
    def best_index(self) -> int:
        """The index of the best member of the last generation."""
        return int(np.argmax(goodness(self.scores[-1], self.mode, np)))

    @property
    def best_score(self) -> float:
        """The metric of the best member of the last generation."""
        return float(self.scores[-1, self.best_index])

    def lineage(self, member: int | None = None) -> np.ndarray:
        """The ancestors of a member of the last generation, itself included, shape (generations,).

        Args:
          member: its index; None for the best member.
        """
        ancestor = self.best_index if member is None else member
        line = []
        for parents in self.parents[::-1]:
            line.append(ancestor)
            ancestor = parents[ancestor]
        return np.array(line[::-1])

    def schedule(self, member: int | None = None) -> dict[str, np.ndarray]:
        """The hyper-parameters along the lineage of a member, each of shape (generations,).

        Args:
          member: its index; None for the best member.
        """
        line = self.lineage(member)
        return {name: values[np.arange(len(line)), line] for name, values in self.hparams.items()}

    def columns(self) -> dict[str, np.ndarray]:
        """A tidy table with one row for each generation and member."""
        generations, members = np.indices(self.scores.shape)
        table = {"generation": generations, "member": members, "parent": self.parents}
        table |= {"step": (generations + 1) * self.ready_every, **self.hparams, self.metric: self.scores}
        return {name: column.ravel() for name, column in table.items()}


def train_population(
    train: Train,
    space: Setting,
    members: int,
    key: Key | int = 0,
    *,
    ready_every: int,
    metric: str,
    mode: Literal["min", "max"] = "min",
    replaced: float = 0.2,
    factors: tuple[float, float] = (0.8, 1.2),
    resample: float = 0.25,
    start: Sequence[Setting] | None = None,
) -> Population:
    """Train several members side by side; every ``ready_every`` steps the worst members continue from the best.

    Each of the worst members copies the whole run of a member drawn from the best (parameters, optimizer state and
    stopping rules) and its hyper-parameters. Each hyper-parameter is then changed: it is drawn again with probability
    ``resample``, and otherwise multiplied by one of ``factors`` within the axis' bounds (a choice moves to a
    neighbouring value). All generations are one loop in one program.

    Args:
      train: a run of ``make_train``; its steps must be a multiple of ``ready_every``, and all of its functions must
        accept hyper-parameters that change during the run.
      space: by name, an axis, or a value that all members share.
      members: number of members, >= 2.
      key: the key of all runs, which share their batches, and of the changes.
      ready_every: number of steps of a generation, a multiple of ``train.check_every``.
      metric: the metric to compare at the last check of a generation; NaN is the worst. A name from ``evaluate``,
        ``train_loss``, or ``aux/<path>``, see ``sweep``.
      mode: whether a small ("min") or a large ("max") metric is better.
      replaced: fraction of the members that are replaced, from the worst, by as many of the best: 0 to 0.5. With 0 the
        members stay independent; a value above 0 replaces at least one.
      factors: the two factors for a value, equally likely.
      resample: probability of drawing a value again.
      start: the settings of the first generation; None to draw them from ``space``.

    Returns:
      A ``Population``.

    Raises:
      ValueError: if a number is out of range, or if ``start`` lacks an axis of ``space``.

    Source: Jaderberg et al. 2017, "Population Based Training of Neural Networks".

    >>> import nnlearn
    >>> from nnlearn.sweeps.space import log_uniform
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(
    ...     lambda p, b, k: p**2, lambda h: nnlearn.sgd(h["rate"]), batches, jnp.ones(()), steps=20, check_every=5
    ... )
    >>> population = train_population(
    ...     train, {"rate": log_uniform(1e-4, 0.5)}, 8, ready_every=5, metric="train_loss"
    ... )
    >>> population.scores.shape, population.best_score < 1e-6
    ((4, 8), True)
    """
    axes = axes_of(space)
    check_mode(mode)
    train = train.with_metrics(metric)
    check_number("replaced", replaced, low=0.0, high=0.5)
    check_number("resample", resample, low=0.0, high=1.0)
    if check_count("members", members) < 2:
        raise ValueError(f"members must be at least 2, so that one can copy another, got {members}")
    if ready_every % train.check_every or train.steps % ready_every:
        raise ValueError(
            f"ready_every={ready_every} must be a multiple of check_every={train.check_every}, and divide the "
            f"{train.steps} steps of the run"
        )
    columns = _first_generation(space, axes, members, start)
    fixed = {name: value for name, value in space.items() if name not in axes}
    moved = min(members // 2, max(1, round(replaced * members))) if replaced else 0

    @jax.jit
    def program(columns: dict[str, jax.Array], key: Key) -> tuple[Any, Any]:
        draw_key = jax.random.fold_in(key, EXPLORE_STREAM)

        def generation(carry: Any, index: jax.Array) -> tuple[Any, Any]:
            columns, runs, scores = carry
            pick_key, change_key = jax.random.split(jax.random.fold_in(draw_key, index))
            parents = jnp.where(index > 0, _parents(pick_key, goodness(scores, mode), moved), jnp.arange(members))
            adopted = parents != jnp.arange(members)
            columns = {name: values[parents] for name, values in columns.items()}
            changed = _explore(change_key, columns, axes, factors, resample)
            columns = {name: jnp.where(adopted, changed[name], values) for name, values in columns.items()}
            runs, scores = take_runs(runs, parents), scores[parents]
            runs, trace = advance_runs(train, columns, fixed, runs, index * ready_every, ready_every)
            scores = last_scores(trace, metric, scores)
            return (columns, runs, scores), (columns, scores, parents)

        carry = (columns, start_runs(train, columns, fixed, key), jnp.full(members, jnp.nan, jnp.float32))
        (_, runs, scores), history = jax.lax.scan(generation, carry, jnp.arange(train.steps // ready_every))
        return history, train.finish(take_run(runs, jnp.argmax(goodness(scores, mode))))

    history, state = program(columns, as_key(key))
    hparams, scores, parents = jax.tree.map(np.asarray, history)
    return Population(hparams, scores, parents, ready_every, fixed, metric, mode, state)


def _first_generation(
    space: Setting, axes: dict[str, Axis], members: int, start: Sequence[Setting] | None
) -> dict[str, jax.Array]:
    start = list_settings(space, members, "quasi") if start is None else start
    if len(start) != members:
        raise ValueError(f"start must hold a setting for each of the {members} members, got {len(start)}")
    for setting in start:
        if not axes.keys() <= setting.keys():
            raise ValueError(f"start must give every axis of the space, {sorted(axes)}, got {sorted(setting)}")
    return {name: jnp.asarray([setting[name] for setting in start]) for name in axes}


def _parents(key: Key, fitness: jax.Array, moved: int) -> jax.Array:
    """The member that each member continues: one of the best for the worst, itself for the others; shape (members,)."""
    order = jnp.argsort(-fitness)  # the best first
    parents = jnp.arange(len(order))
    if not moved:
        return parents
    chosen = order[jax.random.randint(key, (moved,), 0, moved)]
    return parents.at[order[-moved:]].set(chosen)


def _explore(
    key: Key, columns: dict[str, jax.Array], axes: dict[str, Axis], factors: tuple[float, float], resample: float
) -> dict[str, jax.Array]:
    """A changed value for each member: near its own, or anywhere on the axis."""
    changed = {}
    for name_key, (name, values) in zip(jax.random.split(key, len(columns)), columns.items(), strict=True):
        again_key, side_key, value_key = jax.random.split(name_key, 3)
        axis, up = axes[name], jax.random.bernoulli(side_key, shape=values.shape)
        if isinstance(axis, Choice):
            ladder = jnp.sort(jnp.asarray(axis.values))
            at = jnp.searchsorted(ladder, values) + jnp.where(up, 1, -1)
            near = ladder[jnp.clip(at, 0, len(ladder) - 1)]
        else:
            low, high = factors
            near = jnp.clip(values * jnp.where(up, high, low), axis.low, axis.high)
        redrawn = axis.at(jax.random.uniform(value_key, values.shape), jnp)
        again = jax.random.bernoulli(again_key, resample, values.shape)
        changed[name] = jnp.where(again, redrawn, near).astype(values.dtype)
    return changed


__all__ = ["Population", "train_population"]
