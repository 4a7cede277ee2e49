"""The device side of a host-driven run: its state, and the compiled programs that advance and check it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from nnlearn.programs.fingerprint import program_hash
from nnlearn.programs.loops import without_constants
from nnlearn.sharding.axes import filled
from nnlearn.stream.blocks import Block
from nnlearn.stream.host_metrics import HostMetrics
from nnlearn.stream.program_cache import cached_program
from nnlearn.sums import Total
from nnlearn.train.aux_metrics import aux_names, counted_aux
from nnlearn.train.custom_step import lift_step, own_state, with_own_state
from nnlearn.train.state import TrainState
from nnlearn.train.step import Skips, counted_loss
from nnlearn.train.stopping import Metrics, StopRule
from nnlearn.train.verdict import Verdict, best_state, first_verdict, judge, measure, require_guard
from nnlearn.types import PyTree, Scalar

# The state; since the last check: the sum of losses, the skipped steps, the sums of other metrics by name.
Carry = tuple[TrainState, Total, Skips, dict[str, Total]]


class Dispatcher:
    """Holds the state of a run on the device, and dispatches the programs that advance and check it.

    Args:
      step, evaluate: see ``fit``.
      state: the state as loops carry it; its memory is taken.
      rules: the stopping rules.
      host: the metrics that are computed on the host.

    Attributes:
      metric_names: the names of the metrics of a check.
      steps_since_check: number of steps since the last check.

    Raises:
      TypeError, ValueError: if ``evaluate`` does not return a dict of scalars, or a rule needs a metric that is not in
        it. They are raised here rather than at the first check.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        state: TrainState,
        evaluate: Callable[..., Mapping[str, Scalar]] | None,
        rules: tuple[StopRule, ...],
        host: HostMetrics,
    ):
        self._step = step  # its cached programs do not keep it alive
        self._rules, self._host = rules, host
        self._summed = aux_names(rules)
        places = _places(state)
        self._block = cached_program(
            step, "block", (self._summed, places), lambda step: make_block(step, self._summed, places)
        )
        self._check = cached_program(step, "check", (evaluate, rules), lambda _: make_check(evaluate, rules))
        # A loop with a dynamic trip count makes an accelerator ask the host at every turn, so full blocks get a program
        # with a static count. On a CPU it costs nothing, and one program does for all blocks.
        self._compile_full = jax.default_backend() != "cpu"
        self._carry: Carry = (state, *_empty_sums(self._summed))
        # A copy: the check donates the verdict, and the next step donates the state.
        self._verdict = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), first_verdict(rules, state))
        self.steps_since_check = 0
        found = host(self.user_state)
        self.metric_names = list(self._check.eval_shape(self._verdict, self._carry, np.float32(1), found)[0])

    @property
    def carry(self) -> Carry:
        """The state and the sums since the last check, for a checkpoint."""
        return self._carry

    @property
    def verdict(self) -> Verdict:
        """What the rules carry, for a checkpoint."""
        return self._verdict

    def restore(self, carry: Carry, verdict: Verdict, steps_since_check: int) -> None:
        """Continue from what a checkpoint had."""
        self._carry, self._verdict, self.steps_since_check = carry, verdict, steps_since_check

    def program_hash(self, block: Block) -> str:
        """The hash of the step's program on a batch of this block."""
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), block.batches)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._carry[0])
        return program_hash(jax.make_jaxpr(lift_step(self._step))(shapes, batch))

    @property
    def user_state(self) -> Any:
        """The present state, of the type that ``fit`` was given."""
        return own_state(self._carry[0])

    def replace_state(self, user_state: Any) -> None:
        """Continue from another state of the same type."""
        self._carry = (with_own_state(self._carry[0], user_state), *self._carry[1:])

    def make_steps(self, block: Block) -> PyTree:
        """Dispatch the steps of a block, without waiting for them.

        Returns:
          The infos, stacked over the block's size; those beyond ``block.steps`` are undefined.
        """
        count = None if self._compile_full and block.steps == block.size else np.int32(block.steps)
        self._carry, infos = self._block(self._carry, block.batches, count, block.size)
        require_guard(self._rules, infos)
        self.steps_since_check += block.steps
        return infos

    def check(self) -> Metrics:
        """Evaluate the present state and apply the rules."""
        found = self._host(self.user_state)
        count = np.float32(self.steps_since_check)
        metrics, self._verdict = self._check(self._verdict, self._carry, count, found)
        self._carry = (self._carry[0], *_empty_sums(self._summed))
        self.steps_since_check = 0
        return metrics

    @property
    def reason(self) -> int:
        """Which rule has stopped the run, counted from 1; 0 if none has."""
        return int(self._verdict.reason) if self._rules else 0

    @property
    def rule_names(self) -> list[str]:
        """The names of the rules."""
        return [rule.name for rule in self._rules]

    @property
    def best_step(self) -> jax.Array | None:
        """The step of the best check, 0 before the first; None if no rule keeps the best state."""
        return None if self._verdict.best is None else self._verdict.best.step

    def result(self) -> Any:
        """The state that the run ends with: that of the best check where a rule keeps it, otherwise the present one."""
        if self.best_step is None or not int(self.best_step):  # a run may be interrupted before its first check
            return self.user_state
        return own_state(best_state(self._verdict, self._carry[0]))

    def is_lost(self) -> bool:
        """Whether the memory of the state is gone, as after a step that failed."""
        leaves = jax.tree.leaves(self._carry[0])
        return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)


