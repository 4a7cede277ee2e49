"""More healthy programs of tutorials: tables, series, agents, mixtures, and two steps at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://github.com/pytorch/examples/tree/main/time_sequence_prediction sines: healthy")
def time_sequence_prediction(mended):
    rng = np.random.default_rng(2)
    shift = rng.uniform(0, 40, size=(400, 1))
    waves = np.sin((np.arange(81) + shift) / 5).astype(np.float32)
    hidden = 32

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        bound = hidden**-0.5

        def uniform(k, *shape):
            return random.uniform(k, shape, minval=-bound, maxval=bound)

        forget = jnp.zeros(4 * hidden)
        return {
            "x": uniform(k1, 1, 4 * hidden),
            "h": uniform(k2, hidden, 4 * hidden),
            "b": forget.at[hidden : 2 * hidden].set(1.0),
            "linear": uniform(k3, hidden, 1),
        }

    def lstm(params, series):
        def cell(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x[:, None] @ params["x"] + h @ params["h"] + params["b"], 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), (h @ params["linear"])[:, 0]

        start = jnp.zeros((len(series), hidden))
        return lax.scan(cell, (start, start), series.T)[1].T

    def loss(params, batch, key):
        return jnp.mean((lstm(params, batch[:, :-1]) - batch[:, 1:]) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(hparams["lr"])),
        nnlearn.shuffled(waves[:360], 20, remainder="drop"),
        init,
        epochs=25,
        evaluate=lambda params: {"test_loss": loss(params, waves[360:], None)},
    )
    return Case(train, {"lr": 5e-3}, lstm, (waves[360:, :-1], waves[360:, 1:]), "test_loss", "min")


@report(REPORTS, "https://developers.google.com/machine-learning/crash-course logistic table: healthy")
def logistic_regression_on_tumours(mended):
    x, y = load_breast_cancer(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y.astype(np.float32), test_size=0.3, random_state=10)
    mean, std = x_train.mean(0), x_train.std(0)
    x_train, x_test = ((part - mean) / std for part in (x_train, x_test))

    def logits(params, x):
        return x.astype(jnp.float32) @ params["weights"] + params["bias"]

    def log_loss(params, batch, key):
        x, y = batch
        z = logits(params, x)
        penalty = 0.002 * jnp.sum(params["weights"] ** 2)
        return jnp.mean(jax.nn.softplus(z) - y * z) + penalty

    def metrics(params, batch):
        x, y = batch.examples
        z = logits(params, x)
        return {
            "accuracy": jnp.mean((z > 0) == (y > 0.5), where=batch.where),
            "log_loss": jnp.mean(jax.nn.softplus(z) - y * z, where=batch.where),
        }

    train = nnlearn.make_train(
        log_loss,
        lambda hparams: nnlearn.sgd(hparams["lr"], momentum=0.9),
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        {"weights": jnp.zeros(30), "bias": jnp.zeros(())},
        epochs=30,
        check_every=36,
        evaluate=nnlearn.evaluation(metrics, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.02}, logits, (x_test, y_test), "log_loss", "min")


@report(REPORTS, "https://spinningup.openai.com/en/latest/algorithms/vpg.html policy gradient, a bandit: healthy")
def policy_gradient_with_a_baseline(mended):
    arms, features = 5, 6
    secret = random.normal(random.key(123), (features, arms))

    def visits(key, n):
        k1, k2 = random.split(key)
        context = random.normal(k1, (n, features))
        return context, context @ secret + 0.5 * random.normal(k2, (n, arms))

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, context):
            actor = nn.Dense(arms)(nn.tanh(nn.Dense(32)(context)))
            critic = nn.Dense(1)(nn.tanh(nn.Dense(32)(context)))
            return jax.nn.log_softmax(actor), critic[:, 0]

    net = ActorCritic()

    def loss(params, batch, key):
        context, rewards = batch
        log_pi, value = net.apply(params, context)
        action = random.categorical(key, log_pi)[:, None]
        reward = jnp.take_along_axis(rewards, action, axis=1)[:, 0]
        advantage = lax.stop_gradient(reward - value)
        chosen = jnp.take_along_axis(log_pi, action, axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=1).mean()
        return -jnp.mean(chosen * advantage) + 0.5 * jnp.mean((reward - value) ** 2) - 0.01 * entropy

    context, rewards = visits(random.key(321), 1000)

    def evaluate(params):
        action = net.apply(params, context)[0].argmax(1)[:, None]
        mean = context @ secret
        return {"share_of_best": jnp.mean(jnp.take_along_axis(mean, action, 1)) / jnp.mean(mean.max(1))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: visits(key, 128)),
        lambda key: net.init(key, context[:1]),
        steps=800,
        check_every=80,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 3e-3}, None, None, "share_of_best")


@report(REPORTS, "https://blog.otoro.net/2015/11/24/mixture-density-networks-with-tensorflow/ : healthy")
def mixture_density_of_an_inverse_sine(mended):
    rng = np.random.default_rng(24)
    y = rng.uniform(-10.5, 10.5, size=3000)
    x = np.sin(0.75 * y) * 7 + y * 0.5 + rng.normal(size=3000)
    x, y = (x / 7).astype(np.float32)[:, None], (y / 7).astype(np.float32)
    mixtures = 16

    class MDN(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(32)(x))
            h = nn.tanh(nn.Dense(32)(h))
            pi, log_sigma, mu = jnp.split(nn.Dense(3 * mixtures)(h), 3, axis=-1)
            return jax.nn.log_softmax(pi), jnp.clip(log_sigma, -5, 3), mu

    mdn = MDN()

    def nll(params, batch, key):
        x, y = batch
        log_pi, log_sigma, mu = mdn.apply(params, x)
        z = (y[:, None] - mu) * jnp.exp(-log_sigma)
        log_normal = -0.5 * z**2 - log_sigma - 0.5 * np.log(2 * np.pi)
        return -jax.nn.logsumexp(log_pi + log_normal, axis=1).mean()

    held_out = (x[2500:], y[2500:])
    train = nnlearn.make_train(
        nll,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x[:2500], y[:2500]), 50, remainder="drop"),
        lambda key: mdn.init(key, x[:1]),
        epochs=30,
        check_every=150,
        evaluate=lambda params: {"val_nll": nll(params, held_out, None)},
    )
    return Case(train, {"lr": 3e-3}, None, None, "val_nll", "min")


@report(REPORTS, "https://keras.io/examples/timeseries/timeseries_anomaly_detection/ autoencoder: healthy")
def anomalies_by_reconstruction(mended):
    rng = np.random.default_rng(66)
    t = np.arange(64)
    day = np.sin(2 * np.pi * (t / 32 + rng.uniform(size=(1600, 1)))) * rng.uniform(0.7, 1.3, (1600, 1))
    windows = day + 0.4 * np.sin(2 * np.pi * t / 8) + 0.1 * rng.normal(size=day.shape)
    windows = ((windows - windows[:1200].mean()) / windows[:1200].std()).astype(np.float32)
    odd = windows[1400:].copy()
    odd[:, 24:40] += 1.0

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(32)(x))
            code = nn.Dense(6)(h)
            return nn.Dense(64)(nn.relu(nn.Dense(32)(code)))

    net = Autoencoder()

    def error(params, x):
        return jnp.mean((net.apply(params, x) - x) ** 2, axis=1)

    def evaluate(params):
        threshold = jnp.quantile(error(params, windows[:1200]), 0.99)
        found = jnp.mean(error(params, odd) > threshold)
        return {"val_mse": error(params, windows[1200:1400]).mean(), "found": found}

    train = nnlearn.make_train(
        lambda params, x, key: error(params, x).mean(),
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled(windows[:1200], 40, remainder="drop"),
        lambda key: net.init(key, windows[:1]),
        epochs=30,
        check_every=60,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 2e-3}, net.apply, (windows[1200:1400], windows[1200:1400]), "val_mse", "min")
