"""Weights, axes and windows: initial values, a norm over everything, one time step, bits."""

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
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/tensorflow/similarity/issues/237: the SimCLR loss stays at an unreasonably high level, "
    "l2_normalize without axis=-1 divides by the norm of the whole batch",
    "wrong_axis_or_reduction",
)
def simclr_norm_of_the_whole_batch(mended):
    digits = load_digits()
    x = np.float32(digits.images / 16)
    labels = digits.target
    x_train, x_test, labels_train, labels_test = train_test_split(x, labels, test_size=0.3, random_state=3)

    def view(key, pictures):
        k1, k2, k3 = random.split(key, 3)
        bright = random.uniform(k1, (len(pictures), 1, 1), minval=0.7, maxval=1.3)
        kept = random.bernoulli(k2, 0.85, pictures.shape)
        noisy = kept * bright * pictures + 0.05 * random.normal(k3, pictures.shape)
        return noisy.reshape(len(pictures), -1)

    def init(key):
        k1, k2 = random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"w1": he(k1, (64, 96)), "b1": jnp.zeros(96), "w2": he(k2, (96, 24))}

    def l2_normalize(z, axis=None):
        return z / jnp.sqrt(jnp.sum(z**2, axis=axis, keepdims=True) + 1e-12)

    def encoder(params, x):
        return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]

    def loss(params, batch, key):
        k1, k2 = random.split(key)
        za, zb = encoder(params, view(k1, batch)), encoder(params, view(k2, batch))
        axis = -1 if mended else None
        za, zb = l2_normalize(za, axis), l2_normalize(zb, axis)
        similarity = za @ zb.T / 0.1
        own = jnp.arange(len(batch))
        there = optax.softmax_cross_entropy_with_integer_labels(similarity, own)
        back = optax.softmax_cross_entropy_with_integer_labels(similarity.T, own)
        return 0.5 * jnp.mean(there + back)

    def nearest_neighbour(params):
        bank = l2_normalize(encoder(params, x_train.reshape(-1, 64)), -1)
        query = l2_normalize(encoder(params, x_test.reshape(-1, 64)), -1)
        za, zb = (l2_normalize(encoder(params, view(random.key(k), x_test[:64])), -1) for k in (1, 2))
        return {
            "knn": jnp.mean(jnp.asarray(labels_train)[jnp.argmax(query @ bank.T, axis=1)] == labels_test),
            "own_view_found": jnp.mean(jnp.argmax(za @ zb.T, axis=1) == jnp.arange(64)),
        }

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(x_train, 64, remainder="drop"),
        init,
        epochs=25,
        evaluate=nearest_neighbour,
    )
    return Case(train, {"lr": 0.002}, None, None, "own_view_found")


@report(
    REPORTS,
    "https://github.com/snowch-notes/deep-learning: a notebook on saturation, sigmoids with weights of randn * 10 "
    "stall at once (and datascience.stackexchange.com/questions/16911)",
    "saturated_activations",
    "bad_initialisation",
    "vanishing_gradients",
)
def sigmoids_with_randn_times_ten(mended):
    X, y = load_digits(return_X_y=True)
    X = (X - X.mean()) / X.std()
    X, X_new, y, y_new = train_test_split(X, y, test_size=0.25, random_state=8)
    Y = np.eye(10)[y]

    def randn(key, *shape):
        return random.normal(key, shape) * (1 / np.sqrt(shape[0]) if mended else 10)

    def init(key):
        k1, k2 = random.split(key)
        return {"W1": randn(k1, 64, 30), "b1": jnp.zeros((1, 30)), "W2": randn(k2, 30, 10), "b2": jnp.zeros((1, 10))}

    def forward(p, X):
        A1 = jax.nn.sigmoid(X @ p["W1"] + p["b1"])
        return jax.nn.sigmoid(A1 @ p["W2"] + p["b2"])

    def loss(p, batch, key):
        X, Y = batch
        return jnp.mean(jnp.sum((Y - forward(p, X)) ** 2, axis=1))

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((X, Y), 32, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda p: {"accuracy": jnp.mean(forward(p, X_new).argmax(1) == y_new)},
        check_every=84,
    )
    return Case(train, {"lr": 0.5}, forward, (X_new, y_new), "accuracy")


