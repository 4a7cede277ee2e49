"""Overlaps and videos: a coefficient that is minimised, norms over the wrong axis, coordinates that fly away."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/akirasosa/mobile-semantic-segmentation/issues/24: maybe your loss is not 1 - dice coef but "
    "dice coef; training minimises the overlap",
    "sign_error",
)
def dice_coefficient_as_the_loss(mended):
    rng = np.random.default_rng(52)
    size = 10
    rows, columns = np.mgrid[:size, :size]
    first, height, left, width = (rng.integers(a, b, size=(800, 1, 1)) for a, b in ((0, 6), (3, 6), (0, 6), (3, 6)))
    person = (rows >= first) & (rows < first + height) & (columns >= left) & (columns < left + width)
    tint = np.where(person[..., None], [0.7, 0.5, 0.4], [0.4, 0.5, 0.6])
    images = (tint + 0.15 * rng.normal(size=tint.shape)).clip(0, 1).astype(np.float32)
    masks = person[..., None].astype(np.float32)

    class Segmenter(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x - 0.5))
            return nn.Conv(1, (3, 3))(x)

    net = Segmenter()

    def dice_coef(y_true, y_pred, smooth=1.0):
        axes = (1, 2, 3)
        return (2 * jnp.sum(y_true * y_pred, axes) + smooth) / (jnp.sum(y_true, axes) + jnp.sum(y_pred, axes) + smooth)

    def loss(params, batch, key):
        images, masks = batch
        coefficient = dice_coef(masks, jax.nn.sigmoid(net.apply(params, images))).mean()
        return 1 - coefficient if mended else coefficient

    def evaluate(params):
        predicted = (net.apply(params, images[600:]) > 0).astype(jnp.float32)
        return {"dice": dice_coef(masks[600:], predicted).mean()}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((images[:600], masks[:600]), 20, remainder="drop"),
        lambda key: net.init(key, images[:1]),
        epochs=8,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 5e-3}, net.apply, (images[600:], masks[600:]), "dice")


@report(
    REPORTS,
    "https://github.com/gabeur/mmt/issues/1 (also SoundCLR#4): F.normalize with its default dim=1 gets (batch, tokens, "
    "width) and normalises over the tokens",
    "wrong_axis_or_reduction",
)
def expert_tokens_normalised_over_tokens(mended):
    tokens, width, pairs_of = 6, 24, 900
    rng = np.random.default_rng(14)
    story = rng.normal(size=(pairs_of, tokens, 5))
    loud = np.exp(1.5 * rng.normal(size=(pairs_of, tokens, 1)))  # each expert has its own scale
    video = loud * (story @ rng.normal(size=(5, 20)) + 1.2 * rng.normal(size=(pairs_of, tokens, 20)))
    text = story @ rng.normal(size=(5, 16)) + 1.2 * rng.normal(size=(pairs_of, tokens, 16))
    video, text = video.astype(np.float32), text.astype(np.float32)

    def init(key):
        k1, k2 = random.split(key)
        return {"video": random.normal(k1, (20, width)) * 20**-0.5, "text": random.normal(k2, (16, width)) / 4}

    def normalize(x, axis=1):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 1e-12)

    def similarity(params, video, text):
        v, t = video @ params["video"], text @ params["text"]
        v, t = (normalize(v, -1), normalize(t, -1)) if mended else (normalize(v), normalize(t))
        return jnp.einsum("vkd,tkd->vt", v, t) / tokens

    def max_margin(params, batch, key, margin=0.2):
        s = similarity(params, *batch)
        right = jnp.diag(s)
        rows, columns = jax.nn.relu(margin + s - right[:, None]), jax.nn.relu(margin + s - right)
        return jnp.mean((rows + columns) * (1 - jnp.eye(len(s))))

    held_out = (video[700:], text[700:])
    train = nnlearn.make_train(
        max_margin,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((video[:700], text[:700]), 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=lambda p: {"recall_at_1": jnp.mean(similarity(p, *held_out).argmax(1) == jnp.arange(200))},
    )
    return Case(train, {"lr": 3e-3}, None, None, "recall_at_1")


@report(
    REPORTS,
    "https://github.com/lucidrains/egnn-pytorch/issues/7: EGNN explodes for larger problems; an unbounded sum of "
    "relative coordinates is added to the coordinates, the sum has to be normalised",
    "exploding_gradients",
    "wrong_axis_or_reduction",
)
def coordinates_of_a_larger_problem(mended):
    bodies, layers, width = 16, 3, 12

    def systems(key, n):
        k1, k2 = random.split(key)
        x = random.normal(k1, (n, bodies, 3))
        charge = jnp.where(random.bernoulli(k2, 0.5, (n, bodies)), 1.0, -1.0)
        between = x[:, :, None] - x[:, None]
        squared = jnp.sum(between**2, -1, keepdims=True) + 1.0
        force = jnp.sum(charge[:, :, None, None] * charge[:, None, :, None] * between / squared**1.5, axis=2)
        return {"x": x, "charge": charge}, x + 0.1 * force

    class EquivariantLayer(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            between = x[:, :, None] - x[:, None]
            squared = jnp.sum(between**2, -1, keepdims=True)
            pair = (*squared.shape[:-1], h.shape[-1])
            both = [jnp.broadcast_to(h[:, :, None], pair), jnp.broadcast_to(h[:, None], pair)]
            message = nn.silu(nn.Dense(width)(jnp.concatenate([*both, squared], axis=-1)))
            weight = nn.Dense(1)(nn.silu(nn.Dense(width)(message)))
            if mended:
                x = x + jnp.mean(between * weight / (jnp.sqrt(squared + 1e-8) + 1), axis=2)
                message = message.mean(2)
            else:
                x = x + jnp.sum(between * weight, axis=2)
                message = message.sum(2)
            return h + nn.Dense(width)(nn.silu(nn.Dense(width)(jnp.concatenate([h, message], axis=-1)))), x

    class EGNN(nn.Module):
        @nn.compact
        def __call__(self, system):
            h, x = nn.Dense(width)(system["charge"][..., None]), system["x"]
            for _ in range(layers):
                h, x = EquivariantLayer()(h, x)
            return x

    net = EGNN()

    def loss(params, batch, key):
        system, after = batch
        return jnp.mean((net.apply(params, system) - after) ** 2)

    test = systems(random.key(60), 50)
    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: systems(key, 8)),
        lambda key: net.init(key, test[0]),
        steps=300,
        check_every=30,
        evaluate=lambda params: {"mse": loss(params, test, None), "still": jnp.mean((test[0]["x"] - test[1]) ** 2)},
    )
    return Case(train, {"lr": 2e-3}, net.apply, test, "mse", "min")
