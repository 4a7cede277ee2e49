"""Reducing the scale of updates where the loss no longer falls."""

from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import ReduceLROnPlateauState

from nnlearn.checks import check_number, known
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.plumbing import wide_real
from nnlearn.tree import as_hyperparam, scale_tree
from nnlearn.types import GradientTransformationExtraArgs, Scalar


@comparable
def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: Scalar = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: Scalar = 0,
    accumulation_size: Scalar = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformationExtraArgs:
    r"""Multiply updates by a scale that falls by ``factor`` where the loss has stopped to improve.

    An average loss is an improvement if it is below :math:`best - rtol |best| - atol`, whatever its sign; optax's
    rule has :math:`(1 - rtol) best`, which every negative loss fulfils. ``update`` takes the loss as ``value=``, which
    ``make_step`` gives; put it last in a chain.

    Args:
      factor: in (0, 1).
      patience: averages without improvement before the scale falls, >= 1.
      rtol, atol: relative and absolute size of an improvement, >= 0, not both 0; ``rtol`` is at most 1.
      cooldown: averages after a reduction that do not count, >= 0.
      accumulation_size: losses in an average, >= 1.
      min_scale: lower bound of the scale, >= 0.

    Returns:
      A transformation with ``ReduceLROnPlateauState(scale, best_value, plateau_count, cooldown_count, count,
      avg_value)``.

    Raises:
      ValueError: if a number is out of its range; in ``update``, if there is no ``value``.

    >>> tx = reduce_on_plateau(factor=0.5, patience=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for loss in (-1.0, -2.0, -2.0, -2.0):
    ...     update, state = tx.update(jnp.ones(1), state, value=loss)
    >>> update
    Array([0.5], dtype=float32)
    """
    check_number("factor", factor, low=0.0, high=1.0, low_open=True, high_open=True)
    check_number("rtol", rtol, low=0.0, high=1.0)
    for name, value, low in (("atol", atol, 0), ("cooldown", cooldown, 0), ("min_scale", min_scale, 0)):
        check_number(name, value, low=low)
    check_number("patience", patience, low=1)
    check_number("accumulation_size", accumulation_size, low=1)
    if known(rtol) and known(atol) and not (rtol or atol):
        raise ValueError("rtol or atol must be > 0, got 0 for both")

    def init(params):
        real = wide_real(params)
        counts = (jnp.zeros([], jnp.int32) for _ in range(3))
        plateau, cooling, count = counts
        best, average = jnp.array(jnp.inf, real), jnp.zeros([], real)
        return ReduceLROnPlateauState(jnp.ones([], real), best, plateau, cooling, count, average)

    def judged(state):
        real = state.best_value.dtype
        relative, absolute, smallest, by = (as_hyperparam(one, real) for one in (rtol, atol, min_scale, factor))
        margin = jnp.where(jnp.isfinite(state.best_value), relative * jnp.abs(state.best_value) + absolute, 0)
        better = state.avg_value < state.best_value - margin
        plateau = jnp.where(better, 0, increment(state.plateau_count))
        cooling = state.cooldown_count > 0
        reduce = ~cooling & (plateau.astype(real) >= as_hyperparam(patience, real))
        scale = jnp.where(reduce, state.scale * by, state.scale)
        scale = jnp.where(cooling, scale, jnp.maximum(scale, smallest))
        rest = jnp.where(cooling, state.cooldown_count - 1, jnp.where(reduce, jnp.asarray(cooldown, jnp.int32), 0))
        return ReduceLROnPlateauState(
            scale=scale.astype(state.scale.dtype),
            best_value=jnp.where(better, state.avg_value, state.best_value),
            plateau_count=jnp.where(cooling | reduce, 0, plateau),
            cooldown_count=rest,
            count=jnp.zeros_like(state.count),
            avg_value=jnp.zeros_like(state.avg_value),
        )

    def update(updates, state, params=None, *, value: Any = None, **extra_args):
        del params, extra_args
        if value is None:
            raise ValueError("reduce_on_plateau needs the loss: call update(updates, state, params, value=loss)")
        real = state.avg_value.dtype
        count = increment(state.count)
        loss = jnp.asarray(value).astype(real)
        average = (state.count.astype(real) * state.avg_value + loss) / count.astype(real)
        seen = state._replace(count=count, avg_value=average)
        full = count.astype(real) >= as_hyperparam(accumulation_size, real)
        state = jax.tree.map(lambda new, old: jnp.where(full, new, old), judged(seen), seen)
        return scale_tree(updates, state.scale), state

    return GradientTransformationExtraArgs(init, update)


__all__ = ["reduce_on_plateau"]
