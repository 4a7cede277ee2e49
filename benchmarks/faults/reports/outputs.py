"""Losses and activations that do not fit: pixels, sequences, transfer curves, topics."""

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
    "https://datascience.stackexchange.com/questions/18667: MNIST with one hidden layer of relus stays below 50 %, of "
    "sigmoids it reaches 95 %; the pixels go from 0 to 255",
    "unnormalised_inputs",
    "learning_rate_too_high",
    "dead_units",
)
def relu_on_pixels_to_255(mended):
    mnist = load("mnist", seed=1)
    x_train = np.uint8(mnist.train.inputs.reshape(-1, 784) * 255)
    x_test = np.uint8(mnist.validation.inputs.reshape(-1, 784) * 255)
    if mended:
        x_train, x_test = x_train.astype("float32") / 255, x_test.astype("float32") / 255
    y_train, y_test = np.eye(10)[mnist.train.targets], mnist.validation.targets

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(100, kernel_init=nn.initializers.glorot_uniform())(x)
            x = nn.relu(x)
            return nn.Dense(10, kernel_init=nn.initializers.glorot_uniform())(x)

    net = Net()

    def predict(variables, x):
        return net.apply(variables, x.astype(jnp.float32))

    def loss_fn(variables, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy(predict(variables, x), y).mean()

    def metrics(variables, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(jnp.argmax(predict(variables, x), -1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 50, remainder="drop"),
        lambda key: net.init(key, np.zeros((1, 784), np.float32)),
        epochs=10,
        evaluate=nnlearn.evaluation(metrics, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.1 if mended else 0.01}, predict, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/565956: an LSTM with one sigmoid output and categorical crossentropy; "
    "-y log p is smallest where p is 1 for every input",
    "loss_output_mismatch",
)
def categorical_crossentropy_of_one_output(mended):
    rng = np.random.default_rng(3)
    steps, features = 5, 10
    codes = rng.integers(0, 4, size=(6400, steps, features))
    weight = rng.normal(size=(steps, features)) * np.array([0.3, 0.3, 0.5, 1.0, 1.0])[:, None]
    score = ((codes - 1.5) * weight).sum((1, 2))
    labels = (score > np.quantile(score, 0.55)).astype(np.float32)[:, None]
    X = (codes - 1.5).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(X, labels, test_size=400, random_state=0)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.RNN(nn.OptimizedLSTMCell(16))(x)[:, -1]
            return nn.sigmoid(nn.Dense(1)(hidden))

    model = Classifier()

    def loss_fn(params, batch, key):
        p = jnp.clip(model.apply(params, batch["x"]), 1e-7, 1 - 1e-7)
        y = batch["y"]
        if mended:
            return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))
        return jnp.mean(-jnp.sum(y * jnp.log(p), axis=-1))

    def evaluate(params):
        return {"accuracy": jnp.mean((model.apply(params, X_test) > 0.5) == (y_test > 0.5))}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled({"x": X_train, "y": y_train}, 50, remainder="drop"),
        lambda key: model.init(key, X_train[:2]),
        epochs=5,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.005}, model.apply, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/55322991: NaN loss as soon as the two LSTM cells get activation=relu; with "
    "tanh everything works",
    "exploding_gradients",
)
def lstm_cells_with_relu(mended):
    rng = np.random.RandomState(2)
    words, length, count = 60, 90, 900
    texts = rng.randint(0, words, (count, length))
    kind = rng.randint(0, 3, count)
    for text, k in zip(texts, kind, strict=True):
        text[rng.rand(length) < 0.12] = 3 * rng.randint(0, 6) + k  # words that speak for one of three kinds
    train_set, test_set = (texts[:700], kind[:700]), (texts[700:], kind[700:])
    activation = jnp.tanh if mended else jax.nn.relu

    def cell(key, n_in, n):
        k1, k2 = random.split(key)
        kernel = jax.nn.initializers.glorot_uniform()(k1, (n_in, 4 * n))
        recurrent = jax.nn.initializers.orthogonal()(k2, (n, 4 * n))
        return {"w": jnp.concatenate([kernel, recurrent]), "b": jnp.zeros(4 * n)}

    def init(key):
        k1, k2, k3, k4 = random.split(key, 4)
        return {
            "embedding": random.normal(k1, (words, 16)),
            "lstm1": cell(k2, 16, 48),
            "lstm2": cell(k3, 48, 10),
            "out": {"w": random.normal(k4, (10, 3)) / 10**0.5, "b": jnp.zeros(3)},
        }

    def run(p, x):
        n = p["b"].shape[0] // 4

        def step(carry, x_t):
            c, h = carry
            i, f, g, o = jnp.split(jnp.concatenate([x_t, h], axis=-1) @ p["w"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f + 1.0) * c + jax.nn.sigmoid(i) * activation(g)
            h = jax.nn.sigmoid(o) * activation(c)
            return (c, h), h

        zeros = jnp.zeros((x.shape[1], n))
        return jax.lax.scan(step, (zeros, zeros), x)

    def logits(params, text):
        x = params["embedding"][text].transpose(1, 0, 2)
        _, x = run(params["lstm1"], x)
        _, x = run(params["lstm2"], x)
        return jnp.mean(x, axis=0) @ params["out"]["w"] + params["out"]["b"]

    def loss(params, batch, key):
        text, k = batch
        return nnlearn.softmax_cross_entropy_with_integer_labels(logits(params, text), k).mean()

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["rate"]),
        nnlearn.shuffled(train_set, 35, remainder="drop"),
        init,
        epochs=8,
        evaluate=lambda params: {"accuracy": jnp.mean(logits(params, test_set[0]).argmax(-1) == test_set[1])},
    )
    return Case(train, {"rate": 0.01}, logits, test_set, "accuracy")


@report(
    REPORTS,
    "https://procomputingproducts.co.uk/post/custom-parametric-activation-function-leading-to-na-n-loss (of a "
    "question): x3 * log(1 + exp(x1 * (x - x2))) as activation gives NaN, exp overflows",
    "numerical_precision",
)
def parametric_softplus(mended):
    rng = np.random.default_rng(11)
    voltage = rng.uniform(-1, 1, size=(1000, 3))
    current = np.maximum(voltage[:, 0] + 0.5 * voltage[:, 1], 0) ** 1.5 - 0.6 * np.abs(voltage[:, 2] - 0.2)
    current = ((current - current.mean()) / current.std())[:, None]
    x_train, x_val, y_train, y_val = train_test_split(voltage, current, test_size=200, random_state=1)

    class Electronic(nn.Module):
        @nn.compact
        def __call__(self, x):
            x1 = self.param("x1", nn.initializers.constant(45.0), ())
            x2 = self.param("x2", nn.initializers.constant(0.1), ())
            x3 = self.param("x3", nn.initializers.constant(1 / 45.0), ())
            z = x1 * (x - x2)
            return x3 * (jnp.logaddexp(0.0, z) if mended else jnp.log(1 + jnp.exp(z)))

    class Device(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Electronic()(nn.Dense(24, kernel_init=nn.initializers.he_normal())(x))
            x = Electronic()(nn.Dense(24, kernel_init=nn.initializers.he_normal())(x))
            return nn.Dense(1)(x)

    device = Device()

    def loss(params, batch, key):
        x, y = batch
        return nnlearn.squared_error(device.apply(params, x), y).mean()

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 40, remainder="drop"),
        lambda key: device.init(key, x_train[:1]),
        epochs=40,
        evaluate=lambda params: {"mse": loss(params, (x_val, y_val), None)},
        check_every=40,
    )
    return Case(train, {"lr": 0.003}, device.apply, (x_val, y_val), "mse", mode="min")


@report(
    REPORTS,
    "https://github.com/Goliath-Research/Deep-Learning (Reuters newswires): a hidden layer of 4 units in front of 46 "
    "topics is an information bottleneck, the accuracy drops",
    "underfitting",
)
def newswires_through_four_units(mended):
    rng = np.random.RandomState(0)
    topics, vocabulary = 40, 400
    word_given_topic = rng.dirichlet(np.full(vocabulary, 0.06), topics)
    y = rng.randint(0, topics, 3600)
    background = rng.dirichlet(np.full(vocabulary, 0.5))
    x = np.zeros((len(y), vocabulary), np.float32)
    for wire, topic in enumerate(y):
        chosen = rng.choice(vocabulary, 30, p=0.45 * word_given_topic[topic] + 0.55 * background)
        x[wire, chosen] = 1
    x_train, y_train, x_val, y_val = x[:3000], y[:3000], x[3000:], y[3000:]
    sizes = [vocabulary, 64, 64 if mended else 4, topics]

    def init(key):
        keys = random.split(key, 3)
        he = jax.nn.initializers.he_normal()
        return [he(k, (a, b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)], [
            jnp.zeros(b) for b in sizes[1:]
        ]

    def forward(params, x):
        kernels, biases = params
        x = jax.nn.relu(x @ kernels[0] + biases[0])
        x = jax.nn.relu(x @ kernels[1] + biases[1])
        return jax.nn.log_softmax(x @ kernels[2] + biases[2])

    def nll(params, batch, key):
        logp = forward(params, batch[0])
        return -jnp.mean(jnp.take_along_axis(logp, batch[1][:, None], axis=1))

    def evaluate(params):
        logp = forward(params, x_val)
        return {"loss": nll(params, (x_val, y_val), None), "accuracy": jnp.mean(logp.argmax(1) == y_val)}

    train = nnlearn.make_train(
        nll,
        lambda hp: nnlearn.rmsprop(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 100, remainder="drop"),
        init,
        epochs=8,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.002}, forward, (x_val, y_val), "accuracy")


@report(
    REPORTS,
    "http://pullrequest.ru/14126136 (StackOverflow): a custom loss for integer outputs; mean squared error is for "
    "regression, the classes need softmax and crossentropy",
    "loss_output_mismatch",
)
def class_numbers_by_squared_error(mended):
    images, classes = load_digits(return_X_y=True)
    images = images / 8 - 1
    x_train, x_test, t_train, t_test = train_test_split(images, classes, test_size=0.2, random_state=2)

    def init(key):
        k1, k2 = random.split(key)
        n_out = 10 if mended else 1
        return {
            "w1": random.normal(k1, (64, 32)) * np.sqrt(2 / 64),
            "b1": jnp.zeros(32),
            "w2": random.normal(k2, (32, n_out)) * np.sqrt(1 / 32),
            "b2": jnp.zeros(n_out),
        }

    def network(p, x):
        out = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return out if mended else out[:, 0]

    def loss(p, batch, key):
        x, t = batch
        if mended:
            return nnlearn.cross_entropy(network(p, x), t)
        return jnp.mean((network(p, x) - t) ** 2)

    def accuracy(p):
        out = network(p, x_test)
        return {"accuracy": jnp.mean((out.argmax(-1) if mended else jnp.round(out)) == t_test)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((x_train, t_train), 32, remainder="drop"),
        init,
        epochs=15,
        evaluate=accuracy,
    )
    return Case(train, {"lr": 0.01 if mended else 0.001}, network, (x_test, t_test), "accuracy")
