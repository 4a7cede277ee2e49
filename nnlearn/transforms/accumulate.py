"""Gradient accumulation: several mini-steps, one step of the optimizer."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from optax import MultiStepsState, with_extra_args_support

from nnlearn.checks import check_dtype, check_number, known
from nnlearn.settings import bind, remember
from nnlearn.transforms.averages import increment
from nnlearn.transforms.loss_scale import refuse_loss_scale_inside
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.wrapping import run_or_hold
from nnlearn.tree import real_dtype
from nnlearn.types import DTypeLike, GradientTransformation, GradientTransformationExtraArgs


def _never_skip(updates, gradient_step, params):
    del updates, gradient_step, params
    return jnp.array(False), ()


def _accumulated(opt, every_k_schedule: Any, use_grad_mean, should_skip, accumulator_dtype):
    """The two functions of ``MultiSteps``."""
    inner = with_extra_args_support(opt)
    slot = Slot(dtype=accumulator_dtype)

    def init(params):
        mini_step, gradient_step = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)  # two buffers: one may be donated
        sums = slot.start(params)
        _, skip_state = should_skip(sums, gradient_step, params)
        inner_state = inner.init(params)
        if should_skip is not _never_skip:
            refuse_loss_scale_inside(inner_state, "MultiSteps with should_skip_update_fn")
        return MultiStepsState(mini_step, gradient_step, inner_state, sums, skip_state)

    def update(updates, state, params=None, close_window=False, **extra_args):
        if close_window:
            return _closed(inner, state, params, extra_args)
        every_k: Any = every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule
        skip, skip_state = should_skip(updates, state.gradient_step, params)
        skip_state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), skip_state, state.skip_state)
        if jnp.shape(skip) != () or jnp.result_type(skip) != jnp.bool_:
            raise ValueError(
                "should_skip_update_fn must return a boolean scalar first, got "
                f"{jnp.result_type(skip).name} of shape {jnp.shape(skip)}"
            )

        def add(gradient, total):
            gradient = jnp.asarray(gradient).astype(total.dtype)
            seen = (state.mini_step + 1).astype(real_dtype(total.dtype))
            return total + ((gradient - total) / seen if use_grad_mean else gradient)

        sums = jax.tree.map(add, updates, state.acc_grads)
        emit = ~skip & (state.mini_step >= every_k - 1)
        change, inner_state = run_or_hold(emit, inner, sums, state.inner_opt_state, params, extra_args)

        # chosen, never multiplied by zero: a NaN in this window must not reach the next
        kept = jax.tree.map(
            lambda new, old: jnp.where(emit, 0, jnp.where(skip, old, new)).astype(old.dtype), sums, state.acc_grads
        )
        mini_step = jnp.where(emit, 0, jnp.where(skip, state.mini_step, state.mini_step + 1))
        gradient_step = jnp.where(emit, increment(state.gradient_step), state.gradient_step)
        return change, MultiStepsState(mini_step, gradient_step, inner_state, kept, skip_state)

    return init, update


def _closed(inner, state, params, extra_args):
    """The update of a window that ends early; nothing where no window is open."""
    is_open, sums = state.mini_step > 0, state.acc_grads
    change, inner_state = run_or_hold(is_open, inner, sums, state.inner_opt_state, params, extra_args)
    gradient_step = jnp.where(is_open, increment(state.gradient_step), state.gradient_step)
    empty = jax.tree.map(jnp.zeros_like, sums)
    return change, MultiStepsState(jnp.zeros_like(state.mini_step), gradient_step, inner_state, empty, state.skip_state)


class MultiSteps(GradientTransformationExtraArgs):
    """Accumulate gradients over ``k`` mini-steps and run the optimizer once, on their mean.

    It is a gradient transformation like any other: it can stand in a chain. Between emissions the update is zero and
    the inner optimizer does not run (under ``vmap`` both branches of a conditional run; there, accumulate inside of a
    step with ``make_step(..., microbatches=k)``).

    A run that ends inside a window does not apply the window's gradients: ``fit`` and ``make_train`` warn, and
    ``apply_accumulated`` applies them. A mini-step that accumulates is a step like others for what surrounds the
    optimizer: model state advances, and an average that stands outside counts it. To protect running statistics from a
    bad mini-step, give ``should_skip_update_fn``, or put ``apply_if_finite`` around ``MultiSteps``; a guard inside
    sees whole windows, when the statistics have already advanced.

    Args:
      opt: the optimizer to run.
      every_k_schedule: k, a number or tracer >= 1, or a function from the number of optimizer steps made to k.
      use_grad_mean: use the mean of the gradients, else their sum.
      should_skip_update_fn: ``f(updates, gradient_step, params) -> (skip, info)``; a mini-step that is skipped does not
        count and adds nothing, see ``skip_not_finite``; ``info`` is kept in ``state.skip_state``.
      accumulator_dtype: dtype of the sum; None for the parameter's dtype, float32 at least.

    The state is ``MultiStepsState(mini_step, gradient_step, inner_opt_state, acc_grads, skip_state)``.

    Raises:
      ValueError: k is below 1; in ``init``, mini-steps are skipped around a ``dynamic_loss_scale``.

    >>> import nnlearn
    >>> tx = MultiSteps(nnlearn.sgd(1.0), every_k_schedule=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for gradient in (1.0, 3.0):
    ...     update, state = tx.update(jnp.array([gradient]), state)
    ...     print(update, tx.has_updated(state))
    [0.] False
    [-2.] True
    """

    _call: Any  # what the constructor was given, see ``nnlearn.settings``

    def __new__(
        cls,
        opt: GradientTransformation,
        every_k_schedule,
        use_grad_mean: bool = True,
        should_skip_update_fn=None,
        accumulator_dtype: DTypeLike | None = None,
    ):
        if not callable(every_k_schedule):
            check_number("every_k_schedule", every_k_schedule, low=1)
            if known(every_k_schedule) and int(every_k_schedule) != every_k_schedule:
                raise ValueError(f"every_k_schedule must be a whole number of mini-steps, got {every_k_schedule}")
        accumulator_dtype = check_dtype("accumulator_dtype", accumulator_dtype)
        given = (opt, every_k_schedule, use_grad_mean, should_skip_update_fn, accumulator_dtype)
        bound = bind(inspect.signature(MultiSteps), given, {})
        opt, every_k_schedule, use_grad_mean, skip, accumulator_dtype = bound.args
        made = _accumulated(opt, every_k_schedule, use_grad_mean, skip or _never_skip, accumulator_dtype)
        tx = remember(cls, bound, tuple.__new__(cls, made))
        tx._call = tx.init.call
        return tx

    def __getnewargs__(self):  # what copying calls the constructor with
        return self._call.bound.args

    def has_updated(self, state: Any) -> jax.Array:
        """Whether the window is empty because the optimizer has run: a boolean scalar.

        True after an update that ran it, and still after mini-steps that were skipped since.
        """
        return (state.mini_step == 0) & (state.gradient_step > 0)

    @property
    def inner_opt(self) -> GradientTransformationExtraArgs:
        """The optimizer that runs every k mini-steps."""
        return with_extra_args_support(self._call.bound.arguments["opt"])

    def gradient_transformation(self) -> GradientTransformationExtraArgs:
        """Itself, for code written for optax, whose ``MultiSteps`` is not yet a transformation."""
        return self


# Unflattening a named tuple calls its class with the fields, and this one's constructor takes other things.
def _unflatten(call, parts):
    tx = tuple.__new__(MultiSteps, tuple(parts))
    tx._call = call
    return tx


jax.tree_util.register_pytree_node(MultiSteps, lambda tx: (tuple(tx), tx._call), _unflatten)

__all__ = ["MultiSteps"]
