"""Step sizes from squared gradients alone: AdaGrad, RMSProp and AdaDelta."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import ScaleByAdaDeltaState, ScaleByRmsState, ScaleByRssState, ScaleByRStdDevState

from nnlearn.settings import comparable
from nnlearn.transforms.averages import average_with_mean, corrections, step_towards
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_rsqrt, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, Updates


def rss_kernel(g, sum_of_squares, *, eps):
    r"""One step of AdaGrad (Duchi et al. 2011): divide by the root of the sum of squares so far.

    .. math:: s_t = s_{t-1} + |g_t|^2, \quad u_t = g_t / \sqrt{s_t + \epsilon} \text{ where } s_t > 0, \text{ else } 0

    Returns:
      ``(u, s)``.
    """
    total = abs_sq(g) + sum_of_squares
    return jnp.where(total > 0, safe_rsqrt(total + eps), 0) * g, total


@comparable
def scale_by_rss(
    initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7, *, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """AdaGrad's direction, see ``rss_kernel``; arguments are documented in ``nnlearn.adagrad``.

    Returns:
      A transformation with ``ScaleByRssState(sum_of_squares)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_rss(initial_accumulator_value=0.0)
    >>> tx.update(jnp.array([4.0, 0.0]), tx.init(jnp.zeros(2)))[0]
    Array([1., 0.], dtype=float32)
    """
    check_hyperparams(initial_accumulator_value=initial_accumulator_value, eps=eps)
    slot = Slot(initial_accumulator_value, as_storage("accumulator_dtype", accumulator_dtype), real=True)
    return from_kernel(rss_kernel, ScaleByRssState, {"sum_of_squares": slot}, {"eps": eps})


class ScaleByRmsWithCountState(NamedTuple):
    """State of ``scale_by_rms`` with bias correction."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: Updates


