"""Optimizers for very large batches: each layer's step is scaled to its weights."""

from optax import masked

from nnlearn.packing import per_buffer
from nnlearn.settings import comparable
from nnlearn.transforms.adam import scale_by_adam
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.momentum import trace
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate, scale_by_trust_ratio
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


@comparable
def lars(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: MaskOrFn = True,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""LARS: momentum with one rate per layer (You, Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1).

    .. math:: u = g_t + \lambda w_{t-1}, \quad
        t_t = \beta t_{t-1} + \alpha \eta \frac{\|w_{t-1}\|}{\|u\| + \epsilon} u, \quad w_t = w_{t-1} - t_t

    As in optax the norm below is of the sum; the paper has :math:`\|g\| + \lambda \|w\|` there.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      weight_decay_mask: True where weights decay.
      trust_coefficient: :math:`\eta \ge 0`.
      eps: added to the update's norm, >= 0.
      trust_ratio_mask: True where the ratio of norms is used; biases and norm scales usually do without.
      momentum: :math:`\beta` in [0, 1].
      nesterov: look one step ahead.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx, w = lars(1.0, trust_coefficient=0.1), jnp.array([3.0, 4.0])
    >>> tx.update(jnp.array([1.2, 1.6]), tx.init(w), w)[0]
    Array([-0.3, -0.4], dtype=float32)
    """
    return assemble(
        add_decayed_weights(weight_decay, weight_decay_mask),
        masked(scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps), per_buffer(trust_ratio_mask)),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
        master_dtype=master_dtype,
    )


@comparable
def lamb(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""LAMB: AdamW with one rate per layer (You et al. 2020, arXiv:1904.00962, algorithm 2).

    .. math:: w_t = w_{t-1} - \alpha \frac{\|w_{t-1}\|}{\|u_t + \lambda w_{t-1}\|} (u_t + \lambda w_{t-1})

    with Adam's :math:`u_t`. Arguments as in ``adamw``.

    >>> import jax.numpy as jnp
    >>> tx, w = lamb(0.1), jnp.array([3.0, -3.0])
    >>> tx.update(jnp.array([7.0, 0.2]), tx.init(w), w)[0].round(3)
    Array([-0.3, -0.3], dtype=float32)
    """
    return assemble(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def fromage(
    learning_rate: ScalarOrSchedule, min_norm: Scalar = 1e-6, *, master_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    r"""Fromage, steps relative to the norm of each layer (Bernstein et al. 2020, arXiv:2002.03432, algorithm 1).

    .. math:: w_t = \frac{1}{\sqrt{1 + \alpha^2}} \Big(w_{t-1} - \alpha \frac{\|w_{t-1}\|}{\|g_t\|} g_t\Big)

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      min_norm: lower bound of the norms, >= 0.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx, w = fromage(0.75), jnp.array([3.0, 4.0])
    >>> [round(float(each), 4) for each in tx.update(jnp.array([0.0, 2.0]), tx.init(w), w)[0]]
    [-0.6, -3.8]
    """
    check_hyperparams(learning_rate=learning_rate, schedules=("learning_rate",))

    def shrink(step):
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return rate, 1 / (1 + rate**2) ** 0.5

    def rate_at(step):
        rate, factor = shrink(step)
        return rate * factor

    return assemble(
        scale_by_trust_ratio(min_norm),
        scale_by_learning_rate(rate_at),
        add_decayed_weights(lambda step: shrink(step)[1] - 1),
        master_dtype=master_dtype,
    )
