"""Healthy programs of course notes: spirals, counts, outliers, dropout, distillation, logistic regression."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(REPORTS, "https://cs231n.github.io/neural-networks-case-study/ three spirals, full batch, rate 1: healthy")
def three_spirals_full_batch(mended):
    rng = np.random.RandomState(0)
    N, D, K = 100, 2, 3

    def spiral():
        X, y = np.zeros((N * K, D)), np.zeros(N * K, dtype="uint8")
        for j in range(K):
            r = np.linspace(0.0, 1, N)
            t = np.linspace(j * 4, (j + 1) * 4, N) + rng.randn(N) * 0.2
            X[N * j : N * (j + 1)] = np.c_[r * np.sin(t), r * np.cos(t)]
            y[N * j : N * (j + 1)] = j
        return X, y

    (X, y), (X_new, y_new) = spiral(), spiral()
    h = 100

    def init(key):
        k1, k2 = random.split(key)
        return {
            "W": 0.01 * random.normal(k1, (D, h)),
            "b": jnp.zeros((1, h)),
            "W2": 0.01 * random.normal(k2, (h, K)),
            "b2": jnp.zeros((1, K)),
        }

    def scores(p, X):
        return jnp.maximum(0, X @ p["W"] + p["b"]) @ p["W2"] + p["b2"]

    def loss(p, batch, key):
        X, y = batch
        data_loss = -jnp.mean(jax.nn.log_softmax(scores(p, X))[jnp.arange(len(y)), y])
        return data_loss + 0.5 * 1e-3 * (jnp.sum(p["W"] ** 2) + jnp.sum(p["W2"] ** 2))

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["step_size"]),
        nnlearn.generated(lambda key, step: (X, y)),
        init,
        steps=3000,
        check_every=100,
        evaluate=lambda p: {"accuracy": jnp.mean(jnp.argmax(scores(p, X_new), axis=1) == y_new)},
    )
    return Case(train, {"step_size": 1.0}, scores, (X_new, y_new), "accuracy")


@report(
    REPORTS,
    "https://scikit-learn.org/stable/auto_examples/linear_model/plot_poisson_regression_non_normal_loss.html with a "
    "network: healthy",
)
def claim_counts_with_log_link(mended):
    rng = np.random.default_rng(2)
    size = 4000
    age, power = rng.uniform(18, 80, size), rng.integers(4, 13, size)
    area = rng.integers(0, 6, size)
    exposure = rng.uniform(0.1, 1.0, size)
    rate = np.exp(-0.4 + 1.1 * (age < 26) + 0.07 * (power - 7) + 0.25 * (area - 2) - 0.3 * np.sin(age / 9))
    claims = rng.poisson(rate * exposure)
    x = np.column_stack([(age - 49) / 18, (power - 8) / 2.6, np.eye(6)[area]]).astype(np.float32)
    data = {"x": x, "log_exposure": np.log(exposure), "claims": claims}
    train_set, val_set = {k: v[:3000] for k, v in data.items()}, {k: v[3000:] for k, v in data.items()}

    class Frequency(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.softplus(nn.Dense(20)(x))
            return nn.Dense(1)(x)[:, 0]

    model = Frequency()

    def nll(params, batch, key=None):
        log_mean = model.apply(params, batch["x"]) + batch["log_exposure"]
        return jnp.mean(jnp.exp(log_mean) - batch["claims"] * log_mean)

    train = nnlearn.make_train(
        nll,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=1e-3),
        nnlearn.shuffled(train_set, 100, remainder="drop"),
        lambda key: model.init(key, x[:1]),
        epochs=12,
        evaluate=lambda params: {"nll": nll(params, val_set)},
    )
    return Case(train, {"lr": 0.005}, None, None, "nll", mode="min")


@report(
    REPORTS,
    "https://scikit-learn.org/stable/auto_examples/linear_model/plot_huber_vs_ridge.html outliers and the Huber loss, "
    "by gradient descent: healthy",
)
def line_with_outliers_huber(mended):
    rng = np.random.RandomState(0)
    X = rng.randn(240, 3)
    y = X @ np.array([2.0, -1.0, 0.5]) + 0.4 + 0.1 * rng.randn(240)
    y[:12] += rng.choice([-9.0, 9.0], 12)
    X_test = rng.randn(100, 3)
    y_test = X_test @ np.array([2.0, -1.0, 0.5]) + 0.4 + 0.1 * rng.randn(100)

    def predict(params, x):
        return x @ params["coef"] + params["intercept"]

    def loss(params, batch, key):
        x, target = batch
        return jnp.mean(nnlearn.huber_loss(predict(params, x), target, delta=0.5))

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((X, y), 40, remainder="drop"),
        lambda key: {"coef": 0.1 * random.normal(key, (3,)), "intercept": jnp.zeros(())},
        epochs=60,
        check_every=18,
        evaluate=lambda params: {"mae": jnp.mean(jnp.abs(predict(params, X_test) - y_test))},
    )
    return Case(train, {"lr": 0.03}, predict, (X_test, y_test), "mae", mode="min")


@report(
    REPORTS, "https://d2l.ai/chapter_multilayer-perceptrons/dropout.html two hidden layers with dropout, SGD: healthy"
)
def dropout_mlp_on_pictures(mended):
    mnist = load("mnist", seed=11)
    x, y = mnist.train.inputs.reshape(-1, 784), mnist.train.targets
    val = (mnist.validation.inputs.reshape(-1, 784), mnist.validation.targets)

    class DropoutMLP(nn.Module):
        @nn.compact
        def __call__(self, x, training=False):
            x = nn.relu(nn.Dense(96)(x))
            x = nn.Dropout(0.2, deterministic=not training)(x)
            x = nn.relu(nn.Dense(64)(x))
            x = nn.Dropout(0.4, deterministic=not training)(x)
            return nn.Dense(10)(x)

    net = DropoutMLP()

    def loss_fn(params, batch, key):
        logits = net.apply(params, batch[0], training=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def predict(params, x, key=None):
        return net.apply(params, x) if key is None else net.apply(params, x, training=True, rngs={"dropout": key})

    def metrics(params, batch):
        inputs, targets = batch.examples
        logits = predict(params, inputs)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return {
            "val_loss": jnp.mean(each, where=batch.where),
            "accuracy": jnp.mean(logits.argmax(-1) == targets, where=batch.where),
        }

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((x, y), 50, remainder="drop"),
        lambda key: net.init(key, x[:1]),
        epochs=12,
        evaluate=nnlearn.evaluation(metrics, val),
    )
    return Case(train, {"lr": 0.15}, predict, val, "accuracy")


@report(
    REPORTS,
    "https://keras.io/examples/vision/knowledge_distillation/ a small student of a larger teacher, digits: healthy",
)
def student_of_a_teacher(mended):
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(digits.data / 16, digits.target, test_size=0.3, random_state=0)
    teacher = MLPClassifier((128,), alpha=0.01, random_state=1)
    for _ in range(40):
        teacher.partial_fit(x_train, y_train, classes=np.arange(10))
    teacher_logits = teacher.predict_log_proba(x_train)
    teacher_logits = np.maximum(teacher_logits, -20.0)
    alpha, temperature = 0.1, 4.0

    def init(key):
        k1, k2 = random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"w1": he(k1, (64, 20)), "b1": jnp.zeros(20), "w2": he(k2, (20, 10)), "b2": jnp.zeros(10)}

    def student(p, x):
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    def loss(p, batch, key):
        x, y, t = batch
        logits = student(p, x)
        hard = nnlearn.cross_entropy(logits, y)
        log_p, log_q = jax.nn.log_softmax(t / temperature), jax.nn.log_softmax(logits / temperature)
        soft = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)) * temperature**2
        return alpha * hard + (1 - alpha) * soft, {"hard": hard, "soft": soft}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train, teacher_logits), 64, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda p: {"accuracy": jnp.mean(student(p, x_test).argmax(-1) == y_test)},
        check_every=38,
    )
    return Case(train, {"lr": 0.005}, student, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://www.tensorflow.org/guide/core/logistic_regression_core tumours, one layer written by hand: healthy",
)
def logistic_regression_of_tumours(mended):
    table = load_breast_cancer()
    x_train, x_test, y_train, y_test = train_test_split(table.data, table.target, test_size=0.25, random_state=1)
    scaler = StandardScaler().fit(x_train)
    x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)

    def probability(params, x):
        w, b = params
        return jax.nn.sigmoid(x @ w + b)

    def log_loss(params, batch, key):
        x, y = batch
        w, b = params
        logit = x @ w + b
        return jnp.mean(jnp.logaddexp(0.0, logit) - y * logit)

    train = nnlearn.make_train(
        log_loss,
        lambda hp: nnlearn.sgd(hp["learning_rate"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        lambda key: (0.1 * random.normal(key, (30,)), jnp.zeros(())),
        epochs=60,
        check_every=18,
        evaluate=lambda params: {"accuracy": jnp.mean((probability(params, x_test) > 0.5) == (y_test == 1))},
    )
    return Case(train, {"learning_rate": 0.05}, probability, (x_test, y_test), "accuracy")
