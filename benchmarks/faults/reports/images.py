"""Convolutions on images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


def conv2d(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def max_pool_2x2(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


@report(
    REPORTS,
    "https://stackoverflow.com/questions/33712178: "
    "Deep MNIST on images of two classes, -reduce_sum(y_ * log(y_conv)): NaN",
    "numerical_precision",
    "unnormalised_inputs",
)
def tensorflow_nan_bug(mended):
    digits = datasets.load_digits()
    keep = np.isin(digits.target, (3, 8))
    images = (digits.images[keep] * 15.9375).astype(np.uint8)[..., None]
    labels = np.eye(2, dtype=np.float32)[(digits.target[keep] == 8).astype(int)]
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.25, random_state=0)
    train_set, test_set = (x_train, y_train), (x_test, y_test)

    def weight_variable(key, shape):
        return 0.1 * jax.random.truncated_normal(key, -2, 2, shape)

    def init(key):
        k = jax.random.split(key, 4)
        return {
            "W_conv1": weight_variable(k[0], (5, 5, 1, 16)),
            "b_conv1": jnp.full(16, 0.1),
            "W_conv2": weight_variable(k[1], (5, 5, 16, 16)),
            "b_conv2": jnp.full(16, 0.1),
            "W_fc1": weight_variable(k[2], (2 * 2 * 16, 1024)),
            "b_fc1": jnp.full(1024, 0.1),
            "W_fc2": weight_variable(k[3], (1024, 2)),
            "b_fc2": jnp.full(2, 0.1),
        }

    def logits(p, x):
        x = x.astype(jnp.float32)
        if mended:
            x = x / 255.0
        h = max_pool_2x2(jax.nn.relu(conv2d(x, p["W_conv1"]) + p["b_conv1"]))
        h = max_pool_2x2(jax.nn.relu(conv2d(h, p["W_conv2"]) + p["b_conv2"]))
        h = jax.nn.relu(h.reshape(h.shape[0], -1) @ p["W_fc1"] + p["b_fc1"])
        return h @ p["W_fc2"] + p["b_fc2"]

    def y_conv(p, x):
        return jax.nn.softmax(logits(p, x))

    def cross_entropy(p, batch, key):
        x, y_ = batch
        if mended:
            return jnp.mean(optax.softmax_cross_entropy(logits(p, x), y_))
        return -jnp.sum(y_ * jnp.log(y_conv(p, x)))

    def accuracy(p, batch):
        x, y_ = batch.examples
        return {"accuracy": jnp.mean(jnp.argmax(y_conv(p, x), 1) == jnp.argmax(y_, 1), where=batch.where)}

    train = nnlearn.make_train(
        cross_entropy,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 50, remainder="drop"),
        init,
        steps=100,
        evaluate=nnlearn.evaluation(accuracy, test_set),
        check_every=10,
    )
    return Case(train, {"lr": 1e-3}, y_conv, test_set, "accuracy")


@report(
    REPORTS,
    "https://github.com/hunkim/DeepLearningZeroToAll/issues/204 "
    "and https://github.com/aymericdamien/TensorFlow-Examples/issues/205: the probability to keep is given as "
    "the rate of dropout",
    "excessive_regularisation",
    "underfitting",
)
def keep_prob_as_rate(mended):
    digits = load("digits")
    shape = (-1, 8, 8, 1)
    tr = {"image": digits.train.inputs.reshape(shape), "label": digits.train.targets}
    te = {"image": digits.test.inputs.reshape(shape), "label": digits.test.targets}
    keep_prob = 0.9
    rate = 1 - keep_prob if mended else keep_prob

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            x = nn.relu(nn.Conv(16, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.Dropout(rate, deterministic=not training)(x)
            x = x.reshape((x.shape[0], -1))
            x = nn.relu(nn.Dense(64)(x))
            x = nn.Dropout(rate, deterministic=not training)(x)
            return nn.Dense(10)(x)

    net = CNN()

    def cost(params, batch, key):
        logits = net.apply(params, batch["image"], True, rngs={"dropout": key})
        return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 10)))

    def predict(params, x):
        return net.apply(params, x, False)

    def acc(params, batch):
        hit = predict(params, batch.examples["image"]).argmax(-1) == batch.examples["label"]
        return {"acc": jnp.mean(hit, where=batch.where)}

    train = nnlearn.make_train(
        cost,
        lambda hp: nnlearn.adam(hp["learning_rate"]),
        nnlearn.shuffled(tr, 50, remainder="drop"),
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 1)), False),
        epochs=15,
        evaluate=nnlearn.evaluation(acc, te),
    )
    return Case(train, {"learning_rate": 1e-3}, predict, (te["image"], te["label"]), "acc")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/pull/4652: "
    "cifar10_cnn: the loss stays at 2.303 with the original rate of SGD, a smaller one trains",
    "learning_rate_too_high",
    "dead_units",
    "exploding_gradients",
)
def cnn_stuck_at_2_303(mended):
    X, y = datasets.load_digits(return_X_y=True)
    X = (X / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    xt, xv, yt, yv = train_test_split(X, y, test_size=0.2, random_state=6)
    glorot = jax.nn.initializers.glorot_uniform()

    def init(key):
        k = jax.random.split(key, 4)
        return {
            "c1": (glorot(k[0], (3, 3, 1, 8)), jnp.zeros(8)),
            "c2": (glorot(k[1], (3, 3, 8, 16)), jnp.zeros(16)),
            "d1": (glorot(k[2], (64, 64)), jnp.zeros(64)),
            "d2": (glorot(k[3], (64, 10)), jnp.zeros(10)),
        }

    def model(p, x, key=None):
        x = max_pool_2x2(jax.nn.relu(conv2d(x, p["c1"][0]) + p["c1"][1]))
        x = max_pool_2x2(jax.nn.relu(conv2d(x, p["c2"][0]) + p["c2"][1]))
        x = jax.nn.relu(x.reshape(len(x), -1) @ p["d1"][0] + p["d1"][1])
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.75, x.shape) / 0.75
        return x @ p["d2"][0] + p["d2"][1]

    def loss(p, batch, key):
        x, y = batch.examples
        return nnlearn.cross_entropy(model(p, x, key), y, where=batch.where)

    def val(p, batch):
        x, y = batch.examples
        return {"val_acc": jnp.mean(jnp.argmax(model(p, x), -1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9, nesterov=True),
        nnlearn.shuffled((xt, yt), 32),
        init,
        epochs=10,
        evaluate=nnlearn.evaluation(val, (xv, yv)),
    )
    return Case(train, {"lr": 0.01 if mended else 1.0}, model, (xv, yv), "val_acc")


@report(
    REPORTS,
    "https://github.com/open-mmlab/mmaction2/issues/590 (also https://github.com/keras-team/keras/issues/7723): "
    "labels with a direction, images mirrored at random",
    "augmentation_breaks_labels",
)
def left_right_mirrored(mended):
    rs = np.random.RandomState(8)

    def draw(label):  # an arrow on a noisy background
        image = np.full((12, 12), 60.0)
        for i in range(4):
            image[6 - i : 7 + i, 3 + i] = 200  # tip to the left
        image[6, 6:11] = 200
        if label == 1:
            image = image[:, ::-1]
        if label == 2:
            image = np.rot90(image, -1)
        image = np.roll(image, rs.randint(-1, 2, 2), (0, 1)) + rs.normal(0, 35, (12, 12))
        return image.clip(0, 255)

    labels = rs.randint(0, 3, 1200)
    images = np.stack([draw(label) for label in labels]).astype(np.uint8)[..., None]
    x_train, y_train = jnp.asarray(images[:1000]), jnp.asarray(labels[:1000])
    x_val, y_val = images[1000:], labels[1000:]

    def batch_fn(key, step):
        k1, k2, k3 = jax.random.split(key, 3)
        rows = jax.random.randint(k1, (32,), 0, 1000)
        x = x_train[rows].astype(jnp.float32) / 255
        x = x * jax.random.uniform(k2, (32, 1, 1, 1), minval=0.8, maxval=1.2)
        if not mended:
            flip = jax.random.bernoulli(k3, 0.5, (32, 1, 1, 1))
            x = jnp.where(flip, x[:, :, ::-1], x)
        return x, y_train[rows]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(x))
            x = nn.relu(nn.Conv(16, (3, 3))(x))
            x = x.reshape((x.shape[0], -1))
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(3)(x)

    net = Net()

    def loss_fn(params, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    def predict(params, x):
        return net.apply(params, jnp.asarray(x, jnp.float32) / 255)

    def evaluate(params):
        return {"val_acc": jnp.mean(predict(params, x_val).argmax(1) == y_val)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.generated(batch_fn),
        lambda key: net.init(key, jnp.zeros((1, 12, 12, 1))),
        steps=400,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {"lr": 1e-3}, predict, (x_val, y_val), "val_acc")


@report(
    REPORTS,
    "https://github.com/haydnv/tinychain/pull/51: "
    "a review: a new Adam at every cycle, so t never grows; in JAX, the new state of update() is not returned",
    "optimizer_state_reset",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def new_optimizer_state_dropped(mended):
    digits = datasets.load_digits()
    x, y = np.float64(digits.images[:, None] / 16), digits.target  # NCHW
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=300, random_state=3)

    def log_learning_rate(tx, schedule):
        """A wrapper that keeps the last learning rate for the log."""

        def init(params):
            return {"inner": tx.init(params), "count": jnp.zeros([], jnp.int32), "lr": jnp.zeros([])}

        def update(grads, state, params=None):
            updates, inner = tx.update(grads, state["inner"], params)
            new = dict(state, count=state["count"] + 1, lr=schedule(state["count"]))
            if mended:
                new["inner"] = inner
            return updates, new

        return optax.GradientTransformation(init, update)

    def init(key):
        a, b, c = jax.random.split(key, 3)
        he = jax.nn.initializers.he_normal()
        return {
            "conv": jax.nn.initializers.he_normal(in_axis=1, out_axis=0)(a, (16, 1, 3, 3)),
            "fc": he(b, (16 * 9, 64)),
            "fc_b": jnp.zeros(64),
            "out": he(c, (64, 10)),
            "out_b": jnp.zeros(10),
        }

    def apply(p, x):
        h = jax.nn.relu(jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID"))
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").reshape(x.shape[0], -1)
        return jax.nn.relu(h @ p["fc"] + p["fc_b"]) @ p["out"] + p["out_b"]

    def loss(p, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(apply(p, batch[0]), batch[1]).mean()

    schedule = optax.warmup_cosine_decay_schedule(1e-6, 3e-3, 50, 400)
    train = nnlearn.make_train(
        loss,
        log_learning_rate(optax.adam(schedule), schedule),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        steps=400,
        evaluate=lambda p: {"accuracy": jnp.mean(apply(p, x_test).argmax(1) == y_test)},
        check_every=50,
    )
    return Case(train, {}, apply, (x_test, y_test), "accuracy")
