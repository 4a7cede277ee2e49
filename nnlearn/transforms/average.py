"""Averages of the parameters over the steps, often better than the last ones."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import apply_updates

from nnlearn.checks import check_count, check_decay, check_number
from nnlearn.packing import unpack
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment, is_multiple, one_minus, step_towards, weight_seen
from nnlearn.transforms.storage import Slot
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import as_hyperparam, compute_dtype, real_dtype
from nnlearn.types import GradientTransformationExtraArgs, OptState, Params, Scalar


class AverageParamsState(NamedTuple):
    """Steps seen, and the average so far, corrected for its start; before the first step, the initial parameters."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Params
    decay: jax.Array


@comparable
def average_params(decay: Scalar = 0.999) -> GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters; the last link of a chain, which changes no update.

    ::

        a_t = decay * a_{t-1} + (1 - decay) * p_t,   average = a_t / (1 - decay ** t)

    ``averaged_params(opt_state)`` reads it: evaluate with it, train on without. A step that a guard in the chain skips
    does not count in ``make_step``; inside of ``MultiSteps`` it counts windows, behind it mini-steps.

    Args:
      decay: in [0, 1); about ``1 / (1 - decay)`` steps are averaged. A constant is its own average at every step,
        however near to 1 the decay is.

    Returns:
      A transformation with ``AverageParamsState(count, average, decay)``; the average is float32 at least.

    Raises:
      ValueError: ``decay`` is outside [0, 1); in ``update``, there are no params.

    Source: Polyak and Juditsky 1992, SIAM J. Control Optim. 30; the correction is Adam's, arXiv:1412.6980.

    >>> import nnlearn
    >>> tx = nnlearn.chain(nnlearn.sgd(1.0), average_params(0.5))
    >>> params, state = jnp.array([0.0]), tx.init(jnp.array([0.0]))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array([-3.0]), state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> params, averaged_params(state)  # (0.5 * 3 + 6) / 1.5
    (Array([6.], dtype=float32), Array([5.], dtype=float32))
    """
    check_decay("decay", decay)

    def weight(count):
        # a_t / (1 - decay ** t), not a_t, is kept: next to it a small 1 - decay is not rounded away
        return one_minus(decay) / weight_seen(decay, count), count == 1, decay

    return _averaging(weight, decay)


class LatestParamsState(NamedTuple):
    """Steps seen, and the last few parameters that count, each leaf with an axis for them in front."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    kept: jax.Array
    window: Params


@comparable
def average_latest(length: int, every: Scalar = 1, start: Scalar = 1) -> GradientTransformationExtraArgs:
    r"""Keep the parameters of the last few of steps ``start``, ``start + every``, ...; the last link of a chain.

    .. math:: a = \frac{1}{k} \sum_{i=0}^{k-1} w_{T - i s}

    LAWA, latest weight averaging: often better than the last parameters long before
    the learning rate falls. ``averaged_params`` reads the mean. It costs ``length`` copies of the parameters.

    Args:
      length: :math:`k`, how many are averaged, a Python int >= 1; fewer until there are so many.
      every: :math:`s`, steps from one to the next, >= 1.
      start: the first step that counts, >= 1; before it the average is that of the initial parameters.

    Returns:
      A transformation with ``LatestParamsState(count, kept, window)``; the window is float32 at least.

    Raises:
      ValueError: if a number is below 1; in ``update``, if there are no parameters.

    Source: Kaddour 2022, arXiv:2209.14981.

    >>> import nnlearn
    >>> tx = nnlearn.chain(nnlearn.sgd(1.0), average_latest(2, every=2))
    >>> params, state = jnp.array([0.0]), tx.init(jnp.array([0.0]))
    >>> for _ in range(6):
    ...     updates, state = tx.update(jnp.array([-1.0]), state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> averaged_params(state)  # of 3 and 5
    Array([4.], dtype=float32)
    """
    length = check_count("length", length)
    check_number("every", every, low=1)
    check_number("start", start, low=1)
    slot = Slot()

    def init(params):
        def first(zero, param):  # shapes alone have no values
            row = zero if isinstance(param, jax.ShapeDtypeStruct) else jnp.asarray(param, zero.dtype)
            return jnp.zeros((length, *zero.shape), zero.dtype).at[0].set(row)

        window = jax.tree.map(first, slot.start(params), params)
        return LatestParamsState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), window)

    def update(updates, state, params: Any = None, **extra_args):
        del extra_args
        require_params(params, "average_latest")
        count, real = increment(state.count), jnp.result_type(float)
        past = count.astype(real) - as_hyperparam(start, real)
        due = (past >= 0) & is_multiple(past, every)
        place = jnp.where(due, state.kept % length, length)  # past the end nothing is written
        window = jax.tree.map(
            lambda rows, param: rows.at[place].set(param.astype(rows.dtype), mode="drop"),
            state.window,
            apply_updates(params, updates),
        )
        return updates, LatestParamsState(count, state.kept + due.astype(jnp.int32), window)

    return GradientTransformationExtraArgs(init, update)


