"""Healthy programs of tutorials: classic first networks on truth tables, passengers, word counts, prices, assays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://machinelearningmastery.com/tutorial-first-neural-network-python-keras/ on XOR: healthy")
def xor_on_its_four_points(mended):
    X = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    Y = jnp.array([0.0, 1.0, 1.0, 0.0])

    def init(key):
        k1, k2 = random.split(key)
        return {
            "W1": random.normal(k1, (2, 8)),
            "b1": jnp.zeros(8),
            "W2": random.normal(k2, (8,)) / jnp.sqrt(8.0),
            "b2": jnp.zeros(()),
        }

    def net(p, x):
        return jnp.tanh(x @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]

    def bce(p, batch, key):
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(net(p, x), y).mean()

    def evaluate(p):
        return {"loss": bce(p, (X, Y), None), "accuracy": jnp.mean((net(p, X) > 0) == (Y == 1))}

    train = nnlearn.make_train(
        bce,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: (X, Y)),
        init,
        steps=400,
        check_every=40,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.03}, net, (X, Y), "accuracy")


def passengers(count, seed):
    """A made-up list of passengers: numbers, categories, some ages unknown."""
    rng = np.random.default_rng(seed)
    pclass = rng.choice(3, size=count, p=[0.25, 0.2, 0.55])
    female = rng.random(count) < 0.36
    age = np.clip(rng.gamma(5, 6.5 - pclass), 0.5, 80)
    family = rng.poisson(0.9, count)
    port = rng.choice(3, size=count, p=[0.7, 0.2, 0.1])
    fare = np.exp(rng.normal(4.3 - 0.9 * pclass, 0.5)) * (1 + 0.3 * family)
    score = 2.9 * female - 1.0 * pclass - 0.035 * (age - 30) - 0.35 * np.maximum(family - 2, 0) + 0.3 * (port == 1)
    survived = rng.random(count) < 1 / (1 + np.exp(-1.3 * (score - 0.15)))
    age[rng.random(count) < 0.2] = np.nan
    return pclass, female, age, family, port, fare, survived.astype(np.int32)


@report(REPORTS, "https://www.tensorflow.org/tutorials/load_data/csv mixed columns of passengers: healthy")
def passengers_mixed_columns(mended):
    pclass, female, age, family, port, fare, survived = passengers(1600, 12)
    numeric = np.stack([np.where(np.isnan(age), np.nanmedian(age[:1200]), age), family, np.log1p(fare)], 1)
    numeric = (numeric - numeric[:1200].mean(0)) / numeric[:1200].std(0)
    categories = [np.eye(3)[pclass], np.eye(3)[port], np.eye(2)[female.astype(int)], np.isnan(age)[:, None]]
    table = np.concatenate([numeric, *categories], axis=1).astype(np.float32)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Dense(32)(x))
            x = nn.Dropout(0.2, deterministic=not train)(x)
            return nn.Dense(1)(x).squeeze(-1)

    model = Model()

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch["features"], train=True, rngs={"dropout": key})
        return optax.sigmoid_binary_cross_entropy(logits, batch["survived"]).mean()

    def metrics(params, batch):
        logits = model.apply(params, batch.examples["features"])
        y = batch.examples["survived"]
        bce = optax.sigmoid_binary_cross_entropy(logits, y)
        return {
            "val_loss": jnp.mean(bce, where=batch.where),
            "accuracy": jnp.mean((logits > 0) == y, where=batch.where),
        }

    data = {"features": table, "survived": survived}
    train_set, val_set = {k: v[:1200] for k, v in data.items()}, {k: v[1200:] for k, v in data.items()}
    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled(train_set, 32, remainder="drop"),
        lambda key: model.init(key, table[:1]),
        epochs=15,
        evaluate=nnlearn.evaluation(metrics, val_set),
    )

    def predict(params, x, key=None):
        return model.apply(params, x) if key is None else model.apply(params, x, train=True, rngs={"dropout": key})

    return Case(train, {"lr": 3e-3}, predict, (val_set["features"], val_set["survived"]), "accuracy")


@report(
    REPORTS,
    "https://pytorch.org/tutorials/beginner/nlp/deep_learning_tutorial.html bag-of-words counts, one layer: healthy",
)
def word_counts_of_newsgroups(mended):
    rng = np.random.default_rng(3)
    vocabulary, groups = 400, 4
    base = 1 / np.arange(3, vocabulary + 3)
    topics = base * np.exp(0.7 * rng.normal(size=(groups, vocabulary)))
    topics /= topics.sum(1, keepdims=True)
    group = rng.integers(groups, size=2600)
    counts = np.stack([rng.multinomial(rng.integers(30, 90), topics[g]) for g in group]).astype(np.uint8)

    def log_probs(params, bow_vec):
        bow_vec = bow_vec.astype(jnp.float32)
        return jax.nn.log_softmax(bow_vec @ params["weight"] + params["bias"], axis=1)

    def nll_loss(params, batch, key):
        bow_vec, target = batch
        return -jnp.mean(jnp.take_along_axis(log_probs(params, bow_vec), target[:, None], axis=1))

    def evaluate(params, batch):
        bow_vec, target = batch.examples
        return {"accuracy": jnp.mean(log_probs(params, bow_vec).argmax(1) == target, where=batch.where)}

    train = nnlearn.make_train(
        nll_loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((counts[:2000], group[:2000]), 50, remainder="drop"),
        {"weight": jnp.zeros((vocabulary, groups)), "bias": jnp.zeros(groups)},
        epochs=10,
        evaluate=nnlearn.evaluation(evaluate, (counts[2000:], group[2000:])),
    )
    return Case(train, {"lr": 5e-3}, log_probs, (counts[2000:], group[2000:]), "accuracy")


@report(REPORTS, "https://d2l.ai/chapter_multilayer-perceptrons/kaggle-house-price.html log prices: healthy")
def house_prices_in_log_space(mended):
    rng = np.random.default_rng(31)
    n = 1500
    area, lot = rng.lognormal(7.2, 0.35, n), rng.lognormal(9.0, 0.5, n)
    year, quality = rng.integers(1900, 2011, n), rng.integers(1, 11, n)
    place = rng.integers(12, size=n)
    worth = rng.normal(0, 0.2, 12)
    log_price = 6.6 + 0.62 * np.log(area) + 0.08 * np.log(lot) + 0.09 * quality + 0.0025 * (year - 1970) + worth[place]
    price = np.exp(log_price + 0.12 * rng.normal(size=n))
    numbers = np.stack([np.log(area), np.log(lot), year, quality], 1)
    numbers = (numbers - numbers[:1100].mean(0)) / numbers[:1100].std(0)
    features = np.concatenate([numbers, np.eye(12)[place]], 1).astype(np.float32)
    log_target = np.log(price)
    center, spread = log_target[:1100].mean(), log_target[:1100].std()
    target = ((log_target - center) / spread).astype(np.float32)

    def init(key):
        k1, k2 = random.split(key)
        return [
            (random.normal(k1, (16, 24)) * np.sqrt(2 / 16), jnp.zeros(24)),
            (random.normal(k2, (24, 1)) * np.sqrt(1 / 24), jnp.zeros(1)),
        ]

    def net(params, x):
        (w1, b1), (w2, b2) = params
        return (jax.nn.relu(x @ w1 + b1) @ w2 + b2)[:, 0]

    def mse(params, batch, key):
        x, y = batch
        return jnp.mean(jnp.square(net(params, x) - y))

    def log_rmse(params, batch):
        x, y = batch.examples
        return {"log_rmse": spread * jnp.sqrt(jnp.mean(jnp.square(net(params, x) - y), where=batch.where))}

    train = nnlearn.make_train(
        mse,
        lambda hparams: nnlearn.adamw(hparams["lr"], weight_decay=0.02),
        nnlearn.shuffled((features[:1100], target[:1100]), 64, remainder="drop"),
        init,
        epochs=40,
        evaluate=nnlearn.evaluation(log_rmse, (features[1100:], target[1100:])),
    )
    return Case(train, {"lr": 3e-3}, net, (features[1100:], target[1100:]), "log_rmse", "min")


@report(REPORTS, "https://github.com/deepchem/deepchem multitask networks with weights of missing assays: healthy")
def assays_with_missing_targets(mended):
    rng = np.random.default_rng(17)
    molecules = rng.normal(size=(2400, 24)).astype(np.float32)
    factors = np.tanh(molecules @ rng.normal(size=(24, 6)) / 4)
    assays = factors @ rng.normal(size=(6, 5)) / 2 + 0.15 * rng.normal(size=(2400, 5))
    assays = ((assays - assays.mean(0)) / assays.std(0)).astype(np.float32)
    assays[rng.random(assays.shape) < 0.4] = np.nan

    class Multitask(nn.Module):
        @nn.compact
        def __call__(self, x):
            trunk = nn.tanh(nn.Dense(64)(x))
            trunk = nn.tanh(nn.Dense(32)(trunk))
            return nn.Dense(5)(trunk)

    multitask = Multitask()

    def masked_mse(params, batch, key):
        x, y = batch
        measured = ~jnp.isnan(y)
        error = jnp.where(measured, multitask.apply(params, x) - jnp.where(measured, y, 0.0), 0.0)
        return jnp.sum(error**2) / jnp.sum(measured)

    def evaluate(params):
        return {"mse": masked_mse(params, (molecules[2000:], assays[2000:]), None)}

    train = nnlearn.make_train(
        masked_mse,
        lambda hparams: optax.adam(optax.cosine_decay_schedule(hparams["lr"], 1240)),
        nnlearn.shuffled((molecules[:2000], assays[:2000]), 64, remainder="drop"),
        lambda key: multitask.init(key, molecules[:1]),
        epochs=40,
        evaluate=evaluate,
        stop=nnlearn.patience("mse", 8),
    )
    return Case(train, {"lr": 3e-3}, None, None, "mse", "min")


@report(REPORTS, "https://blog.keras.io/building-autoencoders-in-keras.html squares summed over pixels: healthy")
def digits_autoencoder_of_16(mended):
    images = (load_digits().data / 16.0).astype(np.float32)
    train_x, test_x = train_test_split(images, test_size=297, random_state=2)

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            code = nn.Dense(16, name="code")(nn.elu(nn.Dense(64)(x)))
            return nn.sigmoid(nn.Dense(64)(nn.elu(nn.Dense(64)(code))))

    autoencoder = Autoencoder()

    def reconstruction(params, x, key):
        return jnp.sum((autoencoder.apply(params, x) - x) ** 2, axis=1).mean()

    train = nnlearn.make_train(
        reconstruction,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled(train_x, 50, remainder="drop"),
        lambda key: autoencoder.init(key, images[:1]),
        epochs=30,
        evaluate=lambda params: {"test_error": reconstruction(params, test_x, None)},
    )
    return Case(
        train, {"lr": 2e-3}, lambda params, x: autoencoder.apply(params, x), (test_x, test_x), "test_error", "min"
    )
