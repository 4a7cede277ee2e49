"""Lookahead: a slow copy of the parameters follows the fast ones, which restart from it."""

import jax
import jax.numpy as jnp
from optax import LookaheadParams, LookaheadState, with_extra_args_support

from nnlearn.settings import comparable
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.tree import as_hyperparam, compute_dtype, map_unzip
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Scalar


def lookahead_kernel(update, fast, slow, *, is_sync, slow_step_size):
    r"""One step of Lookahead (Zhang et al. 2019, arXiv:1907.08610, algorithm 1), of which every k-th synchronises.

    .. math:: s \leftarrow s + \alpha (f + u - s), \quad f \leftarrow s \text{ at every k-th step, else } f + u

    Returns:
      The updates of the fast and of the slow parameters.
    """
    difference = fast + update - slow
    return (
        jnp.where(is_sync, update - (1 - slow_step_size) * difference, update),
        jnp.where(is_sync, slow_step_size * difference, 0),
    )


@comparable
def lookahead(
    fast_optimizer: GradientTransformation,
    sync_period: Scalar,
    slow_step_size: Scalar,
    reset_state: bool = False,
) -> GradientTransformationExtraArgs:
    """Let slow parameters follow those that an optimizer moves, see ``lookahead_kernel``.

    The parameters are optax's ``LookaheadParams(fast, slow)``, from ``LookaheadParams.init_synced(params)``: take the
    gradient at ``params.fast``, evaluate ``params.slow``. Nothing may change the updates before they are applied.

    Args:
      fast_optimizer: any optimizer.
      sync_period: steps from one synchronisation to the next, >= 1.
      slow_step_size: how far the slow parameters go towards the fast ones, >= 0.
      reset_state: restart the optimizer's state at every synchronisation.

    Returns:
      A transformation with ``LookaheadState(fast_state, steps_since_sync)``; it takes gradients of the fast parameters,
      or of both, of which it ignores those of the slow.

    Raises:
      ValueError: if a number is out of its range; in ``update``, if the parameters are not ``LookaheadParams``.

    >>> import nnlearn
    >>> from optax import LookaheadParams, apply_updates
    >>> tx = lookahead(nnlearn.sgd(1.0), sync_period=2, slow_step_size=0.5)
    >>> params = LookaheadParams.init_synced(jnp.array([0.0]))
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([-3.0]), state, params)
    ...     params = apply_updates(params, updates)
    >>> params.fast, params.slow  # half of the way from 0 to 6
    (Array([3.], dtype=float32), Array([3.], dtype=float32))
    """
    check_hyperparams(sync_period=sync_period, slow_step_size=slow_step_size)
    fast_optimizer = with_extra_args_support(fast_optimizer)

    def init(params):
        fast = params.fast if isinstance(params, LookaheadParams) else params
        return LookaheadState(fast_optimizer.init(fast), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        if not isinstance(params, LookaheadParams):
            raise ValueError(
                f"lookahead needs params=LookaheadParams(fast, slow), got {type(params).__name__}: start from "
                "optax.LookaheadParams.init_synced(params)"
            )
        updates = updates.fast if isinstance(updates, LookaheadParams) else updates
        change, fast_state = fast_optimizer.update(updates, state.fast_state, params.fast, **extra_args)
        steps, real = state.steps_since_sync + 1, jnp.result_type(float)
        is_sync = steps.astype(real) >= as_hyperparam(sync_period, real)

        def on_leaf(update, fast, slow):
            update, fast, slow = map(jnp.asarray, (update, fast, slow))
            wide = compute_dtype(update.dtype, fast.dtype, slow.dtype)
            arrays = (array.astype(wide) for array in (update, fast, slow))
            new = lookahead_kernel(*arrays, is_sync=is_sync, slow_step_size=as_hyperparam(slow_step_size, wide))
            return new[0].astype(update.dtype), new[1].astype(slow.dtype)

        names = ("updates", "params.fast", "params.slow")
        fast_change, slow_change = map_unzip(on_leaf, 2, names, change, params.fast, params.slow)
        if reset_state:
            first = fast_optimizer.init(params.fast)
            fast_state = jax.tree.map(lambda new, old: jnp.where(is_sync, new, old), first, fast_state)
        steps = jnp.where(is_sync, 0, steps)
        return LookaheadParams(fast=fast_change, slow=slow_change), LookaheadState(fast_state, steps)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["lookahead", "lookahead_kernel"]
