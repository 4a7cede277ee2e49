"""Healthy programs of tutorials on pictures: classifiers, autoencoders, contrastive learning, on digits."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jax.scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://flax-linen.readthedocs.io/en/latest/getting_started.html MNIST: healthy")
def annotated_mnist_cnn(mended):
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.2, random_state=7
    )

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(features=8, kernel_size=(3, 3))(x)
            x = nn.relu(x)
            x = nn.Conv(features=16, kernel_size=(3, 3))(x)
            x = nn.relu(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
            x = x.reshape((x.shape[0], -1))
            x = nn.Dense(features=64)(x)
            x = nn.relu(x)
            return nn.Dense(features=10)(x)

    cnn = CNN()

    def loss_fn(params, batch, key):
        logits = cnn.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def compute_metrics(params, batch):
        logits = cnn.apply({"params": params}, batch.examples["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.examples["label"])
        return {
            "loss": jnp.mean(loss, where=batch.where),
            "accuracy": jnp.mean(logits.argmax(-1) == batch.examples["label"], where=batch.where),
        }

    train = nnlearn.make_train(
        loss_fn,
        lambda hparams: optax.adamw(hparams["learning_rate"], hparams["momentum"]),
        nnlearn.shuffled({"image": train_images, "label": train_labels}, 32, remainder="drop"),
        lambda key: cnn.init(key, jnp.ones((1, 8, 8, 1)))["params"],
        epochs=8,
        evaluate=nnlearn.evaluation(compute_metrics, {"image": test_images, "label": test_labels}),
    )
    return Case(
        train,
        {"learning_rate": 0.002, "momentum": 0.9},
        lambda params, x: cnn.apply({"params": params}, x),
        (test_images, test_labels),
        "accuracy",
    )


@report(REPORTS, "https://docs.jax.dev/en/latest/notebooks/Neural_Network_and_Data_Loading.html: healthy")
def mlp_from_scratch(mended):
    digits = load_digits()
    order = np.random.default_rng(3).permutation(len(digits.target))
    images = digits.data.astype(np.float32)[order] / 16
    one_hot = np.array(digits.target[order][:, None] == np.arange(10), np.float32)
    n_test = 360
    layer_sizes = [64, 128, 128, 10]

    def random_layer_params(m, n, key, scale=None):
        w_key, b_key = random.split(key)
        scale = np.sqrt(2 / m)
        return scale * random.normal(w_key, (n, m)), 1e-2 * random.normal(b_key, (n,))

    def init_network_params(key):
        keys = random.split(key, len(layer_sizes))
        return [random_layer_params(m, n, k) for m, n, k in zip(layer_sizes[:-1], layer_sizes[1:], keys, strict=False)]

    def predict(params, image):
        activations = image
        for w, b in params[:-1]:
            activations = jax.nn.relu(jnp.dot(w, activations) + b)
        final_w, final_b = params[-1]
        logits = jnp.dot(final_w, activations) + final_b
        return logits - logsumexp(logits)

    batched_predict = jax.vmap(predict, in_axes=(None, 0))

    def loss(params, batch, key):
        images, targets = batch
        return -jnp.mean(jnp.sum(batched_predict(params, images) * targets, axis=1))

    def accuracy(params, batch):
        images, targets = batch.examples
        right = jnp.argmax(batched_predict(params, images), axis=1) == jnp.argmax(targets, axis=1)
        return {"accuracy": jnp.mean(right, where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.sgd(hparams["step_size"]),
        nnlearn.shuffled((images[n_test:], one_hot[n_test:]), 32, remainder="drop"),
        init_network_params,
        epochs=20,
        evaluate=nnlearn.evaluation(accuracy, (images[:n_test], one_hot[:n_test])),
    )
    return Case(train, {"step_size": 0.1}, batched_predict, (images[:n_test], one_hot[:n_test]), "accuracy")


@report(REPORTS, "https://docs.kidger.site/equinox/examples/mnist/: healthy")
def equinox_cnn_log_softmax(mended):
    data = load_digits()
    x = (data.images / 16 - 0.5).astype("float32") / 0.5
    x = x[:, None]
    x_train, x_test, y_train, y_test = train_test_split(x, data.target, test_size=300, random_state=5678)

    class CNN(eqx.Module):
        layers: list

        def __init__(self, key):
            key1, key2, key3, key4 = jax.random.split(key, 4)
            self.layers = [
                eqx.nn.Conv2d(1, 8, kernel_size=3, key=key1),
                eqx.nn.MaxPool2d(kernel_size=2),
                jax.nn.relu,
                jnp.ravel,
                eqx.nn.Linear(200, 128, key=key2),
                jax.nn.gelu,
                eqx.nn.Linear(128, 64, key=key3),
                jax.nn.relu,
                eqx.nn.Linear(64, 10, key=key4),
                jax.nn.log_softmax,
            ]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    _, static = eqx.partition(CNN(jax.random.key(0)), eqx.is_array)

    def init(key):
        return eqx.filter(CNN(key), eqx.is_array)

    def forward(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def cross_entropy(y, pred_y):
        return -jnp.take_along_axis(pred_y, y[:, None], axis=1)[:, 0]

    def loss(params, batch, key):
        x, y = batch
        return jnp.mean(cross_entropy(y, forward(params, x)))

    def evaluate(params, batch):
        x, y = batch.examples
        pred_y = forward(params, x)
        return {
            "test_loss": jnp.mean(cross_entropy(y, pred_y), where=batch.where),
            "test_accuracy": jnp.mean(jnp.argmax(pred_y, axis=1) == y, where=batch.where),
        }

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adamw(hparams["lr"]),
        nnlearn.shuffled((x_train, y_train), 64, remainder="drop"),
        init,
        steps=500,
        check_every=50,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    return Case(train, {"lr": 1e-3}, forward, (x_test, y_test), "test_accuracy")


@report(REPORTS, "https://github.com/pytorch/examples/blob/main/vae/main.py: healthy")
def vae_summed_loss(mended):
    pixels = (load_digits().data / 16).astype(np.float32)
    pixels = np.random.default_rng(1).permutation(pixels)
    train_x, test_x = pixels[:1450], pixels[1450:]

    def linear(key, fan_in, fan_out):
        wk, bk = random.split(key)
        bound = fan_in**-0.5
        return {
            "w": random.uniform(wk, (fan_in, fan_out), minval=-bound, maxval=bound),
            "b": random.uniform(bk, (fan_out,), minval=-bound, maxval=bound),
        }

    def init(key):
        sizes = {"fc1": (64, 100), "fc21": (100, 8), "fc22": (100, 8), "fc3": (8, 100), "fc4": (100, 64)}
        return {name: linear(k, *s) for (name, s), k in zip(sizes.items(), random.split(key, 5), strict=True)}

    def fc(p, x):
        return x @ p["w"] + p["b"]

    def model(params, x, key):
        h1 = jax.nn.relu(fc(params["fc1"], x))
        mu, logvar = fc(params["fc21"], h1), fc(params["fc22"], h1)
        z = mu + random.normal(key, mu.shape) * jnp.exp(0.5 * logvar)
        return jax.nn.sigmoid(fc(params["fc4"], jax.nn.relu(fc(params["fc3"], z)))), mu, logvar

    def loss_function(params, x, key, where=None):
        recon_x, mu, logvar = model(params, x, key)
        bce = -(x * jnp.log(recon_x + 1e-7) + (1 - x) * jnp.log(1 - recon_x + 1e-7))
        kld = -0.5 * (1 + logvar - mu**2 - jnp.exp(logvar))
        where = True if where is None else where[:, None]
        return jnp.sum(bce, where=where) + jnp.sum(kld, where=where)

    def test(params, batch):
        total = loss_function(params, batch.examples, random.key(1), batch.where)
        return {"test_loss": total / jnp.sum(batch.where)}

    train = nnlearn.make_train(
        loss_function,
        lambda hparams: optax.adam(1e-3),
        nnlearn.shuffled(train_x, 64, remainder="drop"),
        init,
        epochs=40,
        evaluate=nnlearn.evaluation(test, test_x),
    )
    return Case(train, {}, None, None, "test_loss", "min")


@report(REPORTS, "https://keras.io/examples/vision/autoencoder/ convolutional denoising autoencoder: healthy")
def denoising_autoencoder(mended):
    clean = (load_digits().images[..., None] / 16).astype("float32")
    rng = np.random.default_rng(0)
    noisy = np.clip(clean + 0.3 * rng.normal(size=clean.shape), 0, 1).astype("float32")
    train_data, test_data = (noisy[:1500], clean[:1500]), (noisy[1500:], clean[1500:])

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(nn.ConvTranspose(8, (3, 3), strides=(2, 2))(x))
            return nn.Conv(1, (3, 3))(x)

    autoencoder = Autoencoder()

    def bce(params, batch, key):
        noisy, clean = batch
        return nnlearn.sigmoid_binary_cross_entropy(autoencoder.apply(params, noisy), clean).mean()

    def metrics(params, batch):
        noisy, clean = batch.examples
        logits = autoencoder.apply(params, noisy)
        per_picture = optax.sigmoid_binary_cross_entropy(logits, clean).mean((1, 2, 3))
        error = jnp.mean((jax.nn.sigmoid(logits) - clean) ** 2, axis=(1, 2, 3))
        return {"val_loss": jnp.mean(per_picture, where=batch.where), "mse": jnp.mean(error, where=batch.where)}

    train = nnlearn.make_train(
        bce,
        lambda hparams: nnlearn.adam(hparams["learning_rate"]),
        nnlearn.shuffled(train_data, 64, remainder="drop"),
        lambda key: autoencoder.init(key, clean[:1]),
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, test_data),
    )
    return Case(train, {"learning_rate": 2e-3}, autoencoder.apply, test_data, "val_loss", "min")


@report(
    REPORTS, "https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/JAX/tutorial17/SimCLR.html: healthy"
)
def simclr_shifts_and_noise(mended):
    images = (load_digits().images / 8 - 1).astype(np.float32)
    unlabelled, held_out = images[:1400], images[1400:1528]

    def augment(key, image):
        shift_key, noise_key, scale_key = random.split(key, 3)
        padded = jnp.pad(image, 1, constant_values=-1.0)
        image = jax.lax.dynamic_slice(padded, random.randint(shift_key, (2,), 0, 3), (8, 8))
        contrast = random.uniform(scale_key, (), minval=0.7, maxval=1.3)
        return contrast * image + 0.2 * random.normal(noise_key, (8, 8))

    def two_views(key, x):
        keys = random.split(key, 2 * len(x))
        return jax.vmap(augment)(keys, jnp.concatenate([x, x])).reshape(2 * len(x), 64)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(128)(x))
            x = nn.relu(nn.Dense(64)(x))
            return nn.Dense(32)(nn.relu(nn.Dense(64)(x)))

    encoder = Encoder()

    def info_nce(params, x, key, temperature=0.1):
        feats = encoder.apply(params, two_views(key, x))
        feats = feats / jnp.sqrt(jnp.sum(feats**2, axis=-1, keepdims=True) + 1e-8)
        sims = feats @ feats.T / temperature
        sims = jnp.where(jnp.eye(len(sims), dtype=bool), -9e15, sims)
        positive = jnp.roll(jnp.arange(len(sims)), len(x))
        nll = -sims[jnp.arange(len(sims)), positive] + jax.nn.logsumexp(sims, axis=-1)
        return nll.mean(), {"acc_top1": jnp.mean(jnp.argmax(sims, axis=-1) == positive)}

    def evaluate(params):
        nll, aux = info_nce(params, held_out, random.key(42))
        return {"val_loss": nll, **aux}

    train = nnlearn.make_train(
        info_nce,
        lambda hparams: optax.adamw(optax.cosine_decay_schedule(hparams["lr"], 500), weight_decay=1e-4),
        nnlearn.shuffled(unlabelled, 128, remainder="drop"),
        lambda key: encoder.init(key, jnp.zeros((1, 64))),
        steps=500,
        check_every=50,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 2e-3}, None, None, "val_loss", "min")
