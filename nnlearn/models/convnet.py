"""A residual convolutional network for images."""

from collections.abc import Callable, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.losses.arguments import as_boolean, lead_over
from nnlearn.models.convolution import conv, global_average_pool
from nnlearn.models.factory import model_factory
from nnlearn.models.layers import activation as activation_layer
from nnlearn.models.layers import dense, sequential
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.normalization import batch_norm, group_norm
from nnlearn.types import ArrayLike, DTypeLike, Model, Scalar, StatefulModel


@overload
def convnet(
    inputs: int,
    outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 1,
    stride: int = 1,
    norm: Literal["batch"] = "batch",
    groups: int = 8,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: Scalar = 0.0,
    momentum: Scalar = 0.9,
    axis_name: str | tuple[str, ...] | None = None,
    method: Literal["auto", "convolution", "patches"] = "auto",
    dtype: DTypeLike = jnp.float32,
) -> StatefulModel: ...
@overload
def convnet(
    inputs: int,
    outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 1,
    stride: int = 1,
    norm: Literal["group"] | None,
    groups: int = 8,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: Scalar = 0.0,
    momentum: Scalar = 0.9,
    axis_name: str | tuple[str, ...] | None = None,
    method: Literal["auto", "convolution", "patches"] = "auto",
    dtype: DTypeLike = jnp.float32,
) -> Model: ...
@model_factory
def convnet(
    inputs: int,
    outputs: int,
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 1,
    stride: int = 1,
    norm: Literal["batch", "group"] | None = "batch",
    groups: int = 8,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: Scalar = 0.0,
    momentum: Scalar = 0.9,
    axis_name: str | tuple[str, ...] | None = None,
    method: Literal["auto", "convolution", "patches"] = "auto",
    dtype: DTypeLike = jnp.float32,
) -> Model | StatefulModel:
    """A residual network: a convolution, stages of residual blocks, global average pooling and a linear layer.

    Each block is two 3 x 3 convolutions, each after normalisation and activation, and a skip connection::

        h = skip(h) + conv(activation(norm(conv(activation(norm(h))))))

    The first block of every stage but the first halves rows and columns. Where a block does so or changes the width,
    ``skip`` is a 1 x 1 convolution; elsewhere it is the identity.

    Args:
      inputs: channels of the images, shape (..., rows, columns, inputs).
      outputs: length of the last axis of the result, shape (..., outputs), such as the number of classes.
      widths: channels of each stage.
      blocks: number of residual blocks in each stage, one for all or one per stage.
      stride: of the first convolution; 2 or more for larger images or less computation.
      norm: ``"batch"``, ``"group"`` or None. With None keep the network shallow, as each block doubles the variance.
      groups: number of groups with ``"group"``; must divide each width.
      activation: a function of one array or its name; see ``activation_function``.
      dropout: fraction of the pooled features dropped in training, in [0, 1); may be traced.
      momentum, axis_name: see ``batch_norm``.
      method: see ``conv``.
      dtype: the dtype of the parameters.

    Returns:
      With batch normalisation a ``StatefulModel`` whose ``apply`` takes ``where``, booleans of shape (...): images that
      are False are left out of the statistics. Otherwise a ``Model``.

    Raises:
      ValueError: if a size is below 1, ``blocks`` has another length than ``widths``, or a name is unknown; in
        ``apply``, if the images have another number of channels.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

    >>> model = convnet(1, 10)
    >>> run = lambda key: model.apply(*model.init(key), jnp.ones((4, 28, 28, 1)), key)
    >>> logits, state = jax.eval_shape(run, jax.random.key(0))
    >>> logits.shape
    (4, 10)
    """
    widths = [check_count(f"widths[{index}]", width) for index, width in enumerate(widths)]
    blocks = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
    if not widths or len(blocks) != len(widths):
        raise ValueError(f"blocks={blocks} must be one int, or one for each of widths={widths}")
    if norm not in ("batch", "group", None):
        raise ValueError(f"norm must be batch, group, or None; got {norm!r}")

    def convolution(before: int, width: int, size: int, step: int = 1) -> Model:
        bias = norm is None  # a norm has its own bias
        return conv(before, width, size, stride=step, bias=bias, kernel_init="he", method=method, dtype=dtype)

    def normalized(width: int) -> list[Model | StatefulModel]:
        layers: list[Model | StatefulModel] = [activation_layer(activation)]
        if norm == "batch":
            layers.insert(0, batch_norm(width, momentum=momentum, axis_name=axis_name, dtype=dtype))
        if norm == "group":
            layers.insert(0, group_norm(width, groups, dtype=dtype))
        return layers

    def block(before: int, width: int, step: int) -> Model | StatefulModel:
        inner = sequential(
            *normalized(before), convolution(before, width, 3, step), *normalized(width), convolution(width, width, 3)
        )
        same = before == width and step == 1
        return residual(inner, None if same else convolution(before, width, 1, step))

    layers: list[Model | StatefulModel] = [convolution(inputs, widths[0], 3, stride)]
    before = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(check_count(f"blocks[{stage}]", count)):
            layers.append(block(before, width, step=2 if stage and not index else 1))
            before = width
    head = dense(before, outputs, dtype=dtype)
    network = sequential(*layers, *normalized(before), global_average_pool(), dropout_layer(dropout), head)
    return network if isinstance(network, Model) else _masked(network)


