"""Texts, clouds of points and schedules: issues of libraries and of their users."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


def linear(key, m, n, gain=2.0):
    return {"w": random.normal(key, (m, n)) * (gain / m) ** 0.5, "b": jnp.zeros(n)}


def apply(layer, x):
    return x @ layer["w"] + layer["b"]


@report(
    REPORTS,
    "https://github.com/huggingface/transformers/pull/26441 (also RetNet#31, pytorch#3121): embeddings, which are "
    "the head as well, are drawn with variance 1, the first loss is 110 instead of 11",
    "bad_initialisation",
)
def tied_embedding_of_variance_1(mended):
    vocab, context, width = 48, 3, 128
    rng = np.random.default_rng(30)
    choices = rng.integers(vocab, size=(vocab, vocab, 4))
    text = np.zeros(30000, np.int32)
    for i in range(2, len(text)):
        text[i] = choices[text[i - 2] % 6, text[i - 1], rng.choice(4, p=[0.6, 0.2, 0.15, 0.05])]
    windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    x, y = windows[:, :-1], windows[:, -1]

    def init(key):
        k = random.split(key, 3)
        return {
            "wte": (0.02 if mended else 1.0) * random.normal(k[0], (vocab, width)),
            "wi": linear(k[1], context * width, 128),
            "wo": linear(k[2], 128, width),
        }

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)

    def lm(params, ids):
        e = params["wte"][ids]
        h = jax.nn.gelu(apply(params["wi"], norm(e).reshape(len(ids), -1)))
        return norm(e[:, -1] + apply(params["wo"], h)) @ params["wte"].T

    def loss_fn(params, batch, key):
        ids, following = batch
        return nnlearn.cross_entropy(lm(params, ids), following)

    held_out = (x[27000:], y[27000:])
    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled((x[:27000], y[:27000]), 64, remainder="drop"),
        init,
        epochs=3,
        evaluate=lambda params: {"val_loss": loss_fn(params, held_out, None)},
    )
    return Case(train, {"lr": 1e-3}, lm, held_out, "val_loss", "min")


@report(
    REPORTS,
    "https://github.com/sherjilozair/char-rnn-tensorflow/pull/64: a bidirectional char-rnn has a very good perplexity "
    "and cannot write; its backward half has read the next character",
    "target_leak",
)
def bidirectional_char_rnn(mended):
    letters, length, hidden = 20, 25, 48
    rng = np.random.default_rng(40)
    chances = rng.dirichlet(np.full(letters, 0.15), size=(letters, letters))
    book = np.zeros(40000, np.int32)
    for i in range(2, len(book)):
        book[i] = rng.choice(letters, p=chances[book[i - 2], book[i - 1]])
    pages = book[: len(book) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    x, y = pages[:, :-1], pages[:, 1:]

    def cell_init(key):
        k1, k2 = random.split(key)
        return {
            "x": linear(k1, 16, hidden, 1.0),
            "h": random.normal(k2, (hidden, hidden)) * hidden**-0.5,
        }

    def init(key):
        k = random.split(key, 4)
        directions = 1 if mended else 2
        return {
            "embedding": random.normal(k[0], (letters, 16)),
            "forward": cell_init(k[1]),
            "backward": cell_init(k[2]) if not mended else None,
            "out": linear(k[3], directions * hidden, letters, 1.0),
        }

    def run(cell, inputs, reverse=False):
        def step(h, e):
            h = jnp.tanh(apply(cell["x"], e) + h @ cell["h"])
            return h, h

        start = jnp.zeros((inputs.shape[1], hidden))
        return lax.scan(step, start, inputs, reverse=reverse)[1]

    def char_rnn(params, ids):
        inputs = jnp.swapaxes(params["embedding"][ids], 0, 1)
        outputs = [run(params["forward"], inputs)]
        if params["backward"] is not None:
            outputs.append(run(params["backward"], inputs, reverse=True))
        return jnp.swapaxes(apply(params["out"], jnp.concatenate(outputs, axis=-1)), 0, 1)

    def loss(params, batch, key):
        return nnlearn.cross_entropy(char_rnn(params, batch[0]), batch[1])

    test = (x[1400:], y[1400:])

    def evaluate(params):
        written = char_rnn(params, test[0])[:, -1].argmax(-1)
        return {"perplexity": jnp.exp(loss(params, test, None)), "next": jnp.mean(written == test[1][:, -1])}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.chain(optax.clip_by_global_norm(5.0), optax.adam(hparams["lr"])),
        nnlearn.shuffled((x[:1400], y[:1400]), 35, remainder="drop"),
        init,
        epochs=20,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 3e-3}, char_rnn, test, "next")


@report(
    REPORTS,
    "https://github.com/yanx27/Pointnet_Pointnet2_pytorch/issues/30 (also Obj-GAN#30, ACGAN-PyTorch#4): nll_loss gets "
    "a softmax and not a log_softmax, the loss is negative",
    "loss_output_mismatch",
)
def point_clouds_nll_of_softmax(mended):
    rng = np.random.default_rng(12)
    classes, points = 24, 32
    places = rng.normal(size=(classes, 4, 3))
    label = rng.integers(classes, size=2600)
    part = rng.integers(4, size=(2600, points))
    cloud = (places[label[:, None], part] + 0.6 * rng.normal(size=(2600, points, 3))).astype(np.float32)

    def init(key):
        k = random.split(key, 4)
        return {
            "mlp1": linear(k[0], 3, 32),
            "mlp2": linear(k[1], 32, 64),
            "fc1": linear(k[2], 64, 64),
            "fc2": linear(k[3], 64, classes, 0.1),
        }

    def pointnet(params, cloud):
        h = jax.nn.relu(apply(params["mlp1"], cloud))
        h = jax.nn.relu(apply(params["mlp2"], h)).max(axis=1)
        h = apply(params["fc2"], jax.nn.relu(apply(params["fc1"], h)))
        return jax.nn.log_softmax(h) if mended else jax.nn.softmax(h)

    def nll_loss(params, batch, key):
        cloud, label = batch
        return -jnp.take_along_axis(pointnet(params, cloud), label[:, None], axis=1).mean()

    def accuracy(params, batch):
        cloud, label = batch.examples
        return {"accuracy": jnp.mean(pointnet(params, cloud).argmax(1) == label, where=batch.where)}

    test = (cloud[2000:], label[2000:])
    train = nnlearn.make_train(
        nll_loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((cloud[:2000], label[:2000]), 25, remainder="drop"),
        init,
        epochs=12,
        evaluate=nnlearn.evaluation(accuracy, test),
    )
    return Case(train, {"lr": 1e-3}, pointnet, test, "accuracy")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/51956000 (and gptteams.ai on the same): fit_on_texts is called once more on "
    "the test texts, so their words get other numbers",
    "preprocessing_mismatch",
)
def tokenizer_fitted_on_the_test_texts(mended):
    rng = np.random.default_rng(50)
    words, topics = [f"w{i}" for i in range(300)], 5
    usage = rng.dirichlet(np.full(300, 0.3), size=topics)
    topic = rng.integers(topics, size=2400)
    texts = [list(rng.choice(words, p=0.8 * usage[t] + 0.2 / 300, size=rng.integers(8, 20))) for t in topic]

    def fit_on_texts(texts):
        names, counts = np.unique(np.concatenate(texts), return_counts=True)
        return {name: i + 1 for i, name in enumerate(names[np.argsort(-counts)])}

    def texts_to_sequences(texts, word_index):
        padded = np.zeros((len(texts), 20), np.int32)
        for row, text in zip(padded, texts, strict=True):
            ids = [word_index[word] for word in text if word in word_index]
            row[: len(ids)] = ids
        return padded

    word_index = fit_on_texts(texts[:2000])
    x_train = texts_to_sequences(texts[:2000], word_index)
    x_test = texts_to_sequences(texts[2000:], word_index if mended else fit_on_texts(texts[2000:]))
    test = (x_test, topic[2000:])

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        embedding = random.uniform(k1, (301, 16), minval=-0.05, maxval=0.05)
        return {"embedding": embedding, "hidden": linear(k2, 16, 24), "out": linear(k3, 24, topics, 1.0)}

    def model(params, ids):
        known = (ids > 0)[..., None]
        pooled = jnp.sum(params["embedding"][ids] * known, 1) / jnp.maximum(known.sum(1), 1)
        return apply(params["out"], jax.nn.relu(apply(params["hidden"], pooled)))

    def metrics(params):
        logits = model(params, test[0])
        return {"val_acc": jnp.mean(logits.argmax(1) == test[1]), "val_loss": nnlearn.cross_entropy(logits, test[1])}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(model(params, batch[0]), batch[1]),
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, topic[:2000]), 40, remainder="drop"),
        init,
        epochs=10,
        evaluate=metrics,
    )
    return Case(train, {"lr": 3e-3}, model, test, "val_acc")


@report(
    REPORTS,
    "https://github.com/pytorch/pytorch/issues/65417 (also handson-mlp#28): OneCycleLR for epochs x steps_per_epoch "
    "steps is stepped once per epoch, the rate never leaves its start",
    "schedule_mistimed",
    "learning_rate_too_low",
)
def one_cycle_stepped_per_epoch(mended):
    images, target = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype(np.float32)
    x_train, x_valid, y_train, y_valid = train_test_split(images, target, test_size=0.25, random_state=11)
    epochs, batch_size = 12, 32
    steps_per_epoch = len(x_train) // batch_size

    def init(key):
        return [linear(k, m, n) for k, m, n in zip(random.split(key, 3), (64, 100, 50), (100, 50, 10), strict=True)]

    def mlp(layers, x):
        for layer in layers[:-1]:
            x = jax.nn.relu(apply(layer, x))
        return apply(layers[-1], x)

    def optimizer(hparams):
        one_cycle = optax.cosine_onecycle_schedule(epochs * steps_per_epoch, hparams["max_lr"], 0.3, 25.0)
        if mended:
            return optax.sgd(one_cycle)
        return optax.sgd(lambda step: one_cycle(step // steps_per_epoch))

    def accuracy(layers, batch):
        x, y = batch.examples
        logits = mlp(layers, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        right = logits.argmax(-1) == y
        return {"accuracy": jnp.mean(right, where=batch.where), "loss": jnp.mean(losses, where=batch.where)}

    train = nnlearn.make_train(
        lambda layers, batch, key: nnlearn.cross_entropy(mlp(layers, batch[0]), batch[1]),
        optimizer,
        nnlearn.shuffled((x_train, y_train), batch_size, remainder="drop"),
        init,
        epochs=epochs,
        evaluate=nnlearn.evaluation(accuracy, (x_valid, y_valid)),
    )
    return Case(train, {"max_lr": 0.1}, mlp, (x_valid, y_valid), "loss", "min")
