"""AdaMuon: Muon with a second moment for each number."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp

from nnlearn.optimizers.muon import (
    Coefficients,
    DimensionNumbers,
    axes_of,
    coefficients_of,
    on_matrices,
    spread_over,
    with_adamw,
)
from nnlearn.settings import comparable
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.orthogonal import JORDAN, newton_schulz
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule


class ScaleByAdamuonState(NamedTuple):
    """The momentum, and the second moment of the orthogonal update."""

    mu: PyTree
    nu: PyTree


def adamuon_kernel(dims, g, mu, nu, *, beta, b2, eps, ns_coeffs, ns_steps, nesterov=True):
    r"""One step of AdaMuon on a whole leaf (Si, Zhang & Shen 2025, arXiv:2507.11005, algorithm 1).

    .. math::
        m_t = \beta m_{t-1} + (1-\beta) g_t, \quad o_t = \operatorname{NewtonSchulz}(\operatorname{sign}(m_t)), \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) o_t^2, \quad
        \tilde u = \frac{o_t}{\sqrt{v_t} + \epsilon}, \quad u_t = 0.2 \sqrt{n} \frac{\tilde u}{\|\tilde u\|}

    for a matrix of :math:`n` numbers; with Nesterov the sign is of :math:`\beta m_t + (1-\beta) g_t`.

    Returns:
      ``(u, m, v)``.
    """
    mu = moving_average(beta, g, mu)
    direction = moving_average(beta, g, mu) if nesterov else mu
    update = on_matrices(lambda x: newton_schulz(x, ns_coeffs, ns_steps, eps, "frobenius"), jnp.sign(direction), dims)
    nu = moving_average(b2, abs_sq(update), nu)
    update = safe_divide(update, safe_sqrt(nu) + eps)
    batch, *_ = axes_of(dims, update.ndim)
    axes = tuple(axis for axis in range(update.ndim) if axis not in batch)
    size = math.prod(update.shape[axis] for axis in axes)
    return 0.2 * math.sqrt(size) * safe_divide(update, array_norm(update, axes)), mu, nu


@comparable
def scale_by_adamuon(
    ns_coeffs: Coefficients | str = JORDAN,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    *,
    nesterov: bool = True,
    weight_dimension_numbers: DimensionNumbers | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdaMuon's direction, see ``adamuon_kernel``; arguments as in ``adamuon``.

    Returns:
      A transformation with ``ScaleByAdamuonState(mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range; in ``update``, if a leaf is not a matrix.

    >>> tx, g = scale_by_adamuon(), jnp.array([[3.0, 0.1], [-0.1, 4.0]])
    >>> jnp.abs(tx.update(g, tx.init(g))[0]).round(2)
    Array([[0.2, 0.2],
           [0.2, 0.2]], dtype=float32)
    """
    check_hyperparams(beta=beta, b2=b2, eps=eps, ns_steps=ns_steps)
    coefficients = jnp.asarray(coefficients_of(ns_coeffs), float)
    if coefficients.ndim == 2:
        coefficients = coefficients[max(len(coefficients) - int(ns_steps), 0) :]

    def kernel(dims, g, mu, nu, **numbers):
        rows = coefficients.astype(jnp.finfo(g.dtype).dtype)
        return adamuon_kernel(dims, g, mu, nu, ns_coeffs=rows, ns_steps=int(ns_steps), nesterov=nesterov, **numbers)

    return from_kernel(
        kernel,
        ScaleByAdamuonState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True),
        },
        {"beta": beta, "b2": b2, "eps": eps},
        whole_leaf=True,
        stack_equal=True,
        settings=functools.partial(spread_over, weight_dimension_numbers),
    )


@comparable
def adamuon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients | str = JORDAN,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    *,
    nesterov: bool = True,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""AdaMuon, Muon with a second moment for each number (Si, Zhang & Shen 2025, arXiv:2507.11005).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``adamuon_kernel``; the step has the size of AdamW's, which takes all leaves but matrices.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      ns_coeffs: see ``muon``.
      ns_steps: steps of Newton-Schulz, a Python number.
      beta: decay rate of the momentum, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the divisors, >= 0.
      weight_decay, weight_decay_mask, nesterov: see ``muon``.
      adam_b1, adam_b2, adam_weight_decay, adam_learning_rate: see ``muon``.
      muon_weight_dimension_numbers: see ``muon``; ``matrix_rules`` chooses by names and shapes.
      mu_dtype, nu_dtype, master_dtype: see ``muon``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or a leaf that Muon takes is no matrix.

    >>> tx, w = adamuon(0.1), {"w": jnp.eye(2), "b": jnp.zeros(1)}
    >>> updates, _ = tx.update({"w": jnp.eye(2) - 0.5, "b": jnp.ones(1)}, tx.init(w), w)
    >>> updates["w"].round(3)
    Array([[-0.02,  0.02],
           [ 0.02, -0.02]], dtype=float32)
    """
    spec = muon_weight_dimension_numbers
    direction = scale_by_adamuon(
        ns_coeffs,
        ns_steps,
        beta,
        b2,
        eps,
        nesterov=nesterov,
        weight_dimension_numbers=spec,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return with_adamw(
        [direction],
        spec,
        learning_rate,
        eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        master_dtype=master_dtype,
    )


__all__ = ["adamuon", "adamuon_kernel", "scale_by_adamuon"]
