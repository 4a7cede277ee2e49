"""EMA-Nesterov: any optimizer that looks ahead along the average of its steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.packing import unpack
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.tree import as_hyperparam, compute_dtype, map_unzip
from nnlearn.types import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Params,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)


class EmaNesterovState(NamedTuple):
    """Steps made, how far the parameters look ahead, the average of steps, and the state of the optimizer."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    ahead: jax.Array
    trend: PyTree
    base_optimizer_state: OptState


def ema_nesterov_kernel(update, trend, *, ahead, ahead_next, decay):
    r"""One step of EMA-Nesterov (Yau et al. 2026, arXiv:2605.25395), for the points y at which gradients are taken.

    .. math::
        y_t = \theta_t + \beta_t m_t, \quad \theta_{t+1} = y_t + u_t, \quad
        m_{t+1} = \gamma m_t + (1-\gamma) (\theta_{t+1} - \theta_t)

    with the optimizer's update :math:`u`. As :math:`\theta_{t+1} - \theta_t = u_t + \beta_t m_t`, nothing but the
    average :math:`m` is stored.

    Returns:
      The update of y, and m.
    """
    trend = decay * trend + (1 - decay) * (update + ahead * trend)
    return update + ahead_next * trend, trend


@comparable
def ema_nesterov(
    base_optimizer: GradientTransformation, lookahead: ScalarOrSchedule, decay: Scalar = 0.99
) -> GradientTransformationExtraArgs:
    r"""Let an optimizer look ahead along the average of its past steps (Yau et al. 2026, arXiv:2605.25395).

    The parameters are the points y of ``ema_nesterov_kernel``, at which gradients are taken. Evaluate
    ``ema_nesterov_eval_params(opt_state, params)``, or let ``lookahead`` end at 0. The average, in place of the
    last step, makes Nesterov's acceleration less sensitive to the noise of gradients.

    Args:
      base_optimizer: the whole optimizer, learning rate included.
      lookahead: :math:`\beta_t >= 0`, a number or a schedule, which the paper sets to 0 in the warm-up and at the end.
      decay: :math:`\gamma` in [0, 1); about ``1 / (1 - decay)`` steps are averaged.

    Returns:
      A transformation with ``EmaNesterovState(count, ahead, trend, base_optimizer_state)``.

    Raises:
      ValueError: if a number is out of its range.

    >>> import nnlearn
    >>> tx, y = ema_nesterov(nnlearn.sgd(1.0), 2.0, decay=0.5), jnp.zeros(1)
    >>> updates, state = tx.update(jnp.array([-4.0]), tx.init(y), y)
    >>> y = nnlearn.apply_updates(y, updates)
    >>> y, ema_nesterov_eval_params(state, y)  # the step of 4 ends 2 * 2 ahead
    (Array([8.], dtype=float32), Array([4.], dtype=float32))
    """
    check_hyperparams(lookahead=lookahead, decay=decay, schedules=("lookahead",))
    base_optimizer = with_extra_args_support(base_optimizer)
    slot = Slot()

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return EmaNesterovState(count, jnp.zeros([], float), slot.start(params), base_optimizer.init(params))

    def update(updates, state, params: Any = None, **extra_args):
        change, base_state = base_optimizer.update(updates, state.base_optimizer_state, params, **extra_args)
        count = increment(state.count)
        ahead = lookahead(count) if callable(lookahead) else lookahead
        ahead = jnp.asarray(ahead, state.ahead.dtype)

        def on_leaf(u, trend):
            u = jnp.asarray(u)
            wide = compute_dtype(u.dtype, trend.dtype)
            given = {"ahead": state.ahead, "ahead_next": ahead, "decay": decay}
            numbers = {name: as_hyperparam(value, wide) for name, value in given.items()}
            new, kept = ema_nesterov_kernel(u.astype(wide), trend.astype(wide), **numbers)
            return new.astype(u.dtype), kept.astype(trend.dtype)

        new, trend = map_unzip(on_leaf, 2, ("updates", "state.trend"), change, state.trend)
        return new, EmaNesterovState(count, ahead, trend, base_state)

    return GradientTransformationExtraArgs(init, update)


def ema_nesterov_eval_params(opt_state: OptState, params: Params) -> Params:
    r"""The parameters :math:`\theta = y - \beta m` to evaluate, see ``ema_nesterov``.

    Args:
      opt_state: the optimizer's state, with one ``ema_nesterov`` in it.
      params: the points y that it trains.

    Returns:
      A tree like the model's parameters, packed or not before.

    Raises:
      ValueError: if the state has no ``ema_nesterov``, or several.

    >>> import nnlearn
    >>> ema_nesterov_eval_params(nnlearn.ema_nesterov(nnlearn.sgd(0.1), 0.5).init(jnp.ones(1)), jnp.ones(1))
    Array([1.], dtype=float32)
    """

    def is_state(node):
        return isinstance(node, EmaNesterovState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one ema_nesterov, but it holds {len(found)}")

    def on_leaf(y, trend):
        y = jnp.asarray(y)
        wide = compute_dtype(y.dtype, trend.dtype)
        return (y.astype(wide) - as_hyperparam(found[0].ahead, wide) * trend.astype(wide)).astype(y.dtype)

    return unpack(jax.tree.map(on_leaf, params, found[0].trend))


__all__ = ["EmaNesterovState", "ema_nesterov", "ema_nesterov_eval_params", "ema_nesterov_kernel"]