def _mean_of(state: LatestParamsState) -> Params:
    def mean(kept, rows):
        kept = jnp.clip(kept, 1, len(rows))
        taken = (jnp.arange(len(rows)) < kept).astype(rows.dtype).reshape(-1, *(1 for _ in rows.shape[1:]))
        return jnp.sum(taken * rows, axis=0) / kept.astype(rows.dtype)

    for _ in range(state.kept.ndim):  # of vmapped runs
        mean = jax.vmap(mean)
    return jax.tree.map(functools.partial(mean, state.kept), state.window)


@comparable
def average_from(start: Scalar, every: Scalar = 1) -> GradientTransformationExtraArgs:
    r"""Keep the plain mean of the parameters of steps ``start``, ``start + every``, ...; the last link of a chain.

    .. math:: a_t = a_{t-1} + (w_t - a_{t-1}) / n \quad \text{at the } n\text{-th of these steps}

    Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407): at a constant or cyclical learning rate, with
    ``every`` the length of a cycle. ``averaged_params`` reads it; before ``start`` it is the parameters.

    Args:
      start: the first step that counts, >= 1.
      every: steps from one to the next, >= 1.

    Returns:
      A transformation with ``AverageParamsState(count, average, decay)``, where the last ``decay`` is 1 - 1 / n.

    Raises:
      ValueError: if ``start`` or ``every`` is below 1; in ``update``, if there are no parameters.

    >>> import nnlearn
    >>> tx = nnlearn.chain(nnlearn.sgd(1.0), average_from(2))
    >>> params, state = jnp.array([0.0]), tx.init(jnp.array([0.0]))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.array([-1.0]), state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> averaged_params(state)  # of 2 and 3
    Array([2.5], dtype=float32)
    """
    check_number("start", start, low=1)
    check_number("every", every, low=1)

    def weight(count):
        real = jnp.result_type(float)
        past, step = count.astype(real) - as_hyperparam(start, real), as_hyperparam(every, real)
        share = jnp.where(is_multiple(past, every), 1 / (jnp.maximum(past, 0) // step + 1), 0)
        return share, past <= 0, jnp.where(past <= 0, 0, 1 - share)

    return _averaging(weight, 0.0)


def _averaging(weight_at, decay: Scalar) -> GradientTransformationExtraArgs:
    """Average with ``weight_at(count) -> (weight of the new parameters, whether they replace the average, decay)``."""
    slot = Slot()

    def init(params):
        def own(zero, param):  # a copy, in the average's dtype; shapes alone have no values
            return zero if isinstance(param, jax.ShapeDtypeStruct) else jnp.array(param, zero.dtype, copy=True)

        average = jax.tree.map(own, slot.start(params), params)
        return AverageParamsState(jnp.zeros([], jnp.int32), average, jnp.asarray(decay, jnp.float32))

    def update(updates, state, params: Any = None, **extra_args):
        del extra_args
        require_params(params, "average_params")
        count = increment(state.count)
        weight, replaces, last = weight_at(count)

        def mix(average, param):
            wide = compute_dtype(average.dtype)
            param = param.astype(wide)
            mixed = step_towards(average.astype(wide), param, weight.astype(real_dtype(wide)))
            return jnp.where(replaces, param, mixed).astype(average.dtype)

        average = jax.tree.map(mix, state.average, apply_updates(params, updates))
        return updates, AverageParamsState(count, average, jnp.asarray(last, jnp.float32))

    return GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: OptState) -> Params:
    """The average that ``average_params``, ``average_from`` or ``average_latest`` keeps, like the model's parameters.

    It is that tree whether the parameters are packed or not, in float32 or wider. Before the first update it is the
    initial parameters.

    Args:
      opt_state: the optimizer's state, with one of them in it; of vmapped runs, too.

    Raises:
      ValueError: the state keeps none, or several.

    >>> import nnlearn
    >>> averaged_params(nnlearn.sgd(0.1).init(jnp.zeros(1)))
    Traceback (most recent call last):
    ValueError: opt_state keeps 0 averages of the parameters; put one average_params() at the end of the chain
    """

    def is_average(node):
        return isinstance(node, AverageParamsState | LatestParamsState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state keeps {len(found)} averages of the parameters; put one average_params() at the end of the chain"
        )
    (state,) = found
    return unpack(_mean_of(state) if isinstance(state, LatestParamsState) else state.average)


__all__ = [
    "AverageParamsState",
    "LatestParamsState",
    "average_from",
    "average_latest",
    "average_params",
    "averaged_params",
]
