"""Lion: the sign of an interpolated momentum."""

from nnlearn.settings import comparable
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.momentum import scale_by_lion
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


@comparable
def lion(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    .. math:: w_t = w_{t-1} - \alpha (\operatorname{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t) + \lambda w_{t-1}), \quad
        m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t

    Its learning rate is 3 to 10 times smaller, and its decay as much larger, than AdamW's.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1: weight of the momentum in the step, :math:`\beta_1` in [0, 1).
      b2: decay rate of the momentum, :math:`\beta_2` in [0, 1).
      mu_dtype: dtype of the momentum; None for the parameter's dtype, float32 at least.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: a tree of booleans like the parameters, or a function from parameters to one: True where weights decay.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> import jax.numpy as jnp
    >>> tx, w = lion(0.1, weight_decay=0.5), jnp.array([2.0])
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.2], dtype=float32)
    """
    return assemble(
        scale_by_lion(b1, b2, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )
