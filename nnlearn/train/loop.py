"""The loop of a compiled run: steps in stretches, stretches in rounds, and a check after every round."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.programs.loops import blank, end_to_end, followed_by, lean_scan, scan_in_segments
from nnlearn.sums import long_sum
from nnlearn.train.aux_metrics import counted_aux
from nnlearn.train.sampler import Sampler
from nnlearn.train.state import TrainState
from nnlearn.train.step import Info, Skips, counted_loss, step_key
from nnlearn.train.stopping import Metrics, StopRule
from nnlearn.train.verdict import Verdict, judge, require_guard
from nnlearn.types import Key, PyTree


class Run(NamedTuple):
    """A run in progress: everything that its remaining steps need, as a pytree that can be saved and resumed.

    Attributes:
      state: parameters, optimizer state and random key. Its ``step`` stops increasing when a rule stops the run. The
        state of a custom step is its ``stored``, unless it is a ``TrainState`` itself.
      data_key: the random key of the batches.
      order: the sampler's state.
      verdict: the states of the stopping rules, which rule has stopped the run, and the best check so far.
    """

    state: TrainState
    data_key: Key
    order: PyTree
    verdict: Verdict


class _Stretch(NamedTuple):
    """The results of several steps, or of several stretches stacked along a new leading axis."""

    infos: Info  # every ``record_every``-th
    sums: Metrics  # of the loss and of the scalars in ``info.aux``, over the steps that were not skipped
    skips: Skips


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """The loop of one run. Its functions already have the run's hyper-parameters.

    Attributes:
      step: ``step(state, batch, key=key) -> (state, info)``.
      batches: the source of the batches.
      measure: ``measure(state) -> metrics``, called at every check.
      rules: the stopping rules.
      aux: names of scalars in ``info.aux`` whose means are metrics.
      key, data_key: the random keys of the steps and of the batches.
      check_every: steps between two checks.
      record_every: steps between two records.
      stretch: steps between two states that a derivative stores.
      segment: rounds between two states that a derivative stores, if a round is one stretch.
    """

    step: Callable[..., tuple[TrainState, Info]]
    batches: Sampler
    measure: Callable[[TrainState], Metrics]
    rules: tuple[StopRule, ...]
    aux: tuple[str, ...]
    key: Key
    data_key: Key
    check_every: int
    record_every: int
    stretch: int
    segment: int

    def rounds(self, run: Run, first: int | jax.Array, count: int) -> tuple[Run, Info, Metrics]:
        """``count`` steps from step ``first``, with a check after every ``check_every`` steps and after the last."""
        many, rest = divmod(count, self.check_every)
        # A vmapped conditional returns one copy for each run. Keys that runs share, and all random numbers drawn from
        # them, would be copied too, so they stay outside of the loop.
        run = run._replace(state=run.state._replace(key=None), data_key=None)

        def at_round(run, index):
            return self._round(run, first + index * self.check_every, self.check_every)

        if self.stretch < self.check_every:  # then a derivative stores the states between stretches
            run, (infos, metrics) = jax.lax.scan(at_round, run, jnp.arange(many))
        else:
            run, (infos, metrics) = scan_in_segments(at_round, run, many, self.segment)
        infos = end_to_end(infos)
        if rest:
            run, (last_infos, last_metrics) = self._round(run, first + many * self.check_every, rest)
            infos = followed_by(infos, last_infos)
            metrics = jax.tree.map(lambda values, last: jnp.append(values, last), metrics, last_metrics)
        return run._replace(state=run.state._replace(key=self.key), data_key=self.data_key), infos, metrics

    def _round(self, run: Run, first: int | jax.Array, count: int) -> tuple[Run, tuple[Info, Metrics]]:
        """``count`` steps and a check, or a no-op if the run has stopped."""

        def go(run):
            return self._steps_and_check(run, first, count)

        if not self.rules:
            return go(run)

        def hold(run):
            return run, jax.tree.map(blank, jax.eval_shape(go, run)[1])

        return jax.lax.cond(run.verdict.reason > 0, hold, go, run)

    def _steps_and_check(self, run: Run, first: int | jax.Array, count: int) -> tuple[Run, tuple[Info, Metrics]]:
        run, (infos, sums, skips) = self._steps(run, first, count)
        require_guard(self.rules, infos)
        made = (count - skips.count).astype(jnp.float32)
        metrics = {name: total / made for name, total in sums.items()}
        metrics |= self.measure(run.state)
        return run._replace(verdict=judge(run.verdict, self.rules, run.state, metrics, skips)), (infos, metrics)

    def _steps(self, run: Run, first: int | jax.Array, count: int) -> tuple[Run, _Stretch]:
        """``count`` steps in stretches. A derivative stores the state before each stretch and recomputes the rest."""
        carry = (run.state, run.order)
        many, rest = divmod(count, self.stretch)
        if many == 1 and not rest:
            (state, order), made = self._stretch(carry, first, count)
            return run._replace(state=state, order=order), made
        segment = jax.checkpoint(lambda carry, at: self._stretch(carry, at, self.stretch), prevent_cse=False)
        carry, (infos, sums, skips) = jax.lax.scan(segment, carry, first + self.stretch * jnp.arange(many))
        infos = end_to_end(infos)
        if rest:
            carry, last = self._stretch(carry, first + many * self.stretch, rest)
            infos = followed_by(infos, last.infos)
            sums, skips = jax.tree.map(jnp.append, (sums, skips), (last.sums, last.skips))
        skips = Skips(jnp.sum(skips.count, dtype=jnp.int32), jnp.max(skips.last_made))
        made = _Stretch(infos, jax.tree.map(long_sum, sums), skips)
        state, order = carry
        return run._replace(state=state, order=order), made

    def _stretch(self, carry: tuple[TrainState, PyTree], first: Any, count: int):
        """``count`` steps, whose batches and random keys are prepared together."""
        state, order = carry
        order, rows = self.batches.rows(self.data_key, order, first, count, self.stretch)
        step_keys = jax.vmap(step_key, in_axes=(None, 0))(self.key, first + jnp.arange(count))

        def one(state, inputs):
            row, key = inputs
            state, info = self.step(state._replace(key=self.key), self.batches.batch(row), key=key)
            return state._replace(key=None), info

        state, infos = lean_scan(one, state, (rows, step_keys))
        thinned = jax.tree.map(lambda leaf: leaf[self.record_every - 1 :: self.record_every], infos)
        none = jnp.zeros([], jnp.int32)
        skips = Skips(none, none).plus(infos, first + 1 + jnp.arange(count))
        sums = {"train_loss": long_sum(counted_loss(infos))}
        sums |= {name: long_sum(counted_aux(infos, name)) for name in self.aux}
        return (state, order), _Stretch(thinned, sums, skips)


def segment_length(steps: int, check_every: int) -> int:
    """Rounds between two states that a derivative stores: near the square root of all steps.

    >>> segment_length(10_000, 5)
    20
    """
    return max(1, math.isqrt(steps) // check_every)


__all__ = ["Loop", "Run", "segment_length"]
