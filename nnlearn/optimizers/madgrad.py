"""MADGRAD: dual averaging with a cube root, and momentum as an average of the iterates."""

import jax.numpy as jnp
from optax.contrib import MadgradState

from nnlearn.settings import comparable
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.tree import abs_sq
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def madgrad_kernel(g, param, grad_sum_sq, s, x0, *, weight, momentum, eps, **_):
    r"""One step of MADGRAD (Defazio & Jelassi 2021, arXiv:2101.11075, algorithm 1).

    .. math::
        \lambda_t = (\alpha_t + \epsilon) \sqrt t, \quad s_t = s_{t-1} + \lambda_t g_t, \quad
        v_t = v_{t-1} + \lambda_t |g_t|^2, \quad z_t = x_0 - \frac{s_t}{\sqrt[3]{v_t} + \epsilon}, \quad
        x_t = \beta x_{t-1} + (1-\beta) z_t

    Returns:
      ``(x_t - x_{t-1}, v, s, x_0)``.
    """
    grad_sum_sq, s = grad_sum_sq + weight * abs_sq(g), s + weight * g
    zero = grad_sum_sq == 0
    root = jnp.where(zero, 0, jnp.cbrt(jnp.where(zero, 1, grad_sum_sq)))  # its derivative at 0 is infinite
    z = x0 - s / (root + eps)
    return (1 - momentum) * (z - param), grad_sum_sq, s, x0


@comparable
def scale_by_madgrad(
    learning_rate: ScalarOrSchedule, momentum: Scalar = 0.9, eps: Scalar = 1e-6
) -> GradientTransformationExtraArgs:
    """MADGRAD's whole step, see ``madgrad_kernel``; arguments as in ``madgrad``.

    Returns:
      A transformation with ``MadgradState(count, grad_sum_sq, s, x0)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_madgrad(0.008, momentum=0.0, eps=0.0)
    >>> tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))[0].round(5)
    Array([-0.04], dtype=float32)
    """
    check_hyperparams(learning_rate=learning_rate, momentum=momentum, eps=eps, schedules=("learning_rate",))

    def per_step(count, *, learning_rate, eps, **_):
        wide = jnp.result_type(float)
        return {"weight": jnp.asarray(learning_rate + eps, wide) * jnp.sqrt(count.astype(wide))}

    return from_kernel(
        madgrad_kernel,
        MadgradState,
        {"grad_sum_sq": Slot(real=True), "s": Slot(), "x0": Slot(initial=lambda param: param)},
        {"learning_rate": learning_rate, "momentum": momentum, "eps": eps},
        per_step,
        needs_params="scale_by_madgrad",
    )


@comparable
def madgrad(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    eps: Scalar = 1e-6,
    *,
    mask: MaskOrFn = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """MADGRAD (Defazio & Jelassi 2021, arXiv:2101.11075), see ``madgrad_kernel``.

    The weight decay is L2 regularisation: it joins the gradient.

    Args:
      learning_rate: a number >= 0 or a schedule.
      momentum: weight of the previous iterate in the average, in [0, 1].
      weight_decay: a number >= 0 or a schedule.
      eps: added to the learning rate and to the divisor, >= 0.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = madgrad(0.008, momentum=0.0, eps=0.0)
    >>> tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))[0].round(5)
    Array([-0.04], dtype=float32)
    """
    return assemble(
        add_decayed_weights(weight_decay, mask),
        scale_by_madgrad(learning_rate, momentum, eps),
        master_dtype=master_dtype,
    )


__all__ = ["madgrad", "madgrad_kernel", "scale_by_madgrad"]
