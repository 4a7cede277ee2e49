"""Directions from averaged gradients: momentum, exponential averages, signs and Lion."""

import functools
import warnings
from typing import Literal

import jax.numpy as jnp
from optax import EmaState, ScaleByLionState, TraceState, identity, with_extra_args_support

from nnlearn.checks import check_number
from nnlearn.settings import comparable
from nnlearn.transforms.averages import average_with_mean, corrections, step_towards
from nnlearn.transforms.plumbing import from_kernel, from_leaf_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar


def trace_kernel(g, trace, *, decay, nesterov=False):
    r"""One step of momentum (Polyak 1964), or of Nesterov's (Sutskever et al. 2013).

    .. math:: t_t = g_t + \beta t_{t-1}, \quad u_t = t_t \text{, or } g_t + \beta t_t \text{ with Nesterov}

    Returns:
      ``(u, t)``.
    """
    trace = g + decay * trace
    return (g + decay * trace if nesterov else trace), trace


@comparable
def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """Momentum, a decaying *sum* of gradients, see ``trace_kernel``; ``ema`` is the decaying average.

    Args:
      decay: factor of the previous trace, in [0, 1].
      nesterov: look one step ahead.
      accumulator_dtype: dtype of the trace; None for the parameter's dtype, float32 at least.

    Returns:
      A transformation with ``TraceState(trace)``.

    Raises:
      ValueError: if ``decay`` is out of range.

    >>> tx = trace(decay=0.9)
    >>> update, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([1.0]), state)[0]
    Array([1.9], dtype=float32)
    """
    check_number("decay", decay, low=0.0, high=1.0)  # a sum may keep all of itself
    slot = Slot(dtype=as_storage("accumulator_dtype", accumulator_dtype))
    kernel = functools.partial(trace_kernel, nesterov=nesterov)
    return from_kernel(kernel, TraceState, {"trace": slot}, {"decay": decay})


def trace_if(
    momentum: Scalar | None, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """``trace``, or nothing for a momentum of None; then ``nesterov`` has no effect, and warns."""
    if momentum is None and nesterov:
        warnings.warn("nesterov=True has no effect without momentum: give momentum=0.9, or leave it out", stacklevel=4)
    return with_extra_args_support(identity()) if momentum is None else trace(momentum, nesterov, accumulator_dtype)


def ema_kernel(g, ema, *, decay, **seen):
    r"""One step of an exponential moving average.

    .. math:: m_t = \beta m_{t-1} + (1-\beta) g_t, \quad u_t = m_t / (1-\beta^t)

    or :math:`u_t = m_t` without ``seen`` and ``seen_before``, the weights :math:`1-\beta^t` and :math:`1-\beta^{t-1}`.

    Returns:
      ``(u, m)``.
    """
    if seen:
        ema, mean = average_with_mean(ema, g, decay=decay, **seen)
        return mean, ema
    ema = step_towards(ema, g, 1 - decay)
    return ema, ema


@comparable
def ema(
    decay: Scalar, debias: bool = True, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """Exponential moving average of the gradients, see ``ema_kernel``.

    Args:
      decay: decay rate, in [0, 1).
      debias: divide by :math:`1 - \\beta^t`, the weight seen so far; a constant is then its own average at every step.
      accumulator_dtype: dtype of the average; None for the parameter's dtype, float32 at least.

    Returns:
      A transformation with ``EmaState(count, ema)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = ema(decay=0.9)
    >>> tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_hyperparams(decay=decay)
    slot = Slot(dtype=as_storage("accumulator_dtype", accumulator_dtype))
    return from_kernel(ema_kernel, EmaState, {"ema": slot}, {"decay": decay}, corrections if debias else None)


@comparable
def scale_by_sign() -> GradientTransformationExtraArgs:
    """Replace every element by its sign; a complex one by the unit number of its direction.

    >>> tx = scale_by_sign()
    >>> tx.update(jnp.array([0.3, -2.0, 0.0]), tx.init(jnp.zeros(3)))[0]
    Array([ 1., -1.,  0.], dtype=float32)
    """
    return from_leaf_kernel(jnp.sign, {})


LION_MODES = {
    "hard": lambda x, smooth_beta: jnp.sign(x),
    "smooth": lambda x, smooth_beta: jnp.tanh(smooth_beta * x),
    "refined": lambda x, smooth_beta: jnp.where(jnp.abs(x) < 1, x, jnp.sign(x)),
}


def lion_kernel(g, mu, *, b1, b2, smooth_beta, mode="hard"):
    r"""One step of Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    .. math:: u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t), \quad
        m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t

    Returns:
      ``(u, m)``.
    """
    return LION_MODES[mode]((1 - b1) * g + b1 * mu, smooth_beta), (1 - b2) * g + b2 * mu


@comparable
def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Scalar = 1.0,
) -> GradientTransformationExtraArgs:
    """Lion's direction, see ``lion_kernel``.

    Args:
      b1, b2, mu_dtype: see ``nnlearn.lion``.
      mode: ``"hard"`` is the sign; ``"smooth"`` is ``tanh(smooth_beta * x)``; ``"refined"`` is linear inside of
        [-1, 1] and the sign outside.
      smooth_beta: steepness of the smooth mode.

    Returns:
      A transformation with ``ScaleByLionState(count, mu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or ``mode`` is unknown.
      TypeError: if ``mu_dtype`` is not a floating or complex type.

    >>> tx = scale_by_lion()
    >>> tx.update(jnp.array([0.3, -2.0]), tx.init(jnp.zeros(2)))[0]
    Array([ 1., -1.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, smooth_beta=smooth_beta)
    if mode not in LION_MODES:
        raise ValueError(f"mode must be one of {sorted(LION_MODES)}, got {mode!r}")
    return from_kernel(
        functools.partial(lion_kernel, mode=mode),
        ScaleByLionState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype))},
        {"b1": b1, "b2": b2, "smooth_beta": smooth_beta},
    )


__all__ = [
    "ema",
    "ema_kernel",
    "lion_kernel",
    "scale_by_lion",
    "scale_by_sign",
    "trace",
    "trace_kernel",
]
