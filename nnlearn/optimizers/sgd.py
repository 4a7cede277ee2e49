"""Stochastic gradient descent, with momentum, and by sign alone."""

from nnlearn.settings import comparable
from nnlearn.transforms.decay import add_noise
from nnlearn.transforms.momentum import ema, scale_by_sign, trace_if
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Key, Scalar, ScalarOrSchedule


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


@comparable
def signum(
    learning_rate: ScalarOrSchedule,
    beta: Scalar = 0.9,
    accumulator_dtype: DTypeLike | None = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Descent by the sign of the momentum (Bernstein et al. 2018, arXiv:1802.04434, algorithm 2).

    .. math:: m_t = \beta m_{t-1} + (1-\beta) g_t, \quad w_t = w_{t-1} - \alpha \operatorname{sign}(m_t)

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      beta: :math:`\beta` in [0, 1).
      accumulator_dtype: dtype of the momentum; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> import jax.numpy as jnp
    >>> tx = signum(0.1)
    >>> tx.update(jnp.array([7.0, -0.2]), tx.init(jnp.zeros(2)))[0]
    Array([-0.1,  0.1], dtype=float32)
    """
    check_hyperparams(beta=beta)
    return assemble(
        ema(beta, debias=False, accumulator_dtype=accumulator_dtype),
        scale_by_sign(),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def noisy_sgd(
    learning_rate: ScalarOrSchedule,
    eta: Scalar = 0.01,
    gamma: Scalar = 0.55,
    key: Key | int | None = None,
    *,
    seed: int | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Gradient descent with noise of decreasing variance (Neelakantan et al. 2015, arXiv:1511.06807).

    Args:
      learning_rate: a number >= 0 or a schedule.
      eta, gamma, key, seed: see ``add_noise``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx = noisy_sgd(0.1, eta=0.0, key=0)
    >>> tx.update(jnp.array([0.5]), tx.init(jnp.array([2.0])))[0]
    Array([-0.05], dtype=float32)
    """
    return assemble(
        add_noise(eta, gamma, key, seed=seed), scale_by_learning_rate(learning_rate), master_dtype=master_dtype
    )
