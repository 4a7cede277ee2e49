"""Adafactor: a second moment of rows and columns, step sizes relative to the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import FactoredState

from nnlearn.checks import check_count
from nnlearn.settings import comparable
from nnlearn.transforms.averages import moving_average
from nnlearn.transforms.clipping import clip_by_block_rms
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.momentum import ema
from nnlearn.transforms.plumbing import from_kernel, from_leaf_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale, scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, as_hyperparam
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, Scalar, ScalarOrSchedule


def _factored_axes(shape: tuple[int, ...], smallest: int | None) -> tuple[int, int] | None:
    """The second largest and the largest axis, if both have ``smallest`` entries; None where moments stay whole."""
    if smallest is None or len(shape) < 2:
        return None
    *_, second, largest = np.argsort(shape)
    return (int(second), int(largest)) if shape[second] >= smallest else None


@jax.custom_jvp
def _over_root(g: jax.Array, square: jax.Array) -> jax.Array:
    """``g / sqrt(square)``, with derivative 0 where ``g`` is 0, though that of the root may overflow there."""
    return g * jax.lax.rsqrt(square)


@_over_root.defjvp
def _over_root_jvp(primals, tangents):
    (g, square), (dg, dsquare) = primals, tangents
    root = jax.lax.rsqrt(square)
    change = g * root
    return change, dg * root - 0.5 * (change * root) * root * dsquare


def factored_rms_kernel(g, v_row, v_col, v, *, epsilon, decay, smallest):
    r"""One step of Adafactor's direction (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 1 and 4).

    .. math::
        r_t = \beta_t r_{t-1} + (1-\beta_t) \operatorname{mean}_j (|g_t|^2 + \epsilon), \quad
        c_t = \beta_t c_{t-1} + (1-\beta_t) \operatorname{mean}_i (|g_t|^2 + \epsilon), \quad
        u_t = g_t \sqrt{\frac{\operatorname{mean}(r_t)}{r_t c_t^\top}}

    Leaves with fewer than two axes of ``smallest`` entries keep the whole moment, :math:`u_t = g_t / \sqrt{v_t}`; the
    arrays that a leaf does not need have one entry.

    Returns:
      ``(u, r, c, v)``.
    """
    square = abs_sq(g) + epsilon
    axes = _factored_axes(g.shape, smallest)
    if axes is None:
        v = moving_average(decay, square, v)
        return _over_root(g, v), v_row, v_col, v
    second, largest = axes
    v_row = moving_average(decay, jnp.mean(square, axis=largest), v_row)
    v_col = moving_average(decay, jnp.mean(square, axis=second), v_col)
    row, col = jnp.expand_dims(v_row, largest), jnp.expand_dims(v_col, second)
    return _over_root(_over_root(g, row / jnp.mean(row, axis=second, keepdims=True)), col), v_row, v_col, v


def power_decay(step: Any, exponent: Any) -> jax.Array:
    r"""The decay :math:`1 - (step + 1)^{-exponent}`: an average of everything at first, ever slower later.

    Below step 0, which a ``step_offset`` may lead to, it is 0 as at the first step.
    """
    return 1 - jnp.maximum(step + 1, 1) ** -exponent


@comparable
def scale_by_factored_rms(
    factored: bool = True,
    decay_rate: Scalar = 0.8,
    step_offset: Scalar = 0,
    min_dim_size_to_factor: int = 128,
    epsilon: Scalar = 1e-30,
    decay_rate_fn: Callable[..., Scalar] = power_decay,
    *,
    v_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Adafactor's direction, see ``factored_rms_kernel``.

    Args:
      factored: keep row and column means for matrices in place of the whole second moment.
      decay_rate: exponent of the decay, >= 0.
      step_offset: subtracted from the step that the decay is taken at.
      min_dim_size_to_factor: factor leaves with two axes at least this long.
      epsilon: added to the squared gradient, >= 0.
      decay_rate_fn: from step - step_offset and ``decay_rate`` to the decay of the second moment.
      v_dtype: dtype of the second moment; None for the parameter's dtype, float32 at least.

    Returns:
      A transformation with ``FactoredState(count, v_row, v_col, v)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or ``min_dim_size_to_factor`` is below 1.
      TypeError: if ``min_dim_size_to_factor`` is not an int, or ``v_dtype`` is not a floating or complex type.

    >>> tx = scale_by_factored_rms(min_dim_size_to_factor=2)
    >>> state = tx.init(jnp.zeros((3, 2)))
    >>> jax.tree.map(jnp.shape, state)
    FactoredState(count=(), v_row=(2,), v_col=(3,), v=(1,))
    >>> tx.update(jnp.full((3, 2), -4.0), state)[0][0]
    Array([-1., -1.], dtype=float32)
    """
    check_hyperparams(decay_rate=decay_rate, step_offset=step_offset, epsilon=epsilon)
    smallest = check_count("min_dim_size_to_factor", min_dim_size_to_factor) if factored else None
    storage = as_storage("v_dtype", v_dtype)

    def means_over(which):
        def shape_of(shape):
            axes = _factored_axes(shape, smallest)
            return (1,) if axes is None else tuple(np.delete(shape, axes[which]).tolist())

        return Slot(dtype=storage, real=True, shape=shape_of)

    def whole(shape):
        return shape if _factored_axes(shape, smallest) is None else (1,)

    def decay_at(count, *, decay_rate, step_offset, **_):
        real = jnp.result_type(float)
        step = count.astype(real) - 1 - as_hyperparam(step_offset, real)
        return {"decay": decay_rate_fn(step, as_hyperparam(decay_rate, real))}

    def kernel(*arrays, epsilon, decay, **_):
        return factored_rms_kernel(*arrays, epsilon=epsilon, decay=decay, smallest=smallest)

    return from_kernel(
        kernel,
        FactoredState,
        {"v_row": means_over(1), "v_col": means_over(0), "v": Slot(dtype=storage, real=True, shape=whole)},
        {"decay_rate": decay_rate, "step_offset": step_offset, "epsilon": epsilon},
        decay_at,
        whole_leaf=True,
    )


