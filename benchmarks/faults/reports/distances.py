"""Metric learning, attention in half precision, a language model and plain regressions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, make_regression

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/tensorflow/tensorflow/issues/30199 (and jax#3058, sentence-transformers#4033): triplet loss "
    "becomes NaN as soon as a positive equals its anchor; the square root has no slope at zero",
    "numerical_precision",
)
def positive_equals_anchor(mended):
    digits = load("digits", seed=1)
    x, y = digits.train.inputs, digits.train.targets
    members = np.stack([np.flatnonzero(y == c)[:100] for c in range(10)])
    x, members, few_labels = jnp.asarray(x), jnp.asarray(members), jnp.asarray(y[:500])
    held, held_labels = digits.validation.inputs, digits.validation.targets

    def triplets(key, step):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        classes = jax.random.randint(k1, (48,), 0, 10)
        others = (classes + jax.random.randint(k2, (48,), 1, 10)) % 10
        own = members[classes[:, None], jax.random.randint(k3, (48, 2), 0, 100)]
        other = members[others, jax.random.randint(k4, (48,), 0, 100)]
        return x[own[:, 0]], x[own[:, 1]], x[other]

    def init(key):
        k1, k2 = jax.random.split(key)
        glorot = jax.nn.initializers.glorot_uniform()
        return {"W1": glorot(k1, (64, 48)), "b1": jnp.zeros(48), "W2": glorot(k2, (48, 16))}

    def embed(params, x):
        return jax.nn.relu(x @ params["W1"] + params["b1"]) @ params["W2"]

    def distance(a, b):
        squared = jnp.sum((a - b) ** 2, axis=-1)
        return jnp.sqrt(squared + 1e-8) if mended else jnp.sqrt(squared)

    def loss(params, batch, key):
        anchor, positive, negative = (embed(params, part) for part in batch)
        return jnp.mean(jax.nn.relu(distance(anchor, positive) - distance(anchor, negative) + 1.0))

    def evaluate(params):
        gaps = distance(embed(params, held)[:, None], embed(params, x[:500])[None])
        return {"nearest_neighbour": jnp.mean(few_labels[jnp.argmin(gaps, axis=1)] == held_labels)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.generated(triplets),
        init,
        steps=400,
        evaluate=evaluate,
        check_every=50,
    )
    return Case(train, {"lr": 0.002}, None, None, "nearest_neighbour")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/7994: categorical_crossentropy after tanh instead of softmax; the loss "
    "is 25.7, its clipped logarithms hide most errors, accuracy 0.02",
    "loss_output_mismatch",
)
def tanh_with_categorical_crossentropy(mended):
    rng = np.random.RandomState(4)
    topics = rng.dirichlet(np.full(120, 0.15), size=8)
    labels = rng.randint(8, size=1800)
    bags = np.stack([rng.multinomial(25, topics[label]) for label in labels]).astype(np.float32) / 5
    one_hot = np.eye(8, dtype=np.float32)[labels]
    train_set, test_set = (bags[:1500], one_hot[:1500]), (bags[1500:], one_hot[1500:])

    class Topics(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(32, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.Dense(8, kernel_init=nn.initializers.glorot_uniform())(x)
            return nn.softmax(x) if mended else nn.tanh(x)

    model = Topics()

    def categorical_crossentropy(y_true, y_pred):
        y_pred = y_pred / jnp.sum(y_pred, axis=-1, keepdims=True)
        return -jnp.sum(y_true * jnp.log(jnp.clip(y_pred, 1e-7, 1 - 1e-7)), axis=-1)

    def loss(params, batch, key):
        return jnp.mean(categorical_crossentropy(batch[1], model.apply(params, batch[0])))

    def metrics(params, batch):
        x, y = batch.examples
        return {"acc": jnp.mean(model.apply(params, x).argmax(-1) == y.argmax(-1), where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 30, remainder="drop"),
        lambda key: model.init(key, bags[:1]),
        epochs=10,
        evaluate=nnlearn.evaluation(metrics, test_set),
    )
    return Case(train, {"lr": 0.003}, model.apply, test_set, "acc")


@report(
    REPORTS,
    "https://github.com/chuanyangjin/fast-DiT/issues/4 (and own_data_cnn_implementation_keras#4): the lists of feature "
    "files and of label files are in different orders, fixed by sorting both alike",
    "misaligned_labels",
    "label_noise",
)
def features_and_labels_from_two_listings(mended):
    digits = load_digits()
    numbers = list(range(1797))
    feature_files = sorted(f"{n}.npy" for n in numbers)  # 0.npy, 1.npy, 10.npy, 100.npy, ...
    label_files = [f"{n}.npy" for n in numbers]
    if mended:
        label_files.sort()
    features = np.array([digits.data[int(name[:-4])] for name in feature_files]) / 16
    labels = np.array([digits.target[int(name[:-4])] for name in label_files])
    shuffled = np.random.RandomState(0).permutation(1797)
    features, labels = features[shuffled], labels[shuffled]
    validation = features[1400:], labels[1400:]

    def init(key):
        k1, k2 = jax.random.split(key)
        return (jax.random.normal(k1, (64, 50)) / 8, jnp.zeros(50), jax.random.normal(k2, (50, 10)) / 7, jnp.zeros(10))

    def classify(params, z):
        w, b, v, c = params
        return jax.nn.gelu(z @ w + b) @ v + c

    def loss(params, batch, key):
        inputs, targets = batch.examples
        return nnlearn.cross_entropy(classify(params, inputs), targets, where=batch.where)

    def metrics(params, batch):
        right = classify(params, batch.examples[0]).argmax(1) == batch.examples[1]
        return {"accuracy": jnp.mean(right, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adamw(hp["lr"]),
        nnlearn.shuffled((features[:1400], labels[:1400]), 64),
        init,
        epochs=15,
        evaluate=nnlearn.evaluation(metrics, validation),
    )
    return Case(train, {"lr": 0.003}, classify, validation, "accuracy")


@report(
    REPORTS,
    "https://github.com/openai/gpt-2/pull/122 (also flax#982, pytorch-seq2seq#191): attention masked by subtracting "
    "1e10 * (1 - mask) overflows in float16; 1e4 works",
    "numerical_precision",
)
def attention_mask_of_1e10_in_float16(mended):
    rng = np.random.RandomState(6)
    tokens = rng.randint(3, 40, (1500, 12))
    lengths = rng.randint(5, 13, size=1500)
    flags = rng.randint(1, 3, size=1500)  # one token 1 or 2 says which class it is
    tokens[np.arange(1500), rng.randint(0, lengths)] = flags
    mask = (np.arange(12) < lengths[:, None]).astype(np.float16)
    tokens = np.where(mask > 0, tokens, 0)
    data = {"tokens": tokens, "mask": mask, "label": flags - 1}
    test = {name: values[1200:] for name, values in data.items()}

    def init(key):
        k = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(k[0], (40, 16)),
            "query": jax.random.normal(k[1], (16,)) / 4,
            "head": jax.random.normal(k[2], (16, 2)) / 4,
        }

    def attend(params, tokens, mask):
        half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
        x = half["embedding"][tokens]
        w = x @ half["query"]
        w = w - jnp.asarray(1e4 if mended else 1e10).astype(jnp.float16) * (1 - mask)
        return jnp.einsum("nt,ntd->nd", jax.nn.softmax(w), x) @ half["head"]

    def loss(params, batch, key):
        logits = attend(params, batch["tokens"], batch["mask"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def evaluate(params):
        said = attend(params, test["tokens"], test["mask"]).argmax(1)
        return {"accuracy": jnp.mean(said == test["label"])}

    batches = nnlearn.shuffled({name: values[:1200] for name, values in data.items()}, 40, remainder="drop")
    train = nnlearn.make_train(loss, lambda hp: optax.adam(hp["lr"]), batches, init, epochs=12, evaluate=evaluate)
    return Case(train, {"lr": 0.01}, None, None, "accuracy")


@report(
    REPORTS,
    "https://machinelearningmastery.com/how-to-improve-neural-network-stability-and-modeling-performance-with-data-"
    "scaling: make_regression with raw targets, SGD with momentum, the loss becomes NaN; standardised it learns",
    "unnormalised_targets",
    "exploding_gradients",
)
def regression_on_raw_targets(mended):
    X, y = make_regression(n_samples=1000, n_features=20, noise=0.1, random_state=1)
    trainX, testX, trainy, testy = X[:500], X[500:], y[:500], y[500:]
    if mended:
        mean, std = trainy.mean(), trainy.std()
        trainy, testy = (trainy - mean) / std, (testy - mean) / std

    def init(key):
        k1, k2 = jax.random.split(key)
        he, glorot = jax.nn.initializers.he_uniform(), jax.nn.initializers.glorot_uniform()
        return {"W": he(k1, (20, 25)), "b": jnp.zeros(25), "V": glorot(k2, (25, 1)), "c": jnp.zeros(1)}

    def model(p, x):
        return (jax.nn.relu(x @ p["W"] + p["b"]) @ p["V"] + p["c"])[:, 0]

    def mse(p, batch, key):
        return nnlearn.mean_squared_error(model(p, batch[0]), batch[1])

    train = nnlearn.make_train(
        mse,
        lambda hp: nnlearn.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((trainX, trainy), 32, remainder="drop"),
        init,
        epochs=100,
        evaluate=lambda p: {"mse": jnp.mean((model(p, testX) - testy) ** 2)},
        check_every=150,
    )
    return Case(train, {"lr": 0.01}, model, (testX, testy), "mse", mode="min")


@report(
    REPORTS,
    "https://github.com/rajveermalviya/language-modeling/issues/3: the loss of the language model does not go down, "
    "the config gives Adam a rate of 1.0; with its default it gets much better",
    "learning_rate_too_high",
)
def language_model_with_adam_at_1(mended):
    rng = np.random.RandomState(12)
    parts = (
        ["the", "a", "every", "my"],
        ["old", "small", "red", "quiet", "clever"],
        ["cat", "dog", "teacher", "train"],
    )
    parts += (
        ["sees", "follows", "likes", "waits for"],
        ["the", "a", "our"],
        ["garden", "station", "moon", "river", "cake"],
    )
    text = " ".join(" ".join(rng.choice(words) for words in parts) + "." for _ in range(900))
    letters = sorted(set(text))
    codes = np.array([letters.index(c) for c in text])
    windows = np.stack([codes[i : i + 31] for i in range(0, len(codes) - 31, 30)])
    later = windows[int(0.85 * len(windows)) :]
    size, hidden = len(letters), 40

    class Gru(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(size, 16)(tokens)
            return nn.Dense(size)(nn.RNN(nn.GRUCell(hidden))(x))

    model = Gru()

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(windows[: len(windows) - len(later)], 32, remainder="drop"),
        lambda key: model.init(key, windows[:1, :-1]),
        steps=360,
        evaluate=lambda params: {"val_loss": loss_fn(params, later, None)},
        check_every=40,
    )
    validation = later[:, :-1], later[:, 1:]
    return Case(train, {"lr": 0.01 if mended else 1.0}, model.apply, validation, "val_loss", mode="min")
