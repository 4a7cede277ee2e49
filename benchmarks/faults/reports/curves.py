"""Tables and curves: regression and classification with small dense networks."""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://qa.1r1g.com/sf/ask/3361946101 (StackOverflow): tf.reduce_sum of the squares of 100 points cannot be "
    "optimised, the loss grows; with tf.reduce_mean it works",
    "wrong_axis_or_reduction",
    "learning_rate_too_high",
    "exploding_gradients",
)
def plane_with_reduce_sum(mended):
    rng = np.random.RandomState(0)
    x_data = np.float32(rng.rand(100, 2))
    y_data = x_data @ np.float32([0.1, 0.2]) + 0.3
    x_new = np.float32(rng.rand(40, 2))
    y_new = x_new @ np.float32([0.1, 0.2]) + 0.3

    def init(key):
        return {"W": jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0), "b": jnp.zeros(1)}

    def model(params, x):
        return x @ params["W"] + params["b"]

    def loss(params, batch, key):
        x, y = batch
        squares = jnp.square(model(params, x) - y)
        return jnp.mean(squares) if mended else jnp.sum(squares)

    def evaluate(params):
        return {"mse": jnp.mean((model(params, x_new) - y_new) ** 2)}

    batches = nnlearn.shuffled((x_data, y_data), 100, remainder="drop")
    train = nnlearn.make_train(
        loss, lambda hp: optax.sgd(hp["lr"]), batches, init, steps=201, evaluate=evaluate, check_every=20
    )
    return Case(train, {"lr": 0.5 if mended else 0.01}, model, (x_new, y_new), "mse", mode="min")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/46995209: toy model to fit a sine fails; inputs from 0 to 1000 into tanh "
    "layers, the answer standardises them",
    "unnormalised_inputs",
    "saturated_activations",
)
def sine_of_0_to_1000(mended):
    x = np.arange(1000, dtype=np.float64)[:, None]
    y = np.sin(x[:, 0] * 2 * np.pi / 400)
    if mended:
        x = (x - x.mean()) / x.std()
    test = np.random.RandomState(3).rand(1000) < 0.2
    train_set, test_set = (x[~test], y[~test]), (x[test], y[test])

    def init(key):
        return eqx.filter(eqx.nn.MLP(1, "scalar", 20, 3, jnp.tanh, key=key), eqx.is_array)

    static = eqx.filter(eqx.nn.MLP(1, "scalar", 20, 3, jnp.tanh, key=jax.random.key(0)), eqx.is_array, inverse=True)

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def mse(params, batch, key):
        return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)

    def metrics(params, batch):
        x, y = batch.examples
        return {"mse": jnp.mean((predict(params, x) - y) ** 2, where=batch.where)}

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.adam(hp["learning_rate"]),
        nnlearn.shuffled(train_set, 50, remainder="drop"),
        init,
        epochs=120,
        evaluate=nnlearn.evaluation(metrics, test_set),
        check_every=160,
    )
    return Case(train, {"learning_rate": 0.003}, predict, test_set, "mse", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/19365: sin(0), sin(1), ..., sin(99) with ten sigmoids, a sigmoid "
    "as output and ten epochs of SGD",
    "loss_output_mismatch",
    "underfitting",
    "unnormalised_inputs",
)
def sinus_with_sigmoid_output(mended):
    x = np.arange(200).reshape(-1, 1) / 50 if mended else np.arange(100).reshape(-1, 1).astype(float)
    y = np.sin(x)

    class Sinus(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(40 if mended else 10, kernel_init=nn.initializers.glorot_uniform())(x)
            x = nn.sigmoid(x)
            if mended:
                x = nn.sigmoid(nn.Dense(12, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())(x)
            return x if mended else nn.sigmoid(x)

    model = Sinus()

    def loss_fn(params, batch, key):
        return jnp.mean(optax.squared_error(model.apply(params, batch["x"]), batch["y"]))

    def evaluate(params):
        return {"mse": jnp.mean((model.apply(params, x) - y) ** 2)}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]) if mended else optax.sgd(hp["lr"]),
        nnlearn.shuffled({"x": x, "y": y}, 8 if mended else 1, remainder="drop"),
        lambda key: model.init(key, x[:1]),
        epochs=100 if mended else 10,
        evaluate=evaluate,
        check_every=250 if mended else 100,
    )
    return Case(train, {"lr": 0.01}, model.apply, (x, y), "mse", mode="min")


@report(
    REPORTS,
    "https://offlinew.com/q/q/4098171066 (StackOverflow): MNIST with tanh everywhere, mse and targets 1 and -1; after "
    "the first epoch the accuracy stays where it is",
    "saturated_activations",
    "bad_initialisation",
)
def digits_with_tanh_and_mse(mended):
    mnist = load("mnist", seed=2)
    train_x, test_x = (part.inputs.reshape(-1, 784) for part in (mnist.train, mnist.validation))
    train_y = 2 * np.eye(10)[mnist.train.targets] - 1
    sizes = [784, 48, 10]

    def init(key):
        weights = []
        for n_in, n_out in itertools.pairwise(sizes):
            key, sub = jax.random.split(key)
            w = jax.random.normal(sub, (n_in, n_out))
            weights.append((w / np.sqrt(n_in) if mended else w, jnp.zeros(n_out)))
        return weights

    def feedforward(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b)
        return x

    def cost(params, batch, key):
        return jnp.mean(jnp.sum((feedforward(params, batch[0]) - batch[1]) ** 2, axis=1))

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(feedforward(params, x).argmax(1) == y, where=batch.where)}

    train = nnlearn.make_train(
        cost,
        lambda hp: nnlearn.sgd(hp["eta"]),
        nnlearn.shuffled((train_x, train_y), 50, remainder="drop"),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(accuracy, (test_x, mnist.validation.targets)),
    )
    return Case(train, {"eta": 0.03}, feedforward, (test_x, mnist.validation.targets), "accuracy")