def _param_rms_kernel(update, param, *, min_scale):
    rms = array_norm(param) / max(param.size, 1) ** 0.5
    return update * jnp.maximum(rms, min_scale)


@comparable
def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformationExtraArgs:
    """Scale each leaf's update by the root mean square of its parameter, ``min_scale`` at least.

    Args:
      min_scale: the smallest factor, finite and >= 0.

    Returns:
      A transformation without state whose ``update`` needs the parameters.

    Raises:
      ValueError: if ``min_scale`` is out of its range; in ``update``, if there are no parameters.

    >>> tx, w = scale_by_param_block_rms(), jnp.array([3.0, -3.0])
    >>> tx.update(jnp.array([1.0, 2.0]), tx.init(w), w)[0]
    Array([3., 6.], dtype=float32)
    """
    check_hyperparams(min_scale=min_scale)
    hyperparams = {"min_scale": min_scale}
    return from_leaf_kernel(_param_rms_kernel, hyperparams, needs_params="scale_by_param_block_rms", whole_leaf=True)


@comparable
def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: Scalar = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: Scalar | None = None,
    dtype_momentum: DTypeLike = jnp.float32,
    weight_decay_rate: ScalarOrSchedule | None = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: MaskOrFn = None,
    *,
    v_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""Adafactor, with memory for rows and columns alone (Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4).

    .. math:: w_t = w_{t-1} - \alpha_t \max(\epsilon_2, \operatorname{rms}(w_{t-1}))
        \frac{u_t}{\max(1, \operatorname{rms}(u_t) / d)} - \lambda w_{t-1}

    with the :math:`u_t` of ``factored_rms_kernel`` and :math:`\epsilon_2 = 10^{-3}`. As in optax the learning rate does
    not multiply the weight decay.

    Args:
      learning_rate: :math:`\alpha_t`, a number >= 0 or a schedule; None for 1, on a step whose size is the weights'.
      min_dim_size_to_factor, decay_rate, factored, v_dtype: see ``scale_by_factored_rms``.
      decay_offset: its ``step_offset``.
      multiply_by_parameter_scale: make the learning rate relative to the root mean square of each leaf.
      clipping_threshold: :math:`d > 0`, bound of each leaf's root mean square; None does not clip.
      momentum: decay rate of a moving average of the updates, in [0, 1); None keeps none.
      dtype_momentum: dtype of that average.
      weight_decay_rate: :math:`\lambda`, a number >= 0 or a schedule; None for no decay.
      eps: added to the squared gradient, >= 0.
      weight_decay_mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation whose ``update`` needs the parameters.

    Raises:
      ValueError: if a hyper-parameter is out of its range; in ``update``, if there are no parameters.
      TypeError: if a dtype is not a floating or complex type.

    >>> tx, w = adafactor(0.1), jnp.array([2.0, -2.0])
    >>> tx.update(jnp.array([4.0, -8.0]), tx.init(w), w)[0]
    Array([-0.2,  0.2], dtype=float32)
    """
    check_hyperparams(decay_offset=decay_offset, clipping_threshold=clipping_threshold, momentum=momentum, eps=eps)
    check_hyperparams(weight_decay_rate=weight_decay_rate, schedules=("weight_decay_rate",))
    links = [scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps, v_dtype=v_dtype)]
    if clipping_threshold is not None:
        links.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        links.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        links.append(scale_by_param_block_rms())
    if momentum is not None:
        links.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        links.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return assemble(*links, scale(-1), master_dtype=master_dtype)


__all__ = [
    "adafactor",
    "factored_rms_kernel",
    "power_decay",
    "scale_by_factored_rms",
    "scale_by_param_block_rms",
]
