"""Moving averages on arrays: decays to the power of the step, bias corrections, and averages that stay exact."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from optax import safe_increment

from nnlearn.tree import as_hyperparam, compute_dtype, safe_divide


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    r"""What an average started at zero has seen of its weights after ``count`` steps: :math:`1 - \beta^t`.

    As optax works it out, from :math:`\beta` in float32: for a decay of 0.999999 it is 1 % off. ``weight_seen`` is not.
    """
    return 1 - power(decay, count)


def one_minus(decay: Any) -> Any:
    """``1 - decay`` in the decay's own precision, float32 at least."""
    if isinstance(decay, bool | int | float):
        return 1.0 - decay
    decay = jnp.asarray(decay)
    return 1 - decay.astype(compute_dtype(decay.dtype))


def weight_seen(decay: Any, count: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t` to float32's precision for any decay, from ``1 - decay`` in the decay's own precision."""
    if isinstance(decay, bool | int | float):
        log_decay = jnp.asarray(math.log1p(-one_minus(decay)) if decay > 0 else -math.inf, float)
    else:
        log_decay = jnp.log1p(-one_minus(decay))
    counted = jnp.maximum(count, 1).astype(log_decay.dtype)
    return jnp.where(count == 0, 0, -jnp.expm1(counted * log_decay))


def step_towards(average: jax.Array, value: jax.Array, weight: Any) -> jax.Array:
    """``average + weight * (value - average)``: for any ``weight``, a constant is its own average, to the bit.

    ``(1 - weight) * average + weight * value`` is not that if both factors are rounded. An infinite average stays.
    """
    return jnp.where(jnp.isfinite(average), average + weight * (value - average), average)


def average_with_mean(average: jax.Array, value: jax.Array, *, decay, seen, seen_before) -> tuple[jax.Array, jax.Array]:
    """One step of an average that started at zero, and its bias-corrected mean: ``(average, mean)``.

    The step is taken from the mean, which is as large as the values, so that a small ``1 - decay`` is not rounded away.

    Args:
      average, value: arrays of one shape.
      decay: the decay rate.
      seen, seen_before: ``weight_seen`` of this step and of the last one.
    """
    first = step_towards(average, value, 1 - decay)
    # Products with scalars: XLA divides arrays of one number and of many in two ways, which packing would show.
    before = average * safe_divide(1, seen_before)
    # Keeping mean * seen rounds the mean. Where only that parts it from the value it is the value, or it would drift.
    near = jnp.abs(value - before) <= 4 * jnp.finfo(before.dtype).eps * jnp.abs(value)
    mean = step_towards(jnp.where(near, value, before), value, (1 - decay) / seen)
    begun = seen_before > 0
    return jnp.where(begun, mean * seen, first), jnp.where(begun, mean, first * (1 / seen))


def corrections(count: jax.Array, *, decay: Any, **_) -> dict[str, jax.Array]:
    """``seen`` and ``seen_before`` of ``average_with_mean``."""
    return {"seen": weight_seen(decay, count), "seen_before": weight_seen(decay, count - 1)}


def increment(count: Any) -> jax.Array:
    """``count + 1``, at most the largest number of its dtype."""
    return jnp.asarray(safe_increment(count))


def is_multiple(count: Any, every: Any) -> jax.Array:
    """Whether a count is a multiple of a number, which may be traced and need not be whole."""
    real = jnp.result_type(float)
    return jnp.asarray(count).astype(real) % as_hyperparam(every, real) < 1


def moving_average(decay: Any, value: jax.Array, average: jax.Array) -> jax.Array:
    """``(1 - decay) * value + decay * average``, in optax's order of operations."""
    return (1 - decay) * value + decay * average


def momentum_corrections(count: jax.Array, decay: Any) -> dict[str, jax.Array]:
    """Bias corrections of a first moment; ``c1_next`` is the one that Nesterov's look-ahead needs."""
    return {"c1": bias_correction(decay, count), "c1_next": bias_correction(decay, increment(count))}


def debiased(g: jax.Array, mu: jax.Array, *, decay: Any, c1, c1_next, nesterov: bool) -> jax.Array:
    r"""The debiased first moment, or :math:`\beta m_t/(1-\beta^{t+1}) + (1-\beta) g_t/(1-\beta^t)` with Nesterov."""
    return decay * (mu / c1_next) + (1 - decay) * (g / c1) if nesterov else mu / c1


def power(base: Any, count: jax.Array) -> jax.Array:
    """``base ** count``, a number to an integer power, without mixing dtypes, which strict promotion refuses."""
    base = jnp.asarray(base)
    return jax.lax.pow(base.astype(compute_dtype(base.dtype)), count)


__all__ = [
    "average_with_mean",
    "bias_correction",
    "corrections",
    "debiased",
    "increment",
    "is_multiple",
    "momentum_corrections",
    "moving_average",
    "one_minus",
    "power",
    "step_towards",
    "weight_seen",
]
