"""Small networks and losses, written by hand."""

import jax
import jax.numpy as jnp


def mlp_init(sizes, gain=2.0):
    def init(key):
        params = []
        for n, m in zip(sizes[:-1], sizes[1:], strict=True):
            key, sub = jax.random.split(key)
            params.append({"w": jax.random.normal(sub, (n, m)) * (gain / n) ** 0.5, "b": jnp.zeros(m)})
        return params

    return init


def mlp_apply(activation=jax.nn.relu):
    def apply(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return apply


def nll(logits, labels, classes=10):
    return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, classes) * jax.nn.log_softmax(logits), axis=-1))


def mse(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def bce(logits, labels):
    """From one logit of shape (n, 1) and labels (n,)."""
    z = logits[:, 0]
    return jnp.mean(jnp.maximum(z, 0) - z * labels + jnp.log1p(jnp.exp(-jnp.abs(z))))


def conv(x, w, b, stride=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=dims) + b


def convnet_init(key, scale=1.0, bias=0.0):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "c1": {"w": scale * jax.random.normal(k1, (3, 3, 1, 8)) * (2 / 9) ** 0.5, "b": jnp.full(8, bias)},
        "c2": {"w": scale * jax.random.normal(k2, (3, 3, 8, 16)) * (2 / 72) ** 0.5, "b": jnp.full(16, bias)},
        "out": {"w": scale * jax.random.normal(k3, (64, 10)) * (1 / 64) ** 0.5, "b": jnp.zeros(10)},
    }


def convnet_apply(params, x):
    x = jax.nn.relu(conv(x, params["c1"]["w"], params["c1"]["b"], 2))
    x = jax.nn.relu(conv(x, params["c2"]["w"], params["c2"]["b"], 2))
    return x.reshape(x.shape[0], -1) @ params["out"]["w"] + params["out"]["b"]
