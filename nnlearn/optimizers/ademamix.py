"""AdEMAMix: Adam with a second, slow momentum that remembers tens of thousands of gradients."""

from optax.contrib import ScaleByAdemamixState

from nnlearn.settings import comparable
from nnlearn.transforms.adam import adam_corrections
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def ademamix_kernel(g, m1, m2, nu, *, b1, b2, b3, alpha, eps, eps_root, c1, c1_next, c2):
    r"""One step of AdEMAMix (Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, algorithm 1).

    .. math::
        m^1_t = \beta_1 m^1_{t-1} + (1-\beta_1) g_t, \quad m^2_t = \beta_3 m^2_{t-1} + (1-\beta_3) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) |g_t|^2, \quad
        u_t = \frac{m^1_t / (1-\beta_1^t) + \alpha m^2_t}{\sqrt{v_t / (1-\beta_2^t) + \bar\epsilon} + \epsilon}

    The slow moment has no bias correction, so that it fills slowly. Returns ``(u, m1, m2, v)``.
    """
    m1, m2 = moving_average(b1, g, m1), moving_average(b3, g, m2)
    nu = moving_average(b2, abs_sq(g), nu)
    return safe_divide(m1 / c1 + alpha * m2, safe_sqrt(nu / c2 + eps_root) + eps), m1, m2, nu


@comparable
def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """AdEMAMix's direction, see ``ademamix_kernel``; arguments as in ``ademamix``.

    Returns:
      A transformation with ``ScaleByAdemamixState(count, count_m2, m1, m2, nu)``; schedules follow ``count_m2``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.
      TypeError: if a dtype is not a floating or complex type.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_ademamix(b3=0.75, alpha=4.0)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    check_hyperparams(b1=b1, b2=b2, b3=b3, alpha=alpha, eps=eps, eps_root=eps_root, schedules=("b3", "alpha"))
    moment = Slot(dtype=as_storage("mu_dtype", mu_dtype))
    return from_kernel(
        ademamix_kernel,
        ScaleByAdemamixState,
        {"m1": moment, "m2": moment, "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True)},
        {"b1": b1, "b2": b2, "b3": b3, "alpha": alpha, "eps": eps, "eps_root": eps_root},
        adam_corrections,
        counters=("count", "count_m2"),
    )


@comparable
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""AdamW with a mixture of a fast and a slow momentum (Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137).

    .. math:: w_t = w_{t-1} - \alpha_t (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``ademamix_kernel``. The paper warms ``alpha`` and ``b3`` up over the run: give schedules.
    Other arguments as in ``adamw``.

    Args:
      b3: decay rate of the slow momentum, in [0, 1), or a schedule.
      alpha: weight of the slow momentum, >= 0, or a schedule.
      mu_dtype: dtype of both momenta; None for the parameter's dtype, float32 at least.

    >>> import jax.numpy as jnp
    >>> tx, w = ademamix(0.1, b3=0.75, alpha=4.0, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.3], dtype=float32)
    """
    return assemble(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["ademamix", "ademamix_kernel", "scale_by_ademamix"]
