"""Population-based training: members that fall behind copy better ones, and try other hyper-parameters from there."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checks import as_key, check_count, check_number
from nnlearn.sweeps.members import advance_runs, goodness, last_scores, start_runs, take_runs
from nnlearn.sweeps.space import Axis, Choice, Setting, axes_of, list_settings
from nnlearn.train import Train, TrainState
from nnlearn.train.stopping import check_mode
from nnlearn.types import Key

EXPLORE_STREAM = 0x9B7  # an arbitrary constant: it sets what the population draws apart from what the runs draw


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """What a population has learned. A generation is the stretch between two exchanges.

    Attributes:
      hparams: by name, the values that varied, shape (generations, members).
      scores: the metric at the end of each generation, shape (generations, members).
      parents: the member of the generation before that each has gone on from, shape (generations, members).
      ready_every: steps of a generation.
      fixed: the hyper-parameters that did not vary.
      metric, mode: what was compared, and whether small or large is better.
      state: how the best member has ended.
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
        """The best member of the last generation."""
        return int(np.argmax(goodness(self.scores[-1], self.mode, np)))

    @property
    def best_score(self) -> float:
        """Its metric."""
        return float(self.scores[-1, self.best_index])

    def lineage(self, member: int | None = None) -> np.ndarray:
        """Which members a member of the last generation descends from, shape (generations,); the best one's if None."""
        at = self.best_index if member is None else member
        line = []
        for parents in self.parents[::-1]:
            line.append(at)
            at = parents[at]
        return np.array(line[::-1])

    def schedule(self, member: int | None = None) -> dict[str, np.ndarray]:
        """The hyper-parameters that led to a member's parameters, generation by generation; the best one's if None."""
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
    start: list[Setting] | None = None,
) -> Population:
    """Train many members at once; every ``ready_every`` steps the worst go on from the best.

    A member among the worst takes over the whole run of one drawn from the best (parameters, optimizer, stopping
    rules), and its hyper-parameters, each of which is then changed: drawn anew with probability ``resample``, otherwise
    multiplied by one of ``factors`` within the axis' bounds (a choice moves to the value beside it). All generations
    are one loop in one program.

    Args:
      train: made by ``make_train``; its steps must be a multiple of ``ready_every``. Each of its functions must be able
        to take hyper-parameters that change on the way.
      space: by name, an axis, or a value that all members share.
      members: >= 2.
      key: of all runs, which share their batches, and of the draws.
      ready_every: steps of a generation, a multiple of ``train.check_every``.
      metric, mode: what to compare, at the last check of a generation (NaN is worst), and what is better;
        ``aux/<path>`` goes by what steps recorded in ``info.aux``, see ``sweep``.
      replaced: which part of the members, at the bottom, is replaced by as many at the top: 0 to 0.5. 0 is a plain
        sweep; above it at least one.
      factors: by which values are multiplied, each as likely.
      resample: how likely a value is drawn anew instead.
      start: the settings of the first generation; drawn from ``space`` if None.

    Returns:
      A ``Population``.

    Raises:
      ValueError: a number is out of range, or ``start`` has not the names of ``space``.

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
        raise ValueError("members must be at least 2, so that one can learn from another")
    if ready_every % train.check_every or train.steps % ready_every:
        raise ValueError(
            f"ready_every={ready_every} must be a multiple of check_every={train.check_every}, and divide the "
            f"{train.steps} steps of the run"
        )
    columns, fixed = _first_generation(space, axes, members, start), {n: v for n, v in space.items() if n not in axes}
    moved = min(members // 2, max(1, round(replaced * members))) if replaced else 0

    @jax.jit
    def program(columns, key):
        draw_key = jax.random.fold_in(key, EXPLORE_STREAM)

        def generation(carry, index):
            columns, runs, scores = carry
            pick_key, change_key = jax.random.split(jax.random.fold_in(draw_key, index))
            parents = jnp.where(index > 0, _parents(pick_key, goodness(scores, mode), moved), jnp.arange(members))
            adopted = parents != jnp.arange(members)
            columns = {name: values[parents] for name, values in columns.items()}
            changed = _explore(change_key, columns, axes, factors, resample)
            columns = {name: jnp.where(adopted, changed[name], values) for name, values in columns.items()}
            runs, scores = take_runs(train, runs, parents), scores[parents]
            runs, trace = advance_runs(train, columns, fixed, runs, index * ready_every, ready_every)
            scores = last_scores(trace, metric, scores)
            return (columns, runs, scores), (columns, scores, parents)

        carry = (columns, start_runs(train, columns, fixed, key), jnp.full(members, jnp.nan, jnp.float32))
        (_, runs, scores), history = jax.lax.scan(generation, carry, jnp.arange(train.steps // ready_every))
        return history, train.finish(take_runs(train, runs, jnp.argmax(goodness(scores, mode))))

    history, state = program(columns, as_key(key))
    hparams, scores, parents = jax.tree.map(np.asarray, history)
    return Population(hparams, scores, parents, ready_every, fixed, metric, mode, state)


def _first_generation(space: Setting, axes: dict[str, Axis], members: int, start: Any) -> dict[str, jax.Array]:
    start = list_settings(space, members, "quasi") if start is None else start
    if len(start) != members:
        raise ValueError(f"start must hold a setting for each of the {members} members, got {len(start)}")
    for setting in start:
        if not axes.keys() <= setting.keys():
            raise ValueError(f"start must give every axis of the space, {sorted(axes)}, got {sorted(setting)}")
    return {name: jnp.asarray([setting[name] for setting in start]) for name in axes}


def _parents(key: Key, fitness: jax.Array, moved: int) -> jax.Array:
    """Whom each member goes on from: itself, or, for the worst, one drawn from the best; shape (members,)."""
    order = jnp.argsort(-fitness)  # the best first
    parents = jnp.arange(len(order))
    if not moved:
        return parents
    chosen = order[jax.random.randint(key, (moved,), 0, moved)]
    return parents.at[order[-moved:]].set(chosen)


def _explore(key: Key, columns: dict[str, jax.Array], axes: dict[str, Axis], factors, resample) -> dict[str, jax.Array]:
    """Another value near each, or anywhere on its axis."""
    changed = {}
    for name_key, (name, values) in zip(jax.random.split(key, len(columns)), columns.items(), strict=True):
        anew_key, side_key, value_key = jax.random.split(name_key, 3)
        axis, up = axes[name], jax.random.bernoulli(side_key, shape=values.shape)
        if isinstance(axis, Choice):
            ladder = jnp.sort(jnp.asarray(axis.values))
            at = jnp.searchsorted(ladder, values) + jnp.where(up, 1, -1)
            near = ladder[jnp.clip(at, 0, len(ladder) - 1)]
        else:
            low, high = factors
            near = jnp.clip(values * jnp.where(up, high, low), axis.low, axis.high)
        anew = axis.at(jax.random.uniform(value_key, values.shape), jnp)
        again = jax.random.bernoulli(anew_key, resample, values.shape)
        changed[name] = jnp.where(again, anew, near).astype(values.dtype)
    return changed


__all__ = ["Population", "train_population"]
