"""Dynamic loss scaling: float16 gradients kept out of underflow, and overflow taken as a sign to scale less."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.checks import check_number
from nnlearn.settings import comparable
from nnlearn.transforms.wrapping import run_or_hold
from nnlearn.tree import all_finite
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, OptState, Scalar

LARGEST = 2.0**24  # above it a float16 loss of 1e-3 would overflow anyway


class DynamicLossScaleState(NamedTuple):
    """The scale of the next loss, the finite steps since it last changed, steps skipped in all, and the inner state."""

    loss_scale: jax.Array
    good_steps: jax.Array
    skipped: jax.Array
    inner_state: OptState


@comparable
def dynamic_loss_scale(
    inner: GradientTransformation,
    initial_scale: Scalar = 2.0**15,
    growth_interval: Scalar = 2000,
    factor: Scalar = 2.0,
) -> GradientTransformationExtraArgs:
    """Scale the loss so that its float16 gradients do not underflow, and skip the steps where they overflow.

    With ``s`` the scale and ``n`` the finite steps in a row since it changed::

        finite gradient:     run inner;        n = n + 1;  at growth_interval  s = factor * s, n = 0
        any number infinite: update 0, hold;   s = max(s / factor, 1), n = 0

    ``make_step`` looks up the scale in the optimizer's state: it differentiates ``s * loss`` and divides the gradient
    by ``s``, so ``inner`` and ``Info`` see the gradient of the loss. In a loop of your own do the same with
    ``current_loss_scale(opt_state)``. A ``value_and_grad`` given to ``make_step`` is handed the scale if it has an
    argument ``loss_scale``, as ``clipped_value_and_grad`` has, and else differentiates the loss as it is.

    Args:
      inner: the optimizer; clipping belongs inside too, and so do ``apply_if_finite`` and ``MultiSteps`` that skips:
        a guard outside would hide every overflow from the scale, which would never shrink.
      initial_scale: the first scale, >= 1.
      growth_interval: finite steps after which the scale grows, >= 1.
      factor: by how much it grows and shrinks, > 1; a power of 2 rounds nothing.

    Returns:
      A transformation with ``DynamicLossScaleState``. The scale stays within [1, 2 ** 24].

    Raises:
      ValueError: if a hyper-parameter is out of range.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, section 3.2.

    >>> import nnlearn
    >>> tx = dynamic_loss_scale(nnlearn.sgd(0.1), initial_scale=1024.0)
    >>> update, state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
    >>> update, state.loss_scale, state.skipped
    (Array([0.], dtype=float32), Array(512., dtype=float32), Array(1, dtype=int32))
    """
    check_number("initial_scale", initial_scale, low=1.0, high=LARGEST)
    check_number("growth_interval", growth_interval, low=1)
    check_number("factor", factor, low=1.0, low_open=True)
    inner = with_extra_args_support(inner)

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return DynamicLossScaleState(
            jnp.asarray(initial_scale, jnp.float32), count, jnp.zeros_like(count), inner.init(params)
        )

    def update(updates, state, params=None, **extra_args):
        finite = all_finite(updates)
        good = jnp.where(finite, state.good_steps + 1, 0)
        grow = good >= growth_interval
        scale = jnp.where(finite, state.loss_scale, jnp.maximum(state.loss_scale / factor, 1.0))
        scale = jnp.where(grow, jnp.minimum(scale * factor, LARGEST), scale).astype(jnp.float32)
        change, inner_state = run_or_hold(finite, inner, updates, state.inner_state, params, extra_args)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        return change, DynamicLossScaleState(scale, jnp.where(grow, 0, good), skipped, inner_state)

    return GradientTransformationExtraArgs(init, update)


def current_loss_scale(opt_state: OptState) -> jax.Array | None:
    """The scale of the loss that an optimizer's state asks for, or None.

    Raises:
      ValueError: it asks for several; there is one loss.

    >>> import nnlearn
    >>> current_loss_scale(dynamic_loss_scale(nnlearn.sgd(0.1), 8.0).init(jnp.zeros(1)))
    Array(8., dtype=float32)
    """

    found = _scales(opt_state)
    if len(found) + sum(len(_scales(each.inner_state)) for each in found) > 1:
        raise ValueError("opt_state holds several loss scales for one loss: put one dynamic_loss_scale around all")
    return found[0].loss_scale if found else None


def refuse_loss_scale_inside(inner_state: OptState, guard: str) -> None:
    """Raise ``ValueError`` if a guard that hides infinite gradients has a ``dynamic_loss_scale`` inside of it."""
    if _scales(inner_state):
        raise ValueError(
            f"{guard} around dynamic_loss_scale would skip every overflow before the scale sees it, and the scale "
            f"would never shrink: put dynamic_loss_scale around {guard}"
        )


def _scales(opt_state: OptState) -> list[DynamicLossScaleState]:
    def is_scale(node):
        return isinstance(node, DynamicLossScaleState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_scale) if is_scale(node)]


__all__ = ["DynamicLossScaleState", "current_loss_scale", "dynamic_loss_scale", "refuse_loss_scale_inside"]
