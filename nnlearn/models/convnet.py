"""A residual convolutional network for images."""

from collections.abc import Callable, Sequence
from typing import Literal

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
    """A convolution, stages of residual blocks, and a linear map of the mean over all positions.

    Each block adds to what it is given, two 3 x 3 convolutions behind their normalisation and activation::

        h = skip(h) + conv(activation(norm(conv(activation(norm(h))))))

    The first block of every stage but the first halves rows and columns, and its ``skip`` is a 1 x 1 convolution; so it
    is wherever the width changes. Elsewhere ``skip`` is the identity.

    Args:
      inputs: channels of the images, shape (..., rows, columns, inputs).
      outputs: numbers to give out, shape (..., outputs), such as one for each class.
      widths: channels of each stage.
      blocks: residual blocks in each stage, one number for all or one for each.
      stride: of the first convolution: 2 or more for larger images, or less work.
      norm: ``"batch"``, ``"group"`` or None; with None keep the network shallow, for the variance doubles with every
        block.
      groups: of ``"group"``; must divide each width.
      activation: a function of one array or its name; see ``activation_function``.
      dropout: the fraction of the last mean dropped in training, in [0, 1); may be traced.
      momentum, axis_name: of ``batch_norm``.
      method: of ``conv``.
      dtype: the dtype of the parameters.

    Returns:
      A ``StatefulModel`` with batch normalisation, whose ``apply`` takes ``where``, booleans of shape (...): images
      that do not count in the statistics, whatever they hold. Otherwise a ``Model``.

    Raises:
      ValueError: a size is below 1, ``blocks`` is not one number for each stage, a name is unknown; in ``apply``, the
        images have another number of channels.

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
        raise ValueError(f"blocks={blocks} must be one number for each of widths={widths}")
    if norm not in ("batch", "group", None):
        raise ValueError(f"norm must be batch, group, or None; got {norm!r}")
    shared = {"bias": norm is None, "kernel_init": "he", "method": method, "dtype": dtype}

    def normalized(width):
        layers = [activation_layer(activation)]
        if norm == "batch":
            layers.insert(0, batch_norm(width, momentum=momentum, axis_name=axis_name, dtype=dtype))
        if norm == "group":
            layers.insert(0, group_norm(width, groups, dtype=dtype))
        return layers

    def block(before, width, step):
        inner = sequential(
            *normalized(before), conv(before, width, 3, stride=step, **shared),
            *normalized(width), conv(width, width, 3, **shared),
        )  # fmt: skip
        same = before == width and step == 1
        return residual(inner, None if same else conv(before, width, 1, stride=step, **shared))

    layers, before = [conv(inputs, widths[0], 3, stride=stride, **shared)], widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(check_count(f"blocks[{stage}]", count)):
            layers.append(block(before, width, step=2 if stage and not index else 1))
            before = width
    head = dense(before, outputs, dtype=dtype)
    network = sequential(*layers, *normalized(before), global_average_pool(), dropout_layer(dropout), head)
    return network if isinstance(network, Model) else _masked(network)


@model_factory
def residual(inner: Model | StatefulModel, skip: Model | None = None) -> Model | StatefulModel:
    """``inner(x) + skip(x)``.

    Args:
      inner: a model.
      skip: a model that makes of ``x`` what has the shape of ``inner(x)``; None for ``x`` itself.

    Returns:
      A ``StatefulModel`` if ``inner`` is one, whose state is ``inner``'s, else a ``Model``. Its params are ``{"inner":
      ..., "skip": ...}``, the latter only if there is one.

    Source: He et al. 2015, arXiv:1512.03385.

    >>> model = residual(dense(2, 2, kernel_init="ones"))
    >>> model.apply(model.init(jax.random.key(0)), jnp.array([1.0, 2.0]))
    Array([4., 5.], dtype=float32)
    """
    has_state = isinstance(inner, StatefulModel)

    def init(key):
        inner_key, skip_key = jax.random.split(key)
        made = inner.init(inner_key)
        params = {"inner": made[0] if has_state else made} | ({} if skip is None else {"skip": skip.init(skip_key)})
        return (params, made[1]) if has_state else params

    def skipped(params, x, key):
        return x if skip is None else skip.apply(params["skip"], x, key)

    def apply_stateful(params, model_state, x, key=None, **options):
        inner_key, skip_key = (None, None) if key is None else jax.random.split(key)
        y, model_state = inner.apply(params["inner"], model_state, x, inner_key, **options)
        return y + skipped(params, x, skip_key), model_state

    def apply(params, x, key=None):
        inner_key, skip_key = (None, None) if key is None else jax.random.split(key)
        return inner.apply(params["inner"], x, inner_key) + skipped(params, x, skip_key)

    return StatefulModel(init, apply_stateful) if has_state else Model(init, apply)


def _masked(network: StatefulModel) -> StatefulModel:
    """The network with blank images for those that do not count, so that nothing they hold reaches a gradient."""

    def apply(params, model_state, images, key=None, where: ArrayLike | None = None):
        if where is None:
            return network.apply(params, model_state, images, key)
        images, where = jnp.asarray(images), as_boolean(where)
        counts = lead_over("where", where, images.shape)
        return network.apply(params, model_state, jnp.where(counts, images, 0), key, where=where)

    return StatefulModel(network.init, apply)