def _places(state: TrainState) -> tuple[Any, ...] | None:
    """The shardings of a state's arrays if it is on a mesh of several devices; otherwise None."""
    leaves = jax.tree.leaves(state)
    places = tuple(leaf.sharding if isinstance(leaf, jax.Array) else None for leaf in leaves)
    on_mesh = [place for place in places if isinstance(place, NamedSharding) and place.num_devices > 1]
    return places if on_mesh else None


def make_block(step: Callable[..., Any], names: Sequence[str] = (), places: Sequence[Any] | None = None) -> Any:
    """``block(carry, batches, count, size) -> (carry, infos)``, jitted; it donates ``carry``.

    Args:
      step: a training step.
      names: metrics to sum besides the loss, see ``counted_aux``.
      places: the sharding of each array of the state, which the new state has too; None leaves it to XLA.

    Returns:
      A function that makes a step with each of the first ``count`` of ``size`` stacked batches, with one program for
      any count; or, if ``count`` is None, with all of them.
    """
    lifted = jax.jit(lift_step(step))  # jitted, so that all uses below share one trace

    def one(carry, batch):
        state, total, skips, others = carry
        state, info = lifted(state, batch)
        others = {name: others[name].plus(counted_aux(info, name)) for name in names}
        return (state, total.plus(counted_loss(info)), skips.plus(info, state.step), others), info

    def keep(carry):
        if places is None:
            return carry
        leaves, structure = jax.tree.flatten(carry[0])
        kept = [_kept(leaf, place) for leaf, place in zip(leaves, places, strict=True)]
        return (structure.unflatten(kept), *carry[1:])

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def block(carry, batches, count, size):
        def at(index):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)

        turn, carried, restore = without_constants(one, carry, at(0))
        if count is None:
            carried, infos = jax.lax.scan(turn, carried, batches, length=size)
            return keep(restore(carried)), infos

        shapes = jax.eval_shape(one, carry, at(0))[1]
        infos = jax.tree.map(lambda shape: filled(shape, 0, size), shapes)

        def body(index, carry_and_infos):
            carried, infos = carry_and_infos
            carried, info = turn(carried, at(index))
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
            return carried, jax.tree.map(put, infos, info)

        carried, infos = jax.lax.fori_loop(0, count, body, (carried, infos))
        return keep(restore(carried)), infos

    return block


def _kept(leaf: jax.Array, place: Any) -> jax.Array:
    """The leaf in its place on a mesh of Auto axes; the type of an array on Explicit axes has its place already."""
    if not isinstance(place, NamedSharding) or AxisType.Explicit in place.mesh.axis_types:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, place)


def make_check(evaluate: Callable[..., Mapping[str, Scalar]] | None, rules: Sequence[StopRule]) -> Any:
    """``check(verdict, carry, count, host) -> (metrics, verdict)``, jitted; it donates ``verdict``.

    Args:
      evaluate: see ``fit``.
      rules: the stopping rules.

    Returns:
      A function of the rules' verdict, the carry of the steps, the number of steps since the last check, and the
      metrics computed on the host.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def check(verdict, carry, count, host):
        state, total, skips, others = carry
        made = count - skips.count.astype(jnp.float32)
        means = {name: each.value / made for name, each in ({"train_loss": total} | others).items()}
        metrics = means | measure(evaluate, state)
        if both := sorted(host.keys() & metrics.keys()):
            raise ValueError(f"host_metrics returns {both}, names of other metrics of this run: rename them")
        metrics |= host
        return metrics, judge(verdict, rules, state, metrics, skips)

    return check


def _empty_sums(names: Sequence[str]) -> tuple[Total, Skips, dict[str, Total]]:
    """Zeros for the sum of losses, the skipped steps and the other sums, in new memory to be donated."""
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    zeros = [(np.zeros([], dtype), np.zeros([], dtype)) for _ in range(1 + len(names))]
    pairs, counts = jax.device_put((zeros, [np.zeros([], np.int32), np.zeros([], np.int32)]))
    losses, *others = (Total(*pair) for pair in pairs)
    return losses, Skips(*counts), dict(zip(names, others, strict=True))


__all__ = ["Carry", "Dispatcher", "make_block", "make_check"]
