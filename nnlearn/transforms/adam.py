"""The Adam family: a first moment for direction, a second for the size of each step."""

import functools

import jax.numpy as jnp
from optax import (
    ScaleByAdamState,
    ScaleByAmsgradState,
    ScaleByBeliefState,
)

from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, debiased, momentum_corrections, moving_average, power
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar


def adam_corrections(count, *, b1, b2, **_):
    """Bias corrections of one step of Adam and most of its relatives."""
    return momentum_corrections(count, b1) | {"c2": bias_correction(b2, count)}


def adam_kernel(g, mu, nu, *, b1, b2, eps, eps_root, c1, c1_next, c2, nesterov=False):
    r"""One step of Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) on arrays of one shape.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) |g_t|^2, \quad
        u_t = \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t) + \bar\epsilon} + \epsilon}

    Returns:
      ``(u, m, v)``.
    """
    mu = moving_average(b1, g, mu)
    nu = moving_average(b2, abs_sq(g), nu)
    direction = debiased(g, mu, decay=b1, c1=c1, c1_next=c1_next, nesterov=nesterov)
    return safe_divide(direction, safe_sqrt(nu / c2 + eps_root) + eps), mu, nu


@comparable
def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam's direction, see ``adam_kernel`` for the equation; ``adam`` is the whole optimizer.

    The decays and their powers are rounded to float32 as in optax, whose steps the family follows to the digit: at
    ``b2 = 0.999999`` the corrected second moment of a constant is 1 % off, where ``ema`` and ``rmsprop`` are exact.

    Arguments are documented in ``nnlearn.adam``.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> tx = scale_by_adam()
    >>> gradient = jnp.array([0.1, -20.0])
    >>> tx.update(gradient, tx.init(gradient))[0]
    Array([ 1., -1.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return from_kernel(
        functools.partial(adam_kernel, nesterov=nesterov),
        ScaleByAdamState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": _second_moment(nu_dtype)},
        {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        adam_corrections,
    )


def _second_moment(dtype: DTypeLike | None = None, fill: Scalar = 0.0) -> Slot:
    return Slot(fill=fill, dtype=as_storage("nu_dtype", dtype), real=True)


def amsgrad_kernel(g, mu, nu, nu_max, *, b1, b2, eps, eps_root, c1, c1_next, c2, correct_mu=True, correct_nu=True):
    r"""One step of AMSGrad (Reddi et al. 2018, arXiv:1904.09237): Adam whose step sizes never grow.

    As in optax the maximum is of the debiased moment, which the paper does not debias.

    .. math:: \hat v^{\max}_t = \max(\hat v^{\max}_{t-1}, \hat v_t), \quad
        u_t = \hat m_t / (\sqrt{\hat v^{\max}_t + \bar\epsilon} + \epsilon)

    Returns:
      ``(u, m, v, v_max)``.
    """
    mu = moving_average(b1, g, mu)
    nu = moving_average(b2, abs_sq(g), nu)
    nu_max = jnp.maximum(nu_max, nu / c2 if correct_nu else nu)
    direction = mu / c1 if correct_mu else mu
    return safe_divide(direction, safe_sqrt(nu_max + eps_root) + eps), mu, nu, nu_max


@comparable
def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AMSGrad's direction, see ``amsgrad_kernel``; arguments as in ``scale_by_adam``.

    Args:
      bias_correction_mu: divide the first moment by its bias.
      bias_correction_nu: divide the second moment by its bias before the maximum is taken.

    Returns:
      A transformation with ``ScaleByAmsgradState(count, mu, nu, nu_max)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_amsgrad()
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([1.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    second = _second_moment(nu_dtype)
    return from_kernel(
        functools.partial(amsgrad_kernel, correct_mu=bias_correction_mu, correct_nu=bias_correction_nu),
        ScaleByAmsgradState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": second, "nu_max": second},
        {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        adam_corrections,
    )


def adamax_kernel(g, mu, nu, *, b1, b2, eps, c1, c1_next, c2):
    r"""One step of AdaMax (Kingma & Ba 2015, algorithm 2): Adam with the maximum norm.

    .. math:: v_t = \max(\beta_2 v_{t-1}, |g_t| + \epsilon), \quad u_t = \frac{m_t}{(1-\beta_1^t) v_t}

    Returns:
      ``(u, m, v)``.
    """
    mu = moving_average(b1, g, mu)
    nu = jnp.maximum(jnp.abs(g) + eps, b2 * nu)
    return safe_divide(mu / c1, nu), mu, nu


@comparable
def scale_by_adamax(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdaMax's direction, see ``adamax_kernel``; arguments as in ``scale_by_adam``.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_adamax()
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([1.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps)
    return from_kernel(
        adamax_kernel,
        ScaleByAdamState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": _second_moment(nu_dtype)},
        {"b1": b1, "b2": b2, "eps": eps},
        adam_corrections,
    )


def belief_kernel(g, mu, nu, *, b1, b2, eps, eps_root, c1, c1_next, c2, nesterov=False):
    r"""One step of AdaBelief (Zhuang et al. 2020, arXiv:2010.07468): the second moment is of the surprise.

    .. math:: s_t = \beta_2 s_{t-1} + (1-\beta_2) |g_t - m_t|^2 + \bar\epsilon, \quad
        u_t = \frac{m_t / (1-\beta_1^t)}{\sqrt{s_t / (1-\beta_2^t)} + \epsilon}

    Returns:
      ``(u, m, s)``.
    """
    mu = moving_average(b1, g, mu)
    nu = moving_average(b2, abs_sq(g - mu), nu) + eps_root
    direction = debiased(g, mu, decay=b1, c1=c1, c1_next=c1_next, nesterov=nesterov)
    return safe_divide(direction, safe_sqrt(nu / c2) + eps), mu, nu


@comparable
def scale_by_belief(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdaBelief's direction, see ``belief_kernel``; arguments as in ``scale_by_adam``.

    Returns:
      A transformation with ``ScaleByBeliefState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_belief(b1=0.5)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return from_kernel(
        functools.partial(belief_kernel, nesterov=nesterov),
        ScaleByBeliefState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": _second_moment(nu_dtype)},
        {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        adam_corrections,
    )


def yogi_kernel(g, mu, nu, *, b1, b2, eps, eps_root, c1, c1_next, c2):
    r"""One step of Yogi (Zaheer et al. 2018): the second moment moves by at most :math:`(1-\beta_2) g^2` a step.

    .. math:: v_t = v_{t-1} - (1-\beta_2) \operatorname{sign}(v_{t-1} - |g_t|^2) |g_t|^2

    Returns:
      ``(u, m, v)``.
    """
    mu = moving_average(b1, g, mu)
    square = abs_sq(g)
    nu = nu - (1 - b2) * jnp.sign(nu - square) * square
    return safe_divide(mu / c1, safe_sqrt(nu / c2 + eps_root) + eps), mu, nu


@comparable
def scale_by_yogi(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    eps_root: Scalar = 0.0,
    initial_accumulator_value: Scalar = 1e-6,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Yogi's direction, see ``yogi_kernel``; arguments as in ``scale_by_adam``.

    Args:
      initial_accumulator_value: initial value of both moments, >= 0.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_yogi()
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(3)
    Array([1.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root, initial_accumulator_value=initial_accumulator_value)
    first = Slot(fill=initial_accumulator_value, dtype=as_storage("mu_dtype", mu_dtype))
    return from_kernel(
        yogi_kernel,
        ScaleByAdamState,
        {"mu": first, "nu": _second_moment(nu_dtype, initial_accumulator_value)},
        {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
        adam_corrections,
    )


def radam_kernel(g, mu, nu, *, b1, b2, eps, eps_root, threshold, c1, c1_next, c2, rectify, rectifier, nesterov=False):
    r"""One step of RAdam (Liu et al. 2020, arXiv:1908.03265): momentum until the variance of :math:`v` is bounded.

    .. math:: \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \quad
        r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}, \quad
        u_t = r_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} \text{ if } \rho_t \ge \text{threshold, else } \hat m_t

    Returns:
      ``(u, m, v)``.
    """
    mu = moving_average(b1, g, mu)
    nu = moving_average(b2, abs_sq(g), nu)
    direction = debiased(g, mu, decay=b1, c1=c1, c1_next=c1_next, nesterov=nesterov)
    scaled = safe_divide(rectifier * direction, safe_sqrt(nu / c2 + eps_root) + eps)
    return jnp.where(rectify > 0, scaled, direction), mu, nu


def _rectification(count, *, b1, b2, threshold, **_):
    ro_inf = 2 / (1 - b2) - 1
    decayed = power(b2, count)
    ro = ro_inf - 2 * count.astype(decayed.dtype) * decayed / (1 - decayed)
    rectify = (ro >= threshold) & (ro > 4)  # at 4 and below the root is of a negative number, or of infinity
    safe = jnp.where(rectify, ro, 5.0)
    rectifier = jnp.sqrt((safe - 4) * (safe - 2) * ro_inf / ((ro_inf - 4) * (ro_inf - 2) * safe))
    return adam_corrections(count, b1=b1, b2=b2) | {"rectify": rectify.astype(jnp.float32), "rectifier": rectifier}


@comparable
def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """RAdam's direction, see ``radam_kernel``; arguments as in ``scale_by_adam``.

    Args:
      threshold: length of the simple moving average, in steps, from which the variance is trusted.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx = scale_by_radam()
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(4)  # momentum alone, at first
    Array([4.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root, threshold=threshold)
    return from_kernel(
        functools.partial(radam_kernel, nesterov=nesterov),
        ScaleByAdamState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": _second_moment(nu_dtype)},
        {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "threshold": threshold},
        _rectification,
    )


__all__ = [
    "adam_corrections",
    "adam_kernel",
    "adamax_kernel",
    "amsgrad_kernel",
    "belief_kernel",
    "radam_kernel",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_radam",
    "scale_by_yogi",
    "yogi_kernel",
]
