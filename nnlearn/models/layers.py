"""Basic layers: each factory returns a ``Model``, and ``sequential`` composes them, with or without state."""

from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype, check_nonnegative, check_number
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import along_last_axis, check_features, to_floating
from nnlearn.models.named import Initializer, activation_function, initializer
from nnlearn.models.parameters import draw_parameter, parameter
from nnlearn.models.scaling import unit_variance
from nnlearn.sharding.axes import automatic, automatic_axes, explicit_spec, linear
from nnlearn.tree import (
    as_hyperparam,
    compute_dtype,
    real_dtype,
    safe_divide,
)
from nnlearn.types import DTypeLike, Model, Scalar, StatefulModel


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
    """A dense layer, ``y = x @ kernel + bias`` over the last axis.

    Args:
      inputs: length of the last axis of ``x``, shape (..., inputs).
      outputs: length of the last axis of ``y``, shape (..., outputs).
      bias: whether to add a bias.
      kernel_init, bias_init: an initialiser or its name; see ``initializer``.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"kernel": (inputs, outputs), "bias": (outputs,)}``. The result has the promoted dtype of
      ``x`` and ``kernel``: to compute in bfloat16, cast both.

    Raises:
      ValueError: if a size is below 1, or an initialiser is unknown; in ``apply``, if ``x`` or the params have the
        wrong shape.

    >>> model = dense(3, 2, kernel_init="ones")
    >>> print(model.apply(model.init(jax.random.key(0)), jnp.array([1.0, 2.0, 3.0])))
    [6. 6.]
    """
    inputs, outputs = check_count("inputs", inputs), check_count("outputs", outputs)
    make_kernel, make_bias = initializer(kernel_init), initializer(bias_init)
    layer, dtype = f"dense({inputs}, {outputs})", check_dtype("dtype", dtype)

    def init(key):
        kernel_key, bias_key = jax.random.split(key)
        params = {"kernel": draw_parameter(make_kernel, kernel_key, (inputs, outputs), dtype)}
        return params | ({"bias": draw_parameter(make_bias, bias_key, (outputs,), dtype)} if bias else {})

    def apply(params, x, key=None):
        x = to_floating(x)
        check_features(layer, inputs, x)
        kernel = parameter(layer, params, "kernel", (inputs, outputs))
        return linear(x, kernel, parameter(layer, params, "bias", (outputs,)) if bias else None)

    return Model(init, apply)


@model_factory
def dropout(rate: Scalar) -> Model:
    """Dropout: in training, zero each element with probability ``rate`` and scale the others to preserve the mean.

    With ``m`` drawn from Bernoulli(1 - rate), ``y = m * x / (1 - rate)``; without a key ``y = x``.

    Args:
      rate: the fraction dropped, in [0, 1). It may be traced; the derivative with respect to it is that of the factor
        ``1 / (1 - rate)`` for a fixed mask.

    Returns:
      A model without parameters.

    Raises:
      ValueError: if ``rate`` is outside [0, 1).

    Source: Srivastava et al. 2014, JMLR 15.

    >>> model = dropout(0.5)
    >>> print(sorted(set(model.apply({}, jnp.ones(50), jax.random.key(0)).tolist())), model.apply({}, jnp.ones(2)))
    [0.0, 2.0] [1. 1.]
    """
    check_number("rate", rate, low=0.0, high=1.0, high_open=True)
    never = isinstance(rate, int | float) and rate == 0  # no random bits are needed then

    def apply(params, x, key=None):
        x = to_floating(x)
        if key is None or never:
            return x
        wide = compute_dtype(x.dtype)
        keep = 1.0 - as_hyperparam(rate, wide)
        factor = safe_divide(1.0, jnp.asarray(keep, real_dtype(wide)))  # 0, not infinity, for a traced rate of 1

        def drop(x, key, keep, factor):
            return jnp.where(jax.random.bernoulli(key, keep, x.shape), x.astype(wide) * factor, 0).astype(x.dtype)

        return automatic(drop, x, key, keep, factor, spec=lambda _: explicit_spec(x))  # each device draws its own part

    return Model(lambda key: {}, apply)


