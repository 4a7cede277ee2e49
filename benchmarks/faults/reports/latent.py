"""Latent variables: autoencoders, codes and mixtures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/keras-team/keras/pull/3383 (issue 3373): "
    "a mean over pixels against a summed KL divergence: every image is the same",
    "wrong_axis_or_reduction",
    "excessive_regularisation",
)
def vae_mean_of_pixels(mended):
    x = datasets.load_digits().data.astype(np.float32) / 16
    x_train, x_test = x[:1500], x[1500:]
    original_dim, intermediate_dim, latent_dim = 64, 96, 6

    def dense(key, n, m):
        return {"w": jax.random.normal(key, (n, m)) / np.sqrt(n), "b": jnp.zeros(m)}

    def init(key):
        k = jax.random.split(key, 5)
        return {
            "h": dense(k[0], original_dim, intermediate_dim),
            "z_mean": dense(k[1], intermediate_dim, latent_dim),
            "z_log_var": dense(k[2], intermediate_dim, latent_dim),
            "decoder_h": dense(k[3], latent_dim, intermediate_dim),
            "decoder_mean": dense(k[4], intermediate_dim, original_dim),
        }

    def layer(p, x):
        return x @ p["w"] + p["b"]

    def encode(params, x):
        h = jax.nn.relu(layer(params["h"], x))
        return layer(params["z_mean"], h), layer(params["z_log_var"], h)

    def decode(params, z):
        return layer(params["decoder_mean"], jax.nn.relu(layer(params["decoder_h"], z)))

    def vae_loss(params, batch, key):
        z_mean, z_log_var = encode(params, batch)
        z = z_mean + jnp.exp(z_log_var / 2) * jax.random.normal(key, z_mean.shape)
        xent_loss = jnp.mean(optax.sigmoid_binary_cross_entropy(decode(params, z), batch), axis=-1)
        if mended:
            xent_loss = original_dim * xent_loss
        kl_loss = -0.5 * jnp.sum(1 + z_log_var - z_mean**2 - jnp.exp(z_log_var), axis=-1)
        return jnp.mean(xent_loss + kl_loss), {"xent": xent_loss.mean(), "kl": kl_loss.mean()}

    def reconstruct(params, x):
        return jax.nn.sigmoid(decode(params, encode(params, x)[0]))

    def evaluate(params):
        return {"mse": jnp.mean((reconstruct(params, x_test) - x_test) ** 2)}

    train = nnlearn.make_train(
        vae_loss,
        lambda hparams: nnlearn.rmsprop(hparams["rate"]),
        nnlearn.shuffled(x_train, 100, remainder="drop"),
        init,
        epochs=60,
        evaluate=evaluate,
        check_every=150,
    )
    return Case(train, {"rate": 0.001}, reconstruct, (x_test, x_test), "mse", "min")


@report(
    REPORTS,
    "https://github.com/zalandoresearch/pytorch-vq-vae/issues/6 and https://github.com/Biohub/esm/issues/92: "
    "only the codes go to the decoder: no gradient reaches the encoder",
    "blocked_gradient",
    "frozen_parameters",
)
def vqvae_without_straight_through(mended):
    images = datasets.load_digits().images.reshape(-1, 64) / 16.0
    x_train, x_test = images[:1500], images[1500:]
    slots, dim, codes = 8, 4, 32

    def linear(key, n, m):
        return {"w": jax.random.normal(key, (n, m)) * np.sqrt(1.5 / n), "b": jnp.zeros(m)}

    def init(key):
        ks = jax.random.split(key, 5)
        return {
            "enc": [linear(ks[0], 64, 128), linear(ks[1], 128, slots * dim)],
            "dec": [linear(ks[2], slots * dim, 128), linear(ks[3], 128, 64)],
            "codebook": jax.random.uniform(ks[4], (codes, dim), minval=-1, maxval=1),
        }

    def mlp(layers, x):
        x = jax.nn.relu(x @ layers[0]["w"] + layers[0]["b"])
        return x @ layers[1]["w"] + layers[1]["b"]

    def quantize(codebook, z):
        distance = jnp.sum((z[..., None, :] - codebook) ** 2, -1)
        return codebook[jnp.argmin(distance, -1)]

    def forward(p, x):
        z_e = mlp(p["enc"], x).reshape(-1, slots, dim)
        z_q = quantize(p["codebook"], z_e)
        quantized = z_e + jax.lax.stop_gradient(z_q - z_e) if mended else z_q
        return mlp(p["dec"], quantized.reshape(-1, slots * dim)), z_e, z_q

    def loss(p, x, key):
        recon, z_e, z_q = forward(p, x)
        recon_loss = jnp.mean((recon - x) ** 2) / 0.09  # the variance of the data
        codebook_loss = jnp.mean((z_q - jax.lax.stop_gradient(z_e)) ** 2)
        total = recon_loss + codebook_loss
        if mended:
            total += 0.25 * jnp.mean((z_e - jax.lax.stop_gradient(z_q)) ** 2)
        return total, {"recon": recon_loss, "codebook": codebook_loss}

    def predict(p, x):
        return forward(p, x)[0]

    train = nnlearn.make_train(
        loss,
        optax.adam(2e-3),
        nnlearn.shuffled(x_train, 100, remainder="drop"),
        init,
        steps=700,
        evaluate=lambda p: {"recon_mse": jnp.mean((predict(p, x_test) - x_test) ** 2)},
        check_every=100,
    )
    return Case(train, {}, predict, (x_test, x_test), "recon_mse", "min")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/52441877: "
    "sigmoid and binary cross-entropy on standardised data: a negative loss; answer: linear output, squared error",
    "loss_output_mismatch",
    "unnormalised_targets",
    "preprocessing_mismatch",
)
def autoencoder_negative_crossentropy(mended):
    table = datasets.load_breast_cancer().data
    mean, std = table[:450].mean(0), table[:450].std(0)
    table = (table - mean) / std
    x_train, x_test = table[:450], table[450:]

    class AutoEncoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.elu(nn.Dense(20)(x))
            code = nn.Dense(6)(x)
            x = nn.elu(nn.Dense(20)(code))
            return nn.Dense(30)(x) if mended else nn.sigmoid(nn.Dense(30)(x))

    net = AutoEncoder()

    def binary_crossentropy(target, output):
        output = jnp.clip(output, 1e-7, 1 - 1e-7)
        return -jnp.mean(target * jnp.log(output) + (1 - target) * jnp.log(1 - output))

    def loss(params, x, key):
        if not mended:
            return binary_crossentropy(x, net.apply(params, x))
        return nnlearn.mean_squared_error(net.apply(params, x), x)

    train = nnlearn.make_train(
        loss,
        optax.adam(3e-3),
        nnlearn.shuffled(x_train, 50, remainder="drop"),
        lambda key: net.init(key, x_train[:1]),
        epochs=80,
        evaluate=lambda params: {"mse": jnp.mean((net.apply(params, x_test) - x_test) ** 2)},
        check_every=90,
    )
    return Case(train, {}, net.apply, (x_test, x_test), "mse", "min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/1061 and 2586: "
    "mixture density network: the likelihood underflows, NaN after a few batches",
    "numerical_precision",
)
def mdn_underflow(mended):
    table = datasets.load_breast_cancer().data
    table = (table - table.mean(0)) / table.std(0)
    x, y = table[:, :10], table[:, 10:]  # the means; their errors and the worst values, with long tails
    x_train, x_test, t_train, t_test = train_test_split(x, y, test_size=0.25, random_state=1)
    k, d = 3, 20

    def init(key):
        a, b = jax.random.split(key)
        return dict(
            w1=jax.random.normal(a, (10, 32)) / np.sqrt(10),
            b1=jnp.zeros(32),
            w2=jax.random.normal(b, (32, k * (d + 2))) * 0.05,
            b2=jnp.zeros(k * (d + 2)),
        )

    def get_mixture_coef(params, x):
        out = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        means = out[:, : k * d].reshape(-1, k, d)
        return jax.nn.softmax(out[:, k * (d + 1) :]), jnp.exp(out[:, k * d : k * (d + 1)]), means

    def nll(params, x, t):
        pi, sigma, mu = get_mixture_coef(params, x)
        square = jnp.sum((t[:, None] - mu) ** 2, axis=-1)
        if not mended:
            normal = jnp.exp(-square / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi)) ** d
            return jnp.mean(-jnp.log(jnp.sum(normal * pi, axis=1)))
        log_normal = -square / (2 * sigma**2) - d * jnp.log(sigma * np.sqrt(2 * np.pi))
        return -jnp.mean(jax.scipy.special.logsumexp(log_normal + jnp.log(pi + 1e-10), axis=1))

    train = nnlearn.make_train(
        lambda params, batch, key: nll(params, *batch),
        optax.adam(2e-3),
        nnlearn.shuffled((x_train, t_train), 71, remainder="error"),
        init,
        epochs=40,
        evaluate=lambda params: {"nll": nll(params, x_test, t_test)},
        check_every=24,
    )

    def predict(params, x):
        pi, sigma, mu = get_mixture_coef(params, x)
        return jnp.sum(pi[..., None] * mu, axis=1)

    return Case(train, {}, predict, (x_test, t_test), "nll", "min")


@report(
    REPORTS,
    "PyTorch forum and StackOverflow, Gaussian mixture by gradient descent: "
    "all components start at the mean of the data and stay equal; answer: start at random points",
    "symmetric_initialisation",
    "bad_initialisation",
)
def gaussian_mixture_equal_means(mended):
    points, _ = datasets.make_blobs(900, centers=[[0, 0], [4, 1], [1, 5], [5, 5]], cluster_std=0.7, random_state=4)
    points = (points - points.min(0)) / (points.max(0) - points.min(0))  # so densities are above 1
    x_train, x_test = points[:700], points[700:]
    k = 4

    def init(key):
        means = jnp.tile(jnp.asarray(x_train.mean(0), jnp.float32), (k, 1))
        if mended:
            means = jnp.asarray(x_train, jnp.float32)[jax.random.choice(key, 700, (k,), replace=False)]
        return {"logits": jnp.zeros(k), "means": means, "log_scale": jnp.full((k, 2), -1.5)}

    def log_prob(p, x):
        z = (x[:, None] - p["means"]) / jnp.exp(p["log_scale"])
        component = -0.5 * jnp.sum(z**2, -1) - jnp.sum(p["log_scale"], -1) - jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(component + jax.nn.log_softmax(p["logits"]), axis=1)

    train = nnlearn.make_train(
        lambda p, x, key: -log_prob(p, x).mean(),
        nnlearn.adam(1e-2),
        nnlearn.shuffled(x_train, 100, remainder="drop"),
        init,
        epochs=150,
        evaluate=lambda p: {"nll": -log_prob(p, x_test).mean()},
        check_every=70,
    )
    return Case(train, {}, None, None, "nll", "min")
