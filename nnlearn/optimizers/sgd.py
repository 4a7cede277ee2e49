"""Stochastic gradient descent, with momentum, and by sign alone."""

from nnlearn.settings import comparable
from nnlearn.transforms.momentum import scale_by_sign, trace_if
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar, ScalarOrSchedule


@comparable
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Stochastic gradient descent (Robbins & Monro 1951), with momentum (Polyak 1964; Sutskever et al. 2013).

    .. math:: t_t = g_t + \beta t_{t-1}, \quad
        w_t = w_{t-1} - \alpha t_t \text{, or } w_{t-1} - \alpha (g_t + \beta t_t) \text{ with Nesterov}

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      momentum: :math:`\beta` in [0, 1]; None keeps no trace.
      nesterov: look one step ahead; without ``momentum`` it has no effect, and warns.
      accumulator_dtype: dtype of the trace; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> import jax.numpy as jnp
    >>> tx = sgd(0.1)
    >>> tx.update(jnp.array([0.5]), tx.init(jnp.array([2.0])))[0]
    Array([-0.05], dtype=float32)
    """
    return assemble(
        trace_if(momentum, nesterov, accumulator_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def sign_sgd(
    learning_rate: ScalarOrSchedule, *, master_dtype: DTypeLike | None = None
) -> GradientTransformationExtraArgs:
    r"""Descent by the sign of the gradient (Bernstein et al. 2018, arXiv:1802.04434).

    .. math:: w_t = w_{t-1} - \alpha \operatorname{sign}(g_t)

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx = sign_sgd(0.1)
    >>> tx.update(jnp.array([7.0, -0.2]), tx.init(jnp.zeros(2)))[0]
    Array([-0.1,  0.1], dtype=float32)
    """
    return assemble(scale_by_sign(), scale_by_learning_rate(learning_rate), master_dtype=master_dtype)
