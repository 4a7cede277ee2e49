"""The compiled programs of a host-driven run: several steps at once, and a check."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.programs.loops import without_constants
from nnlearn.sharding.axes import filled
from nnlearn.sums import Total
from nnlearn.train.aux_metrics import counted_aux
from nnlearn.train.custom_step import lift_step
from nnlearn.train.state import TrainState
from nnlearn.train.step import Step, count_skipped, counted_loss
from nnlearn.train.stopping import StopRule
from nnlearn.train.verdict import judge, measure
from nnlearn.types import PyTree, Scalar

# The state; since the last check: the sum of losses, the number of skipped steps, the sums of other numbers by name.
Carry = tuple[TrainState, Total, jax.Array, dict[str, Total]]


def make_block(step: Step, names: Sequence[str] = ()) -> Callable[..., tuple[Carry, PyTree]]:
    """``block(carry, batches, count, size) -> (carry, infos)``, compiled; it takes the memory of ``carry``.

    Args:
      step: a training step.
      names: what to sum up besides the loss, see ``counted_aux``.

    Returns:
      A function that makes a step with each of the first ``count`` of ``size`` stacked batches, with one program for
      any count; or with all of them, for None.
    """
    step = jax.jit(lift_step(step))  # so that it is traced once for both

    def one(carry, batch):
        state, total, skipped, others = carry
        state, info = step(state, batch)
        others = {name: others[name].plus(counted_aux(info, name)) for name in names}
        return (state, total.plus(counted_loss(info)), skipped + count_skipped(info), others), info

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def block(carry, batches, count, size):
        def at(index):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)

        turn, carried, restore = without_constants(one, carry, at(0))
        if count is None:
            carried, infos = jax.lax.scan(turn, carried, batches, length=size)
            return restore(carried), infos

        shapes = jax.eval_shape(one, carry, at(0))[1]
        infos = jax.tree.map(lambda shape: filled(shape, 0, size), shapes)

        def body(index, carry_and_infos):
            carried, infos = carry_and_infos
            carried, info = turn(carried, at(index))
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
            return carried, jax.tree.map(put, infos, info)

        carried, infos = jax.lax.fori_loop(0, count, body, (carried, infos))
        return restore(carried), infos

    return block


def make_check(evaluate: Callable[..., Mapping[str, Scalar]] | None, rules: Sequence[StopRule]) -> Callable[..., Any]:
    """``check(verdict, carry, count, host) -> (metrics, verdict)``, compiled; it takes the memory of ``verdict``.

    Args:
      evaluate: see ``fit``.
      rules: the stopping rules.

    Returns:
      A function of what the rules carry, the carry of the steps, the number of steps since the last check, and the
      metrics that were computed on the host.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def check(verdict, carry, count, host):
        state, total, skipped, others = carry
        made = count - skipped.astype(jnp.float32)
        means = {name: each.value / made for name, each in ({"train_loss": total} | others).items()}
        metrics = means | measure(evaluate, state)
        if both := sorted(host.keys() & metrics.keys()):
            raise ValueError(f"host_metrics returns {both}, names of other metrics of this run: give them others")
        metrics |= host
        return metrics, judge(verdict, rules, state, metrics)

    return check


def kept_on(step: Any, kind: str, made_of: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, or the program of that kind which it has made before for this step and the same others.

    It is kept on the step, and so lives as long: a run that is taken up again does not compile anew.

    >>> def step(state, batch): ...
    >>> kept_on(step, "block", (), object) is kept_on(step, "block", (), object)
    True
    """
    key, name = (step, *made_of), f"_nnlearn_{kind}"
    kept = getattr(step, name, None)
    if kept is not None and kept[0] == key:  # a wrapper made by functools.wraps has its function's
        return kept[1]
    program = make()
    if isinstance(step, types.FunctionType):  # other callables may mind a new attribute
        setattr(step, name, (key, program))
    return program


__all__ = ["Carry", "kept_on", "make_block", "make_check"]
