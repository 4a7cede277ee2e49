"""Matrix methods with Kronecker factors: SOAP and KL-SOAP, Adam in Shampoo's eigenbasis, and Shampoo itself."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_number
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.precondition import (
    apply_sides,
    gram,
    inverse_root,
    is_due,
    next_basis,
    side_slot,
    sides_of,
    spread_phases,
    transpose,
    where_due,
)
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, as_hyperparam, rarely, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule


class ScaleBySoapState(NamedTuple):
    """Adam's moments, and for each side of each matrix the average of its products and the basis."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree
    left: PyTree
    right: PyTree
    basis_left: PyTree
    basis_right: PyTree


class ScaleByShampooState(NamedTuple):
    """The momentum, the second moment that sets the size of steps, and for each side its matrix and its root."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree
    left: PyTree
    right: PyTree
    root_left: PyTree
    root_right: PyTree


def _corrections(count, *, b1, b2, shampoo_beta, precondition_every, **_):
    real = jnp.result_type(float)
    every, step = as_hyperparam(precondition_every, real), (count - 1).astype(real)
    decays = {"c1": b1, "c2": b2, "c3": shampoo_beta}
    found = {name: bias_correction(decay, count) for name, decay in decays.items()}
    return found | {"refresh": step % every < 1, "step": step}


def _staggered(kernel):
    """A kernel that also takes the phase of its leaf, which sets the steps at which it refreshes."""

    def run(g, phase, *arrays, step, precondition_every, **numbers):
        numbers["refresh"] = is_due(jnp.asarray(step, phase.dtype), precondition_every, phase)
        return kernel(g, *arrays, **numbers, choose=where_due)

    return run


def _as_matrix(shape: tuple[int, ...], sides: tuple[int, int], *arrays: jax.Array) -> list[jax.Array]:
    return [array.reshape(-1, shape[-1]) if any(sides) else array for array in arrays]


def _whitened(g, basis, matrix, eps, side):
    r"""``g``, of which the other side is multiplied by the inverse root of its matrix, over the root of its size."""
    values = jnp.real(jnp.sum(jnp.conj(basis) * (matrix @ basis), axis=0))
    inverse = jax.lax.rsqrt((values + eps) * basis.shape[0])
    return (g @ basis) * inverse[None, :] if side == 0 else inverse[:, None] * (transpose(basis) @ g)


def soap_kernel(
    g,
    mu,
    nu,
    left,
    right,
    basis_left,
    basis_right,
    *,
    b1,
    b2,
    shampoo_beta,
    eps,
    c1,
    c2,
    refresh,
    largest,
    kl,
    choose=rarely,
    **_,
):
    r"""One step of SOAP on a whole leaf (Vyas et al. 2024, arXiv:2409.11321, algorithm 3).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) |Q_L^\top g_t Q_R|^2, \quad
        u_t = Q_L \frac{Q_L^\top \hat m_t Q_R}{\sqrt{\hat v_t} + \epsilon} Q_R^\top

    Then :math:`L_t = \beta_s L_{t-1} + (1-\beta_s) g_t g_t^\top` and :math:`Q_L = \operatorname{QR}(L_t Q_L)`, and
    the same on the right. With ``kl`` the product is :math:`g_t R_{t-1}^{-1} g_t^\top / n`, and on the right
    :math:`g_t^\top L_{t-1}^{-1} g_t / m`, as in KL-SOAP (Lin et al. 2025, arXiv:2509.03378, eq. 7): the two are then
    the Kronecker factors nearest to the gradient's covariance in the Kullback-Leibler divergence. Inverses come from
    the bases, with ``eps`` added to the eigenvalues. Derivatives treat the bases as constants.

    Returns:
      ``(u, m, v, L, R, Q_L, Q_R)``.
    """
    shape, sides = g.shape, sides_of(g.shape, largest)
    g, mu, nu = _as_matrix(shape, sides, g, mu, nu)
    matrices, bases = [left, right], [basis_left, basis_right]
    to_left = transpose(basis_left) if sides[0] else None
    to_right = basis_right if sides[1] else None
    mu, nu = moving_average(b1, g, mu), moving_average(b2, abs_sq(apply_sides(g, to_left, to_right)), nu)
    direction = safe_divide(apply_sides(mu, to_left, to_right) / c1, safe_sqrt(nu / c2) + eps)
    update = apply_sides(direction, *(None if turn is None else transpose(turn) for turn in (to_left, to_right)))
    seen = [g, g]
    if kl and all(sides):
        seen = [_whitened(g, bases[1 - side], matrices[1 - side], eps, side) for side in (0, 1)]
    for side, size in enumerate(sides):
        if size:
            matrices[side] = moving_average(shampoo_beta, gram(seen[side], side), matrices[side])
            bases[side] = next_basis(refresh != 0, matrices[side], bases[side], choose)
    return *(array.reshape(shape) for array in (update, mu, nu)), *matrices, *bases


@comparable
def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    shampoo_beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    precondition_every: Scalar = 1,
    max_precondition_size: int = 4096,
    kl: bool = False,
    *,
    stagger: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """SOAP's direction, see ``soap_kernel``; arguments as in ``soap``.

    Returns:
      A transformation with ``ScaleBySoapState(count, mu, nu, left, right, basis_left, basis_right)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_soap(), jnp.diag(jnp.array([3.0, -4.0]))
    >>> tx.update(g, tx.init(g))[0].round(4)  # Adam, as the first basis is the identity
    Array([[ 1.,  0.],
           [ 0., -1.]], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, shampoo_beta=shampoo_beta, eps=eps)
    check_number("precondition_every", precondition_every, low=1)
    largest = check_count("max_precondition_size", max_precondition_size)
    kernel = functools.partial(soap_kernel, largest=largest, kl=kl)
    return from_kernel(
        _staggered(kernel) if stagger else kernel,
        ScaleBySoapState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True),
            "left": side_slot(0, largest, identity=kl),
            "right": side_slot(1, largest, identity=kl),
            "basis_left": side_slot(0, largest, identity=True),
            "basis_right": side_slot(1, largest, identity=True),
        },
        {"b1": b1, "b2": b2, "shampoo_beta": shampoo_beta, "eps": eps, "precondition_every": precondition_every},
        _corrections,
        whole_leaf=True,
        stack_equal=True,
        leaf_numbers=spread_phases if stagger else None,
    )


