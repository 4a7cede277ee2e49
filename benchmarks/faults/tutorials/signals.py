"""Healthy programs of tutorials: forecasts, masked attention, segmentation, residual networks, fields, policies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(REPORTS, "https://www.tensorflow.org/tutorials/structured_data/time_series windows of a wave: healthy")
def lstm_next_value_of_waves(mended):
    rng = np.random.default_rng(2)
    t = np.arange(2400)
    wave = np.sin(2 * np.pi * t / 25) + 0.5 * np.sin(2 * np.pi * t / 61) + 0.05 * rng.normal(size=len(t))
    split, look_back = 1800, 30
    wave = ((wave - wave[:split].mean()) / wave[:split].std()).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(wave, look_back + 1)
    past, future = windows[:, :-1, None], windows[:, -1:]
    train_set = (past[: split - look_back], future[: split - look_back])
    test_set = (past[split:], future[split:])  # later than anything in the training set

    class Forecaster(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.RNN(nn.OptimizedLSTMCell(24))(x)
            return nn.Dense(1)(hidden[:, -1])

    forecaster = Forecaster()

    def mse(params, batch, key):
        x, y = batch
        return jnp.mean((forecaster.apply(params, x) - y) ** 2)

    train = nnlearn.make_train(
        mse,
        lambda hparams: nnlearn.adam(hparams["lr"]),
        nnlearn.shuffled(train_set, 50, remainder="drop"),
        lambda key: forecaster.init(key, past[:1]),
        epochs=14,
        evaluate=lambda params: {"mse": mse(params, test_set, None)},
    )
    return Case(train, {"lr": 3e-3}, lambda params, x: forecaster.apply(params, x), test_set, "mse", "min")


@report(
    REPORTS,
    "https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/JAX/tutorial6/Transformers_and_MHAttention.html"
    " an encoder with a padding mask: healthy",
)
def encoder_with_padding_mask(mended):
    rng = np.random.default_rng(9)
    vocab, longest, width = 20, 14, 32
    ids = rng.integers(1, vocab, size=(6400, longest)).astype(np.int32)
    length = rng.integers(5, longest + 1, size=6400)
    ids[np.arange(longest) >= length[:, None]] = 0
    low, high = ((ids >= 1) & (ids <= 7)).sum(1), ((ids >= 13) & (ids <= 19)).sum(1)
    label = np.where(low > high, 0, np.where(high > low, 2, 1))  # more low tokens, as many, more high ones

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, ids, key=None):
            keep = ids > 0
            x = nn.Embed(vocab, width)(ids)
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(h, h, mask=keep[:, None, None, :])
            h = nn.LayerNorm()(x)
            x = x + nn.Dense(width)(nn.relu(nn.Dense(2 * width)(h)))
            pooled = jnp.sum(x * keep[..., None], 1) / jnp.sum(keep, 1, keepdims=True)
            return nn.Dense(3)(nn.LayerNorm()(pooled))

    encoder = Encoder()

    def cross_entropy(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(encoder.apply(params, batch[0]), batch[1]).mean()

    def accuracy(params, batch):
        ids, label = batch.examples
        return {"accuracy": jnp.mean(encoder.apply(params, ids).argmax(-1) == label, where=batch.where)}

    def make_tx(hparams):
        return optax.adam(nnlearn.warmup_cosine_decay_schedule(0.0, hparams["lr"], 50, 600))

    train = nnlearn.make_train(
        cross_entropy,
        make_tx,
        nnlearn.shuffled((ids[:6000], label[:6000]), 60, remainder="drop"),
        lambda key: encoder.init(key, ids[:1]),
        epochs=6,
        evaluate=nnlearn.evaluation(accuracy, (ids[6000:], label[6000:])),
    )
    held_out = (ids[6000:], label[6000:])
    return Case(train, {"lr": 3e-3}, lambda params, ids: encoder.apply(params, ids), held_out, "accuracy")


@report(REPORTS, "https://github.com/milesial/Pytorch-UNet cross-entropy plus dice on blobs: healthy")
def unet_dice_on_blobs(mended):
    rng = np.random.default_rng(14)
    rows, columns = np.mgrid[:12, :12]
    center, radius = rng.uniform(2, 10, size=(1300, 2, 1, 1)), rng.uniform(1.5, 4, size=(1300, 1, 1))
    mask = ((rows - center[:, 0]) ** 2 + (columns - center[:, 1]) ** 2 < radius**2).astype(np.float32)
    image = (0.7 * mask + 0.25 * rng.normal(size=mask.shape)).astype(np.float32)[..., None]

    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            fine = nn.relu(nn.Conv(6, (3, 3))(x))
            coarse = nn.relu(nn.Conv(12, (3, 3))(nn.max_pool(fine, (2, 2), (2, 2))))
            coarse = nn.relu(nn.Conv(12, (3, 3))(coarse))
            up = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
            fine = nn.relu(nn.Conv(6, (3, 3))(jnp.concatenate([up, fine], -1)))
            return nn.Conv(1, (1, 1))(fine)[..., 0]

    unet = UNet()

    def dice(p, mask):
        axes = (1, 2)
        return (2 * jnp.sum(p * mask, axes) + 1) / (jnp.sum(p, axes) + jnp.sum(mask, axes) + 1)

    def criterion(params, batch, key):
        logits = unet.apply(params, batch["image"])
        bce = optax.sigmoid_binary_cross_entropy(logits, batch["mask"]).mean()
        return bce + 1 - dice(jax.nn.sigmoid(logits), batch["mask"]).mean()

    def evaluate(params, batch):
        hard = (unet.apply(params, batch.examples["image"]) > 0).astype(jnp.float32)
        return {"dice": jnp.mean(dice(hard, batch.examples["mask"]), where=batch.where)}

    train = nnlearn.make_train(
        criterion,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.shuffled({"image": image[:1100], "mask": mask[:1100]}, 20, remainder="drop"),
        lambda key: unet.init(key, image[:1]),
        epochs=4,
        evaluate=nnlearn.evaluation(evaluate, {"image": image[1100:], "mask": mask[1100:]}),
    )
    return Case(train, {"lr": 3e-3}, lambda params, x: unet.apply(params, x), (image[1100:], mask[1100:]), "dice")


@report(
    REPORTS, "https://github.com/kuangliu/pytorch-cifar residual network, SGD with momentum, rate in steps: healthy"
)
def residual_network_with_step_decay(mended):
    data = load_digits()
    x = data.images.astype(np.float32)[..., None]
    x_train, x_test, y_train, y_test = train_test_split(x, data.target, test_size=397, random_state=21)
    mean, std = x_train.mean(), x_train.std()
    x_train, x_test = (x_train - mean) / std, (x_test - mean) / std

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            def norm(y):
                return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

            x = nn.relu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
            h = nn.relu(norm(nn.Conv(24, (3, 3), strides=2, use_bias=False)(x)))
            h = norm(nn.Conv(24, (3, 3), use_bias=False)(h))
            x = nn.relu(h + norm(nn.Conv(24, (1, 1), strides=2, use_bias=False)(x)))
            return nn.Dense(10)(x.mean((1, 2)))

    resnet = ResNet()

    def init(key):
        variables = resnet.init(key, x_train[:2], False)
        return variables["params"], variables["batch_stats"]

    def shift(key, images):
        dy, dx = random.randint(key, (2,), 0, 3)
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-mean / std)
        return lax.dynamic_slice(padded, (0, dy, dx, 0), images.shape)

    def loss(params, batch, key, model_state):
        images = shift(key, batch[0])
        variables = {"params": params, "batch_stats": model_state}
        logits, new = resnet.apply(variables, images, True, mutable=["batch_stats"])
        return nnlearn.cross_entropy(logits, batch[1]), {}, new["batch_stats"]

    def evaluate(params, batch, model_state):
        logits = resnet.apply({"params": params, "batch_stats": model_state}, batch.examples[0], False)
        return {"top1": jnp.mean(logits.argmax(-1) == batch.examples[1], where=batch.where)}

    def make_tx(hparams):
        rate = optax.piecewise_constant_schedule(hparams["lr"], {215: 0.1, 344: 0.1})
        return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))

    train = nnlearn.make_train(
        loss,
        make_tx,
        nnlearn.shuffled((x_train, y_train), 32, remainder="drop"),
        init,
        epochs=10,
        evaluate=nnlearn.evaluation(evaluate, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.05}, None, None, "top1")


@report(REPORTS, "https://github.com/vsitzmann/siren one image as a network of sines: healthy")
def siren_of_one_picture(mended):
    side, omega, width = 32, 15.0, 48
    axis = jnp.linspace(-1.0, 1.0, side)
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    rings = jnp.sin(9 * jnp.sum(grid**2, -1)) * jnp.exp(-jnp.sum(grid**2, -1))
    picture = (rings + 0.5 * (grid[:, 0] > 0.3) * jnp.cos(7 * grid[:, 1]))[:, None]

    def init(key):
        sizes = [2, width, width, 1]
        params = []
        for i, (k, m, n) in enumerate(zip(random.split(key, 3), sizes[:-1], sizes[1:], strict=True)):
            bound = 1 / m if i == 0 else np.sqrt(6 / m) / omega
            k1, k2 = random.split(k)
            bias = random.uniform(k2, (n,), minval=-(m**-0.5), maxval=m**-0.5)
            params.append({"w": random.uniform(k1, (m, n), minval=-bound, maxval=bound), "b": bias})
        return params

    def siren(params, x):
        for layer in params[:-1]:
            x = jnp.sin(omega * (x @ layer["w"] + layer["b"]))
        return x @ params[-1]["w"] + params[-1]["b"]

    def loss(params, batch, key):
        return jnp.mean((siren(params, batch[0]) - batch[1]) ** 2)

    def psnr(params):
        return {"psnr": -10 * jnp.log10(loss(params, (grid, picture), None) / jnp.ptp(picture) ** 2)}

    train = nnlearn.make_train(
        loss,
        lambda hparams: optax.adam(hparams["lr"]),
        nnlearn.generated(lambda key, step: (grid, picture)),
        init,
        steps=400,
        check_every=40,
        evaluate=psnr,
    )
    return Case(train, {"lr": 1e-3}, siren, (grid, picture), "psnr")


@report(REPORTS, "https://github.com/lululxvi/deeponet the antiderivative operator: healthy")
def deeponet_antiderivative(mended):
    sensors = jnp.linspace(0.0, 1.0, 40)

    def functions(key, n):
        k1, k2 = random.split(key)
        weight = random.normal(k1, (n, 4)) / jnp.arange(1, 5)
        phase = random.uniform(k2, (n, 4), maxval=2 * jnp.pi)
        waves = jnp.arange(1, 5) * jnp.pi
        u = jnp.einsum("nk,nks->ns", weight, jnp.sin(waves[:, None] * sensors + phase[..., None]))
        g = jnp.einsum(
            "nk,nks->ns",
            weight / waves,
            jnp.cos(phase)[..., None] - jnp.cos(waves[:, None] * sensors + phase[..., None]),
        )
        return {"u": u, "y": sensors[:, None], "g": g}

    class DeepONet(nn.Module):
        @nn.compact
        def __call__(self, u, y):
            branch = nn.Dense(32)(nn.relu(nn.Dense(64)(u)))
            trunk = nn.relu(nn.Dense(32)(nn.relu(nn.Dense(64)(y))))
            return branch @ trunk.T + self.param("bias", nn.initializers.zeros, ())

    operator = DeepONet()

    def loss(params, batch, key):
        return jnp.mean(jnp.square(operator.apply(params, batch["u"], batch["y"]) - batch["g"]))

    test = functions(random.key(4321), 400)

    def relative_error(params):
        error = operator.apply(params, test["u"], test["y"]) - test["g"]
        return {"relative_l2": jnp.mean(jnp.linalg.norm(error, axis=1) / jnp.linalg.norm(test["g"], axis=1))}

    train = nnlearn.make_train(
        loss,
        lambda hparams: nnlearn.adam(nnlearn.exponential_decay(hparams["lr"], 500, 0.5)),
        nnlearn.generated(lambda key, step: functions(key, 64)),
        lambda key: operator.init(key, test["u"][:1], test["y"]),
        steps=2000,
        check_every=200,
        evaluate=relative_error,
    )
    return Case(train, {"lr": 3e-3}, None, None, "relative_l2", "min")
