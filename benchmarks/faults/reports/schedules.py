"""Regularisation, schedules, tables with categories, noisy steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.model_selection import KFold, train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://techfeed.net/es/485530/ (StackOverflow): the predictions of a multilayer LSTM converge to one constant; "
    "dropout 0.5 on inputs and outputs of every layer of a regression",
    "excessive_regularisation",
)
def lstm_regression_full_of_dropout(mended):
    rng = np.random.RandomState(12)
    t = np.arange(1500)
    series = np.sin(2 * np.pi * t / 23) + 0.6 * np.sin(2 * np.pi * t / 61 + 1) + 0.05 * rng.randn(1500)
    series = ((series - series[:1200].mean()) / series[:1200].std()).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(series, 21)
    X, y = windows[:, :20, None], windows[:, 20:]
    train_set, test_set = (X[:1180], y[:1180]), (X[1200:], y[1200:])
    rate = 0.0 if mended else 0.5

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for units in (20, 12):
                x = nn.Dropout(rate, deterministic=not train)(x)
                x = nn.RNN(nn.OptimizedLSTMCell(units))(x)
                x = nn.Dropout(rate, deterministic=not train)(x)
            x = nn.Dense(32)(x[:, -1])
            x = nn.Dropout(rate, deterministic=not train)(x)
            return nn.Dense(1)(x)

    stack = Stack()

    def loss_fn(params, batch, key):
        x, target = batch
        return jnp.mean((stack.apply(params, x, train=True, rngs={"dropout": key}) - target) ** 2)

    def predict(params, x, key=None):
        return stack.apply(params, x) if key is None else stack.apply(params, x, train=True, rngs={"dropout": key})

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.rmsprop(hp["lr"]),
        nnlearn.shuffled(train_set, 32, remainder="drop"),
        lambda key: stack.init(key, X[:2]),
        epochs=10,
        evaluate=lambda params: {"mse": jnp.mean((predict(params, test_set[0]) - test_set[1]) ** 2)},
    )
    return Case(train, {"lr": 0.003}, predict, test_set, "mse", mode="min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/10924: ReduceLROnPlateau with factor 0.2, patience 2 and min_delta "
    "0.04 reduces the rate again and again, though the loss falls",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def plateau_with_min_delta_of_0_04(mended):
    rng = np.random.RandomState(20)
    table = rng.uniform(-1.7, 1.7, (4000, 6))
    signal = table[:, 0] * table[:, 1] + np.sin(2 * table[:, 2]) + 0.7 * np.abs(table[:, 3]) - 0.5 * table[:, 4]
    outcome = (signal + 0.1 * rng.randn(4000) > np.median(signal)).astype(np.float32)
    X, X_val, Y, Y_val = train_test_split(table, outcome, test_size=400, random_state=7)
    layers = [6, 48, 32, 1]
    per_epoch = len(X) // 100

    def init(key):
        keys = random.split(key, 3)
        he = jax.nn.initializers.he_uniform()
        sizes = zip(layers[:-1], layers[1:], strict=True)
        return [{"w": he(k, s), "b": jnp.zeros(s[1])} for k, s in zip(keys, sizes, strict=True)]

    def logit(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]

    def loss(params, batch, key):
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(logit(params, x), y).mean()

    def make_tx(hp):
        reduce_lr = optax.contrib.reduce_on_plateau(
            factor=0.2,
            patience=10 if mended else 2,
            rtol=0.0,
            atol=1e-4 if mended else 0.04,
            accumulation_size=per_epoch,
        )
        return optax.chain(optax.adam(hp["lr"]), reduce_lr)

    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.shuffled((X, Y), 100, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda params: {"accuracy": jnp.mean((logit(params, X_val) > 0) == (Y_val == 1))},
    )
    return Case(train, {"lr": 0.003}, logit, (X_val, Y_val), "accuracy")


@report(
    REPORTS,
    "https://techqa.club/v/q/keep-same-dummy-variable-in-training-and-testing-data-41335718 (StackOverflow): "
    "get_dummies of the test set gives fewer columns, they are filled up with zeros and mean something else",
    "preprocessing_mismatch",
)
def dummies_of_the_test_set(mended):
    rng = np.random.default_rng(13)
    cities = np.array(["Aachen", "Basel", "Cork", "Delft", "Espoo", "Faro", "Gent", "Hull", "Izmir", "Jena"])
    shops = np.array(["app", "market", "phone", "web"])
    taste = rng.normal(size=10) * 1.6
    habit = rng.normal(size=4)

    def sales(count, open_cities):
        city, shop = rng.choice(cities[open_cities], count), rng.choice(shops, count)
        price = rng.normal(size=count)
        mean = taste[np.searchsorted(cities, city)] + habit[np.searchsorted(shops, shop)] * np.sign(price) - price
        return {"city": city, "shop": shop, "price": price}, (mean + 0.2 * rng.normal(size=count))[:, None]

    def get_dummies(frame):
        columns = [frame["price"]]
        for name in ("city", "shop"):
            columns += [frame[name] == value for value in np.unique(frame[name])]
        return np.stack(columns, axis=1).astype(np.float32)

    train_frame, y_train = sales(1600, np.arange(10))
    test_frame, y_test = sales(300, [0, 3, 4, 5, 7, 8, 9])
    x_train = get_dummies(train_frame)
    if mended:
        both = {k: np.concatenate([train_frame[k], test_frame[k]]) for k in train_frame}
        x_test = get_dummies(both)[len(x_train) :]
    else:
        x_test = get_dummies(test_frame)
        x_test = np.pad(x_test, [(0, 0), (0, x_train.shape[1] - x_test.shape[1])])

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(24)(x))
            return nn.Dense(1)(x)

    model = Model()

    def mse(params, batch, key):
        return jnp.mean(optax.squared_error(model.apply(params, batch["x"]), batch["y"]))

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled({"x": x_train, "y": y_train}, 32, remainder="drop"),
        lambda key: model.init(key, x_train[:1]),
        epochs=20,
        evaluate=lambda params: {"mse": mse(params, {"x": x_test, "y": y_test}, None)},
    )
    return Case(train, {"lr": 0.01}, model.apply, (x_test, y_test), "mse", mode="min")


@report(
    REPORTS,
    "https://theneuralbase.com/feature-engineering-for-ml/learn/advanced/k-fold-out-of-fold-encoding/ (and "
    "stats.stackexchange.com/posts/567095): the mean target of a category contains the target of the row itself",
    "target_leak",
    "overfitting",
)
def mean_target_of_the_customer(mended):
    rng = np.random.RandomState(17)
    customers, rows = 1000, 3000
    customer = rng.randint(0, customers, rows)
    numbers = rng.randn(rows, 5)
    score = numbers @ np.array([1.2, -1.0, 0.8, 0.0, 0.5]) + 0.4 * rng.randn(customers)[customer]
    bought = (score + 0.8 * rng.randn(rows) > 0).astype(np.float64)
    seen, new = np.arange(rows) < 2200, np.arange(rows) >= 2200

    def mean_target(of_rows, prior=0.0):
        total = np.bincount(customer[of_rows], bought[of_rows], customers) + prior * 0.5
        count = np.bincount(customer[of_rows], minlength=customers) + prior
        return np.where(count > 0, total / np.maximum(count, 1e-9), 0.5)

    encoding = np.zeros(rows)
    if mended:
        for rest, fold in KFold(5, shuffle=True, random_state=0).split(np.flatnonzero(seen)):
            encoding[fold] = mean_target(rest, prior=4.0)[customer[fold]]
        encoding[new] = mean_target(seen, prior=4.0)[customer[new]]
    else:
        encoding = mean_target(seen)[customer]
    X = np.column_stack([numbers, 2 * encoding - 1]).astype(np.float32)

    def init(key):
        k1, k2 = random.split(key)
        return (random.normal(k1, (6, 16)) / 6**0.5, jnp.zeros(16), random.normal(k2, (16,)) / 4, jnp.zeros(()))

    def logits(params, x):
        w, b, v, c = params
        return jnp.tanh(x @ w + b) @ v + c

    def bce(params, batch, key):
        x, y = batch
        return nnlearn.sigmoid_binary_cross_entropy(logits(params, x), y).mean()

    def evaluate(params):
        return {"loss": bce(params, (X[new], bought[new]), None)}

    train = nnlearn.make_train(
        bce,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=0.01),
        nnlearn.shuffled((X[seen], bought[seen]), 50, remainder="drop"),
        init,
        epochs=12,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.005}, logits, (X[new], bought[new]), "loss", mode="min")


@report(
    REPORTS,
    "https://discuss.tensorflow.org/t/lstm-only-yielding-outputs-between-0-1/3471: a guitar effect with values from "
    "-27 to 27, the last layer is a softmax with categorical crossentropy",
    "loss_output_mismatch",
    "unnormalised_targets",
    "unnormalised_inputs",
)
def guitar_effect_with_softmax(mended):
    rng = np.random.RandomState(5)
    t = np.arange(1700)
    left = np.convolve(rng.randn(1711), np.hanning(12), "valid")[:1700] + 1.5 * np.sin(t / 3.0)
    right = 0.6 * left + np.sin(t / 4.3)
    raw = np.stack([left, right], axis=1) * 6
    effected = raw.copy()
    effected[3:] += 0.5 * raw[:-3, ::-1]
    effected[7:] -= 0.3 * raw[:-7]
    if mended:
        raw, effected = raw / raw[:1400].std(), effected / effected[:1400].std()
    x = np.stack([raw[i : i + 10] for i in range(1690)]).astype(np.float32)
    y = effected[9:1699].astype(np.float32)
    train_set, test_set = (x[:1380], y[:1380]), (x[1400:], y[1400:])

    class Effect(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(32))(x)[:, -1]
            x = nn.Dense(2)(x)
            return x if mended else nn.softmax(x)

    effect = Effect()

    def loss(params, batch, key):
        out = effect.apply(params, batch[0])
        if mended:
            return jnp.mean((out - batch[1]) ** 2)
        return -jnp.mean(jnp.sum(batch[1] * jnp.log(jnp.clip(out, 1e-7, 1.0)), axis=-1))

    def evaluate(params):
        return {"error": jnp.mean((effect.apply(params, test_set[0]) - test_set[1]) ** 2)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 20, remainder="drop"),
        lambda key: effect.init(key, x[:2]),
        epochs=15,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.004 if mended else 0.001}, effect.apply, test_set, "error", mode="min")


@report(
    REPORTS,
    "https://blog.youkuaiyun.com/weixin_43202635/article/details/84204180: with batch_size 1 every step follows the "
    "gradient of one noisy sample, it is hard to converge",
    "batch_too_small",
    "learning_rate_too_high",
)
def one_noisy_sample_per_step(mended):
    rng = np.random.default_rng(30)
    x = rng.uniform(-2, 2, size=(1600, 2))
    clean = np.sin(1.5 * x[:, 0]) + 0.5 * x[:, 1] ** 2 - 0.8
    y = clean + 0.9 * rng.standard_t(4, size=1600)
    x_test = rng.uniform(-2, 2, size=(400, 2))
    y_test = np.sin(1.5 * x_test[:, 0]) + 0.5 * x_test[:, 1] ** 2 - 0.8

    def init(key):
        k1, k2 = random.split(key)
        return {
            "w": random.normal(k1, (2, 24)),
            "b": jnp.zeros(24),
            "v": random.normal(k2, (24,)) / 24**0.5,
            "c": jnp.zeros(()),
        }

    def f(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]

    def loss(p, batch, key):
        x, y = batch
        return jnp.mean((f(p, x) - y) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((x, y), 50 if mended else 1, remainder="drop"),
        init,
        steps=3000,
        evaluate=lambda p: {"mse": jnp.mean((f(p, x_test) - y_test) ** 2)},
        check_every=100,
    )
    return Case(train, {"lr": 0.04}, f, (x_test, y_test), "mse", mode="min")