@model_factory
def rms_norm(features: int, eps: Scalar = 1e-6, *, dtype: DTypeLike = jnp.float32) -> Model:
    """RMS normalisation of the last axis, ``y = scale * x / sqrt(mean(x ** 2) + eps)``.

    Args:
      features: length of the last axis of ``x``, shape (..., features).
      eps: added to the mean square, >= 0. With 0 a row of zeros gives zeros.
      dtype: the dtype of ``scale``.

    Returns:
      A model with params ``{"scale": (features,)}``, initially ones. It computes in float32 at least and returns the
      dtype of ``x``.

    Raises:
      ValueError: if ``features`` is below 1 or ``eps`` is negative; in ``apply``, if ``x`` or the params have the wrong
        shape.

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
        inputs = to_floating(inputs)
        check_features(layer, features, inputs)
        x = inputs.astype(compute_dtype(inputs.dtype))
        scale = parameter(layer, params, "scale", (features,)).astype(x.dtype)
        return (unit_variance(x, eps, centre=False) * along_last_axis(scale, x)).astype(inputs.dtype)

    return Model(lambda key: {"scale": jnp.ones((features,), dtype)}, apply)


@model_factory
def layer_norm(features: int, eps: Scalar = 1e-6, *, bias: bool = True, dtype: DTypeLike = jnp.float32) -> Model:
    """Layer normalisation: shift the last axis to mean 0 and scale it to variance 1.

    With ``c = x - mean(x)``::

        y = scale * c / sqrt(mean(c ** 2) + eps) + bias

    Args:
      features: length of the last axis of ``x``, shape (..., features).
      eps: added to the variance, >= 0. With 0 a constant row gives zeros.
      bias: whether to add a bias.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"scale": (features,), "bias": (features,)}``, initially ones and zeros. It computes in
      float32 at least and returns the dtype of ``x``.

    Raises:
      ValueError: if ``features`` is below 1 or ``eps`` is negative; in ``apply``, if ``x`` or the params have the wrong
        shape.

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
        inputs = to_floating(inputs)
        check_features(layer, features, inputs)
        x = inputs.astype(compute_dtype(inputs.dtype))
        scale = parameter(layer, params, "scale", (features,)).astype(x.dtype)
        y = unit_variance(x, eps, centre=True) * along_last_axis(scale, x)
        if bias:
            y = y + along_last_axis(parameter(layer, params, "bias", (features,)).astype(x.dtype), x)
        return y.astype(inputs.dtype)

    return Model(init, apply)


@model_factory
def activation(name_or_fn: str | Callable[[jax.Array], jax.Array]) -> Model:
    """An elementwise function as a layer.

    Args:
      name_or_fn: a function of one array, or a name such as ``"relu"``; see ``activation_function``.

    Returns:
      A model without parameters.

    Raises:
      ValueError: if the name is unknown.

    >>> print(activation("tanh").apply({}, jnp.zeros(2)))
    [0. 0.]
    """
    function = activation_function(name_or_fn)
    return Model(lambda key: {}, lambda params, x, key=None: function(to_floating(x)))


@overload
def sequential(*models: Model | Callable[[jax.Array], jax.Array]) -> Model: ...
@overload
def sequential(*models: Model | StatefulModel | Callable[[jax.Array], jax.Array]) -> Model | StatefulModel: ...
@model_factory
def sequential(*models: Model | StatefulModel | Callable[[jax.Array], jax.Array]) -> Model | StatefulModel:
    """Apply models one after another, each with its own random key.

    Args:
      *models: models, or functions of one array such as ``jax.nn.relu`` or ``lambda x: x.reshape(len(x), -1)``.

    Returns:
      A model whose params are a tuple with one entry per layer, so that paths read ``0/kernel``, ``2/kernel``. The
      entry of a function is empty. If one of the models is a ``StatefulModel``, so is the result, and its state is a
      tuple too. Its ``apply`` passes further keyword arguments, such as ``where``, to the layers with state.

    Raises:
      ValueError: if there are no models; in ``apply``, if the number of layers in the params differs.

    >>> model = sequential(dense(4, 8), jax.nn.relu, dense(8, 2))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 4))).shape
    (5, 2)
    """
    if not models:
        raise ValueError("sequential needs at least one model")
    layers = [model if isinstance(model, Model | StatefulModel) else activation(model) for model in models]

    def init_stateful(key):
        keys = jax.random.split(key, len(layers))
        made = [
            layer.init(part) if isinstance(layer, StatefulModel) else (layer.init(part), {})
            for layer, part in zip(layers, keys, strict=True)
        ]
        params, states = zip(*made, strict=True)
        return params, states

    def init(key):
        return init_stateful(key)[0]

    def apply_stateful(params, model_state, x, key=None, **options):
        if len(params) != len(layers):
            raise ValueError(f"sequential has {len(layers)} layers, got the params of {len(params)}")
        if len(model_state) != len(layers):
            raise ValueError(f"sequential has {len(layers)} layers, got the state of {len(model_state)}")
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        states = list(model_state)
        for index, layer in enumerate(layers):
            if isinstance(layer, StatefulModel):
                x, states[index] = layer.apply(params[index], states[index], x, keys[index], **options)
            else:
                x = layer.apply(params[index], x, keys[index])
        return x, tuple(states)

    def apply(params, x, key=None):
        return apply_stateful(params, ({},) * len(layers), x, key)[0]

    if any(isinstance(layer, StatefulModel) for layer in layers):
        return StatefulModel(init_stateful, apply_stateful)
    return Model(init, apply)
