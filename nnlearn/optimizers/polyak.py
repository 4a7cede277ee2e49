"""Step sizes from the value of the loss: Polyak's, and MoMo's with momentum."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from optax.contrib import MomoAdamState, MomoState

from nnlearn.optimizers.sgd import sgd
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction
from nnlearn.transforms.plumbing import from_kernel, number, total
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.tree import abs_sq, as_hyperparam, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, EmptyState, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


def given_value(value: Any, name: str, dtype: Any) -> jax.Array:
    """The loss that ``update`` was given.

    Raises:
      TypeError: if it was given none.
    """
    if value is None:
        raise TypeError(f"{name} needs the loss: call update(updates, state, params, value=loss)")
    return jnp.asarray(value).astype(dtype)


@comparable
def scale_by_polyak(
    f_min: Scalar = 0.0,
    max_learning_rate: Scalar = 1.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> GradientTransformationExtraArgs:
    r"""Scale by Polyak's step size (Polyak 1969; Loizou et al. 2021, arXiv:2002.10542, eq. 3).

    .. math:: u = \min\Big(\frac{f(w) - f_{\min}}{\|g\|^2 + \epsilon}, \gamma\Big) g

    ``update`` takes the loss as ``value=``, which ``make_step`` gives.

    Args:
      f_min: lower bound of the loss.
      max_learning_rate: :math:`\gamma`, > 0.
      eps: added to the squared norm, >= 0.
      variant: ``"sps+"`` takes a negative gap for 0.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: in ``update``, if there is no ``value``.

    >>> tx = scale_by_polyak()
    >>> tx.update(jnp.array([2.0]), tx.init(jnp.ones(1)), value=1.0)[0]
    Array([0.5], dtype=float32)
    """
    if variant not in ("sps", "sps+"):
        raise ValueError(f"variant must be 'sps' or 'sps+', got {variant!r}")
    check_hyperparams(f_min=f_min, max_learning_rate=max_learning_rate, eps=eps)

    def per_step(count, *, updates, f_min, max_learning_rate, eps, value=None):
        del count
        square = total(abs_sq, updates)
        f_min, longest, eps = (as_hyperparam(one, square.dtype) for one in (f_min, max_learning_rate, eps))
        gap = given_value(value, "scale_by_polyak", square.dtype) - f_min
        gap = jnp.maximum(gap, 0) if variant == "sps+" else gap
        small = square + eps <= float(jnp.finfo(float).eps)
        return {"step": jnp.where(small, 0, jnp.minimum(gap / jnp.where(small, 1, square + eps), longest))}

    hyperparams = {"f_min": f_min, "max_learning_rate": max_learning_rate, "eps": eps}
    return from_kernel(lambda g, *, step, **_: (step * g,), EmptyState, {}, hyperparams, per_step)


@comparable
def polyak_sgd(
    max_learning_rate: Scalar = 1.0,
    scaling: ScalarOrSchedule = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Gradient descent with Polyak's step size (Loizou et al. 2021, arXiv:2002.10542), see ``scale_by_polyak``.

    Args:
      max_learning_rate, f_min, eps, variant: see ``scale_by_polyak``.
      scaling: a number >= 0 or a schedule, which multiplies the gradient before its norm is taken, as in optax.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = polyak_sgd()
    >>> tx.update(jnp.array([2.0]), tx.init(jnp.ones(1)), jnp.ones(1), value=1.0)[0]
    Array([-0.5], dtype=float32)
    """
    return assemble(sgd(scaling), scale_by_polyak(f_min, max_learning_rate, eps, variant), master_dtype=master_dtype)


