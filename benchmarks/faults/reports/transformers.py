"""Training code of issues: language models, attention, adapters, keypoints, recurrences."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/huggingface/transformers/pull/44642: users shift the labels, the model shifts them once more",
    "misaligned_labels",
)
def causal_lm_shifted_twice(mended):
    vocab, block, width = 16, 24, 48
    rng = np.random.default_rng(4)
    transition = rng.dirichlet(np.full(vocab, 0.08), size=(vocab, vocab))
    text = np.zeros(24000, np.int32)
    for i in range(2, len(text)):
        text[i] = rng.choice(vocab, p=transition[text[i - 2], text[i - 1]])
    chunks = text.reshape(-1, block)

    class CausalLM(nn.Module):
        @nn.compact
        def __call__(self, input_ids):
            wte = self.param("wte", nn.initializers.normal(0.1), (vocab, width))
            wpe = self.param("wpe", nn.initializers.normal(0.1), (block, width))
            x = wte[input_ids] + wpe[: input_ids.shape[1]]
            for _ in range(2):
                h = nn.LayerNorm()(x)
                before = jnp.pad(h, ((0, 0), (2, 0), (0, 0)))
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(jnp.concatenate([before[:, 1:-1], h], -1))))
            return nn.Dense(vocab)(nn.LayerNorm()(x))

    lm = CausalLM()

    def forward_loss(params, input_ids, labels):
        logits = lm.apply(params, input_ids)
        shift_logits, shift_labels = logits[:, :-1], labels[:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(shift_logits, jnp.maximum(shift_labels, 0))
        return jnp.sum(nll * (shift_labels >= 0)) / jnp.sum(shift_labels >= 0)

    def collate(chunk):
        if mended:
            return chunk, chunk
        return chunk, jnp.pad(chunk[:, 1:], ((0, 0), (0, 1)), constant_values=-100)

    def evaluate(params, batch):
        right = lm.apply(params, batch.examples[:, :-1]).argmax(-1) == batch.examples[:, 1:]
        return {"next_token_accuracy": jnp.mean(right.mean(-1), where=batch.where)}

    train = nnlearn.make_train(
        lambda params, chunk, key: forward_loss(params, *collate(chunk)),
        lambda hparams: optax.adamw(hparams["lr"]),
        nnlearn.shuffled(chunks[:900], 30, remainder="drop"),
        lambda key: lm.init(key, chunks[:1]),
        epochs=10,
        evaluate=nnlearn.evaluation(evaluate, chunks[900:]),
    )
    held_out = (chunks[900:, :-1], chunks[900:, 1:])
    return Case(train, {"lr": 3e-3}, lambda params, x: lm.apply(params, x), held_out, "next_token_accuracy")


@report(
    REPORTS,
    "https://github.com/PetrochukM/PyTorch-NLP/issues/2: weights of one query are always 1, wrong softmax dim",
    "wrong_axis_or_reduction",
)
def attention_weights_all_one(mended):
    pairs, n_keys, n_values = 6, 12, 8

    def lookups(key, n):
        k1, k2, k3 = random.split(key, 3)
        keys = jax.vmap(lambda k: random.permutation(k, n_keys)[:pairs])(random.split(k1, n))
        values = random.randint(k2, (n, pairs), 0, n_values)
        which = random.randint(k3, (n, 1), 0, pairs)
        question = jnp.take_along_axis(keys, which, 1)
        return {"keys": keys, "values": values, "question": question}, jnp.take_along_axis(values, which, 1)[:, 0]

    def glorot(key, *shape):
        return random.normal(key, shape) * (2 / (shape[0] + shape[1])) ** 0.5

    def init(key):
        k = random.split(key, 6)
        return {
            "keys": random.normal(k[0], (n_keys, 24)),
            "values": random.normal(k[1], (n_values, 24)),
            "question": random.normal(k[2], (n_keys, 24)),
            "in": glorot(k[3], 24, 24),
            "hidden": glorot(k[4], 48, 48),
            "out": glorot(k[5], 48, n_values),
        }

    def attention(params, query, context, content):
        scores = jnp.einsum("bqd,bkd->bqk", query @ params["in"], context) / 24**0.5
        weights = jax.nn.softmax(scores, axis=-1 if mended else 1)
        return jnp.einsum("bqk,bkd->bqd", weights, content)

    def model(params, x):
        query = params["question"][x["question"]]
        mix = attention(params, query, params["keys"][x["keys"]], params["values"][x["values"]])
        joined = jnp.concatenate([mix, query], axis=-1)[:, 0]
        return jax.nn.relu(joined @ params["hidden"]) @ params["out"]

    def loss(params, batch, key):
        x, y = batch
        return nnlearn.cross_entropy(model(params, x), y)

    x_val, y_val = lookups(random.key(777), 512)
    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: lookups(key, 64)),
        init,
        steps=1500,
        check_every=150,
        evaluate=lambda params: {"accuracy": jnp.mean(model(params, x_val).argmax(-1) == y_val)},
    )
    return Case(train, {"lr": 3e-3}, model, (x_val, y_val), "accuracy")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/51030782: output[:, -1] of padded sequences is the state after the padding",
    "mask_ignored",
    "vanishing_gradients",
)
def rnn_state_after_padding(mended):
    rng = np.random.default_rng(12)
    longest, tokens = 40, 10
    length = rng.integers(3, 13, size=3000)
    weight = rng.normal(size=tokens)
    ids = np.zeros((3000, longest), np.int32)
    for row, n in zip(ids, length, strict=True):
        row[:n] = rng.integers(1, tokens + 1, size=n)
    total = np.sum(np.where(ids > 0, weight[ids - 1], 0.0), axis=1)
    label = np.digitize(total, np.quantile(total, [0.33, 0.67]))
    hidden = 32

    def init(key):
        k = random.split(key, 4)
        bound = hidden**-0.5
        return {
            "embedding": random.normal(k[0], (tokens + 1, 8)),
            "wx": random.uniform(k[1], (8, hidden), minval=-bound, maxval=bound),
            "wh": random.uniform(k[2], (hidden, hidden), minval=-bound, maxval=bound),
            "b": jnp.zeros(hidden),
            "fc": random.uniform(k[3], (hidden, 3), minval=-bound, maxval=bound),
        }

    def classifier(params, x):
        ids, length = x["ids"], x["length"]

        def cell(h, e):
            h = jnp.tanh(e @ params["wx"] + h @ params["wh"] + params["b"])
            return h, h

        start = jnp.zeros((len(ids), hidden))
        _, output = lax.scan(cell, start, jnp.swapaxes(params["embedding"][ids], 0, 1))
        last = output[length - 1, jnp.arange(len(ids))] if mended else output[-1]
        return last @ params["fc"]

    x = {"ids": ids, "length": length}
    x_train, x_test = ({k: v[:2500] for k, v in x.items()}, {k: v[2500:] for k, v in x.items()})

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(classifier(params, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(classifier(params, batch[0]), batch[1]),
        lambda hparams: optax.chain(optax.clip_by_global_norm(5.0), optax.adam(hparams["lr"])),
        nnlearn.shuffled((x_train, label[:2500]), 50, remainder="drop"),
        init,
        epochs=12,
        evaluate=nnlearn.evaluation(accuracy, (x_test, label[2500:])),
    )
    return Case(train, {"lr": 2e-3}, classifier, (x_test, label[2500:]), "accuracy")


def digits_of_two_ways(axis_swap):
    x, y = load_digits(return_X_y=True)
    x = x / 16
    if axis_swap:
        x = x.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 64)
    return train_test_split(x.astype(np.float32), y, test_size=400, random_state=9)


@report(
    REPORTS,
    "https://github.com/Guitaricet/relora/issues/18: both factors of the adapter start at zero, no gradient for either",
    "bad_initialisation",
    "symmetric_initialisation",
    "vanishing_gradients",
)
def lora_both_factors_zero(mended):
    old_x, _, old_y, _ = digits_of_two_ways(False)
    pretrained = MLPClassifier((64, 64), tol=0.01, n_iter_no_change=4, random_state=0, early_stopping=True).fit(
        old_x, old_y
    )
    base = [(w.astype(np.float32), b.astype(np.float32)) for w, b in zip(*_layers(pretrained), strict=True)]
    x_train, x_test, y_train, y_test = digits_of_two_ways(True)
    rank, alpha = 8, 16

    def init(key):
        lora = []
        for (w, _), k in zip(base, random.split(key, len(base)), strict=True):
            bound = w.shape[0] ** -0.5
            a = random.uniform(k, (w.shape[0], rank), minval=-bound, maxval=bound)
            lora.append({"A": a if mended else jnp.zeros_like(a), "B": jnp.zeros((rank, w.shape[1]))})
        return lora

    def forward(lora, x):
        for i, ((w, b), delta) in enumerate(zip(base, lora, strict=True)):
            x = x @ w + b + (alpha / rank) * (x @ delta["A"]) @ delta["B"]
            x = jax.nn.relu(x) if i < len(base) - 1 else x
        return x

    def accuracy(lora, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(forward(lora, x).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda lora, batch, key: nnlearn.cross_entropy(forward(lora, batch[0]), batch[1]),
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.0),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=12,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 2e-3}, forward, (x_test, y_test), "accuracy")


def _layers(classifier):
    return classifier.coefs_, classifier.intercepts_


@report(
    REPORTS,
    "https://github.com/aleju/imgaug/issues/769: Fliplr mirrors the picture, the keypoint's x does not change",
    "augmentation_breaks_labels",
)
def keypoint_not_mirrored(mended):
    rng = np.random.default_rng(2)
    size = 12
    rows, columns = np.mgrid[:size, :size]
    center = rng.uniform(1.5, size - 2.5, size=(2400, 2))
    spot = np.exp(-((columns - center[:, :1, None]) ** 2 + (rows - center[:, 1:, None]) ** 2) / 3)
    image = (spot + 0.1 * rng.normal(size=spot.shape)).astype(np.float32)[..., None]
    keypoint = (center / (size - 1)).astype(np.float32)

    def augment(key, image, keypoint):
        k1, k2 = random.split(key)
        flip = random.bernoulli(k1, 0.5, (len(image),))
        image = jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)
        if mended:
            keypoint = keypoint.at[:, 0].set(jnp.where(flip, 1 - keypoint[:, 0], keypoint[:, 0]))
        return image * random.uniform(k2, (len(image), 1, 1, 1), minval=0.8, maxval=1.2), keypoint

    class Locator(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(x))
            x = x.reshape(len(x), -1)
            return nn.Dense(2)(nn.relu(nn.Dense(64)(x)))

    net = Locator()

    def loss(params, batch, key):
        image, keypoint = augment(key, *batch)
        return jnp.mean((net.apply(params, image) - keypoint) ** 2)

    def pixels(params, batch):
        image, keypoint = batch.examples
        distance = jnp.sqrt(jnp.sum((net.apply(params, image) - keypoint) ** 2, -1))
        return {"error_in_pixels": jnp.mean((size - 1) * distance, where=batch.where)}

    test_set = (image[2000:], keypoint[2000:])
    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((image[:2000], keypoint[:2000]), 50, remainder="drop"),
        lambda key: net.init(key, image[:1]),
        epochs=15,
        evaluate=nnlearn.evaluation(pixels, test_set),
    )
    return Case(train, {"lr": 1e-3}, lambda params, x: net.apply(params, x), test_set, "error_in_pixels", "min")
