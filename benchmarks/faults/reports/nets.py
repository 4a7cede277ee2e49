"""Attention and a gated recurrent unit, by hand."""

import jax
import jax.numpy as jnp
import numpy as np


def attend(p, x, mask=None):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    return jax.nn.softmax(scores, axis=-1) @ v @ p["o"]


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def block_init(key, d):
    ks = jax.random.split(key, 6)
    p = {name: jax.random.normal(k, (d, d)) / np.sqrt(d) for name, k in zip("qkvo", ks, strict=False)}
    return {
        **p,
        "up": jax.random.normal(ks[4], (d, 4 * d)) / np.sqrt(d),
        "down": jax.random.normal(ks[5], (4 * d, d)) / np.sqrt(4 * d),
    }


def block(p, x, mask=None):
    x = x + attend(p, norm(x), mask)
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def gru_init(key, n, m):
    a, b = jax.random.split(key)
    return {
        "wx": jax.random.normal(a, (n, 3 * m)) / np.sqrt(n),
        "wh": jax.random.normal(b, (m, 3 * m)) / np.sqrt(m),
        "b": jnp.zeros(3 * m),
    }


def gru(p, x):
    m = p["wh"].shape[0]

    def cell(h, xt):
        gx, gh = xt @ p["wx"] + p["b"], h @ p["wh"]
        r = jax.nn.sigmoid(gx[:, :m] + gh[:, :m])
        z = jax.nn.sigmoid(gx[:, m : 2 * m] + gh[:, m : 2 * m])
        h = (1 - z) * h + z * jnp.tanh(gx[:, 2 * m :] + r * gh[:, 2 * m :])
        return h, h

    return jax.lax.scan(cell, jnp.zeros((x.shape[0], m)), x.swapaxes(0, 1))[1].swapaxes(0, 1)