def momo_step(barf, gamma, lb, iprod, square, *, rate, longest, weight_decay, lower_bound, c1, adapt):
    r"""The step size of MoMo (Schaipp et al. 2024, arXiv:2305.07583, algorithms 1 and 2) and the next lower bound.

    .. math:: \tau = \min\Big(\alpha, \frac{\max((1 + \alpha\lambda)(\bar f - f_* - \gamma) + \langle m, w \rangle, 0)}
        {\|m\|^2}\Big)

    Args:
      barf, gamma: the averages of the loss and of :math:`\langle g, w \rangle`.
      lb: :math:`f_*`.
      iprod, square: :math:`\langle m, w \rangle` and the squared norm.
      rate, longest: :math:`\alpha`, and the upper bound of the step size.
      weight_decay, lower_bound: :math:`\lambda`, and the bound of :math:`f_*`.
      c1: what the averages have seen of their weights.
      adapt: whether to adapt :math:`f_*`.
    """
    shrink = 1 + rate * weight_decay
    if adapt:
        cap = shrink * (barf - gamma) + iprod
        lb = jnp.where(cap < shrink * c1 * lb, jnp.maximum(cap / (2 * c1 * shrink), lower_bound), lb)
    small = square <= float(jnp.finfo(float).eps)
    tau = jnp.maximum(shrink * (barf - c1 * lb - gamma) + iprod, 0) / jnp.where(small, 1, square)
    tau = jnp.minimum(longest, jnp.where(small, 0, tau))
    if adapt:
        lb = jnp.maximum((barf + iprod - gamma - 0.5 * tau * square) / c1, lower_bound)
    return {"tau": tau, "decay": rate * weight_decay / shrink, "lb": lb}


def _momo_kernel(g, param, exp_avg, *, b1, tau, decay, **_):
    exp_avg = b1 * exp_avg + (1 - b1) * g
    return -decay * param - tau * exp_avg, exp_avg


