"""NovoGrad: a second moment for each layer, and decay inside of the momentum."""

import jax.numpy as jnp
from optax import ScaleByNovogradState

from nnlearn.settings import comparable
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


def novograd_kernel(g, param, mu, nu, *, b1, b2, eps, eps_root, weight_decay, is_first):
    r"""One step of NovoGrad on a whole leaf (Ginsburg et al. 2019, arXiv:1905.11286, algorithm 1).

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) \|g_t\|^2, \quad
        m_t = \beta_1 m_{t-1} + \frac{g_t}{\sqrt{v_t + \bar\epsilon} + \epsilon} + \lambda w_{t-1}, \quad u_t = m_t

    with :math:`v_1 = \|g_1\|^2`. Returns ``(u, m, v)``.
    """
    square = jnp.sum(abs_sq(g))
    nu = jnp.where(is_first, square, moving_average(b2, square, nu))
    new = safe_divide(g, safe_sqrt(nu + eps_root) + eps) + weight_decay * param
    mu = jnp.where(is_first, new, b1 * mu + new)
    return mu, mu, nu


@comparable
def scale_by_novograd(
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """NovoGrad's direction, see ``novograd_kernel``; arguments as in ``novograd``.

    Returns:
      A transformation with ``ScaleByNovogradState(count, mu, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = scale_by_novograd(), jnp.zeros(2)
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)[0]
    Array([0.6, 0.8], dtype=float32)
    """
    hyperparams = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}
    check_hyperparams(**hyperparams, schedules=("weight_decay",))
    return from_kernel(
        novograd_kernel,
        ScaleByNovogradState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "nu": Slot(real=True, shape=lambda shape: ())},
        hyperparams,
        lambda count, **_: {"is_first": count == 1},
        needs_params="scale_by_novograd",
        whole_leaf=True,
    )


@comparable
def novograd(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    mu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""NovoGrad, momentum of layer-wise normalised gradients (Ginsburg et al. 2019, arXiv:1905.11286).

    .. math:: w_t = w_{t-1} - \alpha_t u_t

    with the :math:`u_t` of ``novograd_kernel``; arguments as in ``adamw``. The state is about that of momentum.

    >>> tx, w = novograd(0.1), jnp.zeros(2)
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)[0].round(4)
    Array([-0.06, -0.08], dtype=float32)
    """
    return assemble(
        scale_by_novograd(b1, b2, eps, eps_root, weight_decay, mu_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["novograd", "novograd_kernel", "scale_by_novograd"]
