"""Points and numbers: small networks for made-up classes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/433365: "
    "a 2-2-1 net for XOR, first layer linear, relu output, squared error: stuck at 0.5",
    "loss_output_mismatch",
    "dead_units",
    "underfitting",
)
def xor_relu_output(mended):
    x = np.repeat(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 500, axis=0)
    np.random.RandomState(0).shuffle(x)
    y = np.array([a ^ b for a, b in x])
    x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]
    width = 8 if mended else 2

    def dense(key, n_in, n_out):
        limit = np.sqrt(6 / (n_in + n_out))
        return jax.random.uniform(key, (n_in, n_out), minval=-limit, maxval=limit), jnp.zeros(n_out)

    def init(key):
        k = jax.random.split(key, 3)
        return [dense(k[0], 2, width), dense(k[1], width, width), dense(k[2], width, 1)]

    def net(params, x):
        (w1, b1), (w2, b2), (w3, b3) = params
        h = x.astype(jnp.float32) @ w1 + b1
        if mended:
            h = jax.nn.relu(h)
        h = jax.nn.relu(h @ w2 + b2)
        z = (h @ w3 + b3)[:, 0]
        return jax.nn.sigmoid(z) if mended else jax.nn.relu(z)

    def loss(params, batch, key):
        x, y = batch
        p = net(params, x)
        if mended:
            p = jnp.clip(p, 1e-6, 1 - 1e-6)
            return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))
        return jnp.mean((p - y) ** 2)

    def metrics(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean((net(params, x) > 0.5) == y, where=batch.where)}

    tx = (lambda hp: optax.adam(hp["lr"])) if mended else (lambda hp: optax.sgd(hp["lr"]))
    train = nnlearn.make_train(
        loss,
        tx,
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        steps=2300,
        evaluate=nnlearn.evaluation(metrics, (x_test, y_test)),
        check_every=230,
    )
    return Case(train, {"lr": 0.01}, net, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/126: "
    "a softmax over one unit, squared error: no progress, all predictions are 1",
    "loss_output_mismatch",
)
def keras_126_one_unit_softmax(mended):
    rs = np.random.RandomState(5)
    X = np.clip(rs.uniform(0, 1, (600, 1)) + rs.normal(0, 0.1, (600, 2)), 0, 1)
    y = (X[:, 0] + X[:, 1] > 1.0).astype("int32")
    sizes = [2, 64, 64, 1]

    def init(key):
        params = []
        for k, a, b in zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True):
            params.append((jax.random.uniform(k, (a, b), minval=-0.05, maxval=0.05), jnp.zeros((b,))))
        return params

    def dropout(key, x, p):
        if key is None:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - p, x.shape), x / (1 - p), 0)

    def forward(params, x, key=None):
        k1, k2 = (None, None) if key is None else jax.random.split(key)
        h = dropout(k1, jnp.tanh(x @ params[0][0] + params[0][1]), 0.5)
        h = dropout(k2, jnp.tanh(h @ params[1][0] + params[1][1]), 0.5)
        z = h @ params[2][0] + params[2][1]
        return jax.nn.sigmoid(z) if mended else jax.nn.softmax(z, axis=-1)

    def loss_fn(params, batch, key):
        xb, yb = batch
        return jnp.mean((forward(params, xb, key) - yb[:, None]) ** 2)

    def metrics(params, batch):
        xb, yb = batch.examples
        return {"acc": jnp.mean((forward(params, xb)[:, 0] > 0.5) == yb, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9, nesterov=True),
        nnlearn.shuffled((X[:500], y[:500]), 100, remainder="drop"),
        init,
        steps=1000,
        evaluate=nnlearn.evaluation(metrics, (X[500:], y[500:])),
        check_every=100,
    )
    return Case(train, {"lr": 0.1}, forward, (X[500:], y[500:]), "acc")


@report(
    REPORTS,
    "http://pullrequest.ru/14899114/nuzhno-izmenyat-vhody-pertseptron (from StackOverflow): "
    "a perceptron trained by gradient descent through a step function",
    "blocked_gradient",
)
def perceptron_step_function(mended):
    rs = np.random.RandomState(7)
    pts = rs.uniform(-1, 1, (1000, 2))
    labels = np.where(pts[:, 1] > 0.3 * pts[:, 0] + 0.2, 1, -1)
    inputs = np.concatenate([pts, np.ones((1000, 1))], 1)

    def activation(n):
        if mended:
            return jnp.tanh(n)
        return jnp.where(n >= 0, 1.0, -1.0)

    def make_guess(weights, inputs):
        return activation(jnp.dot(inputs, weights))

    def loss(weights, batch, key):
        error = batch["target"] - make_guess(weights, batch["inputs"])
        return jnp.mean(error**2)

    def score(weights, batch):
        guess = jnp.sign(make_guess(weights, batch.examples["inputs"]))
        return {"accuracy": jnp.mean(guess == batch.examples["target"], where=batch.where)}

    data = {"inputs": inputs[:800], "target": labels[:800]}
    test = {"inputs": inputs[800:], "target": labels[800:]}
    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled(data, 10, remainder="drop"),
        lambda key: jax.random.uniform(key, (3,), minval=-1, maxval=1),
        epochs=10,
        evaluate=nnlearn.evaluation(score, test),
    )
    return Case(train, {"lr": 0.1}, make_guess, (test["inputs"], test["target"]), "accuracy")


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/433365 (first answer): "
    "Dense without activation=: two rings stay at 50 %",
    "underfitting",
)
def circles_without_activation(mended):
    X, y = datasets.make_circles(1200, noise=0.08, factor=0.45, random_state=0)
    xt, xv, yt, yv = train_test_split(X, y, test_size=0.25, random_state=0)

    class Dense(eqx.Module):
        kernel: jax.Array
        bias: jax.Array

        def __init__(self, n_in, n_out, key):
            self.kernel = jax.nn.initializers.glorot_uniform()(key, (n_in, n_out))
            self.bias = jnp.zeros(n_out)

        def __call__(self, x):
            return x @ self.kernel + self.bias

    def init(key):
        k = jax.random.split(key, 3)
        return [Dense(2, 16, k[0]), Dense(16, 16, k[1]), Dense(16, 1, k[2])]

    def model(layers, x):
        for layer in layers[:-1]:
            x = layer(x)
            if mended:
                x = jax.nn.relu(x)
        return layers[-1](x).squeeze(-1)

    def loss(layers, batch, key):
        x, y = batch
        return nnlearn.sigmoid_binary_cross_entropy(model(layers, x), y).mean()

    def metrics(layers, batch):
        x, y = batch.examples
        return {"binary_accuracy": jnp.mean((model(layers, x) > 0) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((xt, yt), 32, remainder="drop"),
        init,
        epochs=30,
        evaluate=nnlearn.evaluation(metrics, (xv, yv)),
    )
    return Case(train, {"lr": 3e-3}, model, (xv, yv), "binary_accuracy")


@report(
    REPORTS,
    "https://chenzhang.org/notes/developer/loss-and-accuracy-get-stuck-in-keras/: "
    "the loss is stuck at 1.91; answer: SGD's rate from 0.00001 to 0.1",
    "learning_rate_too_low",
    "underfitting",
)
def sgd_lr_0_00001(mended):
    X, y = datasets.make_blobs(2100, n_features=10, centers=7, cluster_std=2.4, center_box=(-5, 5), random_state=1)
    X = (X - X[:1700].mean(0)) / X[:1700].std(0)
    Y = np.eye(7)[y]
    train_data, test_data = (X[:1700], Y[:1700]), (X[1700:], Y[1700:])

    def init(key):
        sizes, params = (10, 20, 20, 7), {}
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            key, sub = jax.random.split(key)
            params[f"dense_{i}"] = {"kernel": jax.nn.initializers.glorot_uniform()(sub, (m, n)), "bias": jnp.zeros(n)}
        return params

    def model(params, x):
        for i in range(3):
            layer = params[f"dense_{i}"]
            x = x @ layer["kernel"] + layer["bias"]
            if i < 2:
                x = jax.nn.relu(x)
        return x

    def categorical_crossentropy(params, batch, key):
        (x, t), where = batch
        return jnp.mean(optax.softmax_cross_entropy(model(params, x), t), where=where)

    def acc(params, batch):
        (x, t), where = batch
        return {"acc": jnp.mean(model(params, x).argmax(1) == t.argmax(1), where=where)}

    train = nnlearn.make_train(
        categorical_crossentropy,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9, nesterov=True),
        nnlearn.shuffled(train_data, 64),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(acc, test_data),
    )
    return Case(train, {"lr": 0.1 if mended else 1e-5}, model, test_data, "acc")


@report(
    REPORTS,
    "https://geeksmental.com/question/why-does-accuracy-remain-the-same (from StackOverflow): "
    "is a number above 50000? Relu output, binary cross-entropy, raw input",
    "loss_output_mismatch",
    "unnormalised_inputs",
    "dead_units",
)
def threshold_50000(mended):
    threshold, samples = 50000, 2000
    rs = np.random.RandomState(12)
    low = np.stack([rs.randint(0, threshold, samples), np.zeros(samples, int)], 1)
    high = np.stack([rs.randint(threshold, 2 * threshold, samples), np.ones(samples, int)], 1)
    data_set = np.concatenate([low, high])
    rs.shuffle(data_set)
    input_value = data_set[:, 0:1].astype(np.float64)
    if mended:
        input_value = (input_value - input_value.mean()) / input_value.std()
    expected_result = data_set[:, 1]

    class Sequential(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(3, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.relu(nn.Dense(5, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())(x)
            return nn.sigmoid(x) if mended else nn.relu(x)

    model = Sequential()

    def binary_crossentropy(params, batch, key):
        x, y = batch
        p = jnp.clip(model.apply(params, x)[:, 0], 1e-7, 1 - 1e-7)
        return jnp.mean(-y * jnp.log(p) - (1 - y) * jnp.log(1 - p))

    def metrics(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean((model.apply(params, x)[:, 0] > 0.5) == y, where=batch.where)}

    test = (input_value[3200:], expected_result[3200:])
    train = nnlearn.make_train(
        binary_crossentropy,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((input_value[:3200], expected_result[:3200]), 16, remainder="drop"),
        lambda key: model.init(key, input_value[:1]),
        epochs=10,
        evaluate=nnlearn.evaluation(metrics, test),
    )
    return Case(train, {"lr": 1e-3}, model.apply, test, "accuracy")