@report(
    REPORTS,
    "https://github.com/georgymh/ml-fraud-detection/issues/1: SMOTE before the split into training and test sets leaks "
    "the test set, hence the magical F1 score",
    "leaky_validation",
)
def smote_before_the_split(mended):
    rng = np.random.RandomState(1)
    X, y = make_classification(
        3000, 12, n_informative=6, n_redundant=0, weights=[0.93], class_sep=1.6, flip_y=0.02, random_state=7
    )

    def smote(X, y):
        rare = X[y == 1]
        missing = int(np.sum(y == 0) - len(rare))
        first = rng.randint(len(rare), size=missing)
        distance = np.linalg.norm(rare[:, None] - rare[None], axis=2)
        neighbour = np.argsort(distance, axis=1)[first, rng.randint(1, 6, size=missing)]
        new = rare[first] + rng.rand(missing, 1) * (rare[neighbour] - rare[first])
        return np.concatenate([X, new]), np.concatenate([y, np.ones(missing, int)])

    if mended:
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
        X_train, y_train = smote(X_train, y_train)
    else:
        X, y = smote(X, y)
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    scaler = StandardScaler().fit(X_train)
    X_train, X_test = scaler.transform(X_train), scaler.transform(X_test)

    hidden = 16 if mended else 64

    def init(key):
        k1, k2 = jax.random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"w1": he(k1, (12, hidden)), "b1": jnp.zeros(hidden), "w2": he(k2, (hidden, 1)), "b2": jnp.zeros(1)}

    def logits(p, x):
        return (jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])[:, 0]

    def loss(p, batch, key):
        return optax.sigmoid_binary_cross_entropy(logits(p, batch[0]), batch[1]).mean()

    def evaluate(p):
        said = logits(p, X_test) > 0
        found, false = jnp.sum(said & (y_test == 1)), jnp.sum(said & (y_test == 0))
        recall, specificity = found / np.sum(y_test == 1), 1 - false / np.sum(y_test == 0)
        return {"loss": loss(p, (X_test, y_test), None), "balanced_accuracy": (recall + specificity) / 2}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=hp["decay"]),
        nnlearn.shuffled((X_train, y_train), 64, remainder="drop"),
        init,
        epochs=12 if mended else 40,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003, "decay": 0.01}, logits, (X_test, y_test), "balanced_accuracy")


@report(
    REPORTS,
    "https://github.com/deepchem/deepchem/issues/1175 (and keras#3893): labels of a multitask table that were never "
    "measured are filled with zeros, and count as zeros in the loss",
    "mask_ignored",
    "label_noise",
)
def assays_not_measured(mended):
    rng = np.random.RandomState(5)
    molecules = rng.binomial(1, 0.3, (2400, 60)).astype(np.float32)
    truth = (molecules - 0.3) @ rng.normal(size=(60, 6)) + 0.3 * rng.normal(size=(2400, 6)) > 0
    measured = rng.rand(2400, 6) < 0.3  # a molecule takes part in few assays
    table = np.where(measured, truth, np.nan)
    weights = (~np.isnan(table)).astype(np.float32)
    labels = np.nan_to_num(table).astype(np.float32)
    train_set = {"fp": molecules[:1900], "labels": labels[:1900], "w": weights[:1900]}
    test_set = {"fp": molecules[1900:], "labels": labels[1900:], "w": weights[1900:]}

    def init(key):
        k1, k2 = jax.random.split(key)
        glorot = jax.nn.initializers.glorot_normal()
        return {"W": glorot(k1, (60, 32)), "b": jnp.zeros(32), "V": glorot(k2, (32, 6)), "c": jnp.zeros(6)}

    def apply(params, fp):
        return jax.nn.relu(fp @ params["W"] + params["b"]) @ params["V"] + params["c"]

    def loss_fn(params, batch, key):
        each = optax.sigmoid_binary_cross_entropy(apply(params, batch["fp"]), batch["labels"])
        if mended:
            return jnp.sum(each * batch["w"]) / jnp.sum(batch["w"])
        return jnp.mean(each)

    def evaluate(params):
        right = (apply(params, test_set["fp"]) > 0) == (test_set["labels"] > 0.5)
        return {"accuracy": jnp.sum(right * test_set["w"]) / jnp.sum(test_set["w"])}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["rate"]),
        nnlearn.shuffled(train_set, 50, remainder="drop"),
        init,
        epochs=10,
        evaluate=evaluate,
    )
    return Case(train, {"rate": 0.003}, None, None, "accuracy")
