"""Texts and series: recurrent networks, convolutions over time, bags of words."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


def sentences(rng, count, words, length, mood):
    """Word numbers from 1, zipf-like; a sentence contains some of 20 good or 20 bad words, whose numbers are random."""
    weights = 1 / np.arange(5, words + 5)
    codes = rng.permutation(words)
    labels = rng.randint(2, size=count)
    texts = codes[rng.choice(words - 40, size=(count, length), p=weights[:-40] / weights[:-40].sum())]
    opinion = codes[words - 40 + 20 * labels[:, None] + rng.randint(20, size=(count, length))]
    return np.where(rng.rand(count, length) < mood, opinion, texts) + 1, labels


@report(
    REPORTS,
    "https://stats.stackexchange.com/posts/487195/revisions: the loss of a recurrent network jumps and stays on a flat "
    "place; the answer clips the gradients",
    "exploding_gradients",
    "bad_initialisation",
)
def loss_of_the_rnn_jumps(mended):
    rng = np.random.RandomState(0)
    series = rng.uniform(-1, 1, (1200, 50, 2)).astype(np.float32)
    series[..., 1] = np.cumsum(rng.normal(0, 0.15, (1200, 50)), axis=1)
    target = 3 * series[:, -15:, 0].mean(axis=1) + series[:, -1, 1]
    hidden = 48
    scale = 0.9 / np.sqrt(hidden) if mended else 0.235

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "W_xh": jax.random.normal(k1, (2, hidden)) * scale,
            "W_hh": jax.random.normal(k2, (hidden, hidden)) * scale,
            "b_h": jnp.zeros(hidden),
            "W_hy": jax.random.normal(k3, (hidden,)) * scale,
            "b_y": jnp.zeros(()),
        }

    def rnn(params, x):
        def cell(h, x_t):
            return jax.nn.relu(x_t @ params["W_xh"] + h @ params["W_hh"] + params["b_h"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((len(x), hidden)), x.swapaxes(0, 1))
        return h @ params["W_hy"] + params["b_y"]

    def loss(params, batch, key):
        return jnp.mean((rnn(params, batch[0]) - batch[1]) ** 2)

    def metrics(params, batch):
        x, y = batch.examples
        return {"mse": jnp.mean((rnn(params, x) - y) ** 2, where=batch.where)}

    def optimizer(hp):
        sgd = optax.sgd(hp["lr"], momentum=0.9)
        return optax.chain(optax.clip_by_global_norm(1.0), sgd) if mended else sgd

    test = (series[1000:], target[1000:])
    batches = nnlearn.shuffled((series[:1000], target[:1000]), 40, remainder="drop")
    evaluate = nnlearn.evaluation(metrics, test)
    train = nnlearn.make_train(loss, optimizer, batches, init, epochs=24, evaluate=evaluate)
    return Case(train, {"lr": 0.01}, rnn, test, "mse", mode="min")


@report(
    REPORTS,
    "https://github.com/rixwew/pytorch-fm/issues/21 (and pytorch#26338): F.dropout without training=self.training "
    "stays on when the model is evaluated",
    "evaluation_in_training_mode",
)
def functional_dropout(mended):
    rng = np.random.RandomState(1)
    taste, kind = rng.normal(size=(80, 4)), rng.normal(size=(60, 4))
    pairs = np.stack([rng.randint(80, size=6000), rng.randint(60, size=6000)], axis=1)
    clicked = (np.sum(taste[pairs[:, 0]] * kind[pairs[:, 1]], axis=1) + rng.normal(0, 0.4, 6000) > 0).astype(float)
    test = (pairs[5000:], clicked[5000:])

    def init(key):
        k = jax.random.split(key, 4)
        return {
            "user": jax.random.normal(k[0], (80, 16)) * 0.3,
            "item": jax.random.normal(k[1], (60, 16)) * 0.3,
            "W": jax.random.normal(k[2], (16, 16)) / 4,
            "w": jax.random.normal(k[3], (16,)) / 4,
        }

    def dropout(x, key, rate=0.5):
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0)

    def attentional_fm(params, x, key):
        k1, k2 = jax.random.split(jax.random.key(0) if key is None else key)
        training = key is not None or not mended
        crossed = params["user"][x[:, 0]] * params["item"][x[:, 1]]
        crossed = dropout(crossed, k1) if training else crossed
        scores = jax.nn.relu(crossed @ params["W"])
        scores = dropout(scores, k2) if training else scores
        return scores @ params["w"] + crossed.sum(axis=1)

    def predict(params, x):
        return attentional_fm(params, x, None)

    def loss(params, batch, key):
        return optax.sigmoid_binary_cross_entropy(attentional_fm(params, batch[0], key), batch[1]).mean()

    def metrics(params, batch):
        z, y = predict(params, batch.examples[0]), batch.examples[1]
        accuracy = jnp.mean((z > 0) == y, where=batch.where)
        return {"logloss": optax.sigmoid_binary_cross_entropy(z, y).mean(where=batch.where), "accuracy": accuracy}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((pairs[:5000], clicked[:5000]), 100, remainder="drop"),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, test),
    )
    return Case(train, {"lr": 0.005}, predict, test, "logloss", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/65471: a CNN over embedded sentences, the validation loss is much "
    "higher than the training loss; answer: fewer layers and units, dropout, L2, more data",
    "overfitting",
)
def cnn_learns_the_sentences_by_heart(mended):
    texts, labels = sentences(np.random.RandomState(2), 2600, 600, 30, 0.08)
    size = 2000 if mended else 250
    x_val, y_val = texts[2000:], labels[2000:]

    class TextCnn(nn.Module):
        @nn.compact
        def __call__(self, tokens, key=None):
            x = nn.Embed(601, 12 if mended else 32)(tokens)
            if mended:
                x = nn.Dropout(0.5, deterministic=key is None)(x.mean(axis=1), rng=key)
                return nn.Dense(1)(x)[:, 0]
            x = nn.relu(nn.Conv(32, (5,))(x)).reshape(len(x), -1)
            for units in (50, 50, 25):
                x = nn.relu(nn.Dense(units)(x))
            return nn.Dense(1)(x)[:, 0]

    model = TextCnn()

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch["tokens"], key)
        return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()

    def metrics(params):
        z = model.apply(params, x_val)
        loss = optax.sigmoid_binary_cross_entropy(z, y_val).mean()
        return {"val_loss": loss, "val_accuracy": jnp.mean((z > 0) == y_val)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adamw(hp["lr"], weight_decay=0.01 if mended else 0.0),
        nnlearn.shuffled({"tokens": texts[:size], "label": labels[:size]}, 25, remainder="drop"),
        lambda key: model.init(key, texts[:1]),
        epochs=8 if mended else 25,
        evaluate=metrics,
    )
    return Case(train, {"lr": 0.01 if mended else 0.001}, model.apply, (x_val, y_val), "val_loss", mode="min")


@report(
    REPORTS,
    "https://github.com/cleanlab/cleanlab/issues/227 (and 43; shengliu66/ELR#1): texts labelled by several hands, "
    "a large part of the labels is wrong; better labels for the same texts",
    "label_noise",
)
def labels_of_the_crowd(mended):
    rng = np.random.RandomState(3)
    texts, labels = sentences(rng, 3000, 300, 25, 0.3)
    votes = np.where(rng.rand(3000) < 0.35, 1 - labels, labels)
    y = labels if mended else votes
    bags = np.zeros((3000, 301), np.float32)
    np.add.at(bags, (np.arange(3000)[:, None], texts), 1.0)
    train_set, test_set = (bags[:2400], y[:2400]), (bags[2400:], y[2400:])

    def init(key):
        k1, k2 = jax.random.split(key)
        xavier = jax.nn.initializers.glorot_uniform()
        return [(xavier(k1, (301, 16)), jnp.zeros(16)), (xavier(k2, (16, 2)), jnp.zeros(2))]

    def scores(params, bag):
        (w, b), (v, c) = params
        return jnp.tanh(bag @ w + b) @ v + c

    def loss(params, batch, key):
        return nnlearn.cross_entropy(scores(params, batch[0]), batch[1])

    def metrics(params, batch):
        bag, label = batch.examples
        return {"accuracy": jnp.mean(scores(params, bag).argmax(1) == label, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 32, remainder="drop"),
        init,
        epochs=8,
        evaluate=nnlearn.evaluation(metrics, test_set),
    )
    return Case(train, {"lr": 0.002}, scores, test_set, "accuracy")


@report(
    REPORTS,
    "https://github.com/tensorflow/tensorflow/issues/36626: Dataset.shuffle with a small buffer on data in order of "
    "class (first all zeros, then all ones): batches of one label, poor accuracy",
    "unshuffled_data",
)
def shuffle_buffer_of_100(mended):
    mnist = load("mnist", seed=7)
    rng = np.random.RandomState(7)
    by_class = np.argsort(mnist.train.targets, kind="stable")
    order, buffer = [], list(by_class[:100])
    for i in by_class[100:]:
        j = rng.randint(100)
        order.append(buffer[j])
        buffer[j] = i
    order = np.array(order + buffer)
    rows, digit = mnist.train.inputs[order].reshape(-1, 28, 28), mnist.train.targets[order]
    test = (mnist.validation.inputs.reshape(-1, 28, 28), mnist.validation.targets)

    class ConvOverRows(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(24, (3,), strides=2)(x))
            x = nn.relu(nn.Conv(24, (3,), strides=2)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    net = ConvOverRows()

    def loss(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch[0]), batch[1]).mean()

    def metrics(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(net.apply(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((rows, digit), 32, shuffle=mended, remainder="drop"),
        lambda key: net.init(key, rows[:1]),
        epochs=6,
        evaluate=nnlearn.evaluation(metrics, test),
    )
    return Case(train, {"lr": 0.002}, net.apply, test, "accuracy")


@report(
    REPORTS,
    "https://github.com/uzh-rpg/rpg_event_representation_learning/issues/2: the validation accuracy is far too low, "
    "listdir numbers the classes of the two folders differently; fixed by sorting",
    "label_encoding",
    "preprocessing_mismatch",
)
def classes_from_listdir(mended):
    t = np.arange(40) / 10
    waves = {"sine": np.sin, "square": lambda p: np.sign(np.sin(p)), "saw": lambda p: (p / np.pi) % 2 - 1}
    waves |= {"pulse": lambda p: 2.0 * (np.sin(p) > 0.8) - 1, "silence": np.zeros_like}
    listed = {"training": ["saw", "silence", "square", "pulse", "sine"], "validation": list(waves)}

    def read(folder, count, seed):
        rng = np.random.RandomState(seed)
        classes = sorted(listed[folder]) if mended else listed[folder]
        names = rng.choice(list(waves), size=count)
        phases = 2 * np.pi * (rng.uniform(0.4, 1, (count, 1)) * t + rng.rand(count, 1))
        signals = [waves[name](phase) for name, phase in zip(names, phases, strict=True)]
        return np.array(signals) + rng.normal(0, 0.2, (count, 40)), np.array([classes.index(name) for name in names])

    train_set, validation = read("training", 1000, 0), read("validation", 300, 1)

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        he = jax.nn.initializers.he_uniform()
        shapes = {"conv": (7, 1, 16), "hidden": (16, 32), "out": (32, 5)}
        return {n: (he(k, s), jnp.zeros(s[-1])) for k, (n, s) in zip((k1, k2, k3), shapes.items(), strict=True)}

    def model(params, signal):
        (w, b), (v, c), (u, d) = params["conv"], params["hidden"], params["out"]
        x = jax.lax.conv_general_dilated(signal[..., None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        x = jax.nn.relu(x + b).mean(axis=1)
        return jax.nn.relu(x @ v + c) @ u + d

    def loss(params, batch, key):
        log_p = jax.nn.log_softmax(model(params, batch[0]))
        return -jnp.mean(jnp.sum(log_p * jax.nn.one_hot(batch[1], 5), axis=1))

    def metrics(params, batch):
        x, y = batch.examples
        return {"val_acc": jnp.mean(model(params, x).argmax(1) == y, where=batch.where)}

    batches = nnlearn.shuffled(train_set, 20, remainder="drop")
    evaluate = nnlearn.evaluation(metrics, validation)
    train = nnlearn.make_train(loss, lambda hp: nnlearn.adam(hp["lr"]), batches, init, epochs=12, evaluate=evaluate)
    return Case(train, {"lr": 0.005}, model, validation, "val_acc")
