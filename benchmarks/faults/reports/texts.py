"""Texts: attention, embeddings of words, an encoder and its decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from benchmarks.faults.reports.nets import block, block_init, gru, gru_init, norm

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/Lightning-AI/pytorch-lightning/issues/1476 "
    "and https://github.com/google-deepmind/optax/issues/1567: the schedule is planned in batches, the optimizer "
    "updates every 8th: the warm-up does not end",
    "schedule_mistimed",
    "gradient_accumulation",
    "learning_rate_too_low",
)
def warmup_in_microbatches(mended):
    vocab, length, d = 100, 12, 24
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, vocab, (8000, length))
    labels = (((tokens < 50).sum(1)) > 6).astype(np.int32)  # words below 50 are positive
    tr, te = slice(0, 6400), slice(6400, None)

    def init(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "emb": jax.random.normal(a, (vocab, d)) * 0.5,
            "block": block_init(b, d),
            "out": jax.random.normal(c, (d, 2)) / np.sqrt(d),
        }

    def model(p, t):
        return norm(block(p["block"], p["emb"][t]).mean(1)) @ p["out"]

    def loss(p, batch, key):
        t, y = batch
        return nnlearn.cross_entropy(model(p, t), y)

    def make_tx(hparams):
        warmup = 600 // 8 if mended else 600
        total = 1600 // 8 if mended else 1600
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hparams["peak"], warmup, total)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
        return optax.MultiSteps(tx, every_k_schedule=8).gradient_transformation()

    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.shuffled((tokens[tr], labels[tr]), 32, remainder="drop"),
        init,
        steps=1600,
        evaluate=lambda p: {"accuracy": jnp.mean(model(p, tokens[te]).argmax(1) == labels[te])},
        check_every=160,
    )
    return Case(train, {"peak": 3e-3}, model, (tokens[te], labels[te]), "accuracy")


@report(
    REPORTS,
    "https://thecodeforge.io/ml-ai/transformers-attention-mechanism/ (and many forum threads): "
    "an encoder without positional encoding: the order of words is invisible",
    "underfitting",
)
def no_positional_encoding(mended):
    vocab, length, d = 12, 10, 32
    rng = np.random.default_rng(6)
    tokens = rng.integers(2, vocab, (2400, length))
    places = np.stack([rng.permutation(length)[:2] for _ in tokens])
    rows = np.arange(len(tokens))
    tokens[rows, places[:, 0]], tokens[rows, places[:, 1]] = 0, 1
    labels = (places[:, 0] < places[:, 1]).astype(np.int32)  # does word 0 come before word 1?

    def init(key):
        a, b, c, e = jax.random.split(key, 4)
        p = {
            "emb": jax.random.normal(a, (vocab, d)),
            "layer": block_init(b, d),
            "fc": jax.random.normal(c, (d, 2)) * 0.1,
            "bias": jnp.zeros(2),
        }
        if mended:
            p["pos"] = 0.5 * jax.random.normal(e, (length, d))
        return p

    def transformer(p, t):
        x = p["emb"][t]
        if mended:
            x = x + p["pos"]
        return block(p["layer"], x).mean(axis=1) @ p["fc"] + p["bias"]

    def loss(p, batch, key):
        logits = transformer(p, batch["text"])
        return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 2)))

    test = {"text": tokens[2000:], "label": labels[2000:]}
    train = nnlearn.make_train(
        loss,
        optax.adam(1e-3),
        nnlearn.shuffled({"text": tokens[:2000], "label": labels[:2000]}, 50, remainder="drop"),
        init,
        epochs=20,
        evaluate=lambda p: {"accuracy": jnp.mean(transformer(p, test["text"]).argmax(-1) == test["label"])},
    )
    return Case(train, {}, transformer, (test["text"], test["label"]), "accuracy")


@report(
    REPORTS,
    "https://github.com/alex-matton/causal-transformer-decoder/issues/1 "
    "and https://github.com/pytorch/tutorials/pull/2662: no causal mask, so the training loss is very low and "
    "generation is bad",
    "target_leak",
    "mask_ignored",
)
def language_model_without_causal_mask(mended):
    vocab, length, d = 8, 16, 32
    rng = np.random.default_rng(8)
    one, two = rng.permutation(vocab), rng.permutation(vocab)
    text = rng.integers(0, vocab, (1200, length))
    for i in range(2, length):
        follow = np.where(text[:, i - 2] % 2 == 0, one[text[:, i - 1]], two[text[:, i - 1]])
        text[:, i] = np.where(rng.random(len(text)) < 0.1, text[:, i], follow)
    tr, te = text[:1000], text[1000:]
    causal = np.tril(np.ones((length - 1, length - 1), bool))

    def init(key):
        ks = jax.random.split(key, 5)
        return {
            "wte": jax.random.normal(ks[0], (vocab, d)) * 0.3,
            "wpe": jax.random.normal(ks[1], (length - 1, d)) * 0.3,
            "h0": block_init(ks[2], d),
            "h1": block_init(ks[3], d),
            "lm_head": jax.random.normal(ks[4], (d, vocab)) * 0.1,
        }

    def gpt(p, tokens):
        x = p["wte"][tokens] + p["wpe"]
        mask = causal if mended else None
        x = block(p["h1"], block(p["h0"], x, mask), mask)
        return norm(x) @ p["lm_head"]

    def loss(p, batch, key):
        logits = gpt(p, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    start = 8

    def next_word(p, prefix):  # padded, as in a loop of generation
        return gpt(p, jnp.pad(prefix, ((0, 0), (0, length - 1 - start))))[:, start - 1]

    def evaluate(p):
        return {"next_word_accuracy": jnp.mean(next_word(p, te[:, :start]).argmax(-1) == te[:, start])}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adamw(hparams["lr"])),
        nnlearn.shuffled(tr, 32, remainder="drop"),
        init,
        steps=700,
        evaluate=evaluate,
        check_every=100,
    )
    return Case(train, {"lr": 2e-3}, next_word, (te[:, :start], te[:, start]), "next_word_accuracy")


@report(
    REPORTS,
    "PyTorch forum and StackOverflow, many threads: "
    "model.eval() is not called, dropout stays on in the test; here flax's flag deterministic",
    "evaluation_in_training_mode",
)
def dropout_left_on(mended):
    vocab, length = 80, 16
    rng = np.random.default_rng(11)
    topic_words = rng.dirichlet(np.full(vocab, 0.25), size=6)
    topics = rng.integers(0, 6, 2400)
    texts = np.stack([rng.choice(vocab, size=length, p=0.5 * topic_words[t] + 0.5 / vocab) for t in topics])

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, ids, training):
            x = nn.Embed(vocab, 32)(ids)
            x = nn.Dropout(0.5, broadcast_dims=(1,), deterministic=not training)(x).mean(axis=1)
            x = nn.relu(nn.Dense(64)(x))
            x = nn.Dropout(0.75, deterministic=not training)(x)
            return nn.Dense(6)(x)

    net = Classifier()

    def loss_fn(params, batch, key):
        ids, y = batch
        logits = net.apply(params, ids, True, rngs={"dropout": key})
        return nnlearn.cross_entropy(logits, y)

    def predict(params, ids):
        if not mended:
            return net.apply(params, ids, True, rngs={"dropout": jax.random.key(0)})
        return net.apply(params, ids, False)

    def accuracy(params, batch):
        ids, y = batch.examples
        return {"accuracy": jnp.mean(predict(params, ids).argmax(-1) == y, where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adamw(hparams["rate"], weight_decay=1e-3),
        nnlearn.shuffled((texts[:2000], topics[:2000]), 80, remainder="drop"),
        lambda key: net.init(key, texts[:1], False),
        epochs=30,
        evaluate=nnlearn.evaluation(accuracy, (texts[2000:], topics[2000:])),
    )
    return Case(train, {"rate": 5e-3}, predict, (texts[2000:], topics[2000:]), "accuracy")


@report(
    REPORTS,
    "PyTorch forum, sequence to sequence: "
    "only decoder.parameters() are given to the optimizer, the encoder keeps its random weights",
    "frozen_parameters",
)
def encoder_not_in_optimizer(mended):
    rng = np.random.default_rng(16)
    length, vocab = 8, 10
    x = rng.integers(0, vocab, (1500, length))
    y = (x * np.where(np.arange(length) % 2 == 0, 1, -1)).sum(1) > 0  # alternating sum of digits

    def init(key):
        a, b, c, e = jax.random.split(key, 4)
        return {
            "embed": 0.5 * jax.random.normal(a, (vocab, 8)),
            "encoder": gru_init(b, 8, 16),
            "decoder_hidden": jax.random.normal(c, (16, 16)) / 4,
            "decoder_out": jax.random.normal(e, (16, 1)) / 4,
        }

    def apply(p, x):
        h = gru(p["encoder"], p["embed"][x])[:, -1]
        return (jax.nn.relu(h @ p["decoder_hidden"]) @ p["decoder_out"])[:, 0]

    def loss(p, batch, key):
        return optax.sigmoid_binary_cross_entropy(apply(p, batch["x"]), batch["y"]).mean()

    def label(path, _):
        name = path[0].key
        if not mended:
            return "train" if name.startswith("decoder") else "rest"  # Adam(decoder.parameters())
        return "train"

    tx = optax.multi_transform(
        {"train": optax.adam(3e-3), "rest": optax.set_to_zero()}, lambda p: jax.tree.map_with_path(label, p)
    )
    train = nnlearn.make_train(
        loss,
        tx,
        nnlearn.shuffled({"x": x[:1200], "y": y[:1200].astype(np.float32)}, 40, remainder="drop"),
        init,
        steps=1200,
        evaluate=lambda p: {"accuracy": jnp.mean((apply(p, x[1200:]) > 0) == y[1200:])},
        check_every=120,
    )
    return Case(train, {}, apply, (x[1200:], y[1200:].astype(np.float32)), "accuracy")
