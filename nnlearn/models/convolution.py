"""Convolutions and pooling over one, two or more axes of positions, with channels last.

Inputs have shape (..., time, channels), (..., rows, columns, channels) and so on; the leading axes are examples.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_dtype
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import along_last_axis, check_features, to_floating
from nnlearn.models.named import Initializer, initializer
from nnlearn.models.parameters import draw_parameter, parameter
from nnlearn.sharding.axes import automatic_axes
from nnlearn.tree import compute_dtype, widest
from nnlearn.types import DTypeLike, Model

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]
METHODS = ("auto", "convolution", "patches")


@model_factory
def conv(
    inputs: int,
    outputs: int,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    groups: int = 1,
    bias: bool = True,
    dimensions: int = 2,
    method: Literal["auto", "convolution", "patches"] = "auto",
    kernel_init: str | Initializer = "lecun",
    bias_init: str | Initializer = "zeros",
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """A convolution over the axes of positions.

    In one dimension, with ``p`` zeros before ``x``::

        y[t, o] = bias[o] + sum_{k, i} kernel[k, i, o] x[stride t + dilation k - p, i]

    Args:
      inputs: channels of ``x``, shape (..., *positions, inputs) with ``dimensions`` axes of positions.
      outputs: channels of ``y``, shape (..., *positions', outputs).
      kernel_size: size of the kernel, one int for all dimensions or one per dimension.
      stride: positions between outputs, likewise; ``"SAME"`` gives ``ceil(positions / stride)`` outputs.
      dilation: positions between kernel elements, likewise.
      padding: ``"SAME"`` (zeros on both sides, an odd one at the end), ``"VALID"`` (none), or a pair (before, after)
        for each dimension; ``[(kernel_size - 1, 0)]`` is causal.
      groups: number of channel groups that are convolved separately; must divide ``inputs`` and ``outputs``.
      bias: whether to add a bias.
      dimensions: number of axes of positions.
      method: the implementation. ``"convolution"`` is XLA's own operation, ``"patches"`` one matrix product with the
        extracted patches; their results differ by rounding. On a CPU ``"patches"`` takes about 1.3 times as long for
        one network, but a fifth of the time or less for vmapped networks with separate kernels. ``"auto"`` is
        ``"patches"`` on a CPU and ``"convolution"`` elsewhere.
      kernel_init, bias_init: an initialiser or its name; see ``initializer``.
      dtype: the dtype of the parameters.

    Returns:
      A model with params ``{"kernel": (*kernel_size, inputs // groups, outputs), "bias": (outputs,)}``, of the dtype
      that JAX promotes ``x`` and ``kernel`` to.

    Raises:
      ValueError: if a size is below 1, ``groups`` does not divide the channels, a name is unknown; in ``apply``, if
        ``x`` has too few axes, fewer positions than the kernel covers, or other channels, or the params have the wrong
        shape.

    Source: LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition".

    >>> model = conv(1, 4, 3, stride=2)
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((10, 28, 28, 1))).shape
    (10, 14, 14, 4)
    >>> moving_sum = conv(1, 1, 2, dimensions=1, padding="VALID", kernel_init="ones")
    >>> moving_sum.apply(moving_sum.init(jax.random.key(0)), jnp.array([[1.0], [2.0], [4.0]])).ravel()
    Array([3., 6.], dtype=float32)
    """
    inputs, outputs, groups = (
        check_count("inputs", inputs),
        check_count("outputs", outputs),
        check_count("groups", groups),
    )
    if inputs % groups or outputs % groups:
        raise ValueError(f"groups={groups} must divide inputs={inputs} and outputs={outputs}")
    window = _Window("kernel_size", kernel_size, stride, dilation, padding, dimensions)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    make_kernel, make_bias = initializer(kernel_init), initializer(bias_init)
    layer, dtype = f"conv({inputs}, {outputs}, {window.size})", check_dtype("dtype", dtype)
    kernel_shape = (*window.size, inputs // groups, outputs)

    def init(key):
        if not bias:  # a split takes a while to compile
            return {"kernel": draw_parameter(make_kernel, key, kernel_shape, dtype)}
        kernel_key, bias_key = jax.random.split(key)
        return {
            "kernel": draw_parameter(make_kernel, kernel_key, kernel_shape, dtype),
            "bias": draw_parameter(make_bias, bias_key, (outputs,), dtype),
        }

    @automatic_axes(like="x")
    def apply(params, x, key=None):
        x = to_floating(x)
        check_features(layer, inputs, x)
        kernel = parameter(layer, params, "kernel", kernel_shape)
        x, kernel = x.astype(widest(x, kernel)), kernel.astype(widest(x, kernel))
        examples, pads = window.flatten(layer, x)
        patches = method == "patches" or (method == "auto" and jax.default_backend() == "cpu")
        y = (_convolve_patches if patches else _convolve)(examples, kernel, window, pads, groups)
        y = y.reshape(x.shape[: -1 - window.dimensions] + y.shape[1:])
        return y + along_last_axis(parameter(layer, params, "bias", (outputs,)), y) if bias else y

    return Model(init, apply)


def _convolve(
    x: jax.Array, kernel: jax.Array, window: "_Window", pads: list[tuple[int, int]], groups: int
) -> jax.Array:
    letters = "".join(
        chr(ord("a") + axis) for axis in range(window.dimensions)
    )  # only where N, C, I and O stand counts
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window.stride,
        pads,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


def _convolve_patches(
    x: jax.Array, kernel: jax.Array, window: "_Window", pads: list[tuple[int, int]], groups: int
) -> jax.Array:
    channels, outputs = x.shape[-1], kernel.shape[-1]
    seen = jnp.stack(window.views(x, pads), axis=-2)  # (examples, *positions, places of the kernel, channels)
    positions, places = seen.shape[:-2], seen.shape[-2]
    if groups == 1:
        return seen.reshape(*positions, places * channels) @ kernel.reshape(places * channels, outputs)
    seen = seen.reshape(-1, places, groups, channels // groups)
    kernel = kernel.reshape(places, channels // groups, groups, outputs // groups)
    return jnp.einsum("npgi,pigo->ngo", seen, kernel).reshape(*positions, outputs)


@model_factory
def max_pool(
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    dimensions: int = 2,
) -> Model:
    """Max pooling: the maximum of each window, per channel.

    Args:
      window: size of the window, one int for all dimensions or one per dimension.
      stride: positions between windows, likewise; None for adjacent windows.
      padding: as in ``conv``, but with -inf; a window of padding alone gives -inf.
      dimensions: number of axes of positions.

    Returns:
      A model without parameters, from inputs (..., *positions, channels). Among equal maxima the first gets the
      gradient.

    Raises:
      ValueError: if a size is below 1; in ``apply``, if the inputs have too few axes or fewer positions than the
        window.

    Source: Weng, Ahuja and Huang 1992, "Cresceptron".

    >>> max_pool(2, dimensions=1).apply({}, jnp.array([[1.0], [3.0], [2.0], [0.0]])).ravel()
    Array([3., 2.], dtype=float32)
    """
    windows = _Window("window", window, window if stride is None else stride, 1, padding, dimensions)

    def pool(x, pads):
        every = ((0, 0), *pads, (0, 0))
        # A Python number: JAX recognises a maximum, whose derivative it knows, only with that.
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *windows.size, 1), (1, *windows.stride, 1), every)

    return _pooling("max_pool", windows, pool)


@model_factory
def average_pool(
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    dimensions: int = 2,
) -> Model:
    """Average pooling: the mean of each window, per channel, without the padding.

    Args:
      window, stride, padding, dimensions: as in ``max_pool``.

    Returns:
      A model without parameters, from inputs (..., *positions, channels). It computes in float32 at least. A window of
      padding alone gives 0.

    Raises:
      ValueError: if a size is below 1; in ``apply``, if the inputs have too few axes or fewer positions than the
        window.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".

    >>> average_pool(2, dimensions=1).apply({}, jnp.array([[1.0], [3.0], [2.0], [0.0]])).ravel()
    Array([2., 1.], dtype=float32)
    """
    windows = _Window("window", window, window if stride is None else stride, 1, padding, dimensions)

    def pool(x, pads):
        total = jnp.asarray(sum(windows.views(x.astype(compute_dtype(x.dtype)), pads)))
        count = sum(windows.views(jnp.ones((1, *x.shape[1:-1], 1), total.dtype), pads))
        return (total / jnp.maximum(count, 1)).astype(x.dtype)

    return _pooling("average_pool", windows, pool)


@model_factory
def global_average_pool(dimensions: int = 2) -> Model:
    """Global average pooling: the mean over all positions, (..., *positions, channels) to (..., channels).

    Args:
      dimensions: number of axes of positions.

    Returns:
      A model without parameters. It computes in float32 at least.

    Raises:
      ValueError: if ``dimensions`` is below 1; in ``apply``, if the inputs have too few axes.

    Source: Lin, Chen and Yan 2013, arXiv:1312.4400.

    >>> global_average_pool().apply({}, jnp.ones((5, 8, 8, 3))).shape
    (5, 3)
    """
    dimensions = check_count("dimensions", dimensions)

    @automatic_axes(like="x")
    def apply(params, x, key=None):
        x = to_floating(x)
        _check_axes("global_average_pool", dimensions, x)
        axes = tuple(range(x.ndim - 1 - dimensions, x.ndim - 1))
        return jnp.mean(x, axis=axes, dtype=compute_dtype(x.dtype)).astype(x.dtype)

    return Model(lambda key: {}, apply)


def _pooling(layer: str, window: "_Window", pool) -> Model:
    @automatic_axes(like="x")
    def apply(params, x, key=None):
        x = to_floating(x)
        examples, pads = window.flatten(layer, x)
        y = pool(examples, pads)
        return y.reshape(x.shape[: -1 - window.dimensions] + y.shape[1:])

    return Model(lambda key: {}, apply)


class _Window:
    """A sliding window: its size, stride, dilation and padding, one value per dimension."""

    def __init__(self, name, size, stride, dilation, padding, dimensions):
        self.dimensions = check_count("dimensions", dimensions)
        self.size = self._each(name, size)
        self.stride, self.dilation = self._each("stride", stride), self._each("dilation", dilation)
        self.reach = tuple(step * (size - 1) + 1 for size, step in zip(self.size, self.dilation, strict=True))
        if not isinstance(padding, str):
            padding = tuple((int(before), int(behind)) for before, behind in padding)
            if len(padding) != self.dimensions or min(itertools.chain(*padding)) < 0:
                raise ValueError(f"padding must be {self.dimensions} pairs of ints >= 0, got {padding}")
        elif padding not in ("SAME", "VALID"):
            raise ValueError(f'padding must be "SAME", "VALID" or a pair for each dimension, got {padding!r}')
        self.padding = padding

    def _each(self, name, value):
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self.dimensions
        if len(values) != self.dimensions:
            raise ValueError(f"{name}={value} must be one int, or one for each of dimensions={self.dimensions}")
        return tuple(check_count(name, one) for one in values)

    def flatten(self, layer, x):
        """Flatten the leading axes of ``x`` to one, and compute the padding of each dimension."""
        _check_axes(layer, self.dimensions, x)
        positions = x.shape[-1 - self.dimensions : -1]
        pads = self.padding
        if isinstance(pads, str):
            pads = jax.lax.padtype_to_pads(positions, self.reach, self.stride, pads)
        for length, reach, (before, behind) in zip(positions, self.reach, pads, strict=True):
            if length + before + behind < reach:
                raise ValueError(
                    f"{layer}: the window covers {self.reach} positions, but there are only {positions}, padded by "
                    f'{tuple(pads)}; use a smaller one, or padding="SAME"'
                )
        return x.reshape(math.prod(x.shape[: -1 - self.dimensions]), *x.shape[-1 - self.dimensions :]), list(pads)

    def views(self, x, pads):
        """The inputs at each element of the window: a list of arrays of shape (examples, *outputs, channels)."""
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        counts = [
            (length - reach) // step + 1
            for length, reach, step in zip(padded.shape[1:-1], self.reach, self.stride, strict=True)
        ]
        found = []
        for place in itertools.product(*map(range, self.size)):
            starts = [at * step for at, step in zip(place, self.dilation, strict=True)]
            ends = [
                start + step * (count - 1) + 1 for start, step, count in zip(starts, self.stride, counts, strict=True)
            ]
            found.append(jax.lax.slice(padded, (0, *starts, 0), (len(x), *ends, x.shape[-1]), (1, *self.stride, 1)))
        return found


def _check_axes(layer: str, dimensions: int, x: jax.Array) -> None:
    if x.ndim < dimensions + 1:
        raise ValueError(
            f"{layer} expects inputs of shape (..., *positions, channels) with {dimensions} axes of positions, got "
            f"shape {x.shape}; add an axis for the channels with x[..., None], or set dimensions"
        )
