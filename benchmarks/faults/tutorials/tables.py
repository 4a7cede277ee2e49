"""Healthy programs of tutorials on tables: imbalanced classes, quantiles, survival, ranks, recommendations, margins."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_diabetes, make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://www.tensorflow.org/tutorials/structured_data/imbalanced_data class weights and initial bias: healthy",
)
def fraud_class_weights(mended):
    features, labels = make_classification(
        12000, 12, n_informative=6, weights=[0.95], class_sep=1.4, flip_y=0.005, random_state=11
    )
    train_x, test_x, train_y, test_y = train_test_split(features, labels, stratify=labels, random_state=1)
    scaler = StandardScaler().fit(train_x)
    train_x, test_x = np.clip(scaler.transform(train_x), -5, 5), np.clip(scaler.transform(test_x), -5, 5)
    neg, pos = np.bincount(train_y)
    total = neg + pos
    class_weight = jnp.array([total / neg / 2, total / pos / 2])

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, training=False):
            x = nn.relu(nn.Dense(16)(x))
            x = nn.Dropout(0.3, deterministic=not training)(x)
            return nn.Dense(1)(x)[:, 0]

    network = Network()

    def loss(params, batch, key):
        x, y = batch
        logits = network.apply(params, x, True, rngs={"dropout": key})
        return jnp.mean(class_weight[y] * optax.sigmoid_binary_cross_entropy(logits, y))

    def metrics(params, batch):
        x, y = batch.examples
        logits = network.apply(params, x)
        positive = logits > 0
        recall = jnp.sum(positive & (y == 1)) / jnp.sum(y == 1)
        specificity = jnp.sum(~positive & (y == 0)) / jnp.sum(y == 0)
        return {
            "loss": jnp.mean(class_weight[y] * optax.sigmoid_binary_cross_entropy(logits, y)),
            "balanced_accuracy": (recall + specificity) / 2,
        }

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["learning_rate"]),
        nnlearn.shuffled((train_x.astype("float32"), train_y), 256, remainder="drop"),
        lambda key: network.init(key, train_x[:1]),
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, (test_x.astype("float32"), test_y)),
    )

    def predict(params, x, key=None):
        if key is None:
            return network.apply(params, x)
        return network.apply(params, x, True, rngs={"dropout": key})

    return Case(train, {"learning_rate": 3e-3}, predict, (test_x.astype("float32"), test_y), "balanced_accuracy")


@report(REPORTS, "https://scikit-learn.org/stable/auto_examples/linear_model/plot_ols_ridge.html: healthy")
def diabetes_noisy_targets(mended):
    x, y = load_diabetes(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=42)
    x_mean, x_std, y_mean, y_std = x_train.mean(0), x_train.std(0), y_train.mean(), y_train.std()
    x_train, x_test = (x_train - x_mean) / x_std, (x_test - x_mean) / x_std
    y_train, y_test = (y_train - y_mean) / y_std, (y_test - y_mean) / y_std

    def init(key):
        return {"w": jnp.zeros(10), "b": jnp.zeros(())}

    def model(params, x):
        return x @ params["w"] + params["b"]

    def ridge(params, batch, key, alpha=0.01):
        x, y = batch
        return jnp.mean((model(params, x) - y) ** 2) + alpha * jnp.sum(params["w"] ** 2)

    def score(params, batch):
        x, y = batch.examples
        residual = jnp.sum((y - model(params, x)) ** 2, where=batch.where)
        return {"r2": 1 - residual / jnp.sum((y - jnp.mean(y, where=batch.where)) ** 2, where=batch.where)}

    train = nnlearn.make_train(
        ridge,
        lambda hparams: optax.sgd(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=50,
        evaluate=nnlearn.evaluation(score, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.02}, model, (x_test, y_test), "r2")


@report(REPORTS, "https://keras.io/examples/structured_data/collaborative_filtering_movielens/: healthy")
def recommender_embeddings(mended):
    rng = np.random.default_rng(8)
    num_users, num_movies, embedding_size = 300, 200, 8
    taste, kind = rng.normal(size=(num_users, 4)), rng.normal(size=(num_movies, 4))
    quality, generosity = rng.normal(size=num_movies), rng.normal(size=num_users)
    user, movie = rng.integers(num_users, size=20000), rng.integers(num_movies, size=20000)
    score = 3.3 + 0.5 * quality[movie] + 0.4 * generosity[user] + 0.35 * np.sum(taste[user] * kind[movie], -1)
    rating = np.clip(np.round(score + 0.5 * rng.normal(size=20000)), 1, 5)
    target = ((rating - 1) / 4).astype(np.float32)
    pairs = np.stack([user, movie], axis=1)

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "user": 0.1 * jax.random.normal(k1, (num_users, embedding_size)),
            "movie": 0.1 * jax.random.normal(k2, (num_movies, embedding_size)),
            "user_bias": jnp.zeros(num_users),
            "movie_bias": jnp.zeros(num_movies),
            "bias": jnp.zeros(()),
        }

    def logits(params, pairs):
        u, m = pairs[:, 0], pairs[:, 1]
        dot = jnp.einsum("bd,bd->b", params["user"][u], params["movie"][m])
        return dot + params["user_bias"][u] + params["movie_bias"][m] + params["bias"]

    def recommend(params, pairs):
        return jax.nn.sigmoid(logits(params, pairs))

    def loss(params, batch, key):
        pairs, y = batch
        return optax.sigmoid_binary_cross_entropy(logits(params, pairs), y).mean()

    def evaluate(params, batch):
        pairs, y = batch.examples
        error = 4 * (recommend(params, pairs) - y)
        return {"rmse_stars": jnp.sqrt(jnp.mean(error**2, where=batch.where))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["rate"], weight_decay=hparams["decay"]),
        nnlearn.shuffled((pairs[:18000], target[:18000]), 250, remainder="error"),
        init,
        epochs=8,
        evaluate=nnlearn.evaluation(evaluate, (pairs[18000:], target[18000:])),
    )
    return Case(train, {"rate": 0.01, "decay": 0.1}, recommend, (pairs[18000:], target[18000:]), "rmse_stars", "min")


@report(REPORTS, "https://scikit-learn.org/stable/auto_examples/linear_model/plot_quantile_regression.html: healthy")
def pinball_three_quantiles(mended):
    quantiles = jnp.array([0.05, 0.5, 0.95])

    def draw(key, n=128):
        kx, kn = jax.random.split(key)
        x = jax.random.uniform(kx, (n, 1), minval=0.0, maxval=10.0)
        sd = 0.5 + 0.15 * x
        return x / 5 - 1, (jnp.sin(x) + sd * jax.random.normal(kn, (n, 1)))[:, 0]

    x_val, y_val = draw(jax.random.key(99), 2000)

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(64)(x))
            x = nn.gelu(nn.Dense(64)(x))
            return nn.Dense(3)(x)

    mlp = Mlp()

    def pinball(prediction, y):
        diff = y[:, None] - prediction
        return jnp.maximum(quantiles * diff, (quantiles - 1) * diff).sum(-1)

    def loss_fn(params, batch, key):
        x, y = batch
        return pinball(mlp.apply(params, x), y).mean()

    def coverage(params):
        prediction = mlp.apply(params, x_val)
        inside = (y_val > prediction[:, 0]) & (y_val < prediction[:, 2])
        return {"pinball": pinball(prediction, y_val).mean(), "coverage": inside.mean()}

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: nnlearn.adam(nnlearn.cosine_decay_schedule(hparams["lr"], 1500)),
        nnlearn.generated(lambda key, step: draw(key)),
        lambda key: mlp.init(key, jnp.zeros((1, 1))),
        steps=1500,
        check_every=150,
        evaluate=coverage,
    )
    return Case(train, {"lr": 5e-3}, mlp.apply, (x_val, y_val), "pinball", "min")


@report(REPORTS, "https://github.com/havakv/pycox Cox proportional hazards with a network: healthy")
def cox_partial_likelihood(mended):
    rng = np.random.default_rng(21)
    covariates = rng.normal(size=(1600, 8)).astype(np.float32)
    risk = 0.9 * covariates[:, 0] - 0.7 * covariates[:, 1] + 0.6 * covariates[:, 2] ** 2
    lifetime = rng.exponential(np.exp(-risk))
    censoring = rng.exponential(2.0, size=1600)
    duration, event = np.minimum(lifetime, censoring).astype(np.float32), lifetime <= censoring
    data = {"x": covariates, "t": duration, "e": event}
    train_set, test_set = ({k: v[:1280] for k, v in data.items()}, {k: v[1280:] for k, v in data.items()})

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32)(x))
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(1, use_bias=False)(x).squeeze(-1)

    net = Net()

    def cox_ph_loss(params, batch, key):
        order = jnp.argsort(-batch["t"])
        log_h, events = net.apply(params, batch["x"])[order], batch["e"][order]
        log_cumsum_h = jax.lax.cumlogsumexp(log_h)
        return -jnp.sum((log_h - log_cumsum_h) * events) / jnp.sum(events)

    def concordance(params):
        log_h, t, e = net.apply(params, test_set["x"]), test_set["t"], test_set["e"]
        comparable = (t[:, None] < t[None, :]) & e[:, None]
        return {"c_index": jnp.sum(comparable & (log_h[:, None] > log_h[None, :])) / jnp.sum(comparable)}

    train = nnlearn.make_train(
        cox_ph_loss,
        lambda hparams: optax.adamw(hparams["lr"], weight_decay=0.01),
        nnlearn.shuffled(train_set, 128, remainder="drop"),
        lambda key: net.init(key, covariates[:1]),
        epochs=20,
        evaluate=concordance,
    )
    return Case(train, {"lr": 5e-3}, None, None, "c_index")


@report(REPORTS, "https://github.com/Raschka-research-group/coral-cnn ordinal regression: healthy")
def ordinal_coral_levels(mended):
    x, progression = load_diabetes(return_X_y=True)
    grade = np.digitize(progression, np.quantile(progression, [0.25, 0.5, 0.75]))  # 0, 1, 2, 3
    levels = (grade[:, None] > np.arange(3)).astype(np.int8)
    x = StandardScaler().fit_transform(x).astype(np.float32)
    x_train, x_test, y_train, y_test, g_train, g_test = train_test_split(
        x, levels, grade, test_size=0.3, random_state=5
    )

    def init(key):
        k1, k2 = jax.random.split(key)
        return {
            "hidden": {"w": jax.random.normal(k1, (10, 8)) * (1 / 10) ** 0.5, "b": jnp.zeros(8)},
            "score": jax.random.normal(k2, (8,)) * (1 / 8) ** 0.5,
            "cuts": jnp.array([1.0, 0.0, -1.0]),
        }

    def forward(params, x):
        h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return (h @ params["score"])[:, None] + params["cuts"]

    def coral_loss(params, batch, key):
        x, levels = batch
        logits = forward(params, x)
        return -jnp.mean(
            jnp.sum(jax.nn.log_sigmoid(logits) * levels + (jax.nn.log_sigmoid(logits) - logits) * (1 - levels), axis=1)
        )

    def test_mae(params):
        return {"mae": jnp.mean(jnp.abs(jnp.sum(forward(params, x_test) > 0, axis=1) - g_test))}

    train = nnlearn.make_train(
        coral_loss,
        lambda hparams: nnlearn.adamw(hparams["rate"], weight_decay=0.1),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=25,
        evaluate=test_mae,
    )
    return Case(train, {"rate": 0.005}, forward, (x_test, y_test), "mae", "min")


@report(REPORTS, "https://scikit-learn.org/stable/modules/sgd.html linear SVM by SGD: healthy")
def svm_hinge_breast_cancer(mended):
    x, target = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, 2 * target - 1, stratify=target, random_state=0)
    scaler = StandardScaler().fit(x_train)
    x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)

    def decision(params, x):
        return x @ params["coef"] + params["intercept"]

    def objective(params, batch, key):
        x, y = batch.examples
        hinge = jnp.maximum(0.0, 1.0 - y * decision(params, x))
        return jnp.mean(hinge, where=batch.where) + 0.5 * 1e-2 * jnp.vdot(params["coef"], params["coef"])

    def accuracy(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(jnp.sign(decision(params, x)) == y, where=batch.where)}

    train = nnlearn.make_train(
        objective,
        lambda hparams: nnlearn.sgd(nnlearn.polynomial_schedule(hparams["eta0"], 0.0, 1.0, 600)),
        nnlearn.shuffled((x_train, y_train), 16),
        {"coef": jnp.zeros(30), "intercept": jnp.zeros(())},
        steps=600,
        check_every=27,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"eta0": 0.02}, decision, (x_test, y_test), "accuracy")
