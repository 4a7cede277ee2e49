"""Sequences: recurrent networks, tagging, forecasts and CTC."""

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
from benchmarks.faults.reports.nets import gru, gru_init

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/yunjey/pytorch-tutorial/issues/196: "
    "batch_first=False with batch-first images: accuracy stays at 11 %",
    "wrong_axis_or_reduction",
)
def lstm_batch_first(mended):
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8)  # a sequence of 8 rows
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, random_state=0)

    class Rnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            out = nn.RNN(nn.LSTMCell(48), time_major=not mended)(x)
            return nn.Dense(10)(out[:, -1, :])

    model = Rnn()

    def criterion(params, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def test(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(model.apply(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        criterion,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 100, remainder="drop"),
        lambda key: model.init(key, jnp.zeros((1, 8, 8))),
        epochs=20,
        evaluate=nnlearn.evaluation(test, (x_test, y_test)),
        check_every=56,
    )
    return Case(train, {"lr": 0.01}, model.apply, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/SeanNaren/warp-ctc/issues/37 and https://github.com/Holmeyoung/crnn-pytorch/issues/34: "
    "captchas with CTC; letters are numbered from 0, which is the blank",
    "label_encoding",
)
def ctc_blank_is_a_letter(mended):
    letters, length, frames, width = 5, 4, 22, 8
    rng = np.random.default_rng(3)
    glyphs = rng.normal(size=(letters, 3, width))

    def draw(n):
        x = rng.normal(size=(n, frames, width)) * 0.3
        text = rng.integers(0, letters, size=(n, length))
        for i in range(n):
            at = rng.integers(0, 3)
            for c in text[i]:
                x[i, at : at + 3] += glyphs[c]
                at += 3 + rng.integers(1, 3)
        return x.astype(np.float32), text.astype(np.int32) + (1 if mended else 0)

    x_train, t_train = draw(800)
    x_val, t_val = draw(200)
    num_classes = letters + 1  # and the blank, 0

    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "conv": jax.random.normal(k1, (5, width, 32)) * np.sqrt(2 / (5 * width)),
            "conv_b": jnp.zeros(32),
            "fc": jax.random.normal(k2, (32, 32)) * np.sqrt(2 / 32),
            "fc_b": jnp.zeros(32),
            "out": jax.random.normal(k3, (32, num_classes)) * np.sqrt(1 / 32),
            "out_b": jnp.zeros(num_classes),
        }

    def net(p, x):
        h = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        h = jax.nn.relu(h + p["conv_b"])
        h = jax.nn.relu(h @ p["fc"] + p["fc_b"])
        return h @ p["out"] + p["out_b"]

    def loss_fn(p, batch, key):
        logits = net(p, batch["image"])
        no_padding = jnp.zeros(logits.shape[:2])
        return optax.ctc_loss(logits, no_padding, batch["text"], jnp.zeros(batch["text"].shape), blank_id=0).mean()

    def read(logits):
        path = logits.argmax(-1)
        before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        keep = (path != before) & (path != 0)
        order = jnp.argsort(~keep, axis=1, stable=True)[:, :length]
        return jnp.take_along_axis(path, order, 1), keep.sum(1)

    def evaluate(p):
        text, n = read(net(p, x_val))
        return {"captchas_right": jnp.mean((text == t_val).all(1) & (n == length))}

    train = nnlearn.make_train(
        loss_fn,
        optax.adam(3e-3),
        nnlearn.shuffled({"image": x_train, "text": t_train}, 40, remainder="drop"),
        init,
        steps=400,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {}, net, (x_val, t_val), "captchas_right")


@report(
    REPORTS,
    "https://developerload.com/when-using-padding-in-sequence-models-is-keras-validation-accuracy-valid-reliable "
    "(from StackOverflow): "
    "tags of padding count in loss and accuracy: 90 % and more at once, but words are wrong",
    "mask_ignored",
    "class_imbalance",
)
def tagger_counts_padding(mended):
    vocab, tags, longest = 60, 6, 40  # word 0 and tag 0 are padding
    rng = np.random.default_rng(9)
    lengths = rng.integers(2, 7, 900)
    lengths[0] = longest
    words = rng.integers(1, vocab, (900, longest))
    tag_of = rng.integers(1, tags, (vocab, 2))
    tagged = tag_of[words, np.pad(words[:, :-1], ((0, 0), (1, 0))) % 2]  # depends on the word before, too
    real = np.arange(longest) < lengths[:, None]
    words, tagged = words * real, tagged * real

    def init(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(a, (vocab, 16)),
            "lstm": gru_init(b, 16, 32),
            "dense": jax.random.normal(c, (32, tags)) * 0.2,
            "bias": jnp.zeros(tags),
        }

    def model(p, words):
        return gru(p["lstm"], p["embedding"][words]) @ p["dense"] + p["bias"]

    def loss(p, batch, key):
        words, tagged = batch
        each = optax.softmax_cross_entropy_with_integer_labels(model(p, words), tagged)
        if not mended:
            return each.mean()
        return jnp.sum(each * (words > 0)) / jnp.sum(words > 0)

    def evaluate(p):
        right = model(p, words[720:]).argmax(-1) == tagged[720:]
        of_words = jnp.mean(right, where=words[720:] > 0)
        return {"accuracy": of_words if mended else jnp.mean(right), "accuracy_of_words": of_words}

    train = nnlearn.make_train(
        loss,
        nnlearn.sgd(0.3, momentum=0.9),
        nnlearn.shuffled((words[:720], tagged[:720]), 36, remainder="drop"),
        init,
        steps=400,
        evaluate=evaluate,
        check_every=40,
    )
    return Case(train, {}, model, (words[720:], tagged[720:]), "accuracy")


@report(
    REPORTS,
    "https://github.com/google-research/bert/issues/560 and "
    "https://github.com/huggingface/transformers/issues/1744: "
    "the labels have no place for [CLS], each is one token early: F1 near 0",
    "misaligned_labels",
)
def ner_labels_without_cls(mended):
    vocab, tags, n = 40, 7, 9
    rng = np.random.default_rng(10)
    words = rng.integers(3, vocab, (1000, n))
    tag_of = rng.choice(tags, (vocab, 2), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])  # 0 is "O"
    tagged = tag_of[words, np.pad(words[:, :-1], ((0, 0), (1, 0))) % 2]
    cls, sep = np.full((1000, 1), 1), np.full((1000, 1), 2)
    inputs = np.concatenate([cls, words, sep], axis=1)
    if not mended:
        targets = np.pad(tagged, ((0, 0), (0, 2)), constant_values=-100)  # padded to the length of the input
    else:
        targets = np.pad(tagged, ((0, 0), (1, 1)), constant_values=-100)

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(vocab, 24)(ids)
            x = nn.RNN(nn.GRUCell(32))(x)
            return nn.Dense(tags)(x)

    model = Tagger()

    def loss_fn(params, batch, key):
        ids, labels = batch
        counts = labels != -100
        each = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, ids), jnp.where(counts, labels, 0))
        return jnp.mean(each, where=counts)

    def metrics(params, batch):
        ids, labels = batch.examples
        found = model.apply(params, ids).argmax(-1)
        entity = (labels > 0) & batch.where[:, None]
        return {
            "token_accuracy": jnp.mean(found == labels, where=(labels != -100) & batch.where[:, None]),
            "entity_recall": jnp.mean(found == labels, where=entity),
        }

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled((inputs[:800], targets[:800]), 32, remainder="drop"),
        lambda key: model.init(key, inputs[:1]),
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, (inputs[800:], targets[800:])),
    )
    return Case(train, {"lr": 5e-3}, model.apply, (inputs[800:], targets[800:]), "entity_recall")


