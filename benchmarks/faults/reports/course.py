"""Course work: the first own networks, with the mistakes of the first weeks."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://flisks.com/python-why-do-we-need-to-call-zero-grad-in-pytorch (StackOverflow 48001598): backward() adds "
    "to .grad; without zero_grad() every step uses the sum of all gradients so far",
    "gradient_accumulation",
)
def forgotten_zero_grad(mended):
    rng = np.random.RandomState(0)
    frequency = np.linspace(0, 1, 40)
    vowel = rng.randint(0, 5, 1500)  # two formants in a short spectrum
    first = np.array([0.15, 0.3, 0.2, 0.35, 0.25])[vowel] + 0.03 * rng.randn(1500)
    second = np.array([0.7, 0.6, 0.8, 0.75, 0.55])[vowel] + 0.04 * rng.randn(1500)
    spectra = sum(np.exp(-(((frequency - f[:, None]) / 0.06) ** 2)) for f in (first, second))
    spectra = (spectra + 0.15 * rng.randn(1500, 40)).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(spectra, vowel, test_size=0.2, random_state=0)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc1 = nnx.Linear(40, 32, rngs=rngs)
            self.fc2 = nnx.Linear(32, 5, rngs=rngs)

        def __call__(self, x):
            return self.fc2(nnx.relu(self.fc1(x)))

    def init(key):
        return nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(key))))

    def forward(params, x):
        net = Net(nnx.Rngs(0))
        nnx.update(net, nnx.State(params))
        return net(x)

    def backward():  # .grad of every parameter
        def zero_grad(params):
            return jax.tree.map(jnp.zeros_like, params)

        def update(grads, grad, params=None):
            grad = jax.tree.map(jnp.add, grad, grads)
            return grad, zero_grad(grad) if mended else grad

        return optax.GradientTransformation(zero_grad, update)

    def criterion(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch[0]), batch[1]).mean()

    def test(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(forward(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        criterion,
        lambda hp: optax.chain(backward(), optax.sgd(hp["lr"])),
        nnlearn.shuffled((X_train, y_train), 20, remainder="drop"),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(test, (X_test, y_test)),
    )
    return Case(train, {"lr": 0.1}, forward, (X_test, y_test), "accuracy")


@report(
    REPORTS,
    "http://www.philkr.net/cs342/doc/sigmoid/: with BCEWithLogitsLoss there is no sigmoid before the loss; here it is "
    "in the network, and rounding the sigmoid of it says 1 for everything",
    "loss_output_mismatch",
)
def sigmoid_before_bce_with_logits(mended):
    rng = np.random.RandomState(1)
    topics = rng.dirichlet(np.full(200, 0.1), size=2)
    common = rng.dirichlet(np.full(200, 0.5))
    y = rng.randint(0, 2, 1600)
    counts = np.stack([rng.multinomial(rng.randint(20, 60), 0.8 * common + 0.2 * topics[label]) for label in y])
    x = np.log1p(counts)
    x_train, y_train, x_test, y_test = x[:1200], y[:1200].astype(float), x[1200:], y[1200:].astype(float)

    class BinaryClassification(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            x = nn.relu(nn.Dense(64)(inputs))
            x = nn.relu(nn.Dense(64)(x))
            x = nn.Dense(1)(x)
            return x if mended else nn.sigmoid(x)

    model = BinaryClassification()

    def loss_fn(params, batch, key):
        y_pred = model.apply(params, batch[0])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(y_pred, batch[1][:, None]))

    def binary_acc(params):
        y_pred_tag = jnp.round(jax.nn.sigmoid(model.apply(params, x_test)))
        return {"acc": 100 * jnp.mean(y_pred_tag[:, 0] == y_test)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["LEARNING_RATE"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        lambda key: model.init(key, x[:1]),
        epochs=6,
        evaluate=binary_acc,
    )
    return Case(train, {"LEARNING_RATE": 0.001}, model.apply, (x_test, y_test[:, None]), "acc")


@report(
    REPORTS,
    "https://github.com/AlexeyAB/darknet/issues/2630 (and 674, 3606): flips and turns while training on handwritten "
    "numbers, a turned 6 is a 9 and a mirrored 2 looks like another number",
    "augmentation_breaks_labels",
)
def numbers_turned_by_180(mended):
    data = load_digits()
    images, labels = data.images[..., None].astype(np.float32) / 16, data.target
    numbers = np.isin(labels, (2, 5, 6, 9))
    images, labels = images[numbers], np.searchsorted([2, 5, 6, 9], labels[numbers])
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(24, (3, 3))(x))
            return nn.Dense(4)(nn.relu(nn.Dense(32)(x.reshape(len(x), -1))))

    net = Net()

    def random_flip(key, x):  # both directions, as for photographs
        horizontal, vertical = jax.random.bernoulli(key, shape=(2, len(x), 1, 1, 1))
        x = jnp.where(horizontal, x[:, :, ::-1], x)
        return jnp.where(vertical, x[:, ::-1], x)

    def shift(key, x):
        return jnp.roll(x, jax.random.randint(key, (), -1, 2), axis=2)

    def loss_fn(params, batch, key):
        x = shift(key, batch["image"]) if mended else random_flip(key, batch["image"])
        logits = net.apply({"params": params}, x)
        return nnlearn.cross_entropy(logits, batch["label"])

    def metrics_fn(params, batch):
        logits = net.apply({"params": params}, batch.examples["image"])
        return {"accuracy": jnp.mean(logits.argmax(-1) == batch.examples["label"], where=batch.where)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=1e-4),
        nnlearn.shuffled({"image": train_x, "label": train_y}, 32, remainder="drop"),
        lambda key: net.init(key, train_x[:1])["params"],
        epochs=15,
        evaluate=nnlearn.evaluation(metrics_fn, {"image": test_x, "label": test_y}),
    )
    return Case(train, {"lr": 0.002}, lambda p, x: net.apply({"params": p}, x), (test_x, test_y), "accuracy")


@report(
    REPORTS,
    "https://github.com/fengdu78/Data-Science-Notes/issues/18: optim.SGD(model.fc.parameters()) where "
    "model.parameters() was meant, so that only the last layer of the new network learns",
    "frozen_parameters",
)
def sgd_of_fc_parameters(mended):
    rng = np.random.RandomState(3)
    arm = rng.randint(0, 3, 1800)  # three arms of a spiral
    t = np.sqrt(rng.rand(1800))
    angle = 4.5 * t + arm * 2 * np.pi / 3
    points = np.stack([t * np.cos(angle), t * np.sin(angle)], 1) + 0.02 * rng.randn(1800, 2)
    points = 2 * points
    train_set, test_set = (points[:1400], arm[:1400]), (points[1400:], arm[1400:])

    class Model(eqx.Module):
        body: list
        fc: eqx.nn.Linear

        def __init__(self, key):
            k1, k2, k3 = jax.random.split(key, 3)
            self.body = [eqx.nn.Linear(2, 32, key=k1), eqx.nn.Linear(32, 32, key=k2)]
            self.fc = eqx.nn.Linear(32, 3, key=k3)

        def __call__(self, x):
            for layer in self.body:
                x = jax.nn.relu(layer(x))
            return self.fc(x)

    def logits(model, x):
        return jax.vmap(model)(x)

    def make_tx(hp):
        def groups(model):
            labels = jax.tree.map(lambda _: "train" if mended else "other", model)
            return eqx.tree_at(lambda m: m.fc, labels, jax.tree.map(lambda _: "train", model.fc))

        sgd = optax.sgd(hp["lr"], momentum=0.9)
        return optax.multi_transform({"train": sgd, "other": optax.set_to_zero()}, groups)

    def loss(model, batch, key):
        log_p = jax.nn.log_softmax(logits(model, batch[0]))
        return -jnp.mean(jnp.take_along_axis(log_p, batch[1][:, None], 1))

    def evaluate(model):
        return {"test_acc": jnp.mean(logits(model, test_set[0]).argmax(-1) == test_set[1])}

    train = nnlearn.make_train(
        loss, make_tx, nnlearn.shuffled(train_set, 50, remainder="drop"), Model, epochs=50, evaluate=evaluate
    )
    return Case(train, {"lr": 0.05}, logits, test_set, "test_acc")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/76951: each batch only contains data with one label; the model "
    "says the last of them, the answers shuffle",
    "unshuffled_data",
)
def one_label_per_batch(mended):
    rng = np.random.RandomState(4)
    vocabulary, groups = 150, 4
    language = 0.7 * rng.dirichlet(np.ones(vocabulary)) + 0.3 * rng.dirichlet(np.full(vocabulary, 0.2), groups)
    target = np.sort(rng.randint(0, groups, 1600))  # read folder by folder
    documents = np.stack([rng.multinomial(40, language[g]) for g in target]) / 40
    tfidf = documents * np.log(1600 / (1 + (documents > 0).sum(0)))
    tfidf = tfidf / np.linalg.norm(tfidf, axis=1, keepdims=True)
    test = rng.rand(1600) < 0.2
    train_set = {"x": tfidf[~test], "y": np.eye(groups)[target[~test]]}
    x_test, y_test = tfidf[test], target[test]

    def init(key):
        k1, k2 = jax.random.split(key)
        glorot = jax.nn.initializers.glorot_uniform()
        return [(glorot(k1, (vocabulary, 50)), jnp.zeros(50)), (glorot(k2, (50, groups)), jnp.zeros(groups))]

    def mlp(params, x):
        (w1, b1), (w2, b2) = params
        return jax.nn.relu(x @ w1 + b1) @ w2 + b2

    def loss(params, batch, key):
        return optax.softmax_cross_entropy(mlp(params, batch["x"]), batch["y"]).mean()

    def evaluate(params):
        logits = mlp(params, x_test)
        val_loss = optax.softmax_cross_entropy_with_integer_labels(logits, y_test).mean()
        return {"val_loss": val_loss, "val_accuracy": jnp.mean(logits.argmax(1) == y_test)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.rmsprop(hp["lr"]),
        nnlearn.shuffled(train_set, 16, shuffle=mended, remainder="drop"),
        init,
        epochs=8,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.002}, mlp, (x_test, y_test), "val_accuracy")


@report(
    REPORTS,
    "https://forums.fast.ai/t/cross-entropy-error-log-1-1-inf/1441: -log(1 - guess) of a guess of 1 is infinite; "
    "normalizing the input solved it",
    "numerical_precision",
    "unnormalised_inputs",
)
def log_of_one_minus_one(mended):
    wine = load_wine()
    X_train, X_test, y_train, y_test = train_test_split(wine.data, wine.target, test_size=0.3, random_state=0)
    if mended:
        mean, std = X_train.mean(0), X_train.std(0)
        X_train, X_test = (X_train - mean) / std, (X_test - mean) / std

    def init(key):
        return {"W": jax.random.normal(key, (13, 3)) / np.sqrt(13), "b": jnp.zeros(3)}

    def scores(params, X):
        return X @ params["W"] + params["b"]

    def softmax(before_activation):
        exps = jnp.exp(before_activation)
        return exps / jnp.sum(exps, axis=1, keepdims=True)

    def average_cross_entropy(params, batch, key):
        X, targets = batch
        if mended:
            return nnlearn.cross_entropy(scores(params, X), targets)
        outputs = softmax(scores(params, X))
        errors = jnp.where(jnp.eye(3)[targets] == 1, -jnp.log(outputs), -jnp.log(1 - outputs))
        return jnp.mean(errors)

    def evaluate(params):
        return {"accuracy": jnp.mean(scores(params, X_test).argmax(1) == y_test)}

    train = nnlearn.make_train(
        average_cross_entropy,
        lambda hp: nnlearn.sgd(hp["alpha"]),
        nnlearn.shuffled((X_train, y_train), 31, remainder="drop"),
        init,
        steps=400,
        evaluate=evaluate,
        check_every=40,
    )
    return Case(train, {"alpha": 0.1 if mended else 0.01}, scores, (X_test, y_test), "accuracy")
