"""Adam-mini: one second moment for each output of a matrix."""

import math

import jax.numpy as jnp
from optax import ScaleByAdamState, chain

from nnlearn.optimizers.adam import adamw
from nnlearn.optimizers.muon import by_kind, matrix_rules
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


def _means(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the mean over inputs: all but the last axis, or the middle one of a stack of matrices."""
    if len(shape) < 2:
        return shape
    return (shape[0], 1, shape[2]) if len(shape) == 3 else (*(1 for _ in shape[:-1]), shape[-1])


def adam_mini_kernel(g, mu, nu, *, b1, b2, eps, c1, c2, **_):
    r"""One step of Adam-mini on a whole leaf (Zhang et al. 2024, arXiv:2406.16793, algorithm 1).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) \operatorname{mean}_{inputs} g_t^2, \quad
        u_t = \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Returns:
      ``(u, m, v)``, where :math:`v` has one number for each output.
    """
    axes = tuple(axis for axis, size in enumerate(_means(g.shape)) if size != g.shape[axis])
    count = math.prod(g.shape[axis] for axis in axes)
    mu = moving_average(b1, g, mu)
    nu = moving_average(b2, jnp.sum(abs_sq(g), axis=axes, keepdims=True) / max(count, 1), nu)
    return safe_divide(mu / c1, safe_sqrt(nu / c2) + eps), mu, nu


@comparable
def scale_by_adam_mini(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adam-mini's direction, see ``adam_mini_kernel``; arguments as in ``adam_mini``. Vectors are Adam's.

    Returns:
      A transformation with ``ScaleByAdamState(count, mu, nu)``, whose ``nu`` has one number for each output.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_adam_mini(), jnp.array([[3.0], [-4.0]])
    >>> state = tx.init(g)
    >>> state.nu.shape, tx.update(g, state)[0].round(2).tolist()  # over the root of 12.5
    ((1, 1), [[0.8...], [-1.1...]])
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps)
    return from_kernel(
        adam_mini_kernel,
        ScaleByAdamState,
        {
            "mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)),
            "nu": Slot(dtype=as_storage("nu_dtype", nu_dtype), real=True, shape=_means),
        },
        {"b1": b1, "b2": b2, "eps": eps},
        adam_corrections,
        whole_leaf=True,
    )


@comparable
def adam_mini(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adam-mini, AdamW with half the state (Zhang et al. 2024, arXiv:2406.16793).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``adam_mini_kernel`` for the leaves that ``matrix_rules`` finds to be matrices; embeddings,
    heads, norms and biases are AdamW's. The paper also has one number for each head in queries and keys, and for each
    token in embeddings.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1, b2: decay rates of the moments, in [0, 1).
      eps: added to the divisor, >= 0.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      mu_dtype, nu_dtype: dtypes of the moments; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = adam_mini(0.1), {"w": jnp.zeros((2, 1))}
    >>> updates, _ = tx.update({"w": jnp.array([[4.0], [4.0]])}, tx.init(w), w)
    >>> updates["w"].round(3).tolist()
    [[-0.1...], [-0.1...]]
    """
    matrices = chain(
        scale_by_adam_mini(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    others = adamw(
        learning_rate, b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype, weight_decay=weight_decay, mask=mask
    )
    return assemble(by_kind(matrix_rules, matrices, others), master_dtype=master_dtype)


__all__ = ["adam_mini", "adam_mini_kernel", "scale_by_adam_mini"]
