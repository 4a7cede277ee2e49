"""The training problems of ``train_step.py``: pure losses on plain trees, which every rival can use unchanged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.losses import cross_entropy
from nnlearn.models import mlp


class Problem(NamedTuple):
    """A model to train.

    Attributes:
      params: the initial parameters.
      batch: the batch of every step.
      loss_fn: ``loss_fn(params, batch, key) -> loss``; no model uses random numbers.
    """

    params: Any
    batch: Any
    loss_fn: Callable[[Any, Any, Any], jax.Array]


def digits_mlp() -> Problem:
    """A 64-128-128-10 perceptron on batches of 32, so small that overhead dominates a step."""
    model, keys = mlp((64, 128, 128, 10)), jax.random.split(jax.random.key(0), 3)
    batch = jax.random.normal(keys[1], (32, 64)), jax.random.randint(keys[2], (32,), 0, 10)

    def loss_fn(params, batch, key):
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    return Problem(model.init(keys[0]), batch, loss_fn)


def transformer(layers: int = 24, d: int = 64, ff: int = 256, heads: int = 4) -> Problem:
    """24 pre-norm layers with 288 leaves and 1.19 million parameters, on 4 sequences of length 16."""
    keys = jax.random.split(jax.random.key(0), 3)

    def init_layer(key):
        shapes = {"wq": (d, d), "wk": (d, d), "wv": (d, d), "wo": (d, d), "w1": (d, ff), "w2": (ff, d)}
        draws = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
        norms = {name: {"scale": jnp.ones(d), "bias": jnp.zeros(d)} for name in ("ln1", "ln2")}
        matrices = {name: 0.05 * jax.random.normal(key, shape) for key, (name, shape) in draws}
        return norms | matrices | {"b1": jnp.zeros(ff), "b2": jnp.zeros(d)}

    def layer(params, x_btd):
        b, t, _ = x_btd.shape
        h_btd = _layer_norm(params["ln1"], x_btd)
        q, k, v = ((h_btd @ params[name]).reshape(b, t, heads, d // heads) for name in ("wq", "wk", "wv"))
        weights_bhts = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / (d // heads) ** 0.5)
        x_btd = x_btd + jnp.einsum("bhts,bshd->bthd", weights_bhts, v).reshape(b, t, d) @ params["wo"]
        h_btd = _layer_norm(params["ln2"], x_btd)
        return (
            x_btd
            + jax.nn.gelu(h_btd @ params["w1"] + _along_last(params["b1"], 3)) @ params["w2"]
            + _along_last(params["b2"], 3)
        )

    def loss_fn(params, batch, key):
        x_btd, targets_btd = batch
        for layer_params in params:
            x_btd = layer(layer_params, x_btd)
        return jnp.mean((x_btd - targets_btd) ** 2)

    batch = tuple(jax.random.normal(key, (4, 16, d)) for key in keys[1:])
    return Problem([init_layer(key) for key in jax.random.split(keys[0], layers)], batch, loss_fn)


def convnet(widths: tuple[int, ...] = (16, 32, 64), groups: int = 4) -> Problem:
    """A residual network with group normalisation and one block per width, 25 leaves, on 8 images of 32 x 32 x 3."""
    keys = jax.random.split(jax.random.key(0), 3)
    init_keys = iter(jax.random.split(keys[0], 3 * len(widths) + 2))

    def kernel(size, inputs, outputs):
        return (2 / (size * size * inputs)) ** 0.5 * jax.random.normal(next(init_keys), (size, size, inputs, outputs))

    def norm(width):
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def init_block(inputs, outputs):
        convs = {"conv1": kernel(3, inputs, outputs), "conv2": kernel(3, outputs, outputs)}
        skip = {} if inputs == outputs else {"skip": kernel(1, inputs, outputs)}
        return convs | skip | {"norm1": norm(outputs), "norm2": norm(outputs)}

    def block(params, x_bhwc, stride):
        h_bhwc = jax.nn.relu(_group_norm(params["norm1"], _conv(x_bhwc, params["conv1"], stride), groups))
        h_bhwc = _group_norm(params["norm2"], _conv(h_bhwc, params["conv2"]), groups)
        skip_bhwc = _conv(x_bhwc, params["skip"], stride) if "skip" in params else x_bhwc
        return jax.nn.relu(skip_bhwc + h_bhwc)

    def loss_fn(params, batch, key):
        x_bhwc = jax.nn.relu(_group_norm(params["norm"], _conv(batch[0], params["stem"]), groups))
        for index, block_params in enumerate(params["blocks"]):
            x_bhwc = block(block_params, x_bhwc, 1 if index == 0 else 2)
        logits_bc = jnp.mean(x_bhwc, axis=(1, 2)) @ params["kernel"] + _along_last(params["bias"], 2)
        return cross_entropy(logits_bc, batch[1])

    blocks = [init_block(*pair) for pair in zip((widths[0], *widths[:-1]), widths, strict=True)]
    head = {"kernel": kernel(1, widths[-1], 10)[0, 0], "bias": jnp.zeros(10)}
    params = {"stem": kernel(3, 3, widths[0]), "norm": norm(widths[0]), "blocks": blocks} | head
    batch = jax.random.normal(keys[1], (8, 32, 32, 3)), jax.random.randint(keys[2], (8,), 0, 10)
    return Problem(params, batch, loss_fn)


def _along_last(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def _layer_norm(params: dict, x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    scale, bias = (_along_last(params[name], x.ndim) for name in ("scale", "bias"))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def _group_norm(params: dict, x_bhwc: jax.Array, groups: int) -> jax.Array:
    b, h, w, c = x_bhwc.shape
    x = x_bhwc.reshape(b, h * w, groups, c // groups)
    mean = jnp.mean(x, axis=(1, 3), keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=(1, 3), keepdims=True)
    x = ((x - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(b, h, w, c)
    return x * _along_last(params["scale"], 4) + _along_last(params["bias"], 4)


def _conv(x_bhwc: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_bhwc, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


PROBLEMS = {"mlp": digits_mlp, "transformer": transformer, "convnet": convnet}
QUICK_PROBLEMS = {"mlp": digits_mlp, "transformer": lambda: transformer(layers=2), "convnet": lambda: convnet((8, 16))}
