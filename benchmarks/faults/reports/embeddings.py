"""Embeddings: pairs, triplets, users and films."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/1866 and 16935: "
    "the contrastive loss of the paper (0 is similar) with labels where 1 is similar",
    "sign_error",
    "label_encoding",
)
def siamese_labels_of_the_paper(mended):
    digits = datasets.load_digits()
    x, y = digits.data / 16.0, digits.target
    rng = np.random.default_rng(0)

    def create_pairs(rows):
        a, b, same = [], [], []
        for i in rows:
            for want in (1, 0):
                others = rows[(y[rows] == y[i]) == want]
                a.append(x[i])
                b.append(x[rng.choice(others)])
                same.append(want)
        return np.stack(a), np.stack(b), np.array(same, np.float32)

    tr = create_pairs(np.arange(1200))
    te = create_pairs(np.arange(1200, 1797))
    margin = 1.0
    sizes = [64, 64, 64, 16]

    def create_base_network(key):
        keys = jax.random.split(key, 3)
        init = jax.nn.initializers.glorot_uniform()
        return [(init(k, (n, m)), jnp.zeros(m)) for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def base(layers, x):
        for w, b in layers[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = layers[-1]
        return x @ w + b

    def distance(params, pairs):
        a, b = pairs
        return jnp.sqrt(jnp.maximum(jnp.sum((base(params, a) - base(params, b)) ** 2, axis=1), 1e-7))

    def contrastive_loss(params, batch, key):
        a, b, y_true = batch
        d = distance(params, (a, b))
        if not mended:  # as in the paper
            return jnp.mean((1 - y_true) * d**2 + y_true * jnp.maximum(margin - d, 0) ** 2)
        return jnp.mean(y_true * d**2 + (1 - y_true) * jnp.maximum(margin - d, 0) ** 2)

    def metrics(params, batch):
        a, b, y_true = batch.examples
        return {"accuracy": jnp.mean((distance(params, (a, b)) < 0.5) == (y_true > 0.5), where=batch.where)}

    train = nnlearn.make_train(
        contrastive_loss,
        nnlearn.rmsprop(1e-3),
        nnlearn.shuffled(tr, 128, remainder="drop"),
        create_base_network,
        epochs=30,
        evaluate=nnlearn.evaluation(metrics, te),
    )
    return Case(train, {}, distance, ((te[0], te[1]), te[2]), "accuracy")


@report(
    REPORTS,
    "https://github.com/omoindrot/tensorflow-triplet-loss/issues/25 (also 6 and 38): "
    "the loss stays at the margin, embeddings collapse; answer: a lower learning rate",
    "learning_rate_too_high",
    "dead_units",
)
def batch_hard_collapse(mended):
    digits = datasets.load_digits()
    x, y = (digits.data / 16.0).astype(np.float32), digits.target
    x_train, y_train, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
    margin = 0.5

    class Embed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(-1, 8, 8, 1)
            x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
            x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
            x = x.reshape(x.shape[0], -1)
            return nn.Dense(16)(x)

    net = Embed()

    def pairwise(a, b):
        square = jnp.maximum(jnp.sum(a**2, 1)[:, None] - 2 * a @ b.T + jnp.sum(b**2, 1)[None], 0.0)
        zero = square == 0.0
        return jnp.where(zero, 0.0, jnp.sqrt(square + zero * 1e-16))

    def batch_hard(params, batch, key):
        images, labels = batch
        e = net.apply(params, images)
        d = pairwise(e, e)
        same = labels[:, None] == labels[None]
        hardest_positive = jnp.max(d * (same & ~jnp.eye(len(labels), dtype=bool)), axis=1)
        hardest_negative = jnp.min(d + jnp.max(d, axis=1, keepdims=True) * same, axis=1)
        loss = jnp.mean(jnp.maximum(hardest_positive - hardest_negative + margin, 0.0))
        return loss, {"embedding_norm": jnp.mean(jnp.linalg.norm(e, axis=1))}

    def recall(params):
        nearest = jnp.argmin(pairwise(net.apply(params, x_test), net.apply(params, x_train)), axis=1)
        return {"recall_at_1": jnp.mean(jnp.asarray(y_train)[nearest] == y_test)}

    train = nnlearn.make_train(
        batch_hard,
        lambda hparams: nnlearn.adam(hparams["learning_rate"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        lambda key: net.init(key, x_train[:1]),
        steps=400,
        evaluate=recall,
        check_every=100,
    )
    return Case(train, {"learning_rate": 1e-3 if mended else 0.1}, None, None, "recall_at_1")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/59147986: "
    "matrix factorisation, Adam with weight_decay=0.01: the error stays far above that without",
    "excessive_regularisation",
)
def recommender_weight_decay(mended):
    users, movies, factors = 80, 60, 6
    rng = np.random.default_rng(14)
    taste, kind = rng.normal(size=(users, 3)), rng.normal(size=(movies, 3))
    full = np.clip(3.4 + 0.7 * taste @ kind.T + 0.2 * rng.normal(size=(users, movies)), 0.5, 5)
    user, movie = np.nonzero(rng.random((users, movies)) < 0.6)
    order = rng.permutation(len(user))
    user, movie = user[order], movie[order]
    rating = full[user, movie]
    n = len(user) * 4 // 5

    def init(key):
        a, b = jax.random.split(key)
        return {
            "user_latent": jax.random.uniform(a, (users, factors)),
            "movie_latent": jax.random.uniform(b, (movies, factors)),
        }

    def predict(p, who):
        user, movie = who
        return jnp.sum(p["user_latent"][user] * p["movie_latent"][movie], axis=1)

    def loss(p, batch, key):
        user, movie, rating = batch
        return jnp.mean((predict(p, (user, movie)) - rating) ** 2)

    def make_tx(hparams):  # torch.optim.Adam(lr, weight_decay)
        return optax.chain(optax.add_decayed_weights(hparams["weight_decay"]), optax.adam(0.01))

    held_out = (user[n:], movie[n:])
    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.shuffled((user[:n], movie[:n], rating[:n]), 200, remainder="drop"),
        init,
        steps=1000,
        evaluate=lambda p: {"mse": jnp.mean((predict(p, held_out) - rating[n:]) ** 2)},
        check_every=100,
    )
    return Case(train, {"weight_decay": 1e-4 if mended else 0.01}, predict, (held_out, rating[n:]), "mse", "min")
