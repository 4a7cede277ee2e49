"""Clipped losses, dead relus, few steps, boxes, amounts of money."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://techfeed.net/es/402773/ (StackOverflow): clip_by_value(loss, -1, 1) in an own DQN; outside of the "
    "interval all gradients are zero, the paper means the Huber loss",
    "blocked_gradient",
)
def squared_td_error_clipped(mended):
    rng = np.random.RandomState(21)
    size, actions = 3000, 3
    observation = rng.uniform(-1, 1, (size, 4))
    action = rng.randint(0, actions, size)
    push = np.array([-1.0, 0.0, 1.0])[action]
    value = 6 + 2 * np.cos(3 * observation[:, 0] + push) + 1.5 * observation[:, 1] * push + observation[:, 2] ** 2
    returns = value + 0.1 * rng.randn(size)
    replay = {"s": observation, "a": action, "return": returns}
    memory, held_out = {k: v[:2500] for k, v in replay.items()}, {k: v[2500:] for k, v in replay.items()}

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        he = jax.nn.initializers.he_normal()
        return [
            (he(k1, (4, 40)), jnp.zeros(40)),
            (he(k2, (40, 40)), jnp.zeros(40)),
            (0.1 * random.normal(k3, (40, actions)), jnp.zeros(actions)),
        ]

    def q_values(params, s):
        (w1, b1), (w2, b2), (w3, b3) = params
        h = jax.nn.relu(s @ w1 + b1)
        return jax.nn.relu(h @ w2 + b2) @ w3 + b3

    def td_error(params, batch):
        q = jnp.sum(q_values(params, batch["s"]) * jax.nn.one_hot(batch["a"], actions), axis=1)
        return batch["return"] - q

    def loss(params, batch, key):
        error = td_error(params, batch)
        if mended:
            return jnp.mean(nnlearn.huber_loss(error, delta=1.0))
        return jnp.mean(jnp.clip(jnp.square(error), -1, 1))

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.rmsprop(hp["lr"]),
        nnlearn.shuffled(memory, 32, remainder="drop"),
        init,
        epochs=30,
        evaluate=lambda params: {"squared_error": jnp.mean(td_error(params, held_out) ** 2)},
    )
    return Case(train, {"lr": 0.002}, None, None, "squared_error", mode="min")


@report(
    REPORTS,
    "https://medium.com/analytics-vidhya/is-relu-dead-27943b50102: inputs between -1 and 0, positive random weights, "
    "the relus are dead and the loss does not improve",
    "dead_units",
    "bad_initialisation",
)
def relus_of_negative_inputs(mended):
    rng = np.random.default_rng(8)
    x = rng.uniform(-1, 0, size=(1600, 4))
    y = (np.sin(4 * x[:, 0]) + x[:, 1] * x[:, 2] * 4 - x[:, 3])[:, None]
    y = (y - y.mean()) / y.std()
    x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=400, random_state=5)
    if mended:
        mean, std = x_train.mean(0), x_train.std(0)
        x_train, x_val = (x_train - mean) / std, (x_val - mean) / std
    weights = nn.initializers.lecun_normal() if mended else nn.initializers.uniform(0.5)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Dense(32, kernel_init=weights)(x)
                x = nn.selu(x) if mended else nn.relu(x)
            return nn.Dense(1, kernel_init=weights)(x)

    net = Net()

    def mse(params, batch, key=None):
        return optax.squared_error(net.apply(params, batch[0]), batch[1]).mean()

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 40, remainder="drop"),
        lambda key: net.init(key, x_train[:1]),
        epochs=30,
        evaluate=lambda params: {"mse": mse(params, (x_val, y_val))},
        check_every=60,
    )
    return Case(train, {"lr": 0.003}, net.apply, (x_val, y_val), "mse", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/12532: batch size and quality; with a batch as large as the data "
    "the same number of epochs does not converge, there are far fewer steps",
    "underfitting",
    "learning_rate_too_low",
)
def all_digits_in_one_batch(mended):
    x, y = load_digits(return_X_y=True)
    x = (x - 4.9) / 6.0
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=6)
    epochs = 20

    def init(key):
        k1, k2 = random.split(key)
        return {
            "w": jax.nn.initializers.glorot_uniform()(k1, (64, 40)),
            "b": jnp.zeros(40),
            "v": jax.nn.initializers.glorot_uniform()(k2, (40, 10)),
            "c": jnp.zeros(10),
        }

    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]

    def loss(p, batch, key):
        x, y = batch
        return nnlearn.cross_entropy(model(p, x), y)

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 16 if mended else len(x_train), remainder="drop"),
        init,
        epochs=epochs,
        evaluate=lambda p: {"accuracy": jnp.mean(model(p, x_test).argmax(-1) == y_test)},
    )
    return Case(train, {"lr": 0.05}, model, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/261704: a CNN shall find the box in the picture, but predicts the "
    "centre for every picture; strided relu convolutions and a large rate of Adam",
    "learning_rate_too_high",
    "dead_units",
)
def box_is_always_in_the_centre(mended):
    rng = np.random.RandomState(15)
    count, side = 1000, 16
    corner = rng.randint(0, side - 3, (count, 2))
    pictures = 0.1 * rng.rand(count, side, side, 1).astype(np.float32)
    for picture, (r, c) in zip(pictures, corner, strict=True):
        picture[r : r + 4, c : c + 4] = 1.0
    position = (corner / (side - 4) * 2 - 1).astype(np.float32)
    train_set, val_set = (pictures[:800], position[:800]), (pictures[800:], position[800:])
    shapes = [(3, 3, 1, 8), (3, 3, 8, 12), (3, 3, 12, 16)]

    def init(key):
        keys = random.split(key, 5)
        glorot = jax.nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1)
        return {
            "conv": [(glorot(k, s), jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=False)],
            "dense": (jax.nn.initializers.glorot_uniform()(keys[3], (64, 32)), jnp.zeros(32)),
            "out": (jax.nn.initializers.glorot_uniform()(keys[4], (32, 2)), jnp.zeros(2)),
        }

    def locate(params, x):
        for w, b in params["conv"]:
            x = lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + b)
        w, b = params["dense"]
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ w + b)
        w, b = params["out"]
        return x @ w + b

    def loss(params, batch, key):
        return jnp.mean((locate(params, batch[0]) - batch[1]) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 40, remainder="drop"),
        init,
        epochs=15,
        evaluate=lambda params: {"mse": loss(params, val_set, None)},
    )
    return Case(train, {"lr": 0.003 if mended else 0.1}, locate, val_set, "mse", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/61223: predictions of a network trained on a scaled target have "
    "to be scaled back, else they cannot be compared with the amounts in the test set",
    "preprocessing_mismatch",
)
def scaled_target_raw_test_set(mended):
    rng = np.random.default_rng(40)
    area, rooms, age = rng.gamma(6, 18, 1500), rng.integers(1, 7, 1500), rng.uniform(0, 90, 1500)
    price = (
        40_000 + 2_100 * area + 14_000 * rooms - 600 * age + 9_000 * np.sin(age / 12) + 8_000 * rng.normal(size=1500)
    )
    X = np.column_stack([area, rooms, age])
    X_train, X_test, y_train, y_test = train_test_split(X, price[:, None], test_size=300, random_state=0)
    scaler_X, scaler_y = StandardScaler().fit(X_train), StandardScaler().fit(y_train)
    X_train, X_test = scaler_X.transform(X_train), scaler_X.transform(X_test)
    y_train = scaler_y.transform(y_train)
    if mended:
        y_test = scaler_y.transform(y_test)

    class Price(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32)(x))
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(1)(x)

    net = Price()

    def loss_fn(params, batch, key):
        x, y = batch
        return jnp.mean(optax.squared_error(net.apply({"params": params}, x), y))

    def predict(params, x):
        return net.apply({"params": params}, x)

    def metrics(params, batch):
        x, y = batch.examples
        return {"mse": jnp.mean(optax.squared_error(predict(params, x), y), where=batch.where[:, None])}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((X_train, y_train), 30, remainder="drop"),
        lambda key: net.init(key, X_train[:1])["params"],
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, (X_test, y_test)),
    )
    return Case(train, {"lr": 0.005}, predict, (X_test, y_test), "mse", mode="min")