@comparable
def soap(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    shampoo_beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    precondition_every: Scalar = 1,
    max_precondition_size: int = 4096,
    kl: bool = False,
    *,
    stagger: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""SOAP, Adam in the eigenbasis of Shampoo (Vyas et al. 2024, arXiv:2409.11321), or KL-SOAP (arXiv:2509.03378).

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``soap_kernel``. All equal leaves run as one batch. The first step is Adam's.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1, b2: decay rates of the moments, in [0, 1).
      shampoo_beta: decay rate of the matrices, in [0, 1).
      eps: added to the divisor, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      precondition_every: steps from one QR step of the bases to the next, >= 1. With 1 there are no loss spikes from
        stale bases (arXiv:2607.20548).
      max_precondition_size: longest side that has a matrix; longer ones, and vectors, have none, as in Adam.
      kl: KL-SOAP.
      stagger: after the first step, spread the refreshes of the leaves over ``precondition_every`` steps, so that no
        step is much longer than others.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx, w = soap(0.1), jnp.zeros((2, 2))
    >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, -4.0])), tx.init(w), w)
    >>> [round(float(each), 4) for each in jnp.diag(updates)]
    [-0.1, 0.1]
    """
    return assemble(
        scale_by_soap(
            b1,
            b2,
            shampoo_beta,
            eps,
            precondition_every,
            max_precondition_size,
            kl,
            stagger=stagger,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


def shampoo_kernel(
    g,
    mu,
    nu,
    left,
    right,
    root_left,
    root_right,
    *,
    b1,
    b2,
    shampoo_beta,
    eps,
    ridge,
    refresh,
    largest,
    choose=rarely,
    **seen,
):
    r"""One step of Shampoo on a whole leaf (Gupta, Koren & Singer 2018, arXiv:1802.09568), with averages.

    .. math::
        L_t = \beta_s L_{t-1} + (1-\beta_s) g_t g_t^\top, \quad R_t = \beta_s R_{t-1} + (1-\beta_s) g_t^\top g_t, \quad
        s_t = \hat L_t^{-1/4} \hat m_t \hat R_t^{-1/4}, \quad u_t = \frac{\|a_t\|}{\|s_t\|} s_t

    with Adam's direction :math:`a_t`, whose norm the step takes (grafting, Anil et al. 2020, arXiv:2002.09018). A leaf
    with one matrix has the exponent 1/2, one without any is Adam's. Derivatives treat the roots as constants.

    Returns:
      ``(u, m, v, L, R, roots)``.
    """
    shape, sides = g.shape, sides_of(g.shape, largest)
    g, mu, nu = _as_matrix(shape, sides, g, mu, nu)
    matrices, roots = [left, right], [root_left, root_right]
    c1, c2, c3 = seen["c1"], seen["c2"], seen["c3"]
    mu, nu = moving_average(b1, g, mu), moving_average(b2, abs_sq(g), nu)
    exponent = 0.25 if all(sides) else 0.5
    for side, size in enumerate(sides):
        if size:
            matrices[side] = moving_average(shampoo_beta, gram(g, side), matrices[side])
            smallest = jnp.asarray(ridge, nu.dtype)
            roots[side] = inverse_root(refresh != 0, matrices[side] / c3, roots[side], exponent, smallest, choose)
    update = safe_divide(mu / c1, safe_sqrt(nu / c2) + eps)
    if any(sides):
        turned = apply_sides(mu, *(root if size else None for root, size in zip(roots, sides, strict=True)))
        update = turned * safe_divide(array_norm(update), array_norm(turned))
    return *(array.reshape(shape) for array in (update, mu, nu)), *matrices, *roots


@comparable
def scale_by_shampoo(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    shampoo_beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    ridge: Scalar = 1e-6,
    precondition_every: Scalar = 1,
    max_precondition_size: int = 4096,
    *,
    stagger: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Shampoo's direction, see ``shampoo_kernel``; arguments as in ``shampoo``.

    Returns:
      A transformation with ``ScaleByShampooState(count, mu, nu, left, right, root_left, root_right)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_shampoo(), jnp.diag(jnp.array([3.0, -4.0]))
    >>> tx.update(g, tx.init(g))[0].round(4)
    Array([[ 1.,  0.],
           [ 0., -1.]], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, shampoo_beta=shampoo_beta, eps=eps, ridge=ridge)
    check_number("precondition_every", precondition_every, low=1)
    largest = check_count("max_precondition_size", max_precondition_size)
    hyperparams = {"b1": b1, "b2": b2, "shampoo_beta": shampoo_beta, "eps": eps, "ridge": ridge}
    kernel = functools.partial(shampoo_kernel, largest=largest)
    return from_kernel(
        _staggered(kernel) if stagger else kernel,
        ScaleByShampooState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True),
            "left": side_slot(0, largest),
            "right": side_slot(1, largest),
            "root_left": side_slot(0, largest, identity=True),
            "root_right": side_slot(1, largest, identity=True),
        },
        {**hyperparams, "precondition_every": precondition_every},
        _corrections,
        whole_leaf=True,
        stack_equal=True,
        leaf_numbers=spread_phases if stagger else None,
    )


@comparable
def shampoo(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    shampoo_beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    ridge: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    precondition_every: Scalar = 1,
    max_precondition_size: int = 4096,
    *,
    stagger: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Shampoo with Adam's step sizes (Gupta, Koren & Singer 2018, arXiv:1802.09568; Anil et al. 2020).

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``shampoo_kernel``. All equal leaves run as one batch.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1, b2: decay rates of the moments, in [0, 1).
      shampoo_beta: decay rate of the matrices, in [0, 1).
      eps: added to the divisor of Adam's direction, >= 0.
      ridge: smallest eigenvalue relative to the largest, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      precondition_every: steps from one computation of the roots to the next, >= 1.
      max_precondition_size: longest side that has a matrix.
      stagger: after the first step, spread the refreshes of the leaves over ``precondition_every`` steps, so that no
        step is much longer than others.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx, w = shampoo(0.1), jnp.zeros((2, 2))
    >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, -4.0])), tx.init(w), w)
    >>> [round(float(each), 4) for each in jnp.diag(updates)]
    [-0.1, 0.1]
    """
    return assemble(
        scale_by_shampoo(
            b1,
            b2,
            shampoo_beta,
            eps,
            ridge,
            precondition_every,
            max_precondition_size,
            stagger=stagger,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["scale_by_shampoo", "scale_by_soap", "shampoo", "shampoo_kernel", "soap", "soap_kernel"]
