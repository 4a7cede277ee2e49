"""APOLLO: the step sizes of AdamW, learned from a random projection of the gradient."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_nonnegative, check_number
from nnlearn.optimizers.muon import matrix_rules, with_adamw
from nnlearn.settings import comparable
from nnlearn.transforms.adam import adam_corrections
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, as_hyperparam, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule

Shape = tuple[int, ...]


class ScaleByApolloState(NamedTuple):
    """Adam's moments of projected gradients, and the norm of the last update of each matrix."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree
    norm: PyTree


def _projected(shape: Shape, rank: int) -> Shape:
    """The shape of a matrix, or of a stack of matrices, whose shorter side is projected."""
    if len(shape) not in (2, 3):
        raise ValueError(f"APOLLO needs matrices or stacks of them, got a leaf of shape {shape}: leave it to Adam")
    *stack, rows, columns = shape
    rank = min(rank, rows, columns)
    return (*stack, rank, columns) if rows <= columns else (*stack, rows, rank)


def apollo_kernel(g, mu, nu, norm, *, b1, b2, eps, scale, growth, draw, c1, c2, rank, per_channel=True, **_):
    r"""One step of APOLLO on a matrix (Zhu et al. 2024, arXiv:2412.05270, algorithm 1).

    .. math::
        R_t = P_k^\top g_t, \quad \tilde R_t = \operatorname{Adam}(R_t), \quad
        s_j = \frac{\|\tilde R_{t, :j}\|}{\|R_{t, :j}\|}, \quad \tilde u_{:j} = a s_j g_{t, :j}, \quad
        u_t = \min\left(1, \gamma \frac{\|u_{t-1}\|}{\|\tilde u\|}\right) \tilde u

    :math:`P_k` has independent normal numbers of variance :math:`1/r`, new ones at every :math:`T`-th step, which the
    step alone decides, so that they are not stored. The shorter side is projected, and each index of the longer one
    has a scale; without ``per_channel`` the matrix has one. The first step has no limit.

    Returns:
      ``(u, m, v, norm)``.
    """
    if not g.size:
        return g, mu, nu, norm
    if g.ndim == 3:  # a stack of matrices
        numbers = {"b1": b1, "b2": b2, "eps": eps, "scale": scale, "growth": growth, "draw": draw, "c1": c1, "c2": c2}
        one = functools.partial(apollo_kernel, **numbers, rank=rank, per_channel=per_channel)
        return jax.vmap(one)(g, mu, nu, norm)
    wide = g.shape[0] <= g.shape[1]
    axis, rank = (0 if wide else 1), min(mu.shape[0 if wide else 1], rank)
    key = jax.random.fold_in(jax.random.key(0), draw.astype(jnp.uint32))
    projector = jax.random.normal(key, (min(g.shape), rank), jnp.float32).astype(g.dtype) / math.sqrt(max(rank, 1))
    low = projector.T @ g if wide else g @ projector
    mu, nu = moving_average(b1, low, mu), moving_average(b2, abs_sq(low), nu)
    adam = safe_divide(mu / c1, safe_sqrt(nu / c2) + eps)
    axes = (axis,) if per_channel else None
    update = scale * g * safe_divide(array_norm(adam, axes), array_norm(low, axes))
    size = array_norm(update)
    limit = jnp.where((norm > 0) & (size > growth * norm), safe_divide(growth * norm, size), 1)
    return limit * update, mu, nu, limit * size


@comparable
def scale_by_apollo(
    rank: int = 256,
    update_proj_gap: Scalar = 200,
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    growth: Scalar = 1.01,
    *,
    per_channel: bool = True,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """APOLLO's direction, see ``apollo_kernel``; arguments as in ``apollo``. All leaves must have two or three axes.

    Returns:
      A transformation with ``ScaleByApolloState(count, mu, nu, norm)``.

    Raises:
      TypeError: if ``rank`` is not an int.
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_apollo(rank=1), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> state = tx.init(g)
    >>> state.mu.shape, jnp.linalg.matrix_rank(tx.update(g, state)[0])
    ((1, 2), Array(2, dtype=int32))
    """
    rank = check_count("rank", rank)
    check_hyperparams(b1=b1, b2=b2, eps=eps)
    check_nonnegative("scale", scale)
    check_number("update_proj_gap", update_proj_gap, low=1)
    check_nonnegative("growth", growth)

    def per_step(count, *, update_proj_gap, **numbers):
        real = jnp.result_type(float)
        draw = (count - 1).astype(real) // as_hyperparam(update_proj_gap, real)
        return adam_corrections(count, **numbers) | {"draw": draw}

    low = functools.partial(_projected, rank=rank)
    return from_kernel(
        functools.partial(apollo_kernel, rank=rank, per_channel=per_channel),
        ScaleByApolloState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype), shape=low),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True, shape=low),
            "norm": Slot(real=True, shape=lambda shape: shape[:-2]),
        },
        {"b1": b1, "b2": b2, "eps": eps, "scale": scale, "growth": growth, "update_proj_gap": update_proj_gap},
        per_step,
        whole_leaf=True,
        stack_equal=True,
    )


@comparable
def apollo(
    learning_rate: ScalarOrSchedule,
    rank: int = 256,
    update_proj_gap: Scalar = 200,
    scale: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    growth: Scalar = 1.01,
    *,
    per_channel: bool = True,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""APOLLO, AdamW's step sizes from a random projection of low rank (Zhu et al. 2024, arXiv:2412.05270).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``apollo_kernel`` for the leaves of two and three axes that ``matrix_rules`` finds to be
    matrices; the rest is AdamW's. APOLLO-Mini is ``apollo(..., rank=1, scale=128**0.5, per_channel=False)``.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      rank: largest rank of the projection, a Python int >= 1.
      update_proj_gap: :math:`T`, steps from one projection to the next, >= 1.
      scale: :math:`a`, factor of the updates of matrices, >= 0.
      b1, b2: decay rates of the moments, in [0, 1).
      eps: added to the divisor, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      growth: :math:`\gamma`, by what factor the norm of an update may grow in one step, >= 0.
      per_channel: a scale for each index of the longer side, or one for each matrix.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      TypeError: if ``rank`` is not an int.
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = apollo(0.1, rank=2), {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    >>> updates, _ = tx.update({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, tx.init(w), w)
    >>> updates["b"].round(3)
    Array([-0.1, -0.1, -0.1], dtype=float32)
    """

    def rules(params):
        found = matrix_rules(params)
        return jax.tree.map(lambda leaf, dims: dims if jnp.ndim(leaf) < 4 else None, params, found)

    direction = scale_by_apollo(
        rank, update_proj_gap, scale, b1, b2, eps, growth, per_channel=per_channel, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )
    return with_adamw(
        [direction],
        rules,
        learning_rate,
        eps,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=None,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        master_dtype=master_dtype,
    )


__all__ = ["apollo", "apollo_kernel", "scale_by_apollo"]
