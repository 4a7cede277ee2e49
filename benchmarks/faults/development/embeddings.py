"""Embeddings that are trained on pairs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from benchmarks.faults.case import Fault, Program
from benchmarks.faults.sources import digits
from nnlearn.models import from_linen


class Embed(nn.Module):
    """Images to vectors of length 16."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(16)(x)


def direction(z):
    return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-6)


def contrast(temperature=0.1):
    """Pairs of outputs (n, 2, d): each first view against all second ones."""

    def loss(z, _):
        a, b = direction(z[:, 0]), direction(z[:, 1])
        logits = a @ b.T / temperature
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))

    return loss


def retrieval(z, _):
    """The share of first views whose nearest second view is their own."""
    a, b = direction(z[:, 0]), direction(z[:, 1])
    return jnp.mean(jnp.argmax(a @ b.T, 1) == jnp.arange(len(a)))


def halves(part, seed):
    """Two views of an image: its odd and its even pixels, with some noise."""
    x = part[0] + 0.05 * np.random.default_rng(seed).normal(size=part[0].shape).astype(np.float32)
    views = np.stack([np.where(np.arange(64) % 2 == 0, x, 0), np.where(np.arange(64) % 2 == 1, x, 0)], 1)
    return views.astype(np.float32), part[1]


def hundred(part):
    return part[0][:100], part[1][:100]


def digit_pairs():
    train, validation, test = (halves(part, seed) for seed, part in enumerate(digits(1200, seed=8)))
    model = from_linen(Embed(), jnp.zeros((1, 2, 64)))
    return Program(
        name="digit-pairs", kind="contrastive", train=train, validation=hundred(validation), test=hundred(test),
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=contrast(), measure=retrieval, metric="retrieval",
        tx=lambda hp: nnlearn.adamw(hp["learning_rate"], weight_decay=0.01), hparams={"learning_rate": 3e-3},
        batch_size=100, steps=300,
    )  # fmt: skip


PROGRAMS = [digit_pairs]


def pulled_apart(z, _):
    return -contrast()(z, _)


def mispaired(p):
    """The second views come from another order of the files."""
    x = p.train[0].copy()
    x[:, 1] = x[np.random.default_rng(0).permutation(len(x)), 1]
    return p.with_(train=(x, p.train[1]))


FAULTS = [
    Fault("misaligned_labels", "views of other images", "digit-pairs", mispaired),
    Fault("sign_error", "pairs pushed apart", "digit-pairs", lambda p: p.with_(loss=pulled_apart)),
    Fault("learning_rate_too_high", "rate x1000", "digit-pairs", lambda p: p.rate(1000)),
    Fault("batch_too_small", "two pairs a step", "digit-pairs", lambda p: p.with_(batch_size=2)),
]  # fmt: skip