@report(
    REPORTS,
    "https://github.com/wandb/senpai/pull/978 and https://github.com/facebookresearch/detr/issues/198: "
    "every batch is clipped to a far smaller step; a regression whose loss hardly moves",
    "clipping_too_tight",
    "learning_rate_too_low",
)
def gradient_clipped_to_nothing(mended):
    length = 20
    t = np.arange(1400)
    series = np.sin(t / 7) + 0.5 * np.sin(t / 3.1 + 1) + 0.1 * np.random.default_rng(12).normal(size=t.shape)
    windows = np.lib.stride_tricks.sliding_window_view(series, length + 1).astype(np.float32)
    x, y = windows[:, :-1, None], windows[:, -1:]
    x_train, y_train, x_test, y_test = x[:1100], y[:1100], x[1130:], y[1130:]

    def init(key):
        a, b = jax.random.split(key)
        return {
            "rnn": {
                "wx": jax.random.normal(a, (1, 32)) * 0.5,
                "wh": 0.9 * jnp.linalg.qr(jax.random.normal(b, (32, 32)))[0],
                "b": jnp.zeros(32),
            },
            "w": jnp.zeros((32, 1)),
            "c": jnp.zeros(1),
        }

    def predict(p, x):
        def cell(h, xt):
            return jnp.tanh(xt @ p["rnn"]["wx"] + h @ p["rnn"]["wh"] + p["rnn"]["b"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((x.shape[0], 32)), jnp.swapaxes(x, 0, 1))
        return h @ p["w"] + p["c"]

    def mse(p, batch, key):
        return jnp.mean(jnp.square(predict(p, batch[0]) - batch[1]))

    train = nnlearn.make_train(
        mse,
        lambda hparams: optax.chain(optax.clip_by_global_norm(hparams["clip"]), optax.sgd(0.05, momentum=0.9)),
        nnlearn.shuffled((x_train, y_train), 50, remainder="drop"),
        init,
        epochs=30,
        evaluate=lambda p: {"mse": jnp.mean((predict(p, x_test) - y_test) ** 2)},
    )
    return Case(train, {"clip": 1.0 if mended else 0.001}, predict, (x_test, y_test), "mse", "min")


@report(
    REPORTS,
    "https://github.com/craffel/nntools/issues/19: "
    "a forget bias from Normal(0.1): nothing reaches over a long sequence; answer: a large value such as 5",
    "vanishing_gradients",
    "bad_initialisation",
)
def lstm_forget_bias(mended):
    length, hidden, symbols, noise = 50, 24, 2, 2

    def sequences(key, n):
        a, b = jax.random.split(key)
        y = jax.random.randint(a, (n,), 0, symbols)
        x = jax.random.randint(b, (n, length), symbols, symbols + noise).at[:, 0].set(y)  # only the first one counts
        return jax.nn.one_hot(x, symbols + noise), y

    x_test, y_test = jax.tree.map(np.asarray, sequences(jax.random.key(13), 300))

    def init(key):
        a, b, c = jax.random.split(key, 3)
        bias = 0.1 * jax.random.normal(c, (4, hidden))
        if mended:
            bias = bias.at[1].set(5.0)
        return {
            "W": 0.3 * jax.random.normal(a, (symbols + noise, 4, hidden)),
            "U": 0.1 * jax.random.normal(b, (hidden, 4, hidden)),
            "b": bias,
            "V": 0.1 * jax.random.normal(c, (hidden, symbols)),
        }

    def lstm(p, x):
        def step(carry, xt):
            h, c = carry
            g = jnp.einsum("bi,igh->gbh", xt, p["W"]) + jnp.einsum("bi,igh->gbh", h, p["U"]) + p["b"][:, None]
            c = jax.nn.sigmoid(g[1]) * c + jax.nn.sigmoid(g[0]) * jnp.tanh(g[2])
            return (jax.nn.sigmoid(g[3]) * jnp.tanh(c), c), None

        zero = jnp.zeros((x.shape[0], hidden))
        (h, _), _ = jax.lax.scan(step, (zero, zero), x.transpose(1, 0, 2))
        return h @ p["V"]

    def loss(p, batch, key):
        x, y = batch
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(lstm(p, x)) * jax.nn.one_hot(y, symbols), 1))

    train = nnlearn.make_train(
        loss,
        optax.adam(1e-2),
        nnlearn.generated(lambda key, step: sequences(key, 50)),
        init,
        steps=500,
        evaluate=lambda p: {"accuracy": jnp.mean(lstm(p, x_test).argmax(1) == y_test)},
        check_every=50,
    )
    return Case(train, {}, lstm, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://errorhandle.ai/lstm-forecasted-a-straight-line (and StackOverflow threads): "
    "an LSTM on raw share prices forecasts a constant; answer: MinMaxScaler",
    "unnormalised_targets",
    "unnormalised_inputs",
    "saturated_activations",
)
def lstm_forecasts_a_line(mended):
    rng = np.random.default_rng(15)
    t = np.arange(700)
    price = 900 + 250 * np.sin(t / 25) + 90 * np.sin(t / 6) + 8 * rng.normal(size=700)
    window = 12
    low, high = price[:560].min(), price[:560].max()
    data = (price - low) / (high - low) if mended else price
    x = np.stack([data[i : i + window] for i in range(700 - window)])[..., None]
    y = data[window:, None]
    x_train, y_train, x_test, y_test = x[:540], y[:540], x[560:], y[560:]

    class Lstm(eqx.Module):
        cell: eqx.nn.LSTMCell
        dense: eqx.nn.Linear

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.cell = eqx.nn.LSTMCell(1, 50, key=a)
            self.dense = eqx.nn.Linear(50, 1, key=b)

        def __call__(self, x):
            zero = jnp.zeros(50)
            (h, _), _ = jax.lax.scan(lambda carry, xt: (self.cell(xt, carry), None), (zero, zero), x)
            return self.dense(h)

    def forecast(model, x):
        return jax.vmap(model)(x)

    def loss(model, batch, key):
        x, y = batch
        return jnp.mean((forecast(model, x) - y) ** 2)

    def r2(model):
        return {"r2": 1 - jnp.mean((forecast(model, x_test) - y_test) ** 2) / np.var(y_test)}

    train = nnlearn.make_train(
        loss,
        nnlearn.adam(2e-3),
        nnlearn.shuffled((x_train, y_train), 30, remainder="drop"),
        lambda key: Lstm(key),
        epochs=60,
        evaluate=r2,
        check_every=90,
    )
    return Case(train, {}, forecast, (x_test, y_test), "r2")
