"""Pruned layers, contrastive labels, captions, peaks in signals, factors of users."""

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
    "https://github.com/microsoft/nni/issues/4521: speedup_model replaces the pruned layers, the optimizer still holds "
    "the old ones; their successors are not updated",
    "frozen_parameters",
)
def pruned_layers_unknown_to_the_optimizer(mended):
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split((x / 16).astype(np.float32), y, random_state=2)
    large = MLPClassifier((48, 48), max_iter=30, random_state=1, tol=0, n_iter_no_change=50).fit(x_train, y_train)
    model = {
        name: {"kernel": jnp.float32(w), "bias": jnp.float32(b)}
        for name, w, b in zip(("fc1", "fc2", "fc3"), large.coefs_, large.intercepts_, strict=True)
    }
    optimizer_groups = set(model)

    def speedup(model):  # the weakest units of both hidden layers go, new layers take their place
        keep1 = jnp.argsort(jnp.abs(model["fc1"]["kernel"]).sum(0))[-10:]
        keep2 = jnp.argsort(jnp.abs(model["fc2"]["kernel"]).sum(0))[-10:]
        fc1, fc2, fc3 = model["fc1"], model["fc2"], model["fc3"]
        return {
            "fc1_pruned": {"kernel": fc1["kernel"][:, keep1], "bias": fc1["bias"][keep1]},
            "fc2_pruned": {"kernel": fc2["kernel"][keep1][:, keep2], "bias": fc2["bias"][keep2]},
            "fc3": {"kernel": fc3["kernel"][keep2], "bias": fc3["bias"]},
        }

    pruned = speedup(model)
    if mended:
        optimizer_groups = set(pruned)

    def forward(params, x):
        *hidden, last = [params[name] for name in sorted(params)]
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    def make_tx(hparams):
        labels = {name: "held" if name in optimizer_groups else "unknown" for name in pruned}
        return optax.multi_transform({"held": optax.adam(hparams["lr"]), "unknown": optax.set_to_zero()}, labels)

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(forward(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(forward(params, batch[0]), batch[1]),
        make_tx,
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        lambda key: pruned,
        epochs=12,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 2e-3}, forward, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/HobbitLong/SupContrast/pull/142 (issue 141): an anchor whose class is only once in the batch "
    "gives 0 / 0, the supervised contrastive loss is NaN",
    "numerical_precision",
)
def anchor_without_a_positive(mended):
    rng = np.random.default_rng(77)
    classes, features = 12, 20
    mixing = rng.normal(size=(6, features))
    centers = rng.normal(size=(classes, 6))

    def samples(n):
        label = rng.integers(classes, size=n)
        hidden = centers[label] + 0.35 * rng.normal(size=(n, 6))
        return (np.tanh(hidden @ mixing / 2) + 0.2 * rng.normal(size=(n, features))).astype(np.float32), label

    x, labels = samples(2000)
    x_test, labels_test = samples(500)

    class Projector(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Dense(16)(nn.relu(nn.Dense(64)(x)))
            return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    net = Projector()

    def sup_con(z, labels, temperature=0.2):
        others = 1.0 - jnp.eye(len(z))
        mask = (labels[:, None] == labels) * others
        logits = z @ z.T / temperature
        log_prob = logits - jnp.log(jnp.sum(jnp.exp(logits) * others, axis=1, keepdims=True))
        positives = mask.sum(1)
        if mended:
            positives = jnp.where(positives < 1e-6, 1.0, positives)
        return -jnp.mean((mask * log_prob).sum(1) / positives)

    def nearest_class(params):
        onehot = jax.nn.one_hot(labels, classes)
        means = onehot.T @ net.apply(params, x)
        return {"accuracy": jnp.mean((net.apply(params, x_test) @ means.T).argmax(1) == labels_test)}

    train = nnlearn.make_train(
        lambda params, batch, key: sup_con(net.apply(params, batch[0]), batch[1]),
        lambda hparams: optax.sgd(hparams["lr"], momentum=0.9),
        nnlearn.shuffled((x, labels), 32, remainder="drop"),
        lambda key: net.init(key, x[:1]),
        epochs=10,
        evaluate=nearest_class,
    )
    return Case(train, {"lr": 0.02}, None, None, "accuracy")


@report(
    REPORTS,
    "https://github.com/fartashf/vsepp/pull/36: captions are sorted by length for pack_padded_sequence and not put "
    "back in their order, the embeddings of a batch are mixed up",
    "misaligned_labels",
)
def captions_stay_sorted_by_length(mended):
    rng = np.random.default_rng(64)
    kinds, values, longest, size = 5, 6, 9, 2400
    attributes = rng.integers(values, size=(size, kinds))
    images = np.eye(values)[attributes].reshape(size, -1) @ rng.normal(size=(kinds * values, 24)) / np.sqrt(kinds)
    images = (images + 0.1 * rng.normal(size=images.shape)).astype(np.float32)
    captions, lengths = np.zeros((size, longest), np.int32), np.zeros(size, np.int32)
    for i in range(size):
        words = [1 + k * values + attributes[i, k] for k in rng.permutation(kinds)]
        words += list(31 + rng.integers(4, size=rng.integers(0, longest - kinds + 1)))  # a, the, of, with
        lengths[i] = len(words)
        captions[i, : len(words)] = rng.permutation(words)

    def init(key):
        k = random.split(key, 4)
        return {
            "words": 0.3 * random.normal(k[0], (35, 32)),
            "wx": random.normal(k[1], (32, 48)) * 32**-0.5,
            "wh": 0.8 * jnp.eye(48),
            "text": random.normal(k[2], (48, 32)) * 48**-0.5,
            "image": random.normal(k[3], (24, 32)) * 24**-0.5,
        }

    def encode_text(params, captions, lengths):
        order = jnp.argsort(-lengths)
        captions, lengths = captions[order], lengths[order]

        def step(h, inputs):
            t, e = inputs
            new = jnp.tanh(e @ params["wx"] + h @ params["wh"])
            return jnp.where((t < lengths)[:, None], new, h), None

        embedded = jnp.swapaxes(params["words"][captions], 0, 1)
        h, _ = lax.scan(step, jnp.zeros((len(captions), 48)), (jnp.arange(longest), embedded))
        out = h @ params["text"]
        if mended:
            out = out[jnp.argsort(order)]
        return out / jnp.linalg.norm(out, axis=1, keepdims=True)

    def scores(params, batch):
        image = batch["image"] @ params["image"]
        image = image / jnp.linalg.norm(image, axis=1, keepdims=True)
        return image @ encode_text(params, batch["caption"], batch["length"]).T

    def contrastive(params, batch, key):
        s = scores(params, batch) / 0.1
        n = jnp.arange(len(s))
        return (nnlearn.cross_entropy(s, n) + nnlearn.cross_entropy(s.T, n)) / 2

    data = {"image": images, "caption": captions, "length": lengths}
    train_set, held_out = (
        {k: jnp.asarray(v[rows]) for k, v in data.items()} for rows in (slice(2200), slice(2200, None))
    )
    train = nnlearn.make_train(
        contrastive,
        lambda hparams: nnlearn.chain(nnlearn.clip_by_global_norm(2.0), nnlearn.adam(hparams["lr"])),
        nnlearn.shuffled(train_set, 100, remainder="drop"),
        init,
        epochs=20,
        evaluate=lambda p: {"recall_at_1": jnp.mean(scores(p, held_out).argmax(1) == jnp.arange(200))},
    )
    return Case(train, {"lr": 3e-3}, None, None, "recall_at_1")


@report(
    REPORTS,
    "https://github.com/tensorlayer/TensorLayer/issues/891 (also mobile-hair-segmentation-pytorch#3): the dice loss is "
    "computed from the argmax of the logits, nothing is trained",
    "blocked_gradient",
)
def dice_of_the_argmax(mended):
    rng = np.random.default_rng(5)
    length, t = 80, np.arange(80)
    beats = rng.uniform(8, 70, size=(1000, 3, 1))
    inside = (np.abs(t - beats) < 3.0).any(1)
    drift = np.sin(2 * np.pi * (t / rng.uniform(30, 90, (1000, 1)) + rng.uniform(size=(1000, 1))))
    signal = 1.5 * np.exp(-((t - beats) ** 2) / 3).sum(1) + 0.5 * drift + 0.25 * rng.normal(size=(1000, length))
    signal, labels = signal[..., None].astype(np.float32), inside.astype(np.int32)

    class Segmenter(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.leaky_relu(nn.Conv(12, (9,))(x))
            x = nn.leaky_relu(nn.Conv(12, (9,))(x))
            return nn.Conv(2, (1,))(x)

    net = Segmenter()

    def dice_coe(output, target, smooth=1e-5):
        overlap = jnp.sum(output * target, axis=1)
        return jnp.mean((2.0 * overlap + smooth) / (jnp.sum(output, axis=1) + jnp.sum(target, axis=1) + smooth))

    def loss(params, batch, key):
        signal, labels = batch
        logits = net.apply(params, signal)
        pred = jax.nn.softmax(logits)[..., 1] if mended else logits.argmax(-1).astype(jnp.float32)
        return 1.0 - dice_coe(pred, labels)

    test = (signal[800:], labels[800:])
    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((signal[:800], labels[:800]), 20, remainder="drop"),
        lambda key: net.init(key, signal[:1]),
        epochs=5,
        evaluate=lambda params: {"dice": dice_coe(net.apply(params, test[0]).argmax(-1), test[1])},
    )
    return Case(train, {"lr": 5e-3}, lambda params, x: net.apply(params, x), test, "dice")


@report(
    REPORTS,
    "https://github.com/NicolasHug/Surprise/issues/22: all factors of users and items start at 0.1, so all factors of "
    "a user stay the same and SVD has rank one",
    "symmetric_initialisation",
    "bad_initialisation",
)
def svd_factors_all_of_0_1(mended):
    rng = np.random.default_rng(90)
    users, items, rank = 200, 80, 6
    taste = rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items)) / np.sqrt(rank)
    user, item = np.divmod(rng.permutation(users * items)[:9000], items)
    rating = np.clip(3 + taste[user, item] + 0.2 * rng.normal(size=9000), 1, 5).astype(np.float32)
    mean = rating[:8000].mean()

    def init(key):
        k1, k2 = random.split(key)
        factors = 8
        if mended:
            p, q = 0.1 * random.normal(k1, (users, factors)), 0.1 * random.normal(k2, (items, factors))
        else:
            p, q = jnp.full((users, factors), 0.1), jnp.full((items, factors), 0.1)
        return {"p": p, "q": q, "bu": jnp.zeros(users), "bi": jnp.zeros(items)}

    def estimate(svd, pair):
        user, item = pair["user"], pair["item"]
        return mean + svd["bu"][user] + svd["bi"][item] + jnp.sum(svd["p"][user] * svd["q"][item], axis=-1)

    def loss(svd, batch, key):
        pair, rating = batch
        penalty = jnp.sum(svd["p"][pair["user"]] ** 2, -1) + jnp.sum(svd["q"][pair["item"]] ** 2, -1)
        return jnp.mean((rating - estimate(svd, pair)) ** 2 + 0.02 * penalty)

    pairs = {"user": user, "item": item}
    known, asked = ({k: v[rows] for k, v in pairs.items()} for rows in (slice(8000), slice(8000, None)))
    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled((known, rating[:8000]), 100, remainder="drop"),
        init,
        epochs=25,
        evaluate=lambda svd: {"rmse": jnp.sqrt(jnp.mean((rating[8000:] - estimate(svd, asked)) ** 2))},
    )
    return Case(train, {"lr": 0.01}, estimate, (asked, rating[8000:]), "rmse", "min")
