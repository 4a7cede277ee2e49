"""The layers: each factory returns a ``Model``, and ``sequential`` joins them, with or without state."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype, check_nonnegative, check_number
from nnlearn.models.factory import check_features, model_factory, parameter
from nnlearn.models.named import Initializer, activation_function, initializer
from nnlearn.sharding.axes import automatic, automatic_axes, explicit_spec, linear
from nnlearn.tree import (
    abs_sq,
    as_hyperparam,
    clip_parts,
    compute_dtype,
    power_of_two,
    real_dtype,
    safe_divide,
    safe_rsqrt,
)
from nnlearn.types import DTypeLike, Model, Scalar, StatefulModel


def _floating(inputs) -> jax.Array:
    """``inputs`` as an array of floats; pixels and counts become float32."""
    x = jnp.asarray(inputs)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """``vector`` with leading axes of length 1, so that it broadcasts against ``like`` without rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _drawn(make: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # Drawn in float32: bfloat16 has too few random bits for a smooth distribution, and no QR decomposition.
    return make(key, shape, compute_dtype(dtype)).astype(dtype)


@model_factory
def dense(
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    kernel_init: str | Initializer = "lecun",
    bias_init: str | Initializer = "zeros",
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """A linear map of the last axis, ``y = x @ kernel + bias``.

    Args:
      inputs: length of the last axis of ``x``, shape (..., inputs).
      outputs: length of the last axis of ``y``, shape (..., outputs).
      bias: whether to add a bias.
      kernel_init, bias_init: an initialiser or its name; see ``initializer``.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"kernel": (inputs, outputs), "bias": (outputs,)}``. The result has the dtype that JAX
      promotes ``x`` and ``kernel`` to: to work in bfloat16, cast both.

    Raises:
      ValueError: a size is below 1, an initialiser is unknown; in ``apply``, ``x`` or the params have another shape.

    >>> model = dense(3, 2, kernel_init="ones")
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.array([1.0, 2.0, 3.0])))
    [6. 6.]
    """
    inputs, outputs = check_count("inputs", inputs), check_count("outputs", outputs)
    make_kernel, make_bias = initializer(kernel_init), initializer(bias_init)
    layer, dtype = f"dense({inputs}, {outputs})", check_dtype("dtype", dtype)

    def init(key):
        kernel_key, bias_key = jax.random.split(key)
        params = {"kernel": _drawn(make_kernel, kernel_key, (inputs, outputs), dtype)}
        return params | ({"bias": _drawn(make_bias, bias_key, (outputs,), dtype)} if bias else {})

    def apply(params, x, key=None):
        x = _floating(x)
        check_features(layer, inputs, x)
        kernel = parameter(layer, params, "kernel", (inputs, outputs))
        return linear(x, kernel, parameter(layer, params, "bias", (outputs,)) if bias else None)

    return Model(init, apply)


@model_factory
def dropout(rate: Scalar) -> Model:
    """In training sets each number to 0 with probability ``rate``, and scales the others so that the mean stays.

    With ``m`` drawn from Bernoulli(1 - rate), ``y = m * x / (1 - rate)``; without a key ``y = x``.

    Args:
      rate: the fraction that is dropped, in [0, 1). It may be traced; the derivative with respect to it is that of the
        factor ``1 / (1 - rate)``, for the mask does not change smoothly.

    Returns:
      A model without parameters.

    Raises:
      ValueError: ``rate`` is outside [0, 1).

    Source: Srivastava et al. 2014, JMLR 15.

    >>> model = dropout(0.5)
    >>> print(sorted(set(model.apply({}, jnp.ones(50), jax.random.key(0)).tolist())), model.apply({}, jnp.ones(2)))
    [0.0, 2.0] [1. 1.]
    """
    check_number("rate", rate, low=0.0, high=1.0, high_open=True)
    never = isinstance(rate, int | float) and rate == 0  # then random bits would be drawn for nothing

    def apply(params, x, key=None):
        x = _floating(x)
        if key is None or never:
            return x
        wide = compute_dtype(x.dtype)
        keep = 1.0 - as_hyperparam(rate, wide)
        factor = safe_divide(1.0, jnp.asarray(keep, real_dtype(wide)))  # 0, not infinity, for a traced rate of 1

        def drop(x, key, keep, factor):
            return jnp.where(jax.random.bernoulli(key, keep, x.shape), x.astype(wide) * factor, 0).astype(x.dtype)

        return automatic(drop, x, key, keep, factor, spec=lambda _: explicit_spec(x))  # each device draws its part

    return Model(lambda key: {}, apply)


@model_factory
def rms_norm(features: int, eps: Scalar = 1e-6, *, dtype: DTypeLike = jnp.float32) -> Model:
    """Divides the last axis by its root mean square, ``y = scale * x / sqrt(mean(x ** 2) + eps)``.

    Args:
      features: length of the last axis of ``x``, shape (..., features).
      eps: added to the mean square, >= 0; at 0 a row of zeros gives zeros.
      dtype: the dtype of ``scale``.

    Returns:
      A model with params ``{"scale": (features,)}``, ones at first. It calculates in float32 at least and returns the
      dtype of ``x``.

    Raises:
      ValueError: ``features`` is below 1 or ``eps`` is negative; in ``apply``, ``x`` or the params have another shape.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    >>> model = rms_norm(2)
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.array([5.0, -5.0])).round(3))
    [ 1. -1.]
    """
    features = check_count("features", features)
    check_nonnegative("eps", eps)
    layer, dtype = f"rms_norm({features})", check_dtype("dtype", dtype)

    @automatic_axes(like="inputs", when="params")
    def apply(params, inputs, key=None):
        inputs = _floating(inputs)
        check_features(layer, features, inputs)
        x = inputs.astype(compute_dtype(inputs.dtype))
        scale = parameter(layer, params, "scale", (features,)).astype(x.dtype)
        return (_unit_variance(x, eps, centre=False) * _along_last(scale, x)).astype(inputs.dtype)

    return Model(lambda key: {"scale": jnp.ones((features,), dtype)}, apply)


@model_factory
def layer_norm(features: int, eps: Scalar = 1e-6, *, bias: bool = True, dtype: DTypeLike = jnp.float32) -> Model:
    """Shifts the last axis to mean 0 and scales it to variance 1.

    With ``c = x - mean(x)``::

        y = scale * c / sqrt(mean(c ** 2) + eps) + bias

    Args:
      features: length of the last axis of ``x``, shape (..., features).
      eps: added to the variance, >= 0; at 0 a row of equal numbers gives zeros.
      bias: whether to add a bias.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"scale": (features,), "bias": (features,)}``, ones and zeros at first. It calculates in
      float32 at least and returns the dtype of ``x``.

    Raises:
      ValueError: ``features`` is below 1 or ``eps`` is negative; in ``apply``, ``x`` or the params have another shape.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.

    >>> model = layer_norm(2, eps=0.0)
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.array([1.0, 7.0])))
    [-1.  1.]
    """
    features = check_count("features", features)
    check_nonnegative("eps", eps)
    layer, dtype = f"layer_norm({features})", check_dtype("dtype", dtype)

    def init(key):
        params = {"scale": jnp.ones((features,), dtype)}
        return params | ({"bias": jnp.zeros((features,), dtype)} if bias else {})

    @automatic_axes(like="inputs", when="params")
    def apply(params, inputs, key=None):
        inputs = _floating(inputs)
        check_features(layer, features, inputs)
        x = inputs.astype(compute_dtype(inputs.dtype))
        scale = parameter(layer, params, "scale", (features,)).astype(x.dtype)
        y = _unit_variance(x, eps, centre=True) * _along_last(scale, x)
        if bias:
            y = y + _along_last(parameter(layer, params, "bias", (features,)).astype(x.dtype), x)
        return y.astype(inputs.dtype)

    return Model(init, apply)


def _unit_variance(x: jax.Array, eps: Scalar, *, centre: bool) -> jax.Array:
    """``x``, less its mean if ``centre``, over the root of its mean square plus ``eps``, along the last axis.

    Squares of numbers over 1e19 or under 1e-19 leave float32, so ``x`` is divided by about its largest number first. An
    infinite entry counts as a very large one.
    """
    x, inverse = scaled_to_one(x, eps, (-1,))
    if centre:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(abs_sq(x), axis=-1, keepdims=True)
    return x * safe_rsqrt(mean_square + as_hyperparam(eps, mean_square.dtype) * inverse * inverse)


def scaled_to_one(x: jax.Array, eps: Scalar, axes: tuple[int, ...], axis_name=None) -> tuple[jax.Array, jax.Array]:
    """``x`` times a power of two that brings its largest number, or the root of ``eps``, near 1; and that power.

    The power is one for all of ``axes``, which keep length 1, and of a mapped axis; derivatives take it for a constant.
    """
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axes, keepdims=True, initial=0)
    size = size if axis_name is None else jax.lax.pmax(size, axis_name)
    size = jnp.maximum(size, jnp.sqrt(jax.lax.stop_gradient(jnp.asarray(eps, size.dtype))))
    inverse = 1 / power_of_two(size)
    return clip_parts(x, 4, inverse), inverse  # cuts infinities alone


@model_factory
def activation(name_or_fn: str | Callable[[jax.Array], jax.Array]) -> Model:
    """An elementwise function as a layer.

    Args:
      name_or_fn: a function of one array, or a name such as ``"relu"``; see ``activation_function``.

    Returns:
      A model without parameters.

    Raises:
      ValueError: the name is unknown.

    >>> print(activation("tanh").apply({}, jnp.zeros(2)))
    [0. 0.]
    """
    function = activation_function(name_or_fn)
    return Model(lambda key: {}, lambda params, x, key=None: function(_floating(x)))


@model_factory
def sequential(*models: Model | StatefulModel | Callable[[jax.Array], jax.Array]) -> Model | StatefulModel:
    """Models one after another; each gets its own random key.

    Args:
      *models: models, or functions of one array such as ``jax.nn.relu`` or ``lambda x: x.reshape(len(x), -1)``.

    Returns:
      A model whose params are a tuple, one entry per layer: paths read ``0/kernel``, ``2/kernel``. A function's entry
      is empty. With a ``StatefulModel`` among them, one too, whose state is a tuple likewise; what else its ``apply``
      is given by name, such as ``where``, is handed on to those that have a state.

    Raises:
      ValueError: there are no models; in ``apply``, the params are those of another number of layers.

    >>> model = sequential(dense(4, 8), jax.nn.relu, dense(8, 2))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 4))).shape
    (5, 2)
    """
    if not models:
        raise ValueError("sequential needs at least one model")
    layers = [model if isinstance(model, Model | StatefulModel) else activation(model) for model in models]
    stateful = [isinstance(layer, StatefulModel) for layer in layers]

    def init(key):
        made = [layer.init(part) for layer, part in zip(layers, jax.random.split(key, len(layers)), strict=True)]
        params = tuple(one[0] if has_state else one for one, has_state in zip(made, stateful, strict=True))
        states = tuple(one[1] if has_state else {} for one, has_state in zip(made, stateful, strict=True))
        return (params, states) if any(stateful) else params

    def apply_stateful(params, model_state, x, key=None, **options):
        if len(params) != len(layers):
            raise ValueError(f"sequential has {len(layers)} layers, got the params of {len(params)}")
        if len(model_state) != len(layers):
            raise ValueError(f"sequential has {len(layers)} layers, got the state of {len(model_state)}")
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        states = list(model_state)
        for index, layer in enumerate(layers):
            if stateful[index]:
                x, states[index] = layer.apply(params[index], states[index], x, keys[index], **options)
            else:
                x = layer.apply(params[index], x, keys[index])
        return x, tuple(states)

    def apply(params, x, key=None):
        return apply_stateful(params, ({},) * len(layers), x, key)[0]

    return StatefulModel(init, apply_stateful) if any(stateful) else Model(init, apply)
