"""Points, small pictures and tables: outputs, first weights, rates and penalties that people got wrong."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits, make_friedman1
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/facebookresearch/supervision-by-registration/issues/41 (and 37): the coordinates of a keypoint "
    "are the argmax of its heatmap, through which no gradient goes",
    "blocked_gradient",
)
def keypoint_is_the_argmax(mended):
    rng = np.random.RandomState(0)
    size = 12
    rows, columns = np.mgrid[:size, :size]
    centre = rng.uniform(2, size - 3, (600, 2))
    other = rng.uniform(1, size - 2, (600, 2))

    def square(where, length):
        near = np.maximum(abs(rows - where[:, :1, None]), abs(columns - where[:, 1:, None])) <= length
        return near.astype(float)

    spot = np.exp(-((rows - centre[:, :1, None]) ** 2 + (columns - centre[:, 1:, None]) ** 2) / 3)
    images = (spot + square(other, 1.5) + 0.1 * rng.randn(600, size, size)).astype(np.float32)[..., None]
    target = (centre / (size - 1)).astype(np.float32)
    train_set, test_set = (images[:480], target[:480]), (images[480:], target[480:])

    class Heatmap(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            return nn.Conv(1, (1, 1))(x)[..., 0]

    model = Heatmap()

    def coordinates(params, x):
        heatmap = model.apply(params, x).reshape(len(x), -1)
        if mended:
            grid = jnp.stack([rows.ravel(), columns.ravel()], 1) / (size - 1)
            return jax.nn.softmax(heatmap) @ grid
        peak = jnp.argmax(heatmap, axis=1)
        return jnp.stack([peak // size, peak % size], 1) / (size - 1)

    def loss_fn(params, batch, key):
        return jnp.mean(jnp.sum((coordinates(params, batch[0]) - batch[1]) ** 2, axis=1))

    def metrics(params, batch):
        off = jnp.linalg.norm(coordinates(params, batch.examples[0]) - batch.examples[1], axis=1)
        return {"pixels": (size - 1) * jnp.mean(off, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 24, remainder="drop"),
        lambda key: model.init(key, images[:1]),
        epochs=12,
        evaluate=nnlearn.evaluation(metrics, test_set),
    )
    return Case(train, {"lr": 0.003}, coordinates, test_set, "pixels", mode="min")


@report(
    REPORTS,
    "https://github.com/microsoft/vscode-python/issues/5069 (a course's notebook on weight initialisation): "
    "nn.init.constant_ gives every linear layer the weight 1, the accuracy stays near 10 %",
    "symmetric_initialisation",
    "bad_initialisation",
)
def constant_weight_of_one(mended):
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(x, digits.target, test_size=0.2, random_state=4)

    class Net(nnx.Module):
        def __init__(self, rngs):
            def weight(key, shape, dtype):
                y = 1.0 / np.sqrt(shape[0])
                return jax.random.normal(key, shape, dtype) * y if mended else jnp.full(shape, 1.0, dtype)

            self.fc1 = nnx.Linear(64, 64, kernel_init=weight, rngs=rngs)
            self.fc2 = nnx.Linear(64, 32, kernel_init=weight, rngs=rngs)
            self.fc3 = nnx.Linear(32, 10, kernel_init=weight, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.fc1(x))
            x = nnx.relu(self.fc2(x))
            return self.fc3(x)

    def init(key):
        return nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(key))))

    def forward(params, x):
        net = Net(nnx.Rngs(0))
        nnx.update(net, nnx.State(params))
        return net(x)

    def loss(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch["x"]), batch["y"]).mean()

    def validate(params):
        logits = forward(params, test_x)
        return {"loss": loss(params, {"x": test_x, "y": test_y}, None), "acc": jnp.mean(logits.argmax(1) == test_y)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled({"x": train_x, "y": train_y}, 20, remainder="drop"),
        init,
        epochs=8,
        evaluate=validate,
    )
    return Case(train, {"lr": 0.001}, forward, (test_x, test_y), "acc")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/18919 (also 3040 and StackOverflow 37232782): a regression with SGD, "
    "the loss is NaN after a few steps; a lower rate is the answer",
    "learning_rate_too_high",
    "exploding_gradients",
)
def regression_with_sgd_is_nan(mended):
    rng = np.random.RandomState(6)
    n = 2000
    income, age, rooms = rng.gamma(3, 1.3, n), rng.randint(1, 52, n), rng.normal(5.4, 1.2, n)
    latitude, longitude = rng.uniform(32, 42, n), rng.uniform(-124, -114, n)
    coast = np.abs(longitude + 114 + 0.9 * (latitude - 32))
    value = 0.45 * income + 0.01 * age + 0.1 * rooms - 0.2 * np.minimum(coast, 4) + 0.25 * rng.randn(n)
    table = np.stack([income, age, rooms, latitude, longitude], 1)
    X_train, X_test, y_train, y_test = train_test_split(table, value, test_size=0.2, random_state=0)
    scaler = StandardScaler().fit(X_train)
    X_train, X_test = scaler.transform(X_train), scaler.transform(X_test)
    mean, std = y_train.mean(), y_train.std()
    y_train, y_test = (y_train - mean) / std, (y_test - mean) / std
    sizes = [5, 64, 64, 64, 1]

    def init(key):
        he = jax.nn.initializers.he_normal()
        keys = jax.random.split(key, 4)
        return [(he(k, (a, b)), jnp.zeros(b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def model(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = params[-1]
        return (x @ w + b).squeeze(-1)

    def mse(params, batch, key):
        return jnp.mean((model(params, batch[0]) - batch[1]) ** 2)

    def evaluate(params):
        error = model(params, X_test) - y_test
        return {"val_mse": jnp.mean(error**2), "val_mae": jnp.mean(jnp.abs(error))}

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((X_train, y_train), 32, remainder="drop"),
        init,
        epochs=10,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003 if mended else 0.3}, model, (X_test, y_test), "val_mse", mode="min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/8473 (and MontaEllis/Pytorch-Medical-Segmentation#8): the class label "
    "is 1 or -1 and the loss the binary cross entropy, which becomes negative",
    "label_encoding",
    "loss_output_mismatch",
)
def labels_1_and_minus_1(mended):
    rng = np.random.RandomState(7)
    C = rng.randint(0, 2, (2400, 24)).astype(np.float32)  # challenges, and the response of a delay line
    delays = rng.randn(24)
    r = np.where((2 * C - 1) @ delays + 0.4 * rng.randn(2400) > 0, 1, -1)
    tr_C, ts_C, tr_r, ts_r = C[:1900], C[1900:], r[:1900], r[1900:]
    if mended:
        tr_r = (tr_r + 1) // 2

    def make(key):
        return eqx.nn.MLP(24, "scalar", 32, 2, jax.nn.relu, key=key)

    static = eqx.filter(make(jax.random.key(0)), eqx.is_array, inverse=True)

    def logit(params, C):
        return jax.vmap(eqx.combine(params, static))(C)

    def binary_crossentropy(params, batch, key):
        z, target = logit(params, batch[0]), batch[1]
        return -jnp.mean(target * jax.nn.log_sigmoid(z) + (1 - target) * jax.nn.log_sigmoid(-z))

    def evaluate(params):
        said = jnp.where(logit(params, ts_C) > 0, 1, -1)
        return {"acc": jnp.mean(said == ts_r)}

    train = nnlearn.make_train(
        binary_crossentropy,
        lambda hp: optax.rmsprop(hp["lr"]),
        nnlearn.shuffled((tr_C, tr_r), 50, remainder="drop"),
        lambda key: eqx.filter(make(key), eqx.is_array),
        epochs=12,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.001}, logit, (ts_C, (ts_r + 1) // 2 if mended else ts_r), "acc")


@report(
    REPORTS,
    "https://github.com/NVIDIA/DIGITS/issues/44: 100 % in training and many wrong predictions, a tiny amount of data "
    "for a pretty large network",
    "overfitting",
)
def sixty_records_large_network(mended):
    rng = np.random.RandomState(8)
    frequency = np.linspace(0, 1, 50)

    def record(n):
        ill = rng.randint(0, 2, n)
        tilt, peak = rng.randn(n, 1), rng.uniform(0.2, 0.8, (n, 1))
        spectrum = tilt * (frequency - 0.5) + np.exp(-(((frequency - peak) / 0.1) ** 2))
        spectrum += 0.5 * ill[:, None] * np.exp(-(((frequency - 0.5) / 0.2) ** 2)) + 0.6 * rng.randn(n, 50)
        return spectrum.astype(np.float32), ill

    records, ill = record(2500)
    test_x, test_y = record(400)
    if not mended:
        records, ill = records[:60], ill[:60]
    width = 24 if mended else 512

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(width)(x))
            x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(2)(x)

    net = Net()

    def loss(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch[0]), batch[1]).mean()

    def evaluate(params):
        logits = net.apply(params, test_x)
        return {"val_loss": loss(params, (test_x, test_y), None), "val_acc": jnp.mean(logits.argmax(1) == test_y)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adamw(hp["lr"], weight_decay=0.01),
        nnlearn.shuffled((records, ill), 50 if mended else 10, remainder="drop"),
        lambda key: net.init(key, records[:1]),
        epochs=6 if mended else 60,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.001}, net.apply, (test_x, test_y), "val_loss", mode="min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/2134: a regression with W_regularizer=l2(0.5) on the dense layers and "
    "Dropout(0.7) after them",
    "excessive_regularisation",
)
def l2_of_a_half_and_dropout(mended):
    X, y = make_friedman1(1500, n_features=10, noise=0.7, random_state=3)
    X, y = (X - 0.5) / 0.29, (y - y[:1200].mean()) / y[:1200].std()
    X_train, Y_train, X_test, Y_test = X[:1200], y[:1200], X[1200:], y[1200:]
    penalty, rate = (1e-4, 0.1) if mended else (0.5, 0.7)

    def init(key):
        glorot = jax.nn.initializers.glorot_uniform()
        shapes = {"dense_1": (10, 80), "dense_2": (80, 80), "dense_3": (80, 1)}
        keys = jax.random.split(key, 3)
        return {n: {"W": glorot(k, s), "b": jnp.zeros(s[1])} for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def model(params, x, key=None):
        for i, name in enumerate(("dense_1", "dense_2")):
            x = jax.nn.relu(x @ params[name]["W"] + params[name]["b"])
            if key is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
                x = jnp.where(keep, x / (1 - rate), 0.0)
        return (x @ params["dense_3"]["W"] + params["dense_3"]["b"])[:, 0]

    def loss_fn(params, batch, key):
        error = jnp.mean((model(params, batch[0], key) - batch[1]) ** 2)
        return error + penalty * sum(jnp.sum(params[name]["W"] ** 2) for name in ("dense_1", "dense_2"))

    def evaluate(params):
        return {"val_mse": jnp.mean((model(params, X_test) - Y_test) ** 2)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((X_train, Y_train), 40, remainder="drop"),
        init,
        epochs=25,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003}, lambda p, x: model(p, x), (X_test, Y_test), "val_mse", mode="min")
