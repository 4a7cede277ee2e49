"""Healthy programs of tutorials: graphs, diffusion, physics, plateaus, accumulation, Gaussian processes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits, load_wine, make_moons
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://pytorch-geometric.readthedocs.io/en/latest/get_started/colabs.html GCN on a graph: healthy")
def graph_convolution_two_layers(mended):
    rng = np.random.default_rng(17)
    nodes, classes = 600, 4
    y = rng.integers(classes, size=nodes)
    chance = np.where(y[:, None] == y, 0.02, 0.003)
    edges = np.triu(rng.random((nodes, nodes)) < chance, 1)
    adjacency = (edges + edges.T + np.eye(nodes)).astype(np.float32)
    degree = adjacency.sum(1) ** -0.5
    a_hat = jnp.asarray(degree[:, None] * adjacency * degree)
    x = rng.normal(size=(nodes, 16)).astype(np.float32)
    x[np.arange(nodes), y] += 1.0
    order = rng.permutation(nodes)
    train_mask, test_mask = np.zeros(nodes, bool), np.zeros(nodes, bool)
    train_mask[order[:200]], test_mask[order[300:]] = True, True

    class GCN(nn.Module):
        @nn.compact
        def __call__(self, x, training=False):
            x = nn.relu(a_hat @ nn.Dense(16)(x))
            x = nn.Dropout(0.5, deterministic=not training)(x)
            return a_hat @ nn.Dense(classes)(x)

    gcn = GCN()

    def loss(params, batch, key):
        out = gcn.apply(params, x, True, rngs={"dropout": key})
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y), where=train_mask)

    def test(params):
        out = gcn.apply(params, x)
        nll = optax.softmax_cross_entropy_with_integer_labels(out, y)
        right = out.argmax(1) == y
        return {"test_loss": jnp.mean(nll, where=test_mask), "test_accuracy": jnp.mean(right, where=test_mask)}

    def make_tx(hparams):
        return optax.chain(optax.add_decayed_weights(5e-4), optax.adam(hparams["lr"]))

    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.generated(lambda key, step: step),  # the whole graph at every step
        lambda key: gcn.init(key, x),
        steps=100,
        check_every=10,
        evaluate=test,
    )
    return Case(train, {"lr": 0.01}, None, None, "test_accuracy")


@report(REPORTS, "https://huggingface.co/blog/annotated-diffusion noise prediction, on two moons: healthy")
def diffusion_two_moons(mended):
    points = make_moons(4000, noise=0.05, random_state=0)[0]
    points = ((points - points.mean(0)) / points.std(0)).astype(np.float32)
    timesteps = 100
    alphas_cumprod = jnp.cumprod(1.0 - jnp.linspace(1e-4, 0.07, timesteps))

    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            angle = t[:, None] / timesteps * jnp.pi * 2.0 ** jnp.arange(4)
            h = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)
            for _ in range(3):
                h = nn.silu(nn.Dense(96)(h))
            return nn.Dense(2)(h)

    denoiser = Denoiser()

    def p_losses(params, x_start, key):
        t_key, noise_key = random.split(key)
        t = random.randint(t_key, (len(x_start),), 0, timesteps)
        noise = random.normal(noise_key, x_start.shape)
        a = alphas_cumprod[t][:, None]
        predicted = denoiser.apply(params, jnp.sqrt(a) * x_start + jnp.sqrt(1 - a) * noise, t)
        return nnlearn.huber_loss(predicted, noise).mean()

    train = nnlearn.make_train(
        p_losses,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled(points[:3500], 125, remainder="drop"),
        lambda key: denoiser.init(key, points[:1], jnp.zeros(1)),
        epochs=50,
        check_every=140,
        evaluate=lambda params: {"val_loss": p_losses(params, jnp.tile(points[3500:], (4, 1)), random.key(5))},
    )
    return Case(train, {"lr": 1e-3}, None, None, "val_loss", "min")


@report(REPORTS, "https://github.com/benmoseley/harmonic-oscillator-pinn damped oscillator as a PINN: healthy")
def pinn_damped_oscillator(mended):
    damping, stiffness = 1.0, 20.0  # y'' + damping y' + stiffness y = 0, y(0) = 1, y'(0) = 0
    omega = (stiffness - damping**2 / 4) ** 0.5
    ts = jnp.linspace(0.0, 1.5, 64)
    exact = jnp.exp(-damping * ts / 2) * (jnp.cos(omega * ts) + damping / (2 * omega) * jnp.sin(omega * ts))

    def init(key):
        k = random.split(key, 3)
        return [
            {"w": random.normal(k[0], (1, 32)), "b": random.uniform(k[1], (32,), minval=-1, maxval=1)},
            {"w": random.normal(k[2], (32, 32)) * 32**-0.5, "b": jnp.zeros(32)},
            {"w": jnp.zeros((32, 1)), "b": jnp.zeros(1)},
        ]

    def y(params, t):
        h = t[None]
        for layer in params[:-1]:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        return (h @ params[-1]["w"] + params[-1]["b"])[0]

    def loss(params, t, key):
        dy = jax.grad(y, argnums=1)
        ddy = jax.grad(dy, argnums=1)
        residual = jax.vmap(lambda t: ddy(params, t) + damping * dy(params, t) + stiffness * y(params, t))(t)
        at_zero = (y(params, jnp.zeros(())) - 1) ** 2 + 0.1 * dy(params, jnp.zeros(())) ** 2
        return 1e-3 * jnp.mean(residual**2) + at_zero

    def error(params):
        return {"max_error": jnp.max(jnp.abs(jax.vmap(y, (None, 0))(params, ts) - exact))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(optax.exponential_decay(hparams["lr"], 1000, 0.5)),
        nnlearn.generated(lambda key, step: random.uniform(key, (48,), maxval=1.5)),
        init,
        steps=3000,
        check_every=150,
        evaluate=error,
    )
    return Case(train, {"lr": 5e-3}, None, None, "max_error", "min")


@report(
    REPORTS,
    "https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives/: healthy",
)
def label_smoothing_batch_norm_cosine(mended):
    x, y = load_digits(return_X_y=True)
    x = (x / 16 - 0.3).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=13)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            h = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            h = nn.Dense(64, use_bias=False)(nn.relu(h))
            h = nn.BatchNorm(use_running_average=not training, momentum=0.9)(h)
            h = nn.Dropout(0.1, deterministic=not training)(nn.relu(h))
            return x + nn.Dense(64)(h)

    class ResMlp(nn.Module):
        @nn.compact
        def __call__(self, x, training=False):
            x = nn.Dense(64)(x)
            for _ in range(2):
                x = Block()(x, training)
            return nn.Dense(10)(nn.relu(x))

    net = ResMlp()

    def init(key):
        variables = net.init(key, x[:2])
        return variables["params"], variables["batch_stats"]

    def loss(params, batch, key, model_state):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = net.apply(variables, batch[0], True, mutable=["batch_stats"], rngs={"dropout": key})
        soft = optax.smooth_labels(jax.nn.one_hot(batch[1], 10), 0.1)
        return optax.softmax_cross_entropy(logits, soft).mean(), {}, new["batch_stats"]

    def accuracy(params, batch, model_state):
        logits = net.apply({"params": params, "batch_stats": model_state}, batch.examples[0])
        return {"accuracy": jnp.mean(logits.argmax(-1) == batch.examples[1], where=batch.where)}

    def make_tx(hparams):
        schedule = nnlearn.warmup_cosine_decay_schedule(0.0, hparams["lr"], 44, 660)
        return nnlearn.sgd(schedule, momentum=0.9, nesterov=True)

    def with_decay(hparams):
        return nnlearn.chain(nnlearn.add_decayed_weights(5e-4), make_tx(hparams))

    train = nnlearn.make_train(
        loss,
        with_decay,
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        init,
        epochs=30,
        check_every=44,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.05}, None, None, "accuracy")


@report(REPORTS, "https://optax.readthedocs.io/en/latest/_collections/examples/gradient_accumulation.html: healthy")
def accumulated_lion_on_wine(mended):
    x, y = load_wine(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, stratify=y, test_size=0.3, random_state=3)
    mean, std = x_train.mean(axis=0), x_train.std(axis=0)
    x_train, x_test = (x_train - mean) / std, (x_test - mean) / std

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.tanh(nn.Dense(16)(x)))

    net = Net()

    def accuracy(params, batch):
        logits = net.apply(params, batch.examples[0])
        return {"accuracy": jnp.mean(logits.argmax(1) == batch.examples[1], where=batch.where)}

    train = nnlearn.make_train(
        lambda params, batch, key: nnlearn.cross_entropy(net.apply(params, batch[0]), batch[1]),
        lambda hparams: optax.MultiSteps(optax.lion(hparams["lr"]), every_k_schedule=4),
        nnlearn.shuffled((x_train, y_train), 8, remainder="drop"),
        lambda key: net.init(key, x_train[:1]),
        steps=1200,
        check_every=60,
        evaluate=nnlearn.evaluation(accuracy, (x_test, y_test)),
    )
    return Case(train, {"lr": 2e-3}, lambda params, x: net.apply(params, x), (x_test, y_test), "accuracy")


@report(REPORTS, "https://docs.jaxgaussianprocesses.com/_examples/regression/ marginal likelihood: healthy")
def gaussian_process_hyperparameters(mended):
    rng = np.random.default_rng(123)
    x = np.sort(rng.uniform(-3, 3, size=80))
    y = np.sin(4 * x) + np.cos(2 * x) + 0.3 * rng.normal(size=80)
    x_new = np.linspace(-3, 3, 101)
    y_new = np.sin(4 * x_new) + np.cos(2 * x_new)

    def kernel(params, a, b):
        lengthscale, variance = jax.nn.softplus(params["lengthscale"]), jax.nn.softplus(params["variance"])
        return variance * jnp.exp(-0.5 * ((a[:, None] - b) / lengthscale) ** 2)

    def cholesky(params, x):
        noise = jax.nn.softplus(params["obs_stddev"]) ** 2 + 1e-6
        return jnp.linalg.cholesky(kernel(params, x, x) + noise * jnp.eye(len(x)))

    def negative_mll(params, batch, key):
        x, y = batch
        chol = cholesky(params, x)
        white = jax.scipy.linalg.solve_triangular(chol, y, lower=True)
        return 0.5 * white @ white + jnp.sum(jnp.log(jnp.diag(chol))) + 0.5 * len(x) * jnp.log(2 * jnp.pi)

    def rmse(params):
        chol = cholesky(params, x)
        mean = kernel(params, x_new, x) @ jax.scipy.linalg.cho_solve((chol, True), jnp.asarray(y))
        return {"rmse": jnp.sqrt(jnp.mean((mean - y_new) ** 2))}

    raw = {"lengthscale": jnp.array(0.54), "variance": jnp.array(0.54), "obs_stddev": jnp.array(0.54)}
    train = nnlearn.make_train(
        negative_mll,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled((x.astype(np.float32), y.astype(np.float32)), 80, shuffle=False, remainder="drop"),
        raw,
        steps=300,
        check_every=20,
        evaluate=rmse,
    )
    return Case(train, {"lr": 0.02}, None, None, "rmse", "min")


@report(REPORTS, "https://arxiv.org/abs/2207.08799 parity by SGD: a plateau, then a sudden drop: healthy")
def sparse_parity_plateau(mended):
    bits = 20

    def draw(key, n=128):
        x = random.rademacher(key, (n, bits), jnp.float32)
        return x, x[:, 2] * x[:, 7] * x[:, 11]

    def init(key):
        k1, k2 = random.split(key)
        return {
            "hidden": random.uniform(k1, (bits, 100), minval=-1, maxval=1) * bits**-0.5,
            "bias": jnp.zeros(100),
            "out": random.uniform(k2, (100,), minval=-1, maxval=1) * 100**-0.5,
        }

    def net(params, x):
        return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"]

    x_val, y_val = draw(random.key(31), 2000)
    train = nnlearn.make_train(
        lambda params, batch, key: jnp.mean(nnlearn.hinge_loss(net(params, batch[0]), batch[1])),
        lambda hparams: nnlearn.sgd(hparams["lr"]),
        nnlearn.generated(lambda key, step: draw(key)),
        init,
        steps=3000,
        check_every=100,
        evaluate=lambda params: {"accuracy": jnp.mean(jnp.sign(net(params, x_val)) == y_val)},
    )
    return Case(train, {"lr": 0.1}, net, (x_val, y_val), "accuracy")
