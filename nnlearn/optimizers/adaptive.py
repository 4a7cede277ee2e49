"""AdaGrad, RMSProp and AdaDelta; the equations are in ``nnlearn.transforms.adaptive``."""

from nnlearn.settings import comparable
from nnlearn.transforms.adaptive import scale_by_adadelta, scale_by_rms, scale_by_rss, scale_by_stddev
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.momentum import trace_if
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


@comparable
def adagrad(
    learning_rate: ScalarOrSchedule,
    initial_accumulator_value: Scalar = 0.1,
    eps: Scalar = 1e-7,
    *,
    accumulator_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""AdaGrad (Duchi, Hazan & Singer 2011).

    .. math:: s_t = s_{t-1} + g_t^2, \quad w_t = w_{t-1} - \alpha \frac{g_t}{\sqrt{s_t + \epsilon}}

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      initial_accumulator_value: :math:`s_0 \ge 0`.
      eps: added inside of the square root, >= 0.
      accumulator_dtype: dtype of the sum; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of range.

    >>> import jax.numpy as jnp
    >>> tx = adagrad(0.1, initial_accumulator_value=0.0)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.1], dtype=float32)
    """
    return assemble(
        scale_by_rss(initial_accumulator_value, eps, accumulator_dtype=accumulator_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def adadelta(
    learning_rate: ScalarOrSchedule | None = None,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    *,
    accumulator_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""AdaDelta (Zeiler 2012, arXiv:1212.5701).

    .. math:: w_t = w_{t-1} - \alpha \sqrt{\frac{E[u^2]_{t-1} + \epsilon}{E[g^2]_t + \epsilon}} g_t

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule; None leaves the updates uphill and unscaled, as in
        optax, for a chain that goes on. The paper's choice is 1.0.
      rho: decay rate of both means of squares, in [0, 1).
      eps: added inside of both square roots, >= 0.
      weight_decay: added to the gradient, times the weights: L2 regularisation.
      weight_decay_mask: True where weights decay, see ``add_decayed_weights``.
      accumulator_dtype: dtype of both means; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx, w = adadelta(1.0, rho=0.0, eps=9.0), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-2.4], dtype=float32)
    """
    return assemble(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps, accumulator_dtype=accumulator_dtype),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


@comparable
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""RMSProp (Hinton, Srivastava & Swersky 2012, lecture 6e; centered: Graves 2013, arXiv:1308.0850).

    .. math:: v_t = \beta v_{t-1} + (1-\beta) g_t^2, \quad w_t = w_{t-1} - \alpha \frac{g_t}{\sqrt{v_t + \epsilon}}

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      decay: decay rate of the mean of squares, :math:`\beta` in [0, 1).
      eps: added to the denominator, >= 0.
      initial_scale: initial mean of squares, :math:`v_0 \ge 0` (PyTorch starts from 0, TensorFlow from 1).
      eps_in_sqrt: add eps inside of the square root; PyTorch adds it outside.
      centered: divide by the standard deviation, not the root mean square.
      momentum: decay of a trace of the steps, in [0, 1]; None keeps none.
      nesterov: look one step ahead; without ``momentum`` it has no effect, and warns.
      bias_correction: divide :math:`v_t` by :math:`1-\beta^t`.
      nu_dtype: dtype of the mean of squares; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx = rmsprop(0.1, decay=0.75)
    >>> tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))[0]
    Array([-0.2], dtype=float32)
    """
    scale_by = scale_by_stddev if centered else scale_by_rms
    return assemble(
        scale_by(decay, eps, initial_scale, eps_in_sqrt, bias_correction, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
        trace_if(momentum, nesterov),
        master_dtype=master_dtype,
    )
