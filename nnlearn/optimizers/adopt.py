"""Adam whose second moment is that of the steps before: ADOPT and ACProp."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from optax import ScaleByAdamState, ScaleByBeliefState

from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, clip_parts, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def fourth_root(step: Scalar) -> Scalar:
    """ADOPT's bound of the normalised gradient at a step, counted from 0."""
    return step**0.25


def adopt_kernel(g, mu, nu, *, b1, b2, eps, limit, is_first, nesterov=False):
    r"""One step of ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, algorithm 2).

    .. math::
        n_t = \operatorname{clip}(g_t / \max(\sqrt{v_{t-1}}, \epsilon), c_t), \quad
        m_t = \beta_1 m_{t-1} + (1-\beta_1) n_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) |g_t|^2, \quad u_t = m_t

    The first step only sets :math:`v_1 = |g_1|^2`. With Nesterov :math:`u_t` is one more step of the average.

    Returns:
      ``(u, m, v)``.
    """
    normalised = g / jnp.maximum(safe_sqrt(nu), eps)
    normalised = normalised if limit is None else clip_parts(normalised, limit)
    new = moving_average(b1, normalised, mu)
    update = moving_average(b1, normalised, new) if nesterov else new
    second = jnp.where(is_first, abs_sq(g), moving_average(b2, abs_sq(g), nu))
    return jnp.where(is_first, mu, update), jnp.where(is_first, mu, new), second


@comparable
def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Scalar], Scalar] | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """ADOPT's direction, see ``adopt_kernel``; arguments as in ``adopt``.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_adopt(b1=0.5)
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([4.0]), state)[0]
    Array([0.5], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps)
    bound = clip_value_fn or fourth_root

    def per_step(count, **_):
        limit = bound((count - 1).astype(jnp.result_type(float))) if use_clipping else jnp.inf
        return {"limit": limit, "is_first": count == 1}

    return from_kernel(
        functools.partial(adopt_kernel, nesterov=nesterov),
        ScaleByAdamState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True),
        },
        {"b1": b1, "b2": b2, "eps": eps},
        per_step,
    )


@comparable
def adopt(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Scalar], Scalar] | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""ADOPT, an Adam that converges for any :math:`\beta_2` (Taniguchi et al. 2024, arXiv:2411.02853).

    .. math:: w_t = w_{t-1} - \alpha_t u_t

    with the :math:`u_t` of ``adopt_kernel``. The first step does not move the parameters.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1, b2: decay rates of the moments, in [0, 1).
      eps: smallest divisor, >= 0.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      nesterov: look one step ahead.
      use_clipping: clip the normalised gradient.
      clip_value_fn: from the step, counted from 0, to the largest normalised gradient; None for its fourth root.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = adopt(0.1, b1=0.5)
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([4.0]), state)[0]
    Array([-0.05], dtype=float32)
    """
    return assemble(
        scale_by_adopt(
            b1,
            b2,
            eps,
            mu_dtype,
            nesterov=nesterov,
            use_clipping=use_clipping,
            clip_value_fn=clip_value_fn,
            nu_dtype=nu_dtype,
        ),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


def acprop_kernel(g, mu, nu, *, b1, b2, eps, eps_root, c2, is_first):
    r"""One step of ACProp (Zhuang et al. 2021, arXiv:2110.05454, algorithm 2), from AdaBelief's second moment.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) |g_t - m_{t-1}|^2 + \bar\epsilon, \quad
        u_t = \frac{g_t}{\sqrt{v_{t-1} / (1-\beta_2^{t-1})} + \epsilon}

    The moment centres :math:`v` alone. The divisor of the first step is :math:`1 + \epsilon`. Returns ``(u, m, v)``.
    """
    error, before = abs_sq(g - mu), jnp.where(is_first, 1, nu / c2)
    mu, nu = moving_average(b1, g, mu), moving_average(b2, error, nu) + eps_root
    return safe_divide(g, safe_sqrt(before) + eps), mu, nu


@comparable
def scale_by_acprop(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-16, eps_root: Scalar = 1e-16
) -> GradientTransformationExtraArgs:
    """ACProp's direction, see ``acprop_kernel``; arguments as in ``acprop``.

    Returns:
      A transformation with ``ScaleByBeliefState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_acprop(b1=0.5)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([4.], dtype=float32)
    """
    hyperparams: dict[str, Any] = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    check_hyperparams(**hyperparams)

    def per_step(count, *, b2, **_):
        return {"c2": bias_correction(b2, jnp.maximum(count - 1, 1)), "is_first": count == 1}

    slots = {"mu": Slot(), "nu": Slot(real=True)}
    return from_kernel(acprop_kernel, ScaleByBeliefState, slots, hyperparams, per_step)


@comparable
def acprop(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""ACProp, asynchronous centred AdaBelief (Zhuang et al. 2021, arXiv:2110.05454).

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``acprop_kernel``; arguments as in ``adamw``, but ``eps_root`` joins the second moment.

    >>> tx = acprop(0.1, b1=0.5)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))[0]
    Array([-0.4], dtype=float32)
    """
    return assemble(
        scale_by_acprop(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["acprop", "acprop_kernel", "adopt", "adopt_kernel", "fourth_root", "scale_by_acprop", "scale_by_adopt"]
