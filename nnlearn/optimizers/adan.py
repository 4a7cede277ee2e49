"""Adan: Adam with a moment of the gradient's change, which is Nesterov's look-ahead."""

from typing import Any

import jax.numpy as jnp
from optax import ScaleByAdanState

from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def adan_kernel(gradient, m, v, n, g, *, b1, b2, b3, eps, eps_root, c1, c2, c3, is_first):
    r"""One step of Adan (Xie et al. 2022, arXiv:2208.06677, algorithm 1), with optax's decay rates :math:`1 - \beta`.

    .. math::
        d_t = g_t - g_{t-1}, \quad m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) d_t, \quad
        n_t = \beta_3 n_{t-1} + (1-\beta_3) |g_t + (1-\beta_2) d_t|^2, \quad
        u_t = \frac{\hat m_t + (1-\beta_2) \hat v_t}{\sqrt{\hat n_t + \bar\epsilon} + \epsilon}

    with :math:`d_1 = 0` and debiased moments. Returns ``(u, m, v, n, g)``.
    """
    change = jnp.where(is_first, 0, gradient - g)
    m, v = moving_average(b1, gradient, m), moving_average(b2, change, v)
    n = moving_average(b3, abs_sq(gradient + (1 - b2) * change), n)
    direction = m / c1 + (1 - b2) * (v / c2)
    return safe_divide(direction, safe_sqrt(n / c3 + eps_root) + eps), m, v, n, gradient


def _corrections(count, *, b1, b2, b3, **_):
    c1, c2, c3 = (bias_correction(decay, count) for decay in (b1, b2, b3))
    return {"c1": c1, "c2": c2, "c3": c3, "is_first": count == 1}


@comparable
def scale_by_adan(
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> GradientTransformationExtraArgs:
    """Adan's direction, see ``adan_kernel``; arguments as in ``adan``.

    Returns:
      A transformation with ``ScaleByAdanState(m, v, n, g, t)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_adan()
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0].round(5)
    Array([1.], dtype=float32)
    """
    hyperparams: dict[str, Any] = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "eps_root": eps_root}
    check_hyperparams(**hyperparams)
    slots = {"m": Slot(), "v": Slot(), "n": Slot(real=True), "g": Slot()}
    return from_kernel(adan_kernel, ScaleByAdanState, slots, hyperparams, _corrections, counters=("t",))


@comparable
def adan(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adan, adaptive Nesterov momentum (Xie et al. 2022, arXiv:2208.06677).

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``adan_kernel``.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1: decay rate of the gradient's moment, in [0, 1).
      b2: decay rate of the moment of the gradient's change, in [0, 1).
      b3: decay rate of the second moment, in [0, 1).
      eps, eps_root: added outside and inside of the square root, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = adan(0.1)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))[0].round(5)
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["adan", "adan_kernel", "scale_by_adan"]
