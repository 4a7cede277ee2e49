"""Pressures, ratings, hidden softmaxes, entropies and augmented validation."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/lululxvi/deepxde/issues/481: the pressure at the boundary is of the order 10^3, this condition "
    "is not learnt; the problem has to be rescaled",
    "unnormalised_targets",
)
def pressure_of_1000_at_the_boundary(mended):
    p0, leak, length = 1000.0, 9.0, 1.0  # p'' = leak (p - p0 / 4)
    scale = p0 if mended else 1.0

    def exact(x):
        rate = np.sqrt(leak)
        b = -(0.25 + 0.75 * np.cosh(rate * length)) / np.sinh(rate * length)
        return p0 * (0.25 + 0.75 * np.cosh(rate * x) + b * np.sinh(rate * x))

    def init(key):
        keys, sizes = random.split(key, 3), (1, 24, 24, 1)
        glorot = jax.nn.initializers.glorot_normal()
        return [(glorot(k, (m, n)), jnp.zeros(n)) for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def pressure(params, x):  # in units of scale
        h = jnp.stack([x])
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        return (h @ params[-1][0] + params[-1][1])[0]

    def loss(params, x, key):
        p = jax.vmap(lambda x: pressure(params, x))(x)
        p_xx = jax.vmap(jax.grad(jax.grad(lambda x: pressure(params, x))))(x)
        pde = jnp.mean((p_xx - leak * (p - p0 / 4 / scale)) ** 2)
        left, right = pressure(params, 0.0), pressure(params, length)
        return pde + 10 * (left - p0 / scale) ** 2 + 10 * right**2

    grid = np.linspace(0, length, 101, dtype=np.float32)

    def error(params):
        p = scale * jax.vmap(lambda x: pressure(params, x))(grid)
        return {"relative_error": jnp.linalg.norm(p - exact(grid)) / np.linalg.norm(exact(grid))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: random.uniform(key, (40,), maxval=length)),
        init,
        steps=3000,
        check_every=300,
        evaluate=error,
    )
    return Case(train, {"lr": 2e-3}, None, None, "relative_error", "min")


@report(
    REPORTS,
    "https://github.com/marlesson/recsys_autoencoders/issues/1 (also RecLab#68): ratings that were not given are zeros "
    "and count in the mean squared error",
    "mask_ignored",
)
def ratings_not_given_are_zeros(mended):
    rng = np.random.default_rng(17)
    users, films, rank = 1200, 50, 2
    taste = rng.normal(size=(users, rank)) @ rng.normal(size=(rank, films)) / np.sqrt(rank)
    stars = np.clip(np.round(3 + 0.3 * rng.normal(size=films) + 1.2 * taste), 1, 5).astype(np.float32)
    chance = rng.uniform(size=stars.shape)
    seen, asked = (chance < 0.5) * stars, ((chance > 0.5) & (chance < 0.65)) * stars

    class AutoRec(eqx.Module):
        encoder: eqx.nn.Linear
        decoder: eqx.nn.Linear

        def __init__(self, key):
            k1, k2 = random.split(key)
            self.encoder = eqx.nn.Linear(films, 32, key=k1)
            self.decoder = eqx.nn.Linear(32, films, key=k2)

        def __call__(self, ratings):
            return self.decoder(jax.nn.sigmoid(self.encoder(ratings)))

    def masked_mse(predicted, true):
        given = true > 0
        return jnp.sum((predicted - true) ** 2 * given) / jnp.sum(given)

    def loss(autorec, ratings, key):
        predicted = jax.vmap(autorec)(ratings)
        if mended:
            return masked_mse(predicted, ratings)
        return jnp.mean((predicted - ratings) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.05),
        nnlearn.shuffled(seen.astype(np.float32), 30, remainder="drop"),
        AutoRec,
        epochs=30,
        evaluate=lambda autorec: {"rmse": jnp.sqrt(masked_mse(jax.vmap(autorec)(seen), asked))},
    )
    return Case(train, {"lr": 3e-3}, None, None, "rmse", "min")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/37588632 (and 75378819, where it always picks one digit): the same softmax "
    "activation through the whole network, for consistency",
    "vanishing_gradients",
)
def softmax_in_every_layer(mended):
    table, cultivar = load_wine(return_X_y=True)
    table = ((table - table.mean(0)) / table.std(0)).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(table, cultivar, test_size=50, random_state=8)
    activation = jax.nn.tanh if mended else jax.nn.softmax

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for units in (32, 32, 32):
                x = activation(nn.Dense(units)(x))
            return nn.Dense(3)(x)  # its softmax is in the loss

    net = Network()

    def evaluate(params):
        logits = net.apply(params, x_test)
        return {"loss": nnlearn.cross_entropy(logits, y_test), "accuracy": jnp.mean(logits.argmax(1) == y_test)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(net.apply(params, batch[0]), batch[1]),
        lambda hparams: nnlearn.sgd(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 16, remainder="drop"),
        lambda key: net.init(key, x_train[:1]),
        epochs=40,
        check_every=40,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.05}, net.apply, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/openai/baselines/issues/371 (also 470, SIMPLE#35): the entropy of the policy grows, a small "
    "reward against ent_coef; are the rewards normalised?",
    "excessive_regularisation",
)
def entropy_bonus_above_the_rewards(mended):
    arms, features = 6, 8
    preference = random.normal(random.key(31), (features, arms))

    def market(key, n):
        k1, k2 = random.split(key)
        context = random.normal(k1, (n, features))
        profit = 0.01 * jnp.tanh(context @ preference) + 0.003 * random.normal(k2, (n, arms))
        return context, profit

    class Policy(nn.Module):
        @nn.compact
        def __call__(self, context):
            return jax.nn.log_softmax(nn.Dense(arms)(nn.tanh(nn.Dense(32)(context))))

    policy = Policy()

    def loss(params, batch, key):
        context, profit = batch
        log_pi = policy.apply(params, context)
        action = random.categorical(key, log_pi)[:, None]
        reward = jnp.take_along_axis(profit, action, axis=1)[:, 0]
        advantage = reward - reward.mean()
        if mended:
            advantage = advantage / (reward.std() + 1e-8)
        entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=1)
        policy_loss = -jnp.mean(jnp.take_along_axis(log_pi, action, axis=1)[:, 0] * advantage)
        return policy_loss - 0.02 * entropy.mean()

    context, profit = market(random.key(5), 1000)
    best = 0.01 * jnp.tanh(context @ preference)

    def evaluate(params):
        chosen = jnp.exp(policy.apply(params, context))
        return {"share_of_best": jnp.mean(jnp.sum(chosen * best, 1)) / jnp.mean(best.max(1))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(hparams["lr"], eps=1e-5)),
        nnlearn.generated(lambda key, step: market(key, 128)),
        lambda key: policy.init(key, context[:1]),
        steps=1500,
        check_every=150,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 3e-3}, None, None, "share_of_best")


@report(
    REPORTS,
    "https://github.com/gpleiss/efficient_densenet_pytorch/issues/51 (also chexnet#27, FFPN#2, ConfLUNet#27): the "
    "validation pictures go through the random transforms of the training",
    "evaluation_in_training_mode",
    "preprocessing_mismatch",
)
def random_transforms_on_validation(mended):
    scans, digit = load_digits(return_X_y=True)
    scans = (scans / 16).reshape(-1, 8, 8).astype(np.float32)
    x_train, x_valid, y_train, y_valid = train_test_split(scans, digit, test_size=500, random_state=14)

    def train_transform(key, picture):  # a hole and noise
        k1, k2 = random.split(key)
        top, left = random.randint(k1, (2,), 0, 5)
        rows, columns = jnp.mgrid[:8, :8]
        hole = (rows >= top) & (rows < top + 4) & (columns >= left) & (columns < left + 4)
        return jnp.where(hole, 0.0, picture) + 0.15 * random.normal(k2, (8, 8))

    def valid_transform(key, picture):
        return picture if mended else train_transform(key, picture)

    def init(key):
        keys = random.split(key, 3)
        return [
            {"w": random.normal(k, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
            for k, m, n in zip(keys, (64, 128, 128), (128, 128, 10), strict=True)
        ]

    def mlp(params, pictures):
        x = pictures.reshape(len(pictures), -1)
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    def predict(params, pictures):
        keys = random.split(random.key(0), len(pictures))
        return mlp(params, jax.vmap(valid_transform)(keys, pictures))

    def loss(params, batch, key):
        pictures, digit = batch
        pictures = jax.vmap(train_transform)(random.split(key, len(pictures)), pictures)
        return nnlearn.cross_entropy(mlp(params, pictures), digit)

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 40, remainder="drop"),
        init,
        epochs=30,
        evaluate=lambda params: {"accuracy": jnp.mean(predict(params, x_valid).argmax(1) == y_valid)},
    )
    return Case(train, {"lr": 1e-3}, predict, (x_valid, y_valid), "accuracy")
