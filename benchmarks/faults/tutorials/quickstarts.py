"""Healthy programs of tutorials, example folders and course notes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://karpathy.github.io/2015/05/21/rnn-effectiveness/ the character rnn, adagrad: healthy")
def min_char_rnn_adagrad(mended):
    rng = np.random.default_rng(1)
    who, does, where = (
        ["fox", "dog", "cat", "hen", "goat", "mouse"],
        ["sees", "hears", "likes"],
        ["in", "under", "near"],
    )
    things = ["the barn", "the tree", "the river", "a hill"]
    sentences = [f"the {rng.choice(who)} {rng.choice(does)} the {rng.choice(who)} " for _ in range(400)]
    text = "".join(s + f"{rng.choice(where)} {rng.choice(things)}. " for s in sentences)
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text])
    pieces = np.lib.stride_tricks.sliding_window_view(ids, 26)
    hidden, size = 64, len(letters)

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        return {
            "Wxh": random.normal(k1, (size, hidden)) * 0.1,
            "Whh": random.normal(k2, (hidden, hidden)) * 0.1,
            "Why": random.normal(k3, (hidden, size)) * 0.1,
            "bh": jnp.zeros(hidden),
            "by": jnp.zeros(size),
        }

    def rnn(params, inputs):
        def step(h, letter):
            h = jnp.tanh(params["Wxh"][letter] + h @ params["Whh"] + params["bh"])
            return h, h @ params["Why"] + params["by"]

        _, ys = lax.scan(step, jnp.zeros((len(inputs), hidden)), inputs.T)
        return ys.swapaxes(0, 1)

    def loss(params, piece, key):
        return nnlearn.cross_entropy(rnn(params, piece[:, :-1]), piece[:, 1:])

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.chain(optax.clip(5.0), optax.adagrad(hparams["learning_rate"])),
        nnlearn.shuffled(pieces[:11000], 50, remainder="drop"),
        init,
        epochs=4,
        evaluate=lambda params: {"val_loss": loss(params, pieces[11100::5], None)},
    )
    return Case(train, {"learning_rate": 0.1}, None, None, "val_loss", "min")


@report(REPORTS, "https://pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html plain SGD: healthy")
def quickstart_linear_relu_stack(mended):
    images, labels = load_digits(return_X_y=True)
    training, test, y_train, y_test = train_test_split((images / 16).astype(np.float32), labels, random_state=42)

    class NeuralNetwork(eqx.Module):
        layers: list

        def __init__(self, key):
            k = random.split(key, 3)
            self.layers = [eqx.nn.Linear(m, n, key=q) for m, n, q in zip((64, 64, 64), (64, 64, 10), k, strict=True)]

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    def loss_fn(model, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    def predict(model, x):
        return jax.vmap(model)(x)

    def evaluate(model):
        pred = predict(model, test)
        losses = optax.softmax_cross_entropy_with_integer_labels(pred, jnp.asarray(y_test))
        return {"accuracy": jnp.mean(pred.argmax(1) == y_test), "avg_loss": losses.mean()}

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: optax.sgd(hparams["lr"]),
        nnlearn.shuffled((training, y_train), 64, remainder="drop"),
        NeuralNetwork,
        epochs=30,
        check_every=63,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.1}, predict, (test, y_test), "accuracy")


@report(REPORTS, "https://d2l.ai/chapter_linear-networks/linear-regression-scratch.html synthetic data: healthy")
def linear_regression_from_scratch(mended):
    rng = np.random.default_rng(0)
    w, b = np.array([2.0, -3.4]), 4.2
    X = rng.normal(size=(2000, 2)).astype(np.float32)
    y = (X @ w + b + 0.01 * rng.normal(size=2000)).astype(np.float32)[:, None]

    def init(key):
        return {"w": 0.01 * random.normal(key, (2, 1)), "b": jnp.zeros(1)}

    def net(params, X):
        return X @ params["w"] + params["b"]

    def squared_loss(params, batch, key):
        X, y = batch
        return ((net(params, X) - y) ** 2 / 2).mean()

    val = (X[1000:], y[1000:])
    train = nnlearn.make_train(
        squared_loss,
        lambda hparams: nnlearn.sgd(hparams["lr"]),
        nnlearn.shuffled((X[:1000], y[:1000]), 32, remainder="drop"),
        init,
        epochs=10,
        evaluate=lambda params: {"val_loss": squared_loss(params, val, None)},
    )
    return Case(train, {"lr": 0.03}, net, val, "val_loss", "min")


@report(REPORTS, "https://www.tensorflow.org/tutorials/customization/custom_training_walkthrough iris: healthy")
def iris_two_relu_layers(mended):
    x, y = load_iris(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x.astype(np.float32), y, test_size=30, random_state=1, stratify=y
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(10)(x))
            x = nn.relu(nn.Dense(10)(x))
            return nn.Dense(3)(x)

    model = Model()

    def metrics(params):
        logits = model.apply(params, x_test)
        return {"accuracy": jnp.mean(logits.argmax(1) == y_test), "loss": nnlearn.cross_entropy(logits, y_test)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(model.apply(params, batch[0]), batch[1]),
        lambda hparams: optax.adam(hparams["learning_rate"]),
        nnlearn.shuffled((x_train, y_train), 30, remainder="drop"),
        lambda key: model.init(key, x_train[:1]),
        epochs=120,
        check_every=48,
        evaluate=metrics,
    )
    return Case(train, {"learning_rate": 0.01}, model.apply, (x_test, y_test), "loss", "min")


@report(REPORTS, "https://github.com/adambielski/siamese-triplet siamese network with a margin: healthy")
def siamese_contrastive_margin(mended):
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / 16).astype(np.float32), labels, test_size=400, random_state=3
    )
    x_train, y_train = jnp.asarray(x_train), jnp.asarray(y_train)

    class EmbeddingNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x)))))

    net = EmbeddingNet()

    def pairs(key, step):
        k1, k2, k3 = random.split(key, 3)
        a = random.randint(k1, (64,), 0, len(x_train))
        same = y_train[a][:, None] == y_train
        want = random.bernoulli(k2, 0.5, (64, 1))
        b = random.categorical(k3, jnp.where(same == want, 0.0, -jnp.inf))
        return x_train[a], x_train[b], want[:, 0]

    def contrastive_loss(params, batch, key):
        a, b, same = batch
        squared = jnp.sum((net.apply(params, a) - net.apply(params, b)) ** 2, axis=1)
        apart = jax.nn.relu(1.0 - jnp.sqrt(squared + 1e-9)) ** 2
        return jnp.mean(jnp.where(same, squared, apart)) / 2

    def nearest(params):
        means = jax.nn.one_hot(y_train, 10).T @ net.apply(params, x_train)
        means = means / jnp.bincount(y_train, length=10)[:, None]
        distance = jnp.sum((net.apply(params, x_test)[:, None] - means) ** 2, axis=-1)
        return {"accuracy": jnp.mean(distance.argmin(1) == y_test)}

    train = nnlearn.make_train(
        contrastive_loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(pairs),
        lambda key: net.init(key, x_test[:1]),
        steps=800,
        check_every=80,
        evaluate=nearest,
    )
    return Case(train, {"lr": 1e-3}, None, None, "accuracy")
