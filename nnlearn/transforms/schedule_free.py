"""Schedule-free learning: the average of the iterates takes the place of a decreasing learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
from optax import with_extra_args_support
from optax.contrib import ScheduleFreeState

from nnlearn.packing import unpack
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.plumbing import wide_real
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import as_hyperparam, compute_dtype, map_unzip, safe_divide
from nnlearn.types import (
    DTypeLike,
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Params,
    Scalar,
    ScalarOrSchedule,
)


def schedule_free_kernel(update, y, z, *, b1, weight):
    r"""One step of schedule-free learning (Defazio et al. 2024, arXiv:2405.15682, eq. 5 to 7), for the points y.

    .. math::
        z_t = z_{t-1} + u_t, \quad x_t = (1 - c_t) x_{t-1} + c_t z_t, \quad y_t = \beta x_t + (1-\beta) z_t

    where the gradient is taken at y. In terms of y and z this is
    :math:`y_t = y_{t-1} + c_t (z_{t-1} - y_{t-1}) + (1 - \beta (1 - c_t)) u_t`, which divides by nothing.

    Returns:
      The update of y, and z.
    """
    return weight * (z - y) + (1 - b1 * (1 - weight)) * update, z + update


@comparable
def schedule_free(
    base_optimizer: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Interpolate between an optimizer's iterates and their average, see ``schedule_free_kernel``.

    The parameters are the points y, at which gradients are taken. Evaluate the average x,
    ``schedule_free_eval_params(opt_state, params)``.

    Args:
      base_optimizer: an optimizer without momentum, which moves z.
      learning_rate: its learning rate, which weighs the average: a number >= 0 or a schedule.
      b1: weight of the average in the parameters, in [0, 1); it takes the place of momentum.
      weight_lr_power: an iterate's weight is the largest learning rate so far to this power.
      state_dtype: dtype of z; None for the parameter's dtype, float32 at least.

    Returns:
      A transformation with ``ScheduleFreeState(b1, weight_sum, step_count, max_lr, base_optimizer_state, z)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range; in ``update``, if there are no parameters.

    >>> import nnlearn
    >>> tx, y = schedule_free(nnlearn.sgd(1.0), 1.0, b1=0.5), jnp.zeros(1)
    >>> state = tx.init(y)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([-4.0]), state, y)
    ...     y = nnlearn.apply_updates(y, updates)
    >>> state.z, schedule_free_eval_params(state, y), y
    (Array([8.], dtype=float32), Array([6.], dtype=float32), Array([7.], dtype=float32))
    """
    check_hyperparams(learning_rate=learning_rate, b1=b1, weight_lr_power=weight_lr_power, schedules=("learning_rate",))
    base_optimizer = with_extra_args_support(base_optimizer)
    slot = Slot(dtype=as_storage("state_dtype", state_dtype), initial=lambda param: param)

    def init(params):
        real = wide_real(params)
        zero, largest = jnp.zeros([], real), jnp.zeros([], real)
        base_state = base_optimizer.init(params)
        return ScheduleFreeState(
            jnp.array(b1, real), zero, jnp.ones([], jnp.int32), largest, base_state, slot.start(params)
        )

    def update(updates, state, params: Any = None, **extra_args):
        require_params(params, "schedule_free")
        real = state.max_lr.dtype
        rate = learning_rate(state.step_count) if callable(learning_rate) else learning_rate
        largest = jnp.maximum(state.max_lr, jnp.asarray(rate, real))
        weight = jnp.where(largest > 0, jnp.where(largest > 0, largest, 1) ** as_hyperparam(weight_lr_power, real), 0)
        weight_sum = state.weight_sum + weight
        share = safe_divide(weight, weight_sum)
        change, base_state = base_optimizer.update(updates, state.base_optimizer_state, params, **extra_args)

        def on_leaf(u, y, z):
            u, y = jnp.asarray(u), jnp.asarray(y)
            wide = compute_dtype(u.dtype, y.dtype, z.dtype)
            numbers = {"b1": as_hyperparam(b1, wide), "weight": as_hyperparam(share, wide)}
            new, z_new = schedule_free_kernel(u.astype(wide), y.astype(wide), z.astype(wide), **numbers)
            return new.astype(u.dtype), z_new.astype(z.dtype)

        new, z = map_unzip(on_leaf, 2, ("updates", "params", "state.z"), change, params, state.z)
        count = increment(state.step_count)
        return new, ScheduleFreeState(jnp.array(b1, real), weight_sum, count, largest, base_state, z)

    return GradientTransformationExtraArgs(init, update)


def schedule_free_eval_params(state: OptState, params: Params) -> Params:
    r"""The average x to evaluate with, from the parameters y: :math:`x = (y - (1-\beta) z) / \beta`.

    Args:
      state: the optimizer's state, with one ``schedule_free`` in it, nnlearn's or optax's.
      params: the parameters that it trains.

    Returns:
      A tree like the model's parameters, packed or not before; with ``b1 = 0`` the parameters themselves.

    Raises:
      ValueError: if the state has no ``schedule_free``, or several.

    >>> import nnlearn
    >>> y = jnp.ones(1)
    >>> schedule_free_eval_params(nnlearn.schedule_free_sgd(0.1).init(y), y)
    Array([1.], dtype=float32)
    """

    def is_state(node):
        return isinstance(node, ScheduleFreeState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(f"state must hold one schedule_free, but it holds {len(found)}")
    b1, z = found[0].b1, found[0].z

    def on_leaf(y, z):
        y = jnp.asarray(y)
        wide = compute_dtype(y.dtype, z.dtype)
        share = as_hyperparam(b1, wide)
        share, seen = jnp.where(share == 0, 1, share), share != 0
        y_wide = y.astype(wide)
        return jnp.where(seen, (y_wide - (1 - share) * z.astype(wide)) / share, y_wide).astype(y.dtype)

    return unpack(jax.tree.map(on_leaf, params, z))


__all__ = ["schedule_free", "schedule_free_eval_params", "schedule_free_kernel"]
