"""Schedule-free SGD and AdamW; ``nnlearn.transforms.schedule_free`` has the equations."""

from optax import chain

from nnlearn.schedules import warmup_constant_schedule
from nnlearn.settings import comparable
from nnlearn.transforms.adaptive import scale_by_rms
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.schedule_free import schedule_free
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def _warmed_up(learning_rate: ScalarOrSchedule, warmup_steps: Scalar | None) -> ScalarOrSchedule:
    if warmup_steps is None:
        return learning_rate
    if callable(learning_rate):
        share = warmup_constant_schedule(0.0, 1.0, warmup_steps)
        return lambda step: share(step) * learning_rate(step)
    return warmup_constant_schedule(0.0, learning_rate, warmup_steps)


@comparable
def schedule_free_sgd(
    learning_rate: ScalarOrSchedule = 1.0,
    warmup_steps: Scalar | None = None,
    b1: Scalar = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    mask: MaskOrFn = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Schedule-free SGD (Defazio et al. 2024, arXiv:2405.15682), see ``schedule_free``.

    Args:
      learning_rate: a number >= 0 or a schedule.
      warmup_steps: steps of a linear warmup to that number; None for none.
      b1: weight of the average in the parameters, in [0, 1).
      weight_decay: added to the gradient times the weights, a number >= 0 or a schedule.
      weight_lr_power, state_dtype: see ``schedule_free``.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx, w = schedule_free_sgd(0.1), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.4], dtype=float32)
    """
    rate = _warmed_up(learning_rate, warmup_steps)
    decay = add_decayed_weights(0.0 if weight_decay is None else weight_decay, mask)
    base = chain(decay, scale_by_learning_rate(rate))
    return assemble(schedule_free(base, rate, b1, weight_lr_power, state_dtype), master_dtype=master_dtype)


@comparable
def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: DTypeLike | None = None,
    *,
    mask: MaskOrFn = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1), see ``schedule_free``.

    Args:
      learning_rate: a number >= 0 or a schedule.
      warmup_steps: steps of a linear warmup to that number; None for none.
      b1: weight of the average in the parameters, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the divisor, >= 0.
      weight_decay: a number >= 0 or a schedule.
      weight_lr_power, state_dtype: see ``schedule_free``.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> import jax.numpy as jnp
    >>> tx, w = schedule_free_adamw(0.1), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.1], dtype=float32)
    """
    check_hyperparams(b2=b2, eps=eps)
    rate = _warmed_up(learning_rate, warmup_steps)
    base = chain(
        scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(rate),
    )
    return assemble(schedule_free(base, rate, b1, weight_lr_power, state_dtype), master_dtype=master_dtype)


__all__ = ["schedule_free_adamw", "schedule_free_sgd"]
