"""Lines, sines, genes, brain waves and digits: rates, sizes, scales and splits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stackoverflow.com/questions/48335501: a line through x = 5, 10, ..., 40 with gradient descent at 0.01 "
    "goes to infinity, at 0.001 it does not",
    "learning_rate_too_high",
    "unnormalised_inputs",
)
def line_through_5_to_40(mended):
    x_data = jnp.arange(5.0, 45.0, 5.0)
    y_data = x_data * 0.4
    scale = 20.0 if mended else 1.0

    def init(key):
        one, two = jax.random.normal(key, (2,))
        return {"one": one, "two": two}

    def hypo(params, x):
        return x / scale * params["one"] + params["two"]

    def cost(params, batch, key):
        x, y = batch
        return jnp.mean(jnp.square(hypo(params, x) - y))

    train = nnlearn.make_train(
        cost,
        lambda hp: optax.sgd(hp["rate"]),
        nnlearn.shuffled((x_data, y_data), 8, remainder="drop"),
        init,
        steps=300,
        evaluate=lambda params: {"cost": cost(params, (x_data, y_data), None)},
        check_every=10,
    )
    return Case(train, {"rate": 0.2 if mended else 0.01}, hypo, (x_data, y_data), "cost", mode="min")


@report(
    REPORTS,
    "https://www.philipzucker.com/keras-and-learning-sine: a sine with four layers of five ReLUs and five epochs of "
    "SGD is never all that great; wide works better than deep, and more iterations",
    "underfitting",
)
def sine_with_five_relus(mended):
    rng = np.random.RandomState(0)
    data = (rng.rand(3000, 1) - 0.5) * 2 * np.pi
    vals = np.sin(data)
    grid = np.linspace(-np.pi, np.pi, 100)[:, None]
    sizes = [1, 100, 1] if mended else [1, 5, 5, 5, 5, 1]

    def init(key):
        keys = jax.random.split(key, len(sizes))
        glorot = jax.nn.initializers.glorot_uniform()
        return [(glorot(k, (a, b)), jnp.zeros(b)) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]

    def net(params, x):
        *hidden, (w, b) = params
        for v, c in hidden:
            x = jax.nn.relu(x @ v + c)
        return x @ w + b

    def loss(params, batch, key):
        return jnp.mean((net(params, batch[0]) - batch[1]) ** 2)

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]) if mended else optax.sgd(hp["lr"]),
        nnlearn.shuffled((data, vals), 32, remainder="drop"),
        init,
        epochs=25 if mended else 5,
        evaluate=lambda params: {"mse": loss(params, (grid, np.sin(grid)), None)},
    )
    return Case(train, {"lr": 0.01}, net, (grid, np.sin(grid)), "mse", mode="min")


@report(
    REPORTS,
    "https://ai.stackexchange.com/questions/24910: an autoencoder of gene expression with ReLU in every layer; some "
    "nodes of the bottleneck and of the output only give 0, whatever its size",
    "dead_units",
    "loss_output_mismatch",
)
def genes_always_zero(mended):
    rng = np.random.RandomState(1)
    programs = rng.gamma(2.0, 1.0, (1500, 6))
    genes = np.log1p(programs @ rng.gamma(0.7, 1.0, (6, 80))).astype(np.float32)
    genes += rng.normal(0, 0.05, genes.shape).astype(np.float32)
    x_train, x_valid = genes[:1200], genes[1200:]
    if mended:
        mean, std = x_train.mean(0), x_train.std(0)
        x_train, x_valid = (x_train - mean) / std, (x_valid - mean) / std

    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            act = nn.leaky_relu if mended else nn.relu
            x = act(nn.Dense(40, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.Dense(12, kernel_init=nn.initializers.glorot_uniform())(x)
            x = x if mended else act(x)
            x = act(nn.Dense(40, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.Dense(80, kernel_init=nn.initializers.glorot_uniform())(x)
            return x if mended else act(x)

    model = Autoencoder()

    def mae(params, batch, key):
        return jnp.mean(jnp.abs(model.apply(params, batch) - batch))

    def evaluate(params):  # 1 is perfect, 0 is as good as the mean of each gene
        error = jnp.sum((model.apply(params, x_valid) - x_valid) ** 2, axis=0)
        return {"explained": jnp.mean(1 - error / jnp.sum((x_valid - x_valid.mean(0)) ** 2, axis=0))}

    train = nnlearn.make_train(
        mae,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(x_train, 32, remainder="drop"),
        lambda key: model.init(key, x_train[:1]),
        epochs=30,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.002}, model.apply, (x_valid, x_valid), "explained")


@report(
    REPORTS,
    "https://github.com/tongdaxu/EEG_Emotion_Classifier_DEAP/issues/1 (also Diffusion-TS#67, EEG-AAD#7): overlapping "
    "windows are cut first and then divided into training and test at random",
    "leaky_validation",
)
def windows_before_the_split(mended):
    rng = np.random.RandomState(2)
    trials, length, width, hop = 120, 320, 64, 5
    emotion = np.arange(trials) % 2
    power = 1.0 / (1 + np.arange(161)) ** 0.5 * np.exp(rng.normal(0, 0.7, (trials, 161)))  # each head is different
    power[:, 45:60] *= np.where(emotion, 3.0, 1.0)[:, None]
    power[:, 80:100] *= np.where(emotion, 1.0, 2.5)[:, None]
    phase = np.exp(2j * np.pi * rng.rand(trials, 161))
    eeg = np.fft.irfft(power * phase, n=length)
    starts = np.arange(0, length - width + 1, hop)
    windows = np.stack([eeg[:, s : s + width] for s in starts], axis=1)
    features = np.log(np.abs(np.fft.rfft(windows * np.hanning(width))) + 1e-6)
    trial = np.repeat(np.arange(trials), len(starts))
    x, y = features.reshape(len(trial), -1), emotion[trial]
    held = rng.permutation(trials)[:30]
    test = np.isin(trial, held) if mended else rng.rand(len(trial)) < 0.25
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    validation = x[test], y[test]

    def init(key):
        k1, k2 = jax.random.split(key)
        n_in, hidden = x.shape[1], 12 if mended else 64
        return {
            "hidden": (jax.random.normal(k1, (n_in, hidden)) / np.sqrt(n_in), jnp.zeros(hidden)),
            "output": (jax.random.normal(k2, (hidden,)) / np.sqrt(hidden), 0.0),
        }

    def score(params, x):
        (w, b), (v, c) = params["hidden"], params["output"]
        return jnp.tanh(x @ w + b) @ v + c

    def loss(params, batch, key):
        return jnp.mean(jax.nn.softplus(jnp.where(batch[1] == 1, -1.0, 1.0) * score(params, batch[0])))

    def evaluate(params):
        z = score(params, validation[0])
        return {"loss": loss(params, validation, None), "accuracy": jnp.mean((z > 0) == (validation[1] == 1))}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adamw(hp["lr"], weight_decay=hp["decay"]),
        nnlearn.shuffled((x[~test], y[~test]), 32, remainder="drop"),
        init,
        epochs=4 if mended else 30,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.003, "decay": 0.1 if mended else 0.0}, score, validation, "accuracy")


@report(
    REPORTS,
    "http://pullrequest.ru/10248037/cnn-keras-shodyatsya-odnomu-tomu-zhe-znacheniy-nezavisimo-vvoda (StackOverflow): a "
    "CNN gives the same values whatever the input; the pixels from 0 to 255 were not normalised",
    "unnormalised_inputs",
    "exploding_gradients",
    "dead_units",
)
def cnn_on_pixels_to_255(mended):
    mnist = load("mnist", seed=8)

    def read(part):
        pixels = np.round(part.inputs.reshape(-1, 28, 28, 1)[:, ::2, ::2] * 255).astype(np.uint8)
        return pixels, part.targets

    test = read(mnist.validation)

    def init(key):
        k = jax.random.split(key, 3)
        glorot = jax.nn.initializers.glorot_uniform()
        shapes = [(3, 3, 1, 8), (7 * 7 * 8, 32), (32, 10)]
        return [(glorot(key, shape), jnp.zeros(shape[-1])) for key, shape in zip(k, shapes, strict=True)]

    def cnn(params, pixels):
        (w, b), *dense = params
        x = pixels.astype(jnp.float32)
        if mended:
            x = x / 255
        x = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + b
        x = jax.nn.relu(x).reshape(len(x), -1)
        x = jax.nn.relu(x @ dense[0][0] + dense[0][1])
        return x @ dense[1][0] + dense[1][1]

    def loss(params, batch, key):
        return nnlearn.cross_entropy(cnn(params, batch[0]), batch[1])

    def metrics(params, batch):
        return {"acc": jnp.mean(cnn(params, batch.examples[0]).argmax(1) == batch.examples[1], where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled(read(mnist.train), 32, remainder="drop"),
        init,
        epochs=8,
        evaluate=nnlearn.evaluation(metrics, test),
    )
    return Case(train, {"lr": 0.03}, cnn, test, "acc")


@report(
    REPORTS,
    "https://github.com/microsoft/CNTK/issues/905: 03_ConvBatchNorm with minibatchSize = 1 has an error rate above 50 "
    "%, with 64 below 1 %; without batch normalisation 1 works as well",
    "batch_too_small",
)
def batch_norm_of_one_image(mended):
    digits = load_digits()
    order = np.random.RandomState(8).permutation(1797)
    images, labels = (digits.images[order, :, :, None] / 16).astype(np.float32), digits.target[order]
    test = (images[1400:], labels[1400:])

    class ConvBatchNorm(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for channels, stride in ((8, 1), (16, 2)):
                x = nn.Conv(channels, (3, 3), strides=stride, use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
            x = nn.Dense(32, use_bias=False)(x.reshape(len(x), -1))
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
            return nn.Dense(10)(x)

    net = ConvBatchNorm()

    def init(key):
        variables = net.init(key, images[:2], True)
        return variables["params"], variables["batch_stats"]

    def loss(params, batch, key, model_state):
        variables = {"params": params, "batch_stats": model_state}
        logits, new = net.apply(variables, batch[0], True, mutable=["batch_stats"])
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        return cross, {}, new["batch_stats"]

    def metrics(params, batch, model_state):
        logits = net.apply({"params": params, "batch_stats": model_state}, batch.examples[0], False)
        return {"accuracy": jnp.mean(logits.argmax(1) == batch.examples[1], where=batch.where)}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled((images[:1400], labels[:1400]), 32 if mended else 1, remainder="drop"),
        init,
        epochs=8 if mended else 1,
        evaluate=nnlearn.evaluation(metrics, test),
    )
    return Case(train, {"lr": 0.03 if mended else 0.01}, None, None, "accuracy")
