"""Optimistic methods, for games: the last gradient predicts the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_nonnegative
from nnlearn.settings import comparable
from nnlearn.transforms.adam import scale_by_adam
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, PyTree, Scalar, ScalarOrSchedule


class ScaleByOptimisticGradientState(NamedTuple):
    """Whether no gradient was seen, and the last one; optax's state of this name is not public."""

    is_initial_step: jax.Array
    previous_gradient: PyTree


def optimistic_kernel(g, previous, *, alpha, beta, is_first, **_):
    r"""One optimistic step (Mokhtari, Ozdaglar & Pattathil 2019, arXiv:1901.08511, eq. 10).

    .. math:: u_t = (\alpha + \beta) g_t - \beta g_{t-1}

    with :math:`g_0 = g_1`. Returns ``(u, g)``.
    """
    return (alpha + beta) * g - beta * jnp.where(is_first, g, previous), g


@comparable
def scale_by_optimistic_gradient(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> GradientTransformationExtraArgs:
    """The optimistic direction, see ``optimistic_kernel``; arguments as in ``optimistic_gradient_descent``.

    Returns:
      A transformation with ``ScaleByOptimisticGradientState(is_initial_step, previous_gradient)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_optimistic_gradient()
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([3.0]), state)[0]
    Array([5.], dtype=float32)
    """
    check_nonnegative("alpha", alpha)
    check_nonnegative("beta", beta)
    return from_kernel(
        optimistic_kernel,
        ScaleByOptimisticGradientState,
        {"previous_gradient": Slot()},
        {"alpha": alpha, "beta": beta},
        lambda count, *, is_initial_step, **_: {"is_first": is_initial_step, "is_initial_step": False},
        shared={"is_initial_step": True},
    )


@comparable
def optimistic_gradient_descent(
    learning_rate: ScalarOrSchedule,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Optimistic gradient descent (Mokhtari, Ozdaglar & Pattathil 2019, arXiv:1901.08511), see ``optimistic_kernel``.

    Args:
      learning_rate: a number >= 0 or a schedule.
      alpha: weight of the gradient, >= 0.
      beta: weight of its change, >= 0.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = optimistic_gradient_descent(0.1)
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([3.0]), state)[0]
    Array([-0.5], dtype=float32)
    """
    return assemble(
        scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(learning_rate), master_dtype=master_dtype
    )


@comparable
def optimistic_adam_v2(
    learning_rate: ScalarOrSchedule,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    nesterov: bool = True,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Optimistic Adam (Daskalakis et al. 2018, arXiv:1711.00141): ``optimistic_kernel`` on Adam's direction.

    Args:
      learning_rate: a number >= 0 or a schedule.
      alpha: weight of Adam's direction, >= 0.
      beta: weight of its change, >= 0.
      b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype: see ``adam``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = optimistic_adam_v2(0.1, nesterov=False)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype),
        scale_by_optimistic_gradient(alpha, beta),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["optimistic_adam_v2", "optimistic_gradient_descent", "optimistic_kernel", "scale_by_optimistic_gradient"]
