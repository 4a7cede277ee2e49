"""Pictures, windows and order: convolutions, rare events, sorted examples."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import make_blobs

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/51280: image classification in two classes is stuck at 50 % with "
    "the larger learning rate of Adam, with a tenth of it 90 % come at once",
    "learning_rate_too_high",
    "dead_units",
)
def convolutions_with_a_large_adam_rate(mended):
    rng = np.random.RandomState(4)
    label = rng.randint(0, 2, 1000)
    yy, xx = np.mgrid[:12, :12] / 12
    angle = np.where(label == 1, 0.5, -0.5) + 0.15 * rng.randn(1000)
    phase = rng.uniform(0, 2 * np.pi, 1000)
    wave = np.cos(angle)[:, None, None] * xx + np.sin(angle)[:, None, None] * yy
    image = np.sin(2 * np.pi * 3 * wave + phase[:, None, None]) + 0.8 * rng.randn(1000, 12, 12)
    image = image[..., None].astype(np.float32)
    train_set = {"image": image[:800], "label": label[:800]}
    val_image, val_label = image[800:], label[800:]

    class SmallVGG(nn.Module):
        @nn.compact
        def __call__(self, x):
            for filters in (6, 12, 16):
                x = nn.relu(nn.Conv(filters, (3, 3))(x))
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(32)(x))
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(2)(x)

    net = SmallVGG()

    def loss(params, batch, key):
        logits = net.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def evaluate(params):
        logits = net.apply({"params": params}, val_image)
        return {"accuracy": jnp.mean(logits.argmax(-1) == val_label)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 40, remainder="drop"),
        lambda key: net.init(key, val_image[:1])["params"],
        epochs=6,
        evaluate=evaluate,
    )

    def predict(params, x):
        return net.apply({"params": params}, x)

    return Case(train, {"lr": 0.002 if mended else 0.1}, predict, (val_image, val_label), "accuracy")


@report(
    REPORTS,
    "https://whosebug.com/question/1677023 (StackOverflow): img.transpose(2, 0, 1) puts the channels first, "
    "img.reshape(1, 3, l, w) mixes the pixels with the channels",
    "preprocessing_mismatch",
)
def picture_reshaped_for_prediction(mended):
    rng = np.random.default_rng(6)
    side, count = 12, 1000
    kinds = rng.integers(0, 4, count)
    pictures = rng.integers(0, 110, size=(count, side, side, 3))
    for picture, kind in zip(pictures, kinds, strict=True):
        r, c = rng.integers(1, side - 5, 2)
        shape = np.zeros((4, 4), bool)
        if kind % 2:
            shape[1:3], shape[:, 1:3] = True, True  # a plus
        else:
            shape[:] = True
            shape[1:3, 1:3] = False  # a frame
        picture[r : r + 4, c : c + 4, kind // 2][shape] = rng.integers(170, 256)
    seen = np.stack([p.transpose(2, 0, 1) for p in pictures[:700]]) / 256.0
    if mended:
        new = np.stack([p.transpose(2, 0, 1) for p in pictures[700:]]) / 256.0
    else:
        new = np.stack([p.reshape(3, side, side) for p in pictures[700:]]) / 256.0

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        he = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
        return {
            "w1": he(k1, (8, 3, 3, 3)),
            "b1": jnp.zeros((8, 1, 1)),
            "w2": he(k2, (12, 8, 3, 3)),
            "b2": jnp.zeros((12, 1, 1)),
            "w3": random.normal(k3, (12 * 9, 4)) / 10,
            "b3": jnp.zeros(4),
        }

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def forward(p, x):
        x = pool(jax.nn.relu(conv(x.astype(jnp.float32), p["w1"]) + p["b1"]))
        x = pool(jax.nn.relu(conv(x, p["w2"]) + p["b2"]))
        return x.reshape(x.shape[0], -1) @ p["w3"] + p["b3"]

    def loss(p, batch, key):
        x, y = batch
        return nnlearn.cross_entropy(forward(p, x), y)

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((seen, kinds[:700]), 50, remainder="drop"),
        init,
        epochs=24,
        evaluate=lambda p: {"accuracy": jnp.mean(jnp.argmax(forward(p, new), 1) == kinds[700:])},
    )
    return Case(train, {"lr": 0.006}, forward, (new, kinds[700:]), "accuracy")


@report(
    REPORTS,
    "https://openillumi.com/?p=64013 (of a StackOverflow question): own CNN and VGG reach a high training accuracy and "
    "a bad one in the test, there are 15 images per class",
    "overfitting",
)
def fifteen_images_per_class(mended):
    mnist = load("mnist", seed=9)
    images, labels = mnist.train.inputs.reshape(-1, 28, 28), mnist.train.targets
    if not mended:
        few = np.concatenate([np.flatnonzero(labels == c)[:15] for c in range(10)])
        images, labels = images[few], labels[few]
    images = images[:, ::2, ::2]
    val_images, val_labels = mnist.validation.inputs.reshape(-1, 28, 28)[:, ::2, ::2], mnist.validation.targets

    class CNN(eqx.Module):
        conv: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            k1, k2, k3 = random.split(key, 3)
            self.conv = eqx.nn.Conv2d(1, 12, 3, key=k1)
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.hidden = eqx.nn.Linear(12 * 36, 64, key=k2)
            self.out = eqx.nn.Linear(64, 10, key=k3)

        def __call__(self, x):
            x = self.pool(jax.nn.relu(self.conv(x[None])))
            return self.out(jax.nn.relu(self.hidden(x.ravel())))

    static = eqx.filter(CNN(random.key(0)), eqx.is_array, inverse=True)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(params, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def metrics(params, batch):
        x, y = batch.examples
        out = logits(params, x)
        return {
            "val_loss": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y), where=batch.where),
            "accuracy": jnp.mean(out.argmax(-1) == y, where=batch.where),
        }

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((images, labels), 30, remainder="drop"),
        lambda key: eqx.filter(CNN(key), eqx.is_array),
        steps=580,
        evaluate=nnlearn.evaluation(metrics, (val_images, val_labels)),
        check_every=58,
    )
    return Case(train, {"lr": 0.002}, logits, (val_images, val_labels), "accuracy")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/51432992: 1D convolutions for four classes, nearly all samples belong to one "
    "of them, and the model predicts only that; balanced class weights",
    "class_imbalance",
)
def rare_events_in_signals(mended):
    rng = np.random.RandomState(10)

    def signals(count, shares):
        kind = rng.choice(4, size=count, p=shares)
        x = rng.randn(count, 48, 1).astype(np.float32)
        t = np.arange(12)
        bumps = [np.zeros(12), np.sin(t * np.pi / 11), np.sin(t * np.pi / 3), np.where(t < 6, 1.0, -1.0)]
        for row, k in zip(x, kind, strict=True):
            start = rng.randint(0, 36)
            row[start : start + 12, 0] += 1.7 * bumps[k]
        return x, kind

    x_train, k_train = signals(4000, [0.955, 0.015, 0.015, 0.015])
    x_test, k_test = signals(800, [0.25] * 4)
    weights = len(k_train) / (4 * np.bincount(k_train)) if mended else np.ones(4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (9,))(x))
            x = nn.relu(nn.Conv(12, (5,), strides=(2,))(x))
            x = jnp.max(x, axis=1)
            return nn.Dense(4)(x)

    net = Net()

    def loss(params, batch, key):
        x, k = batch
        each = optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), k)
        return jnp.mean(each * jnp.asarray(weights)[k])

    def evaluate(params):
        return {"accuracy": jnp.mean(net.apply(params, x_test).argmax(-1) == k_test)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, k_train), 100, remainder="drop"),
        lambda key: net.init(key, x_test[:1]),
        epochs=10,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003}, net.apply, (x_test, k_test), "accuracy")


@report(
    REPORTS,
    "https://taourl.com/read-2677139.html: why does the order of the data matter? First all examples of one class, "
    "then all of the next, and the network follows the last it has seen",
    "unshuffled_data",
)
def one_class_after_the_other(mended):
    X, y = make_blobs(5200, n_features=8, centers=6, cluster_std=4.0, random_state=3)
    X = (X - X.mean(0)) / X.std(0)
    X_test, y_test, X, y = X[:400], y[:400], X[400:], y[400:]
    order = np.argsort(y, kind="stable")
    X, y = X[order], y[order]

    def init(key):
        k1, k2 = random.split(key)
        return {
            "hidden": {"w": random.normal(k1, (8, 32)) * 0.5, "b": jnp.zeros(32)},
            "out": {"w": random.normal(k2, (32, 6)) * 0.25, "b": jnp.zeros(6)},
        }

    def predict(params, x):
        h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return h @ params["out"]["w"] + params["out"]["b"]

    def loss(params, batch, key):
        return nnlearn.softmax_cross_entropy_with_integer_labels(predict(params, batch["x"]), batch["y"]).mean()

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled({"x": X, "y": y}, 16, shuffle=mended, remainder="drop"),
        init,
        epochs=6,
        evaluate=lambda params: {"accuracy": jnp.mean(predict(params, X_test).argmax(-1) == y_test)},
    )
    return Case(train, {"lr": 0.03}, predict, (X_test, y_test), "accuracy")