@comparable
def momo(
    learning_rate: ScalarOrSchedule = 1.0,
    beta: Scalar = 0.9,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Momentum with a step size from the loss (Schaipp et al. 2024, arXiv:2305.07583), see ``momo_step``.

    ``update`` takes the loss as ``value=``, which ``make_step`` gives.

    Args:
      learning_rate: the longest step size, a number >= 0 or a schedule.
      beta: decay rate of the averages, in [0, 1).
      lower_bound: lower bound of the loss.
      weight_decay: a number >= 0.
      adapt_lower_bound: estimate the bound, from ``lower_bound`` upwards.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation with ``MomoState(exp_avg, barf, gamma, lb, count)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: in ``update``, if there is no ``value``.

    >>> tx, w = momo(), jnp.ones(1)
    >>> tx.update(jnp.array([2.0]), tx.init(w), w, value=1.0)[0]
    Array([-0.5], dtype=float32)
    """
    check_hyperparams(
        learning_rate=learning_rate,
        beta=beta,
        lower_bound=lower_bound,
        weight_decay=weight_decay,
        schedules=("learning_rate",),
    )

    def per_step(count, *, barf, gamma, lb, updates, params, exp_avg, value=None, **hyperparams):
        real = barf.dtype
        rate, beta, bound, decay = (
            as_hyperparam(hyperparams[name], real) for name in ("learning_rate", "beta", "lower_bound", "weight_decay")
        )
        b1 = jnp.where(count == 1, 0, beta)
        barf = b1 * barf + (1 - b1) * given_value(value, "momo", real)
        gamma = b1 * gamma + (1 - b1) * total(lambda g, p: jnp.conj(g) * p, updates, params)
        square = total(lambda g, m: abs_sq(b1 * m + (1 - b1) * g), updates, exp_avg)
        iprod = total(lambda g, m, p: jnp.conj(b1 * m + (1 - b1) * g) * p, updates, exp_avg, params)
        step = momo_step(
            barf,
            gamma,
            lb,
            iprod,
            square,
            rate=rate,
            longest=rate,
            weight_decay=decay,
            lower_bound=bound,
            c1=1,
            adapt=adapt_lower_bound,
        )
        return {"barf": barf, "gamma": gamma, "b1": b1, **step}

    hyperparams = {"learning_rate": learning_rate, "beta": beta, "lower_bound": lower_bound}
    tx = from_kernel(
        _momo_kernel,
        MomoState,
        {"exp_avg": Slot()},
        {**hyperparams, "weight_decay": weight_decay},
        per_step,
        shared={"barf": number(0.0), "gamma": number(0.0), "lb": number(lower_bound)},
        needs_params="momo",
    )
    return assemble(tx, master_dtype=master_dtype)


def _momo_adam_kernel(g, param, exp_avg, exp_avg_sq, *, b1, b2, eps, c2, tau, decay, **_):
    exp_avg, exp_avg_sq = b1 * exp_avg + (1 - b1) * g, b2 * exp_avg_sq + (1 - b2) * abs_sq(g)
    direction = safe_divide(exp_avg, eps + safe_sqrt(exp_avg_sq / c2))
    return -decay * param - tau * direction, exp_avg, exp_avg_sq


@comparable
def momo_adam(
    learning_rate: ScalarOrSchedule = 1e-2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam with a step size from the loss (Schaipp et al. 2024, arXiv:2305.07583), see ``momo_step``.

    ``update`` takes the loss as ``value=``, which ``make_step`` gives.

    Args:
      learning_rate: the longest step size, a number >= 0 or a schedule.
      b1, b2, eps: see ``adam``.
      lower_bound, weight_decay, adapt_lower_bound: see ``momo``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation with ``MomoAdamState(exp_avg, exp_avg_sq, barf, gamma, lb, count)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: in ``update``, if there is no ``value``.

    >>> tx, w = momo_adam(1.0), jnp.ones(1)
    >>> tx.update(jnp.array([2.0]), tx.init(w), w, value=1.0)[0].round(4)
    Array([-0.5], dtype=float32)
    """
    decays = {"b1": b1, "b2": b2, "eps": eps}
    others = {"learning_rate": learning_rate, "lower_bound": lower_bound, "weight_decay": weight_decay}
    check_hyperparams(**decays, **others, schedules=("learning_rate",))

    def per_step(count, *, barf, gamma, lb, updates, params, exp_avg, exp_avg_sq, value=None, **hyperparams):
        real = barf.dtype
        rate, bound, decay, b1, b2, eps = (
            as_hyperparam(hyperparams[name], real)
            for name in ("learning_rate", "lower_bound", "weight_decay", "b1", "b2", "eps")
        )
        c1, c2 = (bias_correction(one, count).astype(real) for one in (b1, b2))

        def product(g, m, v):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * abs_sq(g)
            return abs_sq(m) * safe_divide(1, eps + safe_sqrt(v / c2))

        barf = b1 * barf + (1 - b1) * given_value(value, "momo_adam", real)
        gamma = b1 * gamma + (1 - b1) * total(lambda g, p: jnp.conj(g) * p, updates, params)
        square = total(product, updates, exp_avg, exp_avg_sq)
        iprod = total(lambda g, m, p: jnp.conj(b1 * m + (1 - b1) * g) * p, updates, exp_avg, params)
        step = momo_step(
            barf,
            gamma,
            lb,
            iprod,
            square,
            rate=rate,
            longest=rate / c1,
            weight_decay=decay,
            lower_bound=bound,
            c1=c1,
            adapt=adapt_lower_bound,
        )
        return {"barf": barf, "gamma": gamma, "c2": c2, **step}

    tx = from_kernel(
        _momo_adam_kernel,
        MomoAdamState,
        {"exp_avg": Slot(), "exp_avg_sq": Slot(real=True)},
        {**decays, **others},
        per_step,
        shared={"barf": number(0.0), "gamma": number(0.0), "lb": number(lower_bound)},
        needs_params="momo_adam",
    )
    return assemble(tx, master_dtype=master_dtype)


__all__ = ["given_value", "momo", "momo_adam", "momo_step", "polyak_sgd", "scale_by_polyak"]
