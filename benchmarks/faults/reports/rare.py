"""Rare labels, dying units, sums over neighbours, scores without a scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/appvision-ai/fast-bert/issues/52 (also flair#678): with hundreds of labels, of which few are "
    "given, only zeros are predicted; pos_weight helps",
    "class_imbalance",
)
def many_labels_only_zeros(mended):
    rng = np.random.default_rng(88)
    count, tags, words = 3000, 60, 120
    vocabulary = rng.dirichlet(np.full(words, 0.05), size=tags)
    given = rng.uniform(size=(count, tags)) < 0.02
    mixture = given @ vocabulary + 0.7 / words
    texts = np.stack([rng.multinomial(40, m / m.sum()) for m in mixture])
    x = np.log1p(texts).astype(np.float32)
    y = (given & (rng.uniform(size=given.shape) < 0.45)).astype(np.float32)  # a tagger gives less than half of them
    pos_weight = (1 - y[:2400].mean()) / y[:2400].mean() / 12 if mended else 1.0

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(tags)(nn.relu(nn.Dense(64)(x)))

    net = Tagger()

    def bce_with_logits(params, batch, key):
        x, y = batch
        z = net.apply(params, x)
        return -jnp.mean(pos_weight * y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z))

    def f1(params):
        predicted = net.apply(params, x[2400:]) > 0
        hits = jnp.sum(predicted * y[2400:])
        return {"f1": 2 * hits / (predicted.sum() + y[2400:].sum()), "accuracy": jnp.mean(predicted == y[2400:])}

    train = nnlearn.make_train(
        bce_with_logits,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled((x[:2400], y[:2400]), 40, remainder="drop"),
        lambda key: net.init(key, x[:1]),
        epochs=10,
        evaluate=f1,
    )
    return Case(train, {"lr": 2e-3}, net.apply, (x[2400:], y[2400:]), "f1")


@report(
    REPORTS,
    "https://github.com/dangitstam/topic-rnn/pull/9 (also BicycleGAN-Tensorflow#3): a smaller learning rate to prevent "
    "dying ReLUs",
    "dead_units",
    "learning_rate_too_high",
)
def relus_that_die(mended):
    rng = np.random.default_rng(19)
    documents, words, topics = 2400, 100, 6
    usage = rng.dirichlet(np.full(words, 0.2), size=topics)
    share = rng.dirichlet(np.full(topics, 0.4), size=documents)
    counts = np.stack([rng.multinomial(400, s @ usage) for s in share])
    counts = (counts / 5).astype(np.float32)
    length = rng.uniform(1, 3, size=(topics, 1))
    score = (share @ length)[:, 0].astype(np.float32)

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        he = jax.nn.initializers.he_normal()
        return {
            "encoder": {"w": he(k1, (words, 32)), "b": jnp.zeros(32)},
            "topics": {"w": he(k2, (32, 16)), "b": jnp.zeros(16)},
            "score": {"w": he(k3, (16, 1)), "b": jnp.zeros(1)},
        }

    def model(params, counts):
        h = jax.nn.relu(counts @ params["encoder"]["w"] + params["encoder"]["b"])
        h = jax.nn.relu(h @ params["topics"]["w"] + params["topics"]["b"])
        return (h @ params["score"]["w"] + params["score"]["b"])[:, 0]

    def mse(params, batch, key):
        counts, score = batch
        return jnp.mean((model(params, counts) - score) ** 2)

    test = (counts[2000:], score[2000:])
    train = nnlearn.make_train(
        mse,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((counts[:2000], score[:2000]), 20, remainder="drop"),
        init,
        epochs=12,
        evaluate=lambda params: {"mse": mse(params, test, None)},
    )
    return Case(train, {"lr": 2e-3 if mended else 0.5}, model, test, "mse", "min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras-io/pull/2304: messages of neighbours are summed, features explode at nodes "
    "of high degree; divided by the degree the validation loss is stable",
    "wrong_axis_or_reduction",
    "exploding_gradients",
    "bad_initialisation",
)
def messages_summed_over_neighbours(mended):
    rng = np.random.default_rng(73)
    papers, fields, words = 360, 5, 30
    field = rng.integers(fields, size=papers)
    fame = rng.pareto(1.5, size=papers) + 0.3
    chance = np.where(field[:, None] == field, 0.20, 0.02) * fame[:, None] * fame
    links = np.triu(rng.uniform(size=chance.shape) < chance, 1)
    adjacency = (links | links.T | np.eye(papers, dtype=bool)).astype(np.float32)
    profile = rng.dirichlet(np.full(words, 0.5), size=fields)
    features = (rng.uniform(size=(papers, words)) < 2.5 * profile[field] + 0.05).astype(np.float32)
    order = rng.permutation(papers)
    known, asked = order[:160], order[160:]
    if mended:
        adjacency = adjacency / adjacency.sum(1, keepdims=True)

    def init(key):
        keys, sizes = random.split(key, 3), (words, 32, 32, fields)
        glorot = jax.nn.initializers.glorot_uniform()
        return [{"w": glorot(k, (m, n)), "b": jnp.zeros(n)} for k, m, n in zip(keys, sizes, sizes[1:], strict=False)]

    def gnn(params, key):
        h = features
        for i, layer in enumerate(params):
            h = adjacency @ (h @ layer["w"]) + layer["b"]
            if i < len(params) - 1:
                h = jax.nn.relu(h)
                if key is not None:
                    h = h * random.bernoulli(random.fold_in(key, i), 0.5, h.shape) / 0.5
        return h

    def loss(params, nodes, key):
        return nnlearn.cross_entropy(gnn(params, key)[nodes], jnp.asarray(field)[nodes])

    def evaluate(params):
        logits = gnn(params, None)[asked]
        right = logits.argmax(1) == field[asked]
        return {"val_loss": nnlearn.cross_entropy(logits, field[asked]), "val_acc": jnp.mean(right)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: jnp.asarray(known)),
        init,
        steps=200,
        check_every=20,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.01}, None, None, "val_loss", "min")


@report(
    REPORTS,
    "https://github.com/ThilinaRajapakse/simpletransformers/issues/234: 4e-5 suits the pretrained layers, not for the "
    "new classification layer; with 1e-3 there it predicts well",
    "learning_rate_too_low",
)
def new_head_at_4e_5(mended):
    scans, digit = load_digits(return_X_y=True)
    scans = (scans / 16).astype(np.float32)
    low = digit < 5
    corpus = MLPClassifier((96, 48), max_iter=25, random_state=4, tol=0, n_iter_no_change=50).fit(
        scans[low], digit[low]
    )
    bert = [(jnp.float32(w), jnp.float32(b)) for w, b in zip(corpus.coefs_[:2], corpus.intercepts_[:2], strict=True)]
    x_train, x_test, y_train, y_test = train_test_split(scans[~low], digit[~low] - 5, test_size=250, random_state=6)

    def init(key):
        return {"bert": bert, "classifier": (0.02 * random.normal(key, (48, 5)), jnp.zeros(5))}

    def model(params, x):
        for w, b in params["bert"]:
            x = jax.nn.relu(x @ w + b)
        w, b = params["classifier"]
        return x @ w + b

    def grouped(hparams):
        rates = {"bert": hparams["lr"], "classifier": 1e-3 if mended else hparams["lr"]}
        groups = {name: nnlearn.adamw(rate, weight_decay=0.0) for name, rate in rates.items()}
        return optax.multi_transform(groups, {name: name for name in rates})

    def evaluate(params):
        logits = model(params, x_test)
        return {"eval_loss": nnlearn.cross_entropy(logits, y_test), "acc": jnp.mean(logits.argmax(1) == y_test)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(model(params, batch[0]), batch[1]),
        grouped,
        nnlearn.shuffled((x_train, y_train), 16, remainder="drop"),
        init,
        epochs=40,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 4e-5}, model, (x_test, y_test), "eval_loss", "min")
