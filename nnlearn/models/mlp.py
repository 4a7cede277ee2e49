"""The multi-layer perceptron, plain or residual."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count
from nnlearn.models.factory import model_factory
from nnlearn.models.inputs import check_features
from nnlearn.models.layers import dense, layer_norm, rms_norm
from nnlearn.models.layers import dropout as dropout_layer
from nnlearn.models.named import Initializer, activation_function
from nnlearn.types import DTypeLike, Model, Scalar

# Functions that are odd or nearly linear at 0 preserve the variance of their inputs. The others lose about half of it,
# for which He's factor of 2 compensates.
KERNEL_INIT_FOR = {"tanh": "glorot", "sigmoid": "glorot", "identity": "lecun", "selu": "lecun"}

NORMS = {"layer": layer_norm, "rms": rms_norm}


@model_factory
def mlp(
    sizes: Sequence[int],
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    residual: bool = False,
    norm: Literal["layer", "rms"] | None = None,
    dropout: Scalar = 0.0,
    kernel_init: str | Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """A multi-layer perceptron: dense layers with activations in between.

    The first layer is ``h = dense(x)``; every later layer is::

        z = dense(dropout(activation(norm(h))))
        h = h + z    if residual and the layer is hidden, else z

    Without ``residual`` this is the usual order dense, norm, activation, dropout. With it the blocks are pre-activation
    blocks with identity skip connections. Combine it with ``norm``; otherwise each block doubles the variance.

    Args:
      sizes: features of the inputs, of each hidden layer and of the outputs: ``(64, 128, 128, 10)``.
      activation: a function of one array or its name; see ``activation_function``.
      residual: add skip connections between the hidden layers, which must have one width.
      norm: ``"layer"``, ``"rms"`` or None; normalises before each activation.
      dropout: the fraction of the activations dropped in training, in [0, 1); may be traced.
      kernel_init: an initialiser or its name; by default Glorot for tanh and sigmoid, LeCun for identity and selu, and
        He for all others.
      dtype: the dtype of the parameters.

    Returns:
      A model from inputs (..., sizes[0]) to outputs (..., sizes[-1]), without an activation at the end. Its params are
      ``{"hidden": (layer, ...), "output": layer}``. Each layer is a dict with ``kernel``, ``bias`` and, except for the
      first, ``norm`` if there is one.

    Raises:
      ValueError: if ``sizes`` has fewer than two entries or one below 1, ``norm`` or a name is unknown, ``dropout`` is
        outside [0, 1), or with ``residual`` there are fewer than two hidden layers or their widths differ; in
        ``apply``, if inputs or params have the wrong shape.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

    >>> model = mlp((64, 128, 128, 10), residual=True, norm="layer")
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.ones((32, 64))).shape
    (32, 10)
    >>> jax.tree.map(jnp.shape, params["output"])
    {'bias': (10,), 'kernel': (128, 10), 'norm': {'bias': (128,), 'scale': (128,)}}
    """
    sizes = _check_sizes(sizes, residual)
    function = activation_function(activation)
    if kernel_init is None:
        kernel_init = KERNEL_INIT_FOR.get(activation, "he") if isinstance(activation, str) else "he"
    layers = [
        dense(inputs, outputs, kernel_init=kernel_init, dtype=dtype)
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    if norm not in (None, *NORMS):
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, or None; got {norm!r}")
    norms = [None, *(NORMS[norm](width, dtype=dtype) if norm else None for width in sizes[1:-1])]
    drop = dropout_layer(dropout)
    name = f"mlp({sizes})"

    def init_layer(layer, norm_layer, key):
        params = layer.init(key)
        return params | ({"norm": norm_layer.init(key)} if norm_layer else {})

    def init(key):
        keys = jax.random.split(key, len(layers))
        *hidden, output = [init_layer(*parts) for parts in zip(layers, norms, keys, strict=True)]
        return {"hidden": tuple(hidden), "output": output}

    def apply(params, x, key=None):
        x = jnp.asarray(x)
        check_features(name, sizes[0], x)
        parts = [*params["hidden"], params["output"]]
        if len(parts) != len(layers):
            raise ValueError(f"{name} has {len(layers)} layers, got the params of {len(parts)}")
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        h = layers[0].apply(parts[0], x)
        for index in range(1, len(layers)):
            z = norms[index].apply(parts[index]["norm"], h) if norms[index] else h
            z = layers[index].apply(parts[index], drop.apply({}, function(z), keys[index]))
            h = h + z if residual and index < len(layers) - 1 else z
        return h

    return Model(init, apply)


def _check_sizes(sizes: Sequence[int], residual: bool) -> tuple[int, ...]:
    if isinstance(sizes, int) or len(sizes) < 2:
        raise ValueError(f"sizes must name at least the inputs and the outputs, such as (64, 10), got {sizes!r}")
    widths = tuple(check_count(f"sizes[{index}]", size) for index, size in enumerate(sizes))
    hidden = widths[1:-1]
    if residual and (len(hidden) < 2 or len(set(hidden)) > 1):
        raise ValueError(
            f"residual=True needs at least two hidden layers of equal width, but sizes={widths} has hidden "
            f"widths {hidden}; use for example {(widths[0], 128, 128, widths[-1])}, or residual=False"
        )
    return widths