class ScaleByRStdDevWithCountState(NamedTuple):
    """State of ``scale_by_stddev`` with bias correction."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Updates
    nu: Updates


def _inverse_root(power, eps, eps_in_sqrt):
    return safe_rsqrt(power + eps) if eps_in_sqrt else safe_divide(1, safe_sqrt(power) + eps)


def _average(average, value, decay, seen):
    """The average of one step more, and its mean: corrected for the start if ``seen`` says how."""
    if seen:
        return average_with_mean(average, value, decay=decay, **seen)
    average = step_towards(average, value, 1 - decay)
    return average, average


def rms_kernel(g, nu, *, decay, eps, eps_in_sqrt=True, **seen):
    r"""One step of RMSProp (Hinton, Srivastava & Swersky 2012, lecture 6e).

    .. math:: v_t = \beta v_{t-1} + (1-\beta) |g_t|^2, \quad u_t = g_t / \sqrt{v_t + \epsilon}

    or :math:`g_t / (\sqrt{v_t} + \epsilon)` with ``eps_in_sqrt=False``.

    Returns:
      ``(u, v)``.
    """
    nu, mean_square = _average(nu, abs_sq(g), decay, seen)
    return _inverse_root(mean_square, eps, eps_in_sqrt) * g, nu


def stddev_kernel(g, mu, nu, *, decay, eps, eps_in_sqrt=True, **seen):
    r"""One step of centered RMSProp (Graves 2013, arXiv:1308.0850, eq. 38-41): divide by the standard deviation.

    .. math:: m_t = \beta m_{t-1} + (1-\beta) g_t, \quad u_t = g_t / \sqrt{\max(v_t - |m_t|^2, 0) + \epsilon}

    The maximum is there for rounding: a variance cannot be negative, the difference of two rounded numbers can.

    Returns:
      ``(u, m, v)``.
    """
    mu, mean = _average(mu, g, decay, seen)
    nu, mean_square = _average(nu, abs_sq(g), decay, seen)
    variance = jnp.maximum(mean_square - abs_sq(mean), 0)
    return _inverse_root(variance, eps, eps_in_sqrt) * g, mu, nu


@comparable
def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """RMSProp's direction, see ``rms_kernel``; arguments are documented in ``nnlearn.rmsprop``.

    Returns:
      A transformation with ``ScaleByRmsState(nu)``, or ``ScaleByRmsWithCountState(count, nu)`` with
      ``bias_correction``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_rms(decay=0.0)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([1.], dtype=float32)
    """
    check_hyperparams(decay=decay, eps=eps, initial_scale=initial_scale)
    return from_kernel(
        functools.partial(rms_kernel, eps_in_sqrt=eps_in_sqrt),
        ScaleByRmsWithCountState if bias_correction else ScaleByRmsState,
        {"nu": Slot(initial_scale, as_storage("nu_dtype", nu_dtype), real=True)},
        {"decay": decay, "eps": eps},
        corrections if bias_correction else None,
    )


@comparable
def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Centered RMSProp's direction, see ``stddev_kernel``; arguments as in ``scale_by_rms``.

    Returns:
      A transformation with ``ScaleByRStdDevState(mu, nu)``, or ``ScaleByRStdDevWithCountState(count, mu, nu)`` with
      ``bias_correction``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_stddev(decay=0.5)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_hyperparams(decay=decay, eps=eps, initial_scale=initial_scale)
    second = Slot(initial_scale, as_storage("nu_dtype", nu_dtype), real=True)
    return from_kernel(
        functools.partial(stddev_kernel, eps_in_sqrt=eps_in_sqrt),
        ScaleByRStdDevWithCountState if bias_correction else ScaleByRStdDevState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": second},
        {"decay": decay, "eps": eps},
        corrections if bias_correction else None,
    )


def adadelta_kernel(g, e_g, e_x, *, rho, eps):
    r"""One step of AdaDelta (Zeiler 2012, arXiv:1212.5701, algorithm 1): steps in the units of the parameters.

    .. math:: E[g^2]_t = \rho E[g^2]_{t-1} + (1-\rho) |g_t|^2, \quad
        u_t = \sqrt{\frac{E[u^2]_{t-1} + \epsilon}{E[g^2]_t + \epsilon}} g_t

    Returns:
      ``(u, E[g^2], E[u^2])``.
    """
    e_g = (1 - rho) * abs_sq(g) + rho * e_g
    # Floored, so that eps = 0 makes no 0 / 0 (a parameter that never had a gradient has none now); no division and no
    # selection, because XLA splits those into more passes over memory.
    tiny = jnp.finfo(e_g.dtype).tiny
    change = jnp.sqrt(jnp.maximum(e_x + eps, tiny)) * jax.lax.rsqrt(jnp.maximum(e_g + eps, tiny)) * g
    return change, e_g, (1 - rho) * abs_sq(change) + rho * e_x


@comparable
def scale_by_adadelta(
    rho: Scalar = 0.9, eps: Scalar = 1e-6, *, accumulator_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """AdaDelta's direction, see ``adadelta_kernel``; arguments are documented in ``nnlearn.adadelta``.

    Returns:
      A transformation with ``ScaleByAdaDeltaState(e_g, e_x)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_adadelta(rho=0.0, eps=1.0)
    >>> tx.update(jnp.array([0.0]), tx.init(jnp.zeros(1)))[0]
    Array([0.], dtype=float32)
    """
    check_hyperparams(rho=rho, eps=eps)
    slot = Slot(dtype=as_storage("accumulator_dtype", accumulator_dtype), real=True)
    return from_kernel(adadelta_kernel, ScaleByAdaDeltaState, {"e_g": slot, "e_x": slot}, {"rho": rho, "eps": eps})


__all__ = [
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsWithCountState",
    "adadelta_kernel",
    "rms_kernel",
    "rss_kernel",
    "scale_by_adadelta",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
    "stddev_kernel",
]
