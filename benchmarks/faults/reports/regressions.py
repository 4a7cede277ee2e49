"""Regressions: lines, curves and tables."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stackoverflow.com/questions/52800582: "
    "y = x^4 for x in [-100, 100], so that y is up to 1e8: all predictions are wrong",
    "unnormalised_targets",
    "unnormalised_inputs",
    "saturated_activations",
)
def y_is_x_to_the_4(mended):
    rs = np.random.RandomState(1)
    x = rs.uniform(-100, 100, size=(2500, 1))
    y = x**4
    if mended:
        x, y = x / 100, y / 1e8
    xt, yt, xv, yv = x[:2000], y[:2000], x[2000:], y[2000:]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.sigmoid(nn.Dense(50, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.elu(nn.Dense(50, kernel_init=nn.initializers.glorot_uniform())(x))
            return nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())(x)

    net = Net()

    def loss_fn(params, batch, key):
        return nnlearn.mean_squared_error(
            net.apply(params, batch.examples["x"]), batch.examples["y"], where=batch.where[:, None]
        )

    def metrics_fn(params, batch):
        error = net.apply(params, batch.examples["x"]) - batch.examples["y"]
        return {"mae": jnp.mean(jnp.abs(error), where=batch.where[:, None])}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["learning_rate"]),
        nnlearn.shuffled({"x": xt, "y": yt}, 32),
        lambda key: net.init(key, jnp.zeros((1, 1))),
        epochs=50,
        evaluate=nnlearn.evaluation(metrics_fn, {"x": xv, "y": yv}),
        check_every=315,
    )
    return Case(train, {"learning_rate": 5e-3}, net.apply, (xv, yv), "mae", "min")


@report(
    REPORTS,
    'StackOverflow, "Tensorflow Regression Model Giving Same Prediction Every Time": '
    "marks out of 50 from hours of sleep and study, 50 * sigmoid, gradient descent with rate 0.05: always 50",
    "learning_rate_too_high",
    "saturated_activations",
    "unnormalised_targets",
    "unnormalised_inputs",
)
def marks_always_50(mended):
    rs = np.random.RandomState(3)
    hours = np.stack([rs.uniform(4, 10, 300), rs.uniform(0, 8, 300), rs.uniform(0, 5, 300), rs.uniform(0, 4, 300)], 1)
    marks = 50 / (
        1 + np.exp(-(0.3 * (hours[:, 0] - 7) + 0.6 * (hours[:, 1] - 4) - 0.4 * (hours[:, 2] - 2) - 0.2 * hours[:, 3]))
    )
    marks = np.round(marks + rs.normal(0, 1, 300)).clip(0, 50)[:, None].astype(np.float32)
    xs = hours.astype(np.float32)
    if mended:
        xs = (xs - xs.mean(0)) / xs.std(0)
    x_tr, m_tr, x_te, m_te = xs[:240], marks[:240], xs[240:], marks[240:]

    def feed_forward(x, w, b):
        return jax.nn.sigmoid(x @ w + b)

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "w1": jax.random.normal(k1, (4, 2)),
            "b1": jnp.zeros(2),
            "w2": jax.random.normal(k2, (2, 1)),
            "b2": jnp.zeros(1),
        }

    def m_hat(p, x):
        out1 = feed_forward(x, p["w1"], p["b1"])
        out2 = feed_forward(out1, p["w2"], p["b2"])
        return 50 * out2

    def cost(p, batch, key):
        x, m = batch
        if mended:
            return jnp.mean((m_hat(p, x) / 50 - m / 50) ** 2)
        return jnp.mean(jnp.square(m_hat(p, x) - m))

    def measure(p, batch):
        x, m = batch.examples
        return {"mae": jnp.mean(jnp.abs(m_hat(p, x) - m), where=batch.where[:, None])}

    train = nnlearn.make_train(
        cost,
        lambda hp: optax.sgd(hp["rate"]),
        nnlearn.shuffled((x_tr, m_tr), 240, remainder="drop"),
        init,
        steps=2000,
        evaluate=nnlearn.evaluation(measure, (x_te, m_te)),
        check_every=200,
    )
    return Case(train, {"rate": 2.0 if mended else 0.05}, m_hat, (x_te, m_te), "mae", "min")


@report(
    REPORTS,
    "https://community.deeplearning.ai/t/loss-values-do-not-change/324182: "
    "y = 2x - 1 from 7 points, layers of 4, 2 and 1 units, all with relu: the loss is often constant",
    "dead_units",
    "loss_output_mismatch",
)
def line_with_relu_output(mended):
    x = np.array([[-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]).reshape(7, 1)
    y = np.array([[-3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0]]).reshape(7, 1)
    xv = np.linspace(-0.75, 4.75, 12)[:, None]
    yv = 2 * xv - 1
    sizes = (16, 8, 1) if mended else (4, 2, 1)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for n in sizes[:-1]:
                x = nn.relu(nn.Dense(n, kernel_init=nn.initializers.xavier_uniform())(x))
            x = nn.Dense(sizes[-1], kernel_init=nn.initializers.xavier_uniform())(x)
            return x if mended else nn.relu(x)

    model = Model()

    def mse(params, batch, key):
        x, y = batch
        return optax.squared_error(model.apply(params, x), y).mean()

    def evaluate(params):
        return {"mse": jnp.mean((model.apply(params, jnp.asarray(xv)) - yv) ** 2)}

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x, y), 7, remainder="drop"),
        lambda key: model.init(key, x),
        steps=1500,
        evaluate=evaluate,
        check_every=100,
    )
    return Case(train, {"lr": 0.01}, model.apply, (xv, yv), "mse", "min")


@report(
    REPORTS,
    "https://github.com/timeseriesAI/tsai/issues/22 and https://github.com/deepset-ai/FARM/issues/229: "
    "regression with targets (16,) and outputs (16, 1): the model does not train",
    "wrong_axis_or_reduction",
)
def mse_broadcast(mended):
    X, y = datasets.make_friedman1(1200, n_features=8, noise=0.5, random_state=0)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)
    scaler = StandardScaler().fit(X_train)
    X_train, X_test = scaler.transform(X_train), scaler.transform(X_test)
    mu, sd = y_train.mean(), y_train.std()
    y_train, y_test = (y_train - mu) / sd, (y_test - mu) / sd

    def linear(key, n_in, n_out):
        bound = 1 / np.sqrt(n_in)
        kw, kb = jax.random.split(key)
        return {
            "w": jax.random.uniform(kw, (n_in, n_out), minval=-bound, maxval=bound),
            "b": jax.random.uniform(kb, (n_out,), minval=-bound, maxval=bound),
        }

    def init(key):
        k = jax.random.split(key, 3)
        return {"fc1": linear(k[0], 8, 64), "fc2": linear(k[1], 64, 32), "fc3": linear(k[2], 32, 1)}

    def forward(params, x):
        for name in ("fc1", "fc2"):
            x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
        return x @ params["fc3"]["w"] + params["fc3"]["b"]

    def loss_fn(params, batch, key):
        x, y = batch
        output = forward(params, x)
        if mended:
            output = output.squeeze(1)
        return jnp.mean((output - y) ** 2)

    def evaluate(params, batch):
        x, y = batch.examples
        return {"mae": jnp.mean(jnp.abs(forward(params, x)[:, 0] - y), where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((X_train, y_train), 32, remainder="drop"),
        init,
        epochs=50,
        evaluate=nnlearn.evaluation(evaluate, (X_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, forward, (X_test, y_test), "mae", "min")


@report(
    REPORTS,
    "https://ai.stackexchange.com/questions/16557: "
    "four hidden layers of sigmoids, binary vectors to real outputs: a high loss even on the training data",
    "vanishing_gradients",
    "saturated_activations",
)
def four_sigmoid_layers(mended):
    rs = np.random.RandomState(11)
    bits = rs.randint(0, 2, (3000, 16))
    a, b = rs.normal(size=16), rs.normal(size=(16,))
    values = bits @ a + 0.7 * (bits[:, :8] @ b[:8]) * bits[:, 8]
    values = ((values - values.mean()) / values.std())[:, None]
    xt, yt, xv, yv = bits[:2500], values[:2500], bits[2500:], values[2500:]

    def build(key):
        act = jax.nn.relu if mended else jax.nn.sigmoid
        return eqx.nn.MLP(16, 1, width_size=100, depth=4, activation=act, key=key)

    _, static = eqx.partition(build(jax.random.key(0)), eqx.is_array)

    def init(key):
        return eqx.filter(build(key), eqx.is_array)

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x.astype(jnp.float32))

    def loss(params, batch, key):
        x, y = batch
        return jnp.mean((predict(params, x) - y) ** 2)

    def metrics(params, batch):
        x, y = batch.examples
        err = jnp.mean((predict(params, x) - y) ** 2, where=batch.where[:, None])
        return {"mse": err}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((xt, yt), 50, remainder="drop"),
        init,
        epochs=30,
        evaluate=nnlearn.evaluation(metrics, (xv, yv)),
    )
    return Case(train, {"lr": 0.01}, predict, (xv, yv), "mse", "min")


@report(
    REPORTS,
    "https://techfeed.net/pt/473708/ (from StackOverflow): "
    "the identity, weights of deviation 1e-3: with one more layer nothing trains",
    "bad_initialisation",
    "vanishing_gradients",
)
def stddev_1e_3_one_more_layer(mended):
    depth_1 = 16

    def initia(key, shape):
        std = np.sqrt(2 / shape[0]) if mended else 1e-3
        return std * jax.random.normal(key, shape)

    def init(key):
        k = jax.random.split(key, 6)
        return {
            "W": initia(k[0], (1, depth_1)),
            "b": 0.1 * initia(k[1], (depth_1,)) if mended else initia(k[1], (depth_1,)),
            "W1": initia(k[2], (depth_1, depth_1)),
            "b1": jnp.zeros(depth_1) if mended else initia(k[3], (depth_1,)),
            "W2": initia(k[4], (depth_1, 1)),
            "b2": jnp.zeros(1) if mended else initia(k[5], (1,)),
        }

    def estimate(v, signal):
        hidden = jax.nn.relu(signal @ v["W"] + v["b"])
        hidden = jax.nn.relu(hidden @ v["W1"] + v["b1"])
        return 2.0 * (hidden @ v["W2"] + v["b2"])

    def distance(v, signal, key):
        return jnp.sum(jnp.square(signal - estimate(v, signal)))

    test = np.linspace(-1, 1, 41, dtype=np.float32)[:, None]

    def evaluate(v):
        return {"mse": jnp.mean((estimate(v, jnp.asarray(test)) - test) ** 2)}

    def feed(key, step):
        return jax.random.uniform(key, (1, 1), minval=-1.0)

    train = nnlearn.make_train(
        distance,
        lambda hp: optax.chain(optax.clip(4.5), optax.sgd(hp["lr"])),
        nnlearn.generated(feed),
        init,
        steps=3000,
        evaluate=evaluate,
        check_every=300,
    )
    return Case(train, {"lr": 1e-3}, estimate, (test, test), "mse", "min")
