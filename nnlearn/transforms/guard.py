"""What to do with a gradient that is not finite, or far too large: skip the step, and count it."""

import jax
import jax.numpy as jnp
from optax import ApplyIfFiniteState, with_extra_args_support

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.loss_scale import refuse_loss_scale_inside
from nnlearn.transforms.wrapping import run_or_hold
from nnlearn.tree import all_finite, global_norm
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Params, Scalar, Updates


@comparable
def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: Scalar) -> GradientTransformationExtraArgs:
    """Run ``inner`` on finite updates only; otherwise the update is zero and the state stays.

    Args:
      inner: the transformation to guard. It is not run on a skipped step, but under ``vmap``, where both branches of
        a conditional run and one result is chosen.
      max_consecutive_errors: after so many skipped steps in a row the next one goes through, so that a run that is
        broken for good shows it.

    Returns:
      A transformation with ``ApplyIfFiniteState(notfinite_count, last_finite, total_notfinite, inner_state)``.

    In a step of ``make_step`` everything else stays too, such as running statistics; see ``was_skipped``.

    Raises:
      ValueError: ``max_consecutive_errors`` is negative; in ``init``, ``inner`` holds a ``dynamic_loss_scale``.

    >>> import nnlearn
    >>> tx = apply_if_finite(nnlearn.sgd(0.1), max_consecutive_errors=5)
    >>> update, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
    >>> update, state.total_notfinite
    (Array([0.], dtype=float32), Array(1, dtype=int32))
    """
    check_number("max_consecutive_errors", max_consecutive_errors, low=0)
    inner = with_extra_args_support(inner)

    def init(params):
        in_a_row, total = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        inner_state = inner.init(params)
        refuse_loss_scale_inside(inner_state, "apply_if_finite")
        return ApplyIfFiniteState(in_a_row, jnp.array(True), total, inner_state)

    def update(updates, state, params=None, **extra_args):
        finite = all_finite(updates)
        in_a_row = jnp.where(finite, 0, increment(state.notfinite_count))
        total = jnp.where(finite, state.total_notfinite, increment(state.total_notfinite))
        go = finite | (in_a_row > max_consecutive_errors)
        change, inner_state = run_or_hold(go, inner, updates, state.inner_state, params, extra_args)
        return change, ApplyIfFiniteState(in_a_row, finite, total, inner_state)

    return GradientTransformationExtraArgs(init, update)


def skip_not_finite(
    updates: Updates, gradient_step: jax.Array, params: Params | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Skip a mini-step that is not finite: a rule for ``MultiSteps(should_skip_update_fn=...)``.

    Args:
      updates: the gradients or updates of the mini-step, a pytree of arrays.
      gradient_step: the number of complete steps; not used.
      params: the parameters; not used.

    Returns:
      Whether to skip, and how many numbers were not finite.

    >>> bool(skip_not_finite(jnp.array([1.0, jnp.inf]), 0, None)[0])
    True
    """
    del gradient_step, params
    bad = [jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]
    count = jnp.sum(jnp.stack(bad)) if bad else jnp.zeros([], jnp.int32)
    return count > 0, {"should_skip": count > 0, "num_not_finite": count}


def skip_large_updates(
    updates: Updates, gradient_step: jax.Array, params: Params | None, max_squared_norm: Scalar
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Skip a mini-step whose squared norm is not below ``max_squared_norm``, NaN included.

    Bind the bound with ``functools.partial`` to use it in ``MultiSteps(should_skip_update_fn=...)``.

    Args:
      updates: the gradients or updates of the mini-step, a pytree of arrays.
      gradient_step: the number of complete steps; not used.
      params: the parameters; not used.
      max_squared_norm: the bound of the squared Euclidean norm, finite and >= 0.

    Returns:
      Whether to skip, a boolean scalar, and a dict with the keys ``should_skip`` and ``norm_squared``.

    Raises:
      ValueError: if ``max_squared_norm`` is negative or not finite.

    >>> bool(skip_large_updates(jnp.array([3.0]), 0, None, max_squared_norm=4.0)[0])
    True
    """
    del gradient_step, params
    check_nonnegative("max_squared_norm", max_squared_norm)
    squared = jnp.square(global_norm(updates))
    skip = ~(squared < max_squared_norm)
    return skip, {"should_skip": skip, "norm_squared": squared}


__all__ = ["apply_if_finite", "skip_large_updates", "skip_not_finite"]
