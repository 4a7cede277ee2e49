"""Dion: orthogonal updates of low rank, by one step of power iteration with error feedback."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_number
from nnlearn.linalg import one_by_one
from nnlearn.optimizers.muon import matrix_rules, with_adamw
from nnlearn.settings import comparable
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precondition import transpose
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import array_norm
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule


class ScaleByDionState(NamedTuple):
    """The momentum, and for each matrix the right factor (outputs, rank) of its last update."""

    mu: PyTree
    basis: PyTree


def _rank(shape: tuple[int, ...], fraction: float) -> int:
    return max(1, math.ceil(fraction * min(shape[-2:])))


_basis = one_by_one(lambda x: jnp.linalg.qr(x)[0])


@jax.custom_jvp
def _columns(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of a matrix. Its derivative is taken to be zero."""
    return _basis(x)


_columns.defjvp(lambda primals, _: (_columns(*primals), jnp.zeros_like(_columns(*primals))))


def dion_kernel(g, mu, basis, *, beta, eps):
    r"""One step of Dion on a matrix of inputs by outputs (Ahn et al. 2025, arXiv:2504.05295, algorithm 1).

    .. math::
        B = m_{t-1} + g_t, \quad P = \operatorname{QR}(B Q_{t-1}), \quad R = B^\top P, \quad
        m_t = B - (1-\beta) P R^\top, \quad Q_t = R / \|R\|_{columns}, \quad u_t = \sqrt{outputs / inputs} \, P Q_t^\top

    What the low rank leaves out stays in the momentum. Derivatives treat :math:`P` as a constant.

    Returns:
      ``(u, m, Q)``.
    """
    if not g.size:
        return g, mu, basis
    if g.ndim == 3:  # a stack of matrices
        return jax.vmap(functools.partial(dion_kernel, beta=beta, eps=eps))(g, mu, basis)
    total = mu + g
    left = _columns(total @ basis)
    right = transpose(total) @ left
    basis = right / (array_norm(right, (0,)) + eps)
    return (
        math.sqrt(g.shape[1] / g.shape[0]) * left @ transpose(basis),
        total - (1 - beta) * left @ transpose(right),
        basis,
    )


@comparable
def scale_by_dion(
    rank_fraction: float = 0.25, beta: Scalar = 0.95, eps: Scalar = 1e-8, *, mu_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    """Dion's direction, see ``dion_kernel``; arguments as in ``dion``. All leaves must have two or three axes.

    Returns:
      A transformation with ``ScaleByDionState(mu, basis)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_dion(0.5), jnp.array([[4.0, 0.0], [0.0, 0.0]])
    >>> jnp.abs(tx.update(g, tx.init(g))[0]).round(4)  # a singular vector on each side
    Array([[1., 0.],
           [0., 0.]], dtype=float32)
    """
    check_hyperparams(beta=beta, eps=eps)
    check_number("rank_fraction", rank_fraction, low=0.0, high=1.0, low_open=True)

    def first(param):  # directions at random, the same for all leaves of one shape
        *stack, _, outputs = param.shape
        drawn = jax.random.normal(jax.random.key(0), (outputs, _rank(param.shape, rank_fraction)), jnp.float32)
        return jnp.broadcast_to(drawn.astype(param.dtype), (*stack, *drawn.shape))

    def shape(leaf):
        return (*leaf[:-2], leaf[-1], _rank(leaf, rank_fraction))

    return from_kernel(
        dion_kernel,
        ScaleByDionState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "basis": Slot(shape=shape, initial=first)},
        {"beta": beta, "eps": eps},
        whole_leaf=True,
        stack_equal=True,
    )


@comparable
def dion(
    learning_rate: ScalarOrSchedule,
    rank_fraction: float = 0.25,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    *,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Dion, orthogonal updates of low rank, and AdamW for the rest (Ahn et al. 2025, arXiv:2504.05295).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``dion_kernel`` for the leaves of two and three axes that ``matrix_rules`` finds to be
    matrices. A step takes two thin products and one thin QR in place of Newton-Schulz.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      rank_fraction: the rank over the shorter side, in (0, 1], a Python number.
      beta: share of the momentum that stays in the directions of the update, in [0, 1).
      eps: added to the norms of columns, >= 0, and Adam's eps.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      weight_decay_mask: True where matrices decay, see ``adamw``.
      adam_b1, adam_b2, adam_weight_decay, adam_learning_rate: see ``muon``.
      mu_dtype, nu_dtype, master_dtype: see ``muon``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = dion(0.1, 1.0), {"w": jnp.zeros((2, 2))}
    >>> updates, _ = tx.update({"w": jnp.diag(jnp.array([4.0, -1.0]))}, tx.init(w), w)
    >>> jnp.linalg.svdvals(updates["w"]).round(1)
    Array([0.1, 0.1], dtype=float32)
    """

    def rules(params):
        found = matrix_rules(params)
        return jax.tree.map(lambda leaf, dims: dims if jnp.ndim(leaf) < 4 else None, params, found)

    return with_adamw(
        [scale_by_dion(rank_fraction, beta, eps, mu_dtype=mu_dtype)],
        rules,
        learning_rate,
        eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        master_dtype=master_dtype,
    )


__all__ = ["dion", "dion_kernel", "scale_by_dion"]
