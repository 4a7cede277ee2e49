"""Batch normalisation, with running statistics as explicit state, and group normalisation."""

import math

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype, check_nonnegative, check_number
from nnlearn.losses.arguments import as_boolean, lead_over
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import along_last_axis, check_features, to_floating
from nnlearn.models.parameters import parameter
from nnlearn.models.scaling import scale_to_one, unit_variance
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import as_hyperparam, compute_dtype, finite_part, safe_divide, safe_rsqrt
from nnlearn.types import ArrayLike, DTypeLike, Model, Scalar, StatefulModel


@model_factory
def batch_norm(
    features: int,
    *,
    momentum: Scalar = 0.9,
    eps: Scalar = 1e-5,
    axis_name: str | tuple[str, ...] | None = None,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> StatefulModel:
    """Batch normalisation: shift every feature to mean 0 and scale it to variance 1, over all axes but the last.

    In training, with ``mean`` and ``var`` of the batch (``var`` the mean squared deviation)::

        y = scale * (x - mean) / sqrt(var + eps) + bias
        running_mean = momentum * running_mean + (1 - momentum) * mean
        running_var  = momentum * running_var  + (1 - momentum) * var

    Without a key ``y`` is computed from the running statistics. As in flax, ``momentum`` is the weight of the old
    average, and the running variance is the biased one of the batch. In PyTorch ``momentum`` is the weight of the new
    value (0.1 there is 0.9 here), and the running variance is multiplied by ``n / (n - 1)``.

    Args:
      features: length of the last axis of ``x``, shape (..., features).
      momentum: the weight of the old running statistics, in [0, 1].
      eps: added to the variance, >= 0. With 0 the output of a constant feature is rounding error plus ``bias``.
      axis_name: the mapped axis or axes over which the examples are distributed; statistics are shared over them.
      bias: whether to add a bias.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"scale": (features,), "bias": (features,)}``, initially ones and zeros, and state
      ``{"mean": (features,), "var": (features,)}``, initially zeros and ones, in float32 at least. It computes in
      float32 at least and returns the dtype of ``x``. Its ``apply(params, model_state, x, key=None, where=None)`` takes
      ``where``, booleans of the shape of ``x`` without its last axis, or of its leading axes: entries that are False
      are left out of the statistics and get no gradient, even if they are NaN. With fewer than two values per feature
      there is no variance, and the state is unchanged.

    Raises:
      ValueError: if ``features`` is below 1, ``eps`` is negative or ``momentum`` is outside [0, 1]; in ``apply``, if
        shapes do not match, or training without a batch axis or with a single value per feature.

    An infinite entry counts as a very large finite one. A variance that overflows the dtype of the state is stored as
    its largest finite value.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.

    >>> model = batch_norm(1, eps=0.0)
    >>> params, state = model.init(jax.random.key(0))
    >>> outputs, state = model.apply(params, state, jnp.array([[1.0], [5.0]]), jax.random.key(1))
    >>> outputs.ravel(), state["mean"], state["var"]
    (Array([-1.,  1.], dtype=float32), Array([0.3], dtype=float32), Array([1.3], dtype=float32))
    """
    features = check_count("features", features)
    check_number("momentum", momentum, low=0.0, high=1.0)
    check_nonnegative("eps", eps)
    layer, dtype = f"batch_norm({features})", check_dtype("dtype", dtype)

    def init(key):
        wide = compute_dtype(dtype)
        params = {"scale": jnp.ones((features,), dtype)} | ({"bias": jnp.zeros((features,), dtype)} if bias else {})
        return params, {"mean": jnp.zeros((features,), wide), "var": jnp.ones((features,), wide)}

    def apply(params, model_state, inputs, key=None, where: ArrayLike | None = None):
        inputs = to_floating(inputs)
        check_features(layer, features, inputs)
        running = {
            name: parameter(f"{layer}, for its state,", model_state, name, (features,)) for name in ("mean", "var")
        }
        x = inputs.astype(compute_dtype(inputs.dtype))
        mask = None if where is None else lead_over("where", as_boolean(where), x.shape[:-1])[..., None]
        if mask is not None:
            x = jnp.where(mask, x, 0)
        if key is None:
            mean, var = (running[name].astype(x.dtype) for name in ("mean", "var"))
            inverse = jnp.ones_like(mean)
        else:
            if inputs.ndim == 1 and axis_name is None:
                raise ValueError(
                    f"{layer} trains on a batch, got one example of shape {inputs.shape}; give axis_name if the "
                    "examples lie along a mapped axis"
                )
            if _values_per_feature(x, axis_name) == 1:
                raise ValueError(
                    f"{layer} trains on more than one value per feature, got a batch of one example, of shape "
                    f"{inputs.shape}: it has no variance, and every output would be the bias. Use larger batches, "
                    "remainder='drop', or group_norm"
                )
            x, inverse = scale_to_one(x, eps, tuple(range(x.ndim - 1)), axis_name)
            inverse = inverse.reshape(-1)
            mean, var, count = _batch_moments(x, mask, axis_name)
            weight = jnp.where(count > 1, 1 - as_hyperparam(momentum, x.dtype), 0)
            batch = mean / inverse, finite_part(var / inverse / inverse)
            model_state = {
                name: (old + weight.astype(old.dtype) * (new.astype(old.dtype) - old))
                for (name, old), new in zip(running.items(), batch, strict=True)
            }
        eps_here = as_hyperparam(eps, var.dtype) * inverse * inverse
        y = (x - along_last_axis(mean, x)) * along_last_axis(safe_rsqrt(var + eps_here), x)
        y = y * along_last_axis(parameter(layer, params, "scale", (features,)).astype(x.dtype), x)
        if bias:
            y = y + along_last_axis(parameter(layer, params, "bias", (features,)).astype(x.dtype), x)
        return y.astype(inputs.dtype), model_state

    return StatefulModel(init, apply)


def _values_per_feature(x: jax.Array, axis_name) -> int:
    """The number of values per feature in the batch, on all devices."""
    return math.prod(x.shape[:-1]) * (1 if axis_name is None else jax.lax.psum(1, axis_name))


def _batch_moments(x: jax.Array, mask: jax.Array | None, axis_name) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance of each feature, 0 where there are no values, and the number of values."""
    axes = tuple(range(x.ndim - 1))

    def total(array):
        summed = jnp.sum(array, axis=axes)
        return summed if axis_name is None else jax.lax.psum(summed, axis_name)

    count = total(jnp.broadcast_to(True if mask is None else mask, x.shape[:-1] + (1,)).astype(x.dtype))
    mean = safe_divide(total(x), count)
    # From squared deviations, as mean(x**2) - mean(x)**2 cancels for large means.
    deviation = x - along_last_axis(mean, x)
    if mask is not None:
        deviation = jnp.where(mask, deviation, 0)
    return mean, safe_divide(total(jnp.square(deviation)), count), count[0]


@model_factory
def group_norm(
    features: int,
    groups: int = 32,
    eps: Scalar = 1e-6,
    *,
    dimensions: int = 2,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """Group normalisation: shift each group of channels of each example to mean 0 and scale it to variance 1.

    With ``c = x - mean(x)``, where means are over the positions of one example and the channels of one group::

        y = scale * c / sqrt(mean(c ** 2) + eps) + bias

    Args:
      features: channels of ``x``, shape (..., *positions, features).
      groups: number of groups of consecutive channels; must divide ``features``. With ``groups=features`` this is
        instance normalisation.
      eps: added to the variance, >= 0. With 0 the output of a constant group is rounding error plus ``bias``.
      dimensions: number of axes of positions; 0 for none.
      bias: whether to add a bias.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"scale": (features,), "bias": (features,)}``, initially ones and zeros. It computes in
      float32 at least and returns the dtype of ``x``.

    Raises:
      ValueError: if ``groups`` does not divide ``features``, a size is below 1 or ``eps`` is negative; in ``apply``, if
        ``x`` or the params have the wrong shape.

    Source: Wu and He 2018, arXiv:1803.08494.

    >>> model = group_norm(4, groups=2, eps=0.0, dimensions=1)
    >>> model.apply(model.init(jax.random.key(0)), jnp.array([[1.0, 5.0, 0.0, 0.0], [5.0, 1.0, 2.0, 2.0]]))
    Array([[-1.,  1., -1., -1.],
           [ 1., -1.,  1.,  1.]], dtype=float32)
    """
    features, groups = check_count("features", features), check_count("groups", groups)
    if features % groups:
        raise ValueError(f"groups={groups} must divide features={features}")
    dimensions = dimensions if dimensions == 0 else check_count("dimensions", dimensions)
    check_nonnegative("eps", eps)
    layer, dtype = f"group_norm({features}, {groups})", check_dtype("dtype", dtype)

    def init(key):
        params = {"scale": jnp.ones((features,), dtype)}
        return params | ({"bias": jnp.zeros((features,), dtype)} if bias else {})

    @automatic_axes(like="inputs")
    def normalized(params, inputs, eps):
        inputs = to_floating(inputs)
        check_features(layer, features, inputs)
        if inputs.ndim < dimensions + 1:
            raise ValueError(f"{layer} expects {dimensions} axes of positions before the channels, got {inputs.shape}")
        x = inputs.astype(compute_dtype(inputs.dtype))
        lead, positions = x.shape[: -1 - dimensions], x.shape[x.ndim - 1 - dimensions : -1]
        grouped = x.reshape(*lead, math.prod(positions), groups, features // groups)
        grouped = jnp.swapaxes(grouped, -3, -2)  # (..., groups, positions, channels)
        flat = grouped.reshape(*lead, groups, math.prod(positions) * (features // groups))
        flat = unit_variance(flat, eps, centre=True)
        y = jnp.swapaxes(flat.reshape(grouped.shape), -3, -2).reshape(*lead, *positions, features)
        y = y * along_last_axis(parameter(layer, params, "scale", (features,)).astype(x.dtype), x)
        if bias:
            y = y + along_last_axis(parameter(layer, params, "bias", (features,)).astype(x.dtype), x)
        return y.astype(inputs.dtype)

    def apply(params, inputs, key=None):
        return normalized(params, inputs, eps)

    return Model(init, apply)
