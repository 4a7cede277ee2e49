"""QHAdam: Adam whose numerator and denominator mix each moment with the latest gradient."""

from typing import Any

from optax import ScaleByAdamState

from nnlearn.settings import comparable
from nnlearn.transforms import Slot, add_decayed_weights, assemble, from_kernel, scale_by_learning_rate
from nnlearn.transforms.averages import bias_correction, moving_average
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def qhadam_kernel(g, mu, nu, *, b1, b2, nu1, nu2, eps, c1, c2):
    r"""One step of QHAdam (Ma & Yarats 2019, arXiv:1810.06801).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) |g_t|^2, \quad
        u_t = \frac{(1-\nu_1) g_t + \nu_1 m_t / (1-\beta_1^t)}
        {\sqrt{(1-\nu_2) |g_t|^2 + \nu_2 v_t / (1-\beta_2^t)} + \epsilon}

    Returns:
      ``(u, m, v)``.
    """
    square = abs_sq(g)
    mu, nu = moving_average(b1, g, mu), moving_average(b2, square, nu)
    mean, mean_square = moving_average(nu1, g, mu / c1), moving_average(nu2, square, nu / c2)
    return safe_divide(mean, safe_sqrt(mean_square) + eps), mu, nu


@comparable
def scale_by_qhadam(
    b1: Scalar = 0.995,
    b2: Scalar = 0.999,
    nu1: Scalar = 0.7,
    nu2: Scalar = 1.0,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """QHAdam's direction, see ``qhadam_kernel``; arguments as in ``qhadam``.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_qhadam(b1=0.5, b2=0.5, nu1=0.75, nu2=0.75)
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> tx.update(jnp.array([0.0]), state)[0]
    Array([0.5], dtype=float32)
    """
    hyperparams: dict[str, Any] = {"b1": b1, "b2": b2, "nu1": nu1, "nu2": nu2, "eps": eps}
    check_hyperparams(**hyperparams)
    return from_kernel(
        qhadam_kernel,
        ScaleByAdamState,
        slots={
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True),
        },
        hyperparams=hyperparams,
        per_step=lambda count, b1, b2, **_: {"c1": bias_correction(b1, count), "c2": bias_correction(b2, count)},
    )


@comparable
def qhadam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.995,
    b2: Scalar = 0.999,
    nu1: Scalar = 0.7,
    nu2: Scalar = 1.0,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Quasi-hyperbolic Adam (Ma & Yarats 2019, arXiv:1810.06801), with the weight decay of ``adamw``.

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``qhadam_kernel``. With ``nu1 = nu2 = 1`` it is ``adamw``.

    Args:
      learning_rate: :math:`\alpha_t`, a number >= 0 or a schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      nu1: weight of the first moment beside the gradient, in [0, 1].
      nu2: weight of the second moment beside the squared gradient, in [0, 1].
      eps: added to the denominator, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx, w = qhadam(0.1, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0].round(4)
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_qhadam(b1, b2, nu1, nu2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["qhadam", "qhadam_kernel", "scale_by_qhadam"]
