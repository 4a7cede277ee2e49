"""Multiplying updates: by a number, a learning rate, a schedule or the trust ratio of a layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import ScaleByScheduleState, identity, with_extra_args_support

from nnlearn.checks import check_nonnegative, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.plumbing import from_leaf_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.wrapping import from_map
from nnlearn.tree import clip_parts, scaled_norm
from nnlearn.tree import scale as scale_tree
from nnlearn.types import GradientTransformationExtraArgs, Scalar, ScalarOrSchedule, Schedule


@comparable
def scale(step_size: Scalar) -> GradientTransformationExtraArgs:
    """Multiply every update by ``step_size``, of either sign.

    Args:
      step_size: the factor, any number that is not NaN.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``step_size`` is NaN or not a scalar.

    >>> tx = scale(-0.1)
    >>> tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.2], dtype=float32)
    """
    check_number("step_size", step_size)
    return from_map(lambda updates, params: scale_tree(updates, step_size))


class ScaleByLearningRateState(NamedTuple):
    """Step counter, and the last learning rate for inspection.

    It is the same for a number as for a schedule, so swapping one for the other still loads an old checkpoint. The
    counter is called ``step``, which leaves ``count`` to the moments: ``optax.tree.get(state, "count")`` stays unique.

    Attributes:
      step: updates made so far, int32.
      learning_rate: the rate that the last update used; before the first, the one it will use.
    """

    step: jax.Array
    learning_rate: jax.Array


@comparable
def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> GradientTransformationExtraArgs:
    """Multiply every update by minus the learning rate; the last link of a descent chain.

    Args:
      learning_rate: a number >= 0, or a schedule from step to number; None leaves updates as they are, sign and all.
      flip_sign: multiply by minus the rate, so that adding the update goes downhill.

    Returns:
      A transformation with ``ScaleByLearningRateState(step, learning_rate)``.

    Raises:
      ValueError: if the rate is negative, infinite or NaN.

    >>> tx = scale_by_learning_rate(lambda step: 0.1 * 0.5**step)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     update, state = tx.update(jnp.array([1.0]), state)
    >>> update, state.learning_rate
    (Array([-0.025], dtype=float32), Array(0.025, dtype=float32))
    """
    if learning_rate is None:
        return with_extra_args_support(identity())
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    sign = -1 if flip_sign else 1

    def rate_at(step):
        return learning_rate(step) if callable(learning_rate) else learning_rate

    def init(params):
        del params
        step = jnp.zeros([], jnp.int32)
        return ScaleByLearningRateState(step, jnp.asarray(rate_at(step), jax.dtypes.canonicalize_dtype(float)))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        rate = rate_at(state.step)
        record = jnp.asarray(rate, state.learning_rate.dtype)
        return scale_tree(updates, sign * rate), ScaleByLearningRateState(increment(state.step), record)

    return GradientTransformationExtraArgs(init, update)


@comparable
def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformationExtraArgs:
    """Multiply every update by a value that depends on the step, of either sign.

    Args:
      step_size_fn: from the step, an int32 that starts at 0, to a number.

    Returns:
      A transformation with ``ScaleByScheduleState(count)``.

    Raises:
      TypeError: if ``step_size_fn`` is not a function.

    >>> tx = scale_by_schedule(lambda step: 1.0 / (1 + step))
    >>> update, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([1.0]), state)[0]
    Array([0.5], dtype=float32)
    """
    if not callable(step_size_fn):
        raise TypeError(f"step_size_fn must be a schedule, got {step_size_fn!r}; for a constant use scale")

    def init(params):
        del params
        return ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return scale_tree(updates, step_size_fn(state.count)), ScaleByScheduleState(increment(state.count))

    return GradientTransformationExtraArgs(init, update)


def trust_ratio_kernel(update, param, *, min_norm, trust_coefficient, eps):
    r"""Scale a layer's update to its weights (LARS, You et al. 2017, arXiv:1708.03888, eq. 6).

    .. math:: u \leftarrow \eta \frac{\|w\|}{\|u\| + \epsilon} u \text{, and } u \text{ where a norm is } 0

    Norms below ``min_norm`` count as ``min_norm``. Returns the update.
    """
    param_norm, param_scale = scaled_norm([param], bounded=True)
    largest = float(jnp.finfo(param_norm.dtype).max)
    param_norm = jnp.maximum(jnp.minimum(param_norm / param_scale, largest), min_norm)
    update_norm, scale = scaled_norm([update], bounded=True)
    update_norm = jnp.maximum(update_norm, min_norm * scale)
    usable = (param_norm > 0) & (update_norm > 0)
    # in three factors, each of which is in range and brings the product into it
    inverse = 1 / jnp.where(usable, update_norm + eps * scale, 1)
    inverse, ratio = jnp.where(usable, inverse, 1), jnp.where(usable, trust_coefficient * param_norm, 1)
    scale, limit = jnp.where(usable, scale, 1), jnp.where(usable, largest * scale, jnp.inf)
    return clip_parts(update, limit, scale) * inverse * ratio


@comparable
def scale_by_trust_ratio(
    min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformationExtraArgs:
    """Scale each layer's update by the ratio of weight norm to update norm, see ``trust_ratio_kernel``.

    Args:
      min_norm: lower bound of both norms, >= 0.
      trust_coefficient: multiplies the ratio, >= 0.
      eps: added to the update's norm, >= 0.

    Raises:
      ValueError: if ``update`` is called without parameters, or a hyper-parameter is out of range.

    >>> tx = scale_by_trust_ratio()
    >>> params = jnp.array([3.0, 4.0])
    >>> tx.update(jnp.array([0.0, 2.0]), tx.init(params), params)[0]
    Array([0., 5.], dtype=float32)
    """
    hyperparams: dict[str, Any] = {"min_norm": min_norm, "trust_coefficient": trust_coefficient, "eps": eps}
    check_hyperparams(**hyperparams)
    return from_leaf_kernel(trust_ratio_kernel, hyperparams, needs_params="scale_by_trust_ratio", whole_leaf=True)


__all__ = [
    "ScaleByLearningRateState",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "scale_by_trust_ratio",
    "trust_ratio_kernel",
]