@overload
def residual(inner: Model, skip: Model | None = None) -> Model: ...
@overload
def residual(inner: StatefulModel, skip: Model | None = None) -> StatefulModel: ...
@overload
def residual(inner: Model | StatefulModel, skip: Model | None = None) -> Model | StatefulModel: ...
@model_factory
def residual(inner: Model | StatefulModel, skip: Model | None = None) -> Model | StatefulModel:
    """Add a skip connection, ``inner(x) + skip(x)``.

    Args:
      inner: a model.
      skip: a model from ``x`` to an array of the shape of ``inner(x)``; None for the identity.

    Returns:
      A ``StatefulModel`` with the state of ``inner`` if ``inner`` is one, else a ``Model``. Its params are ``{"inner":
      ..., "skip": ...}``, without ``skip`` if that is None.

    Source: He et al. 2015, arXiv:1512.03385.

    >>> model = residual(dense(2, 2, kernel_init="ones"))
    >>> model.apply(model.init(jax.random.key(0)), jnp.array([1.0, 2.0]))
    Array([4., 5.], dtype=float32)
    """

    def with_skip(inner_params, key):
        return {"inner": inner_params} | ({} if skip is None else {"skip": skip.init(key)})

    def skipped(params, x, key):
        return x if skip is None else skip.apply(params["skip"], x, key)

    if isinstance(inner, StatefulModel):

        def init_stateful(key):
            inner_key, skip_key = jax.random.split(key)
            params, model_state = inner.init(inner_key)
            return with_skip(params, skip_key), model_state

        def apply_stateful(params, model_state, x, key=None, **options):
            inner_key, skip_key = (None, None) if key is None else jax.random.split(key)
            y, model_state = inner.apply(params["inner"], model_state, x, inner_key, **options)
            return y + skipped(params, x, skip_key), model_state

        return StatefulModel(init_stateful, apply_stateful)

    def init(key):
        inner_key, skip_key = jax.random.split(key)
        return with_skip(inner.init(inner_key), skip_key)

    def apply(params, x, key=None):
        inner_key, skip_key = (None, None) if key is None else jax.random.split(key)
        return inner.apply(params["inner"], x, inner_key) + skipped(params, x, skip_key)

    return Model(init, apply)


def _masked(network: StatefulModel) -> StatefulModel:
    """Replace the images that ``where`` leaves out by zeros, so that their values reach no gradient."""

    def apply(params, model_state, images, key=None, where: ArrayLike | None = None):
        if where is None:
            return network.apply(params, model_state, images, key)
        images, where = jnp.asarray(images), as_boolean(where)
        counts = lead_over("where", where, images.shape)
        return network.apply(params, model_state, jnp.where(counts, images, 0), key, where=where)

    return StatefulModel(network.init, apply)
