"""Healthy programs of tutorials on sequences, words, graphs, dynamics and decisions."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://github.com/karpathy/minGPT/blob/master/demo.ipynb a small GPT sorts digits: healthy")
def mingpt_sorts_digits(mended):
    length, num_digits, width, heads = 6, 3, 32, 2
    block_size = 2 * length - 1

    def sequences(key, n):
        inp = random.randint(key, (n, length), 0, num_digits)
        cat = jnp.concatenate([inp, jnp.sort(inp, axis=1)], axis=1)
        x, y = cat[:, :-1], cat[:, 1:]
        return x, y.at[:, : length - 1].set(-1)  # only the sorted part is predicted

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(heads, deterministic=True)(h, h, mask=mask)
            h = nn.LayerNorm()(x)
            return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(h)))

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, idx):
            wte = self.param("wte", nn.initializers.normal(0.02), (num_digits, width))
            wpe = self.param("wpe", nn.initializers.normal(0.02), (block_size, width))
            x = wte[idx] + wpe
            for _ in range(2):
                x = Block()(x)
            return nn.Dense(num_digits, use_bias=False)(nn.LayerNorm()(x))

    gpt = GPT()

    def loss_fn(params, batch, key):
        x, y = batch
        nll = optax.softmax_cross_entropy_with_integer_labels(gpt.apply(params, x), jnp.maximum(y, 0))
        return jnp.sum(nll * (y >= 0)) / jnp.sum(y >= 0)

    x_val, y_val = sequences(random.key(2023), 256)

    def evaluate(params):
        right = (gpt.apply(params, x_val).argmax(-1) == y_val) | (y_val < 0)
        return {"loss": loss_fn(params, (x_val, y_val), None), "all_right": jnp.mean(right.all(1))}

    def make_tx(hparams):
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hparams["learning_rate"], 50, 600)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))

    train = nnlearn.make_train(
        loss_fn,
        make_tx,
        nnlearn.generated(lambda key, step: sequences(key, 32)),
        lambda key: gpt.init(key, x_val[:1]),
        steps=600,
        check_every=50,
        evaluate=evaluate,
    )
    return Case(train, {"learning_rate": 2e-3}, None, None, "loss", "min")


SYLLABLES = [c + v for c in "bdklmnrst" for v in "aio"]


def names(count, seed):
    """Made-up names of two styles, as lists of characters with an end mark."""
    rng = np.random.default_rng(seed)
    made, style = [], rng.integers(2, size=count)
    for s in style:
        made.append(
            "".join(rng.choice(SYLLABLES[:14] if s else SYLLABLES[12:], rng.integers(1, 4))) + ("n" if s else "s")
        )
    return made, style


@report(REPORTS, "https://pytorch.org/tutorials/intermediate/char_rnn_generation_tutorial.html generate names: healthy")
def char_gru_generates_names(mended):
    words, _ = names(2000, 1)
    letters = sorted(set("".join(words)))
    code = {c: i + 1 for i, c in enumerate(letters)}  # 0 is the start, the end and the padding
    text = np.zeros((len(words), 9), np.int32)
    for row, word in zip(text, words, strict=True):
        row[1 : len(word) + 1] = [code[c] for c in word]
    lengths = np.array([len(w) + 1 for w in words])
    n_letters, hidden = len(letters) + 1, 48

    def init(key):
        k = random.split(key, 4)
        bound = hidden**-0.5
        return {
            "embed": 0.3 * random.normal(k[0], (n_letters, 16)),
            "i2h": random.uniform(k[1], (16 + hidden, 2 * hidden), minval=-bound, maxval=bound),
            "cand": random.uniform(k[2], (16 + hidden, hidden), minval=-bound, maxval=bound),
            "h2o": {
                "w": random.uniform(k[3], (hidden, n_letters), minval=-bound, maxval=bound),
                "b": jnp.zeros(n_letters),
            },
        }

    def rnn(params, x):
        def cell(h, letter):
            z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([letter, h], -1) @ params["i2h"]), 2, axis=-1)
            c = jnp.tanh(jnp.concatenate([letter, r * h], -1) @ params["cand"])
            h = (1 - z) * h + z * c
            return h, h

        inputs = jnp.swapaxes(params["embed"][x], 0, 1)
        _, hs = lax.scan(cell, jnp.zeros((x.shape[0], hidden)), inputs)
        return jnp.swapaxes(hs, 0, 1) @ params["h2o"]["w"] + params["h2o"]["b"]

    def nll(params, text, lengths):
        logp = jax.nn.log_softmax(rnn(params, text[:, :-1]))
        picked = jnp.take_along_axis(logp, text[:, 1:, None], axis=-1)[..., 0]
        mask = jnp.arange(text.shape[1] - 1) < lengths[:, None]
        return -(picked * mask).sum() / mask.sum()

    train = nnlearn.make_train(
        lambda params, batch, key: nll(params, *batch),
        lambda hparams: nnlearn.chain(nnlearn.clip_by_global_norm(1.0), nnlearn.adam(hparams["lr"])),
        nnlearn.shuffled((text[:1700], lengths[:1700]), 64, remainder="drop"),
        init,
        epochs=20,
        evaluate=lambda params: {"val_loss": nll(params, text[1700:], lengths[1700:])},
    )
    return Case(train, {"lr": 3e-3}, None, None, "val_loss", "min")


@report(REPORTS, "https://keras.io/examples/nlp/text_classification_from_scratch/ bag of embeddings: healthy")
def sentiment_mean_of_embeddings(mended):
    rng = np.random.default_rng(5)
    vocab, seq = 800, 24
    polarity = np.where(rng.random(vocab) < 0.25, rng.normal(size=vocab), 0.0)
    frequency = 1 / np.arange(10, vocab + 10)
    review = rng.choice(vocab, size=(13000, seq), p=frequency / frequency.sum()).astype(np.int32)
    size = rng.integers(8, seq + 1, size=13000)
    present = np.arange(seq) < size[:, None]
    feeling = np.sum(polarity[review] * present, 1) + 0.3 * rng.normal(size=13000)
    label = (feeling > np.median(feeling)).astype(np.int32)
    tokens = np.where(present, review + 1, 0)  # 0 pads

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            mask = (tokens > 0)[..., None]
            x = self.param("embedding", nn.initializers.normal(0.05), (vocab + 1, 16))[tokens]
            x = jnp.sum(x * mask, axis=1) / jnp.sum(mask, axis=1)
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(1)(x)[..., 0]

    net = Classifier()

    def accuracy(params, batch):
        tokens, label = batch.examples
        return {"accuracy": jnp.mean((net.apply(params, tokens) > 0) == label, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.sigmoid_binary_cross_entropy(net.apply(params, batch[0]), batch[1]).mean(),
        lambda hparams: nnlearn.adamw(hparams["lr"], weight_decay=0.05),
        nnlearn.shuffled((tokens[:12000], label[:12000]), 64, remainder="drop"),
        lambda key: net.init(key, tokens[:1]),
        epochs=3,
        evaluate=nnlearn.evaluation(accuracy, (tokens[12000:], label[12000:])),
    )
    held_out = (tokens[12000:], label[12000:])
    return Case(train, {"lr": 5e-3}, lambda params, x: net.apply(params, x), held_out, "accuracy")


@report(REPORTS, "https://www.tensorflow.org/text/tutorials/word2vec skip-gram with negative samples: healthy")
def skip_gram_topics(mended):
    rng = np.random.default_rng(6)
    vocab, topics = 120, 8
    topic_of_word = np.arange(vocab) % topics
    topic = rng.integers(topics, size=12000)
    target = np.array([rng.choice(np.flatnonzero(topic_of_word == t)) for t in topic])
    near = np.array([rng.choice(np.flatnonzero(topic_of_word == t)) for t in topic])
    context = np.where(rng.random(12000) < 0.8, near, rng.integers(vocab, size=12000))

    def init(key):
        k1, k2 = random.split(key)
        shape = (vocab, 12)
        return {"w2v": random.uniform(k1, shape, minval=-0.2, maxval=0.2), "context": 0.2 * random.normal(k2, shape)}

    def loss(params, batch, key):
        target, context = batch
        negative = random.randint(key, (len(target), 4), 0, vocab)
        word = params["w2v"][target]
        good = jnp.sum(word * params["context"][context], -1)
        bad = jnp.einsum("be,bne->bn", word, params["context"][negative])
        return -jnp.mean(jax.nn.log_sigmoid(good) + jax.nn.log_sigmoid(-bad).sum(-1))

    def nearest_shares_topic(params):
        v = params["w2v"] / jnp.linalg.norm(params["w2v"], axis=1, keepdims=True)
        neighbour = jnp.argmax(v @ v.T - 2 * jnp.eye(vocab), axis=1)
        return {"same_topic": jnp.mean(jnp.asarray(topic_of_word)[neighbour] == topic_of_word)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((target, context), 128, remainder="drop"),
        init,
        epochs=8,
        evaluate=nearest_shares_topic,
    )
    return Case(train, {"lr": 0.01}, None, None, "same_topic")


@report(REPORTS, "https://docs.kidger.site/equinox/examples/neural_ode/ fits a nonlinear oscillator: healthy")
def neural_ode_rk4(mended):
    ts = jnp.linspace(0.0, 3.0, 21)
    dt = ts[1] - ts[0]

    def rk4(f, y, steps=1):
        h = dt / steps
        for _ in range(steps):
            k1 = f(y)
            k2 = f(y + h / 2 * k1)
            k3 = f(y + h / 2 * k2)
            k4 = f(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    def solve(f, y0):
        _, ys = lax.scan(lambda y, _: (rk4(f, y),) * 2, y0, None, length=20)
        return jnp.concatenate([y0[None], ys])

    def oscillator(y):
        x = y / (1 + y)
        return jnp.stack([x[1], -x[0]])

    y0s = random.uniform(random.key(5678), (128, 2), minval=-0.4, maxval=1.0)
    ys = jax.vmap(lambda y0: solve(oscillator, y0))(y0s)

    def make(key):
        return eqx.nn.MLP(2, 2, width_size=32, depth=2, activation=jax.nn.softplus, key=key)

    _, static = eqx.partition(make(random.key(0)), eqx.is_array)

    def predict(params, y0):
        model = eqx.combine(params, static)
        return jax.vmap(lambda start: solve(model, start))(y0)

    def loss(params, batch, key):
        return jnp.mean((predict(params, batch[:, 0]) - batch) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adabelief(hparams["lr"]),
        nnlearn.shuffled(ys[:96], 32, remainder="drop"),
        lambda key: eqx.filter(make(key), eqx.is_array),
        steps=500,
        check_every=50,
        evaluate=lambda params: {"test_loss": loss(params, ys[96:], None)},
    )
    return Case(train, {"lr": 3e-3}, predict, (ys[96:, 0], ys[96:]), "test_loss", "min")


@report(REPORTS, "https://pytorch.org/tutorials/intermediate/reinforcement_q_learning.html on a grid: healthy")
def q_learning_gridworld(mended):
    size, gamma = 5, 0.9
    goal = jnp.array([4, 4])
    moves = jnp.array([[0, 1], [1, 0], [0, -1], [-1, 0]])

    def transition(key, step):
        k1, k2 = random.split(key)
        cell = random.randint(k1, (128, 2), 0, size)
        action = random.randint(k2, (128,), 0, 4)
        after = jnp.clip(cell + moves[action], 0, size - 1)
        return {"s": cell, "a": action, "s_next": after, "done": jnp.all(after == goal, axis=1)}

    def observe(cell):
        return jnp.concatenate([jax.nn.one_hot(cell[..., 0], size), jax.nn.one_hot(cell[..., 1], size)], -1)

    class QNetwork(nn.Module):
        @nn.compact
        def __call__(self, cell):
            return nn.Dense(4)(nn.relu(nn.Dense(64)(observe(cell))))

    q = QNetwork()

    def td_loss(params, batch, key):
        q_next = lax.stop_gradient(q.apply(params, batch["s_next"])).max(-1)
        target = jnp.where(batch["done"], 1.0, gamma * q_next)
        q_taken = jnp.take_along_axis(q.apply(params, batch["s"]), batch["a"][:, None], axis=-1)[:, 0]
        return optax.huber_loss(q_taken, target).mean()

    cells = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), -1).reshape(-1, 2)[:-1]
    value = gamma ** (jnp.sum(goal - cells, axis=1) - 1.0)

    def evaluate(params):
        return {"value_error": jnp.mean(jnp.abs(q.apply(params, cells).max(-1) - value))}

    train = nnlearn.make_train(
        td_loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(transition),
        lambda key: q.init(key, cells[:1]),
        steps=1500,
        check_every=100,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 1e-3}, None, None, "value_error", "min")
