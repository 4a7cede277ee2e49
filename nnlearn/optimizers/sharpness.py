"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from optax import apply_updates, with_extra_args_support
from optax.contrib import SAMState

from nnlearn.checks import check_count, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import compute_dtype
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Scalar


def _negative(tree):
    return jax.tree.map(jnp.negative, tree)


def _opaque(optimizer, adversary, steps: int, reset_state: bool, batch_axis_name):
    """``update`` that climbs and descends in one call, with gradients of ``grad_fn``."""

    def update(updates, state, params: Any = None, *, grad_fn: Callable | None = None, **extra_args) -> Any:
        require_params(params, "sam")
        if grad_fn is None:
            raise ValueError("sam(opaque_mode=True) needs grad_fn: call update(updates, state, params, grad_fn=...)")
        moved, adv_state, gradient = params, state.adv_state, updates
        for index in range(steps):
            climb, adv_state = adversary.update(gradient, adv_state, moved)
            moved = apply_updates(moved, _negative(climb))
            gradient = grad_fn(moved, index)
            if batch_axis_name is not None:
                gradient = jax.lax.pmean(gradient, batch_axis_name)
        adv_state = adversary.init(params) if reset_state else adv_state
        change, opt_state = optimizer.update(gradient, state.opt_state, params, **extra_args)
        return change, SAMState(jnp.zeros([], jnp.int32), opt_state, adv_state, None)

    return update


@comparable
def sam(
    optimizer: GradientTransformation,
    adv_optimizer: GradientTransformation,
    sync_period: Scalar = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
    batch_axis_name: str | None = None,
) -> GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation, SAM (Foret et al. 2021, arXiv:2010.01412, algorithm 1).

    .. math:: \hat w = w + \rho \frac{\nabla f(w)}{\|\nabla f(w)\|}, \quad w \leftarrow w - \alpha \nabla f(\hat w)

    ``adv_optimizer`` climbs, ``chain(normalize(), sgd(rho))`` for the formula. In the usual mode the parameters
    themselves move: ``sync_period - 1`` updates climb, the next returns to where they started and descends. Each
    update takes the gradient at the parameters as they are.

    Args:
      optimizer: descends.
      adv_optimizer: climbs: it descends the loss, and its updates are taken with the other sign.
      sync_period: updates from one descent to the next, >= 1; in opaque mode a Python int.
      reset_state: start the climbing optimizer anew after each descent.
      opaque_mode: climb and descend within one update; it needs ``grad_fn(params, index)`` as an extra argument.
      batch_axis_name: the mapped axis over which opaque mode averages gradients.

    Returns:
      A transformation with ``SAMState(steps_since_sync, opt_state, adv_state, cache)``.

    Raises:
      ValueError: if ``sync_period`` is below 1; in ``update``, if ``params`` or ``grad_fn`` is missing.

    >>> import nnlearn
    >>> tx, w = sam(nnlearn.sgd(0.5), nnlearn.chain(nnlearn.normalize(), nnlearn.sgd(0.1))), jnp.array([2.0])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(w, state, w)
    ...     w = nnlearn.apply_updates(w, updates)
    >>> w.round(3)  # 2 - 0.5 * 2.1
    Array([0.95], dtype=float32)
    """
    check_number("sync_period", sync_period, low=1)
    optimizer, adversary = with_extra_args_support(optimizer), with_extra_args_support(adv_optimizer)
    held = Slot(initial=lambda param: param)

    def init(params) -> Any:
        cache = None if opaque_mode else held.start(params)
        return SAMState(jnp.zeros([], jnp.int32), optimizer.init(params), adversary.init(params), cache)

    if opaque_mode:
        steps = check_count("sync_period", sync_period) - 1
        return GradientTransformationExtraArgs(init, _opaque(optimizer, adversary, steps, reset_state, batch_axis_name))

    def update(updates, state, params: Any = None, *, grad_fn: Callable | None = None, **extra_args) -> Any:
        del grad_fn
        require_params(params, "sam")
        steps = state.steps_since_sync
        real = jnp.result_type(float)
        is_last = steps.astype(real) >= jnp.asarray(sync_period, real) - 1
        start = jax.tree.map(
            lambda param, old: jnp.where(steps == 0, jnp.asarray(param).astype(old.dtype), old), params, state.cache
        )

        def narrow(wide, like):
            return wide.astype(jnp.result_type(like))

        def settled(tree, like):
            return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), tree, like)

        def climb():
            change, adv_state = adversary.update(updates, state.adv_state, params)
            change = jax.tree.map(lambda step, like: narrow(-step, like), change, updates)
            return change, state.opt_state, settled(adv_state, state.adv_state)

        def descend():
            # the optimizer sees the parameters in their own dtypes, from which the climb started
            home = jax.tree.map(lambda cache, param: narrow(cache, param), start, params)
            change, opt_state = optimizer.update(updates, state.opt_state, home, **extra_args)

            def back(step, cache, param, like):
                wide = compute_dtype(cache.dtype, jnp.result_type(step))
                return narrow(cache.astype(wide) - jnp.asarray(param).astype(wide) + step.astype(wide), like)

            change = jax.tree.map(back, change, start, params, updates)
            adv_state = settled(adversary.init(params), state.adv_state) if reset_state else state.adv_state
            return change, settled(opt_state, state.opt_state), adv_state

        change, opt_state, adv_state = jax.lax.cond(is_last, descend, climb)
        return change, SAMState(jnp.where(is_last, 0, steps + 1), opt_state, adv_state, start)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["sam"]