@report(
    REPORTS,
    "https://notebook.community/BeatHubmann/17F-U-DLND/weight-initialization/weight_initialization: MNIST with weights "
    "of tf.random_uniform, from 0 to 1 by default, has an enormous loss",
    "bad_initialisation",
    "exploding_gradients",
)
def weights_of_random_uniform(mended):
    mnist = load("mnist", seed=6)
    x, y = mnist.train.inputs.reshape(-1, 784), np.eye(10, dtype=np.float32)[mnist.train.targets]
    x_val, y_val = mnist.validation.inputs.reshape(-1, 784), mnist.validation.targets
    shapes = [(784, 64), (64, 32), (32, 10)]

    def init(key):
        params = []
        for shape in shapes:
            key, k = random.split(key)
            bound = 1 / np.sqrt(shape[0])
            low, high = (-bound, bound) if mended else (0.0, 1.0)
            params.append({"weights": random.uniform(k, shape, minval=low, maxval=high), "bias": jnp.zeros(shape[1])})
        return params

    def logits(params, features):
        layer = features
        for p in params[:-1]:
            layer = jax.nn.relu(layer @ p["weights"] + p["bias"])
        return layer @ params[-1]["weights"] + params[-1]["bias"]

    def loss(params, batch, key):
        return jnp.mean(nnlearn.softmax_cross_entropy(logits(params, batch["x"]), batch["y"]))

    def metrics(params, batch):
        inputs, targets = batch.examples
        return {"accuracy": jnp.mean(logits(params, inputs).argmax(-1) == targets, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled({"x": x, "y": y}, 50, remainder="drop"),
        init,
        epochs=7,
        evaluate=nnlearn.evaluation(metrics, (x_val, y_val)),
    )
    return Case(train, {"lr": 0.001}, logits, (x_val, y_val), "accuracy")


@report(
    REPORTS,
    "https://answerofmath.com/solved-lstm-nn-produces-shifted-forecast-low-quality-result/ (stats.stackexchange): the "
    "forecast of sin(0.1 t) + sin(t) is the series shifted by one, the LSTM is given a single time step",
    "underfitting",
)
def lstm_of_one_timestep(mended):
    rng = np.random.RandomState(1)
    t = np.arange(1400)
    series = np.float32(np.sin(0.1 * t) + np.sin(t) + 0.1 * rng.randn(1400))
    timesteps = 24 if mended else 1
    windows = np.lib.stride_tricks.sliding_window_view(series, timesteps + 1)
    x, y = windows[:, :-1, None], windows[:, -1:]
    train_set, val_set = (x[:1000], y[:1000]), (x[1050:], y[1050:])

    class Forecast(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(24))(x)
            return nn.Dense(1)(x[:, -1])

    net = Forecast()

    def loss(params, batch, key):
        return nnlearn.mean_squared_error(net.apply(params, batch[0]), batch[1])

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 25, remainder="drop"),
        lambda key: net.init(key, x[:1]),
        epochs=20,
        evaluate=lambda params: {"mse": loss(params, val_set, None)},
    )
    return Case(train, {"lr": 0.005}, net.apply, val_set, "mse", mode="min")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/46620813: an LSTM of one unit and a softmax of one unit shall predict the "
    "next bit from the last ones, the accuracy does not move",
    "loss_output_mismatch",
    "underfitting",
)
def next_bit_with_softmax(mended):
    rng = np.random.default_rng(14)
    bits = rng.integers(0, 2, 4)
    for _ in range(1500):
        flip = rng.random() < 0.02
        bits = np.append(bits, bits[-1] ^ bits[-3] ^ flip)
    windows = np.lib.stride_tricks.sliding_window_view(bits, 4)
    vecX, vecY = windows[:, :3, None].astype(np.float32), windows[:, 3:].astype(np.float32)
    train_set, test_set = (vecX[:1200], vecY[:1200]), (vecX[1200:], vecY[1200:])
    units = 8 if mended else 1

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.LSTMCell(units))(x)[:, -1]
            x = nn.Dense(1)(x)
            return nn.sigmoid(x) if mended else nn.softmax(x)

    net = Net()

    def binary_crossentropy(params, batch, key):
        x, y = batch
        p = jnp.clip(net.apply(params, x), 1e-7, 1 - 1e-7)
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    def evaluate(params):
        return {"acc": jnp.mean((net.apply(params, test_set[0]) > 0.5) == (test_set[1] > 0.5))}

    train = nnlearn.make_train(
        binary_crossentropy,
        lambda hp: optax.adam(hp["lr"]) if mended else optax.adagrad(hp["lr"]),
        nnlearn.shuffled(train_set, 64, remainder="drop"),
        lambda key: net.init(key, vecX[:1]),
        epochs=40,
        evaluate=evaluate,
        check_every=36,
    )
    return Case(train, {"lr": 0.01}, net.apply, test_set, "acc")
