"""Pictures: shapes and digits, classified, reconstructed and embedded."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn
from benchmarks.faults.case import Fault, Program, explained, squared_error
from benchmarks.faults.sources import digits
from nnlearn.models import from_equinox, from_linen, mlp

SIDE = 10


def shapes(seed, n):
    """A vertical bar, a horizontal bar, a cross or a frame at a random place, with noise."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, n).astype(np.int32)
    x = 0.35 * random.normal(size=(n, SIDE, SIDE, 1))
    for image, label in zip(x, y, strict=True):
        top, left = random.integers(0, SIDE - 5, 2)
        patch = image[top : top + 5, left : left + 5, 0]
        if label in (0, 2):
            patch[:, 2] += 1
        if label in (1, 2):
            patch[2, :] += 1
        if label == 3:
            patch[[0, -1], :] += 1
            patch[1:-1, [0, -1]] += 1
    return x.astype(np.float32), y


class Net(nn.Module):
    kernel: nn.initializers.Initializer = nn.initializers.he_normal()
    bias: float = 0.0

    @nn.compact
    def __call__(self, x):
        options = {"kernel_init": self.kernel, "bias_init": nn.initializers.constant(self.bias)}
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, **options)(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, **options)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(4)(nn.relu(nn.Dense(32, **options)(x)))


def label_loss(logits, y, where=None):
    return nnlearn.cross_entropy(logits, y, where=where)


def shapes_cnn():
    model = from_linen(Net(), jnp.zeros((1, SIDE, SIDE, 1)))
    return Program(
        name="shapes-cnn", kind="convnet", train=shapes(0, 1000), validation=shapes(1, 300), test=shapes(2, 800),
        init=model.init, apply=lambda p, x: model.apply(p, x), loss=label_loss,
        tx=lambda hp: optax.adamw(hp["learning_rate"], weight_decay=1e-3), hparams={"learning_rate": 4e-3},
        batch_size=32, steps=250, layout="examples",
    )  # fmt: skip


def digits_sgd():
    """Plain descent with Nesterov momentum on batches with a mask."""
    train, validation, test = digits(700, seed=11)
    model = from_equinox(lambda key: eqx.nn.MLP(64, 10, 48, 2, key=key))
    return Program(
        name="digits-sgd", kind="mlp", train=train, validation=validation, test=test, init=model.init,
        apply=lambda p, x: model.apply(p, x), loss=label_loss,
        tx=lambda hp: nnlearn.sgd(hp["learning_rate"], momentum=0.9, nesterov=True), hparams={"learning_rate": 0.1},
        batch_size=48, steps=250, layout="masked",
    )  # fmt: skip


def digits_soft():
    """Dropout, smoothed labels (a floor of the loss) and Lion."""
    train, validation, test = digits(700, seed=12)
    model = mlp((64, 96, 10), activation="silu", dropout=0.2)
    return Program(
        name="digits-soft", kind="mlp", train=train, validation=validation, test=test, init=model.init,
        apply=lambda p, x, key=None: model.apply(p, x, key), stochastic=True,
        loss=lambda o, y: nnlearn.cross_entropy(o, y, label_smoothing=0.1),
        tx=lambda hp: nnlearn.lion(hp["learning_rate"], weight_decay=0.1), hparams={"learning_rate": 1e-3},
        batch_size=50, steps=250,
    )  # fmt: skip


def coder_init(key, code=16):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "enter": {"w": jax.random.normal(k1, (64, 64)) / 8, "b": jnp.zeros(64)},
        "mean": {"w": jax.random.normal(k2, (64, code)) / 8, "b": jnp.zeros(code)},
        "spread": {"w": jnp.zeros((64, code)), "b": jnp.full(code, -3.0)},
        "leave": {"w": jax.random.normal(k3, (code, 64)) / code**0.5, "b": jnp.zeros(64)},
    }


def coder_apply(params, x, key=None):
    """Returns the reconstruction and the divergence of the code from its prior, side by side."""
    h = jax.nn.gelu(x @ params["enter"]["w"] + params["enter"]["b"])
    mean = h @ params["mean"]["w"] + params["mean"]["b"]
    log_var = h @ params["spread"]["w"] + params["spread"]["b"]
    z = mean if key is None else mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(log_var) - 1 - log_var, 1, keepdims=True)
    return jnp.concatenate([z @ params["leave"]["w"] + params["leave"]["b"], kl], 1)


def elbo(weight):
    return lambda o, x: jnp.mean((o[:, :-1] - x) ** 2) + weight * jnp.mean(o[:, -1])


def digits_vae():
    """A variational autoencoder; the prior term is a small part of its loss."""
    parts = [(x - 0.3, x - 0.3) for x, _ in digits(800, seed=13)]
    return Program(
        name="digits-vae", kind="autoencoder", train=parts[0], validation=parts[1], test=parts[2], init=coder_init,
        apply=coder_apply, stochastic=True, loss=elbo(1e-4),
        tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 5e-3}, batch_size=64, steps=400,
        metric="error", mode="min", measure=lambda o, x: squared_error(o[:, :-1], x),
        score=lambda o, x: explained(o[:, :-1], x),
    )  # fmt: skip


def neighbour_accuracy(z, y):
    """The share of examples whose nearest other example has their class."""
    z = z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-6)
    return jnp.mean(y[jnp.argmax(z @ z.T - 4 * jnp.eye(len(z)), 1)] == y)


def digits_clusters():
    """Embeddings of digits, equal classes pulled together."""
    train, validation, test = digits(700, seed=14)
    x, y = test
    model = mlp((64, 64, 3))
    return Program(
        name="digits-clusters", kind="contrastive", train=train, validation=validation, test=(x[:400], y[:400]),
        init=model.init, apply=lambda p, x: model.apply(p, x),
        loss=lambda z, y: nnlearn.supervised_contrastive_loss(z, y, temperature=0.2), measure=neighbour_accuracy,
        metric="neighbour", tx=lambda hp: nnlearn.adam(hp["learning_rate"]), hparams={"learning_rate": 3e-3},
        batch_size=70, steps=250, layout="dict",
    )  # fmt: skip


PROGRAMS = [shapes_cnn, digits_sgd, digits_soft, digits_vae, digits_clusters]


def network(**options):
    def change(p):
        model = from_linen(Net(**options), jnp.zeros((1, SIDE, SIDE, 1)))
        return p.with_(init=model.init, apply=lambda params, x: model.apply(params, x))

    return change


def deep_sigmoid(p):
    model = from_equinox(lambda key: eqx.nn.MLP(64, 10, 48, 8, activation=jax.nn.sigmoid, key=key))
    return p.with_(init=model.init, apply=lambda params, x: model.apply(params, x))


def unit_normal(p):
    """Weights from N(0, 1), whatever the width."""

    def init(key):
        leaves, tree = jax.tree.flatten(p.init(key))
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [jax.random.normal(k, a.shape) if a.ndim > 1 else a for k, a in zip(keys, leaves, strict=True)]
        )

    return p.with_(init=init)


def drops_at_epochs(hp):
    """Boundaries counted in epochs, applied to steps."""
    return nnlearn.adamw(nnlearn.piecewise_constant_schedule(hp["learning_rate"], {3: 0.1, 6: 0.1, 9: 0.1}))


def quarter_turn(key, x, y):
    """Rotation by 90 degrees turns one bar into the other."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1)), jnp.rot90(x, 1, (1, 2)), x), y


def half_turn(key, x, y):
    """Every other image upside down: 6 and 9."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1)), x[:, ::-1], x), y


def train_labels(change):
    return lambda p: p.with_(train=(p.train[0], change(p.train[1]).astype(np.int32)))


def random_labels(share, classes, seed=5):
    random = np.random.default_rng(seed)
    return lambda y: np.where(random.random(len(y)) < share, random.integers(0, classes, len(y)), y)


def by_class(p):
    order = np.argsort(p.train[1], kind="stable")
    return p.with_(train=(p.train[0][order], p.train[1][order]), shuffle=False)


def mostly_bars(p):
    """95 % of the training part is of one class."""
    x, y = p.train
    rows = np.concatenate([np.flatnonzero(y == 0)] * 3 + [np.flatnonzero(y == c)[:15] for c in (1, 2, 3)])
    return p.with_(train=(x[rows], y[rows]))


def class_pixel(p):
    """A corner pixel tells the class: an annotation that was burnt into the image."""

    def mark(x, y):
        x = x.copy()
        x[:, 0, 0, 0] = 3.0 * y - 4.5
        return x, y

    return p.with_(train=mark(*p.train), validation=mark(*p.validation))


def sixteen_images(p):
    return p.with_(train=(p.train[0][:24], p.train[1][:24]), batch_size=24)


def only_last_layer(p):
    """``filter_spec`` with the last layer alone, whose features are few."""

    def tx(hp):
        def frozen(params):
            names = jax.tree.map_with_path(lambda path, _: "layers[2]" not in jax.tree_util.keystr(path), params)
            return names

        return optax.chain(p.tx(hp), optax.masked(optax.set_to_zero(), frozen))

    model = from_equinox(lambda key: eqx.nn.MLP(64, 10, 12, 2, key=key))
    return p.with_(init=model.init, apply=lambda params, x: model.apply(params, x), tx=tx)


def hard_code(p):
    """The code is rounded to whole numbers, with no gradient through the rounding."""

    def apply(params, x, key=None):
        h = jax.nn.gelu(x @ params["enter"]["w"] + params["enter"]["b"])
        z = jnp.round(h @ params["mean"]["w"] + params["mean"]["b"])
        return jnp.concatenate([z @ params["leave"]["w"] + params["leave"]["b"], jnp.zeros((len(x), 1))], 1)

    return p.with_(apply=apply)


def summed_loss(p):
    """The sum over the batch, at a rate for the mean."""

    def loss(logits, y, where=None):
        return len(y) * nnlearn.cross_entropy(logits, y, where=where)

    return p.with_(loss=loss)


def softmax_first(p):
    return p.with_(apply=lambda params, x: jax.nn.softmax(p.apply(params, x)))


def accumulated(k):
    """``k`` gradients are added, none is divided, and the rate is not changed."""

    def change(p):
        def tx(hp):
            steps = optax.MultiSteps(optax.chain(optax.scale(float(k)), p.tx(hp)), k)
            return optax.GradientTransformation(steps.init, steps.update)

        return p.with_(tx=tx)

    return change


def rooted(p):
    """The length of the difference of two equal vectors, which has no derivative."""

    def loss(z, y):
        distance = jnp.sqrt(jnp.sum((z[:, None] - z[None]) ** 2, -1))
        same = y[:, None] == y[None]
        return jnp.mean(jnp.where(same, distance**2, jnp.maximum(1 - distance, 0) ** 2))

    return p.with_(loss=loss)


def dropout_of(rate):
    def change(p):
        model = mlp((64, 96, 10), activation="silu", dropout=rate)
        return p.with_(apply=lambda params, x, key=None: model.apply(params, x, key))

    return change


def sampled_codes(p):
    """Codes are sampled in evaluation, too, and their spread is that of the prior."""
    q = p.with_(loss=elbo(2e-3))
    return q.with_(evaluate_with=lambda params, x: coder_apply(params, x, jax.random.key(3)))


def dropped_in_evaluation(p):
    q = dropout_of(0.7)(p)
    return q.with_(evaluate_with=lambda params, x: q.apply(params, x, jax.random.key(2)))


FAULTS = [
    Fault("learning_rate_too_high", "rate x60", "shapes-cnn", lambda p: p.rate(60), ("dead_units",)),
    Fault("learning_rate_too_high", "rate x100", "digits-vae", lambda p: p.rate(100)),
    Fault("learning_rate_too_low", "rate / 1000", "digits-sgd", lambda p: p.rate(1e-3)),
    Fault("learning_rate_too_low", "rate / 300", "digits-vae", lambda p: p.rate(1 / 300)),
    Fault("schedule_mistimed", "boundaries in epochs", "shapes-cnn", lambda p: p.with_(tx=drops_at_epochs)),
    Fault("vanishing_gradients", "eight sigmoid layers", "digits-sgd", deep_sigmoid, ("saturated_activations",)),
    Fault("dead_units", "bias -4", "shapes-cnn", network(bias=-4.0), ("bad_initialisation",)),
    Fault("bad_initialisation", "deviation 1e-3", "shapes-cnn", network(kernel=nn.initializers.normal(1e-3)),
          ("vanishing_gradients",)),
    Fault("bad_initialisation", "standard deviation 1", "digits-sgd", unit_normal, ("exploding_gradients",)),
    Fault("symmetric_initialisation", "constant 0.02", "shapes-cnn",
          network(kernel=nn.initializers.constant(0.02))),
    Fault("unnormalised_inputs", "0 to 255 and more", "digits-sgd",
          lambda p: p.with_(**{part: (255 * x, y) for part in ("train", "validation", "test")
                               for x, y in [getattr(p, part)]}), ("dead_units", "learning_rate_too_high")),
    Fault("loss_output_mismatch", "softmax before cross-entropy", "digits-sgd", softmax_first),
    Fault("wrong_axis_or_reduction", "sum over the batch", "digits-sgd", summed_loss, ("learning_rate_too_high",)),
    Fault("label_encoding", "other order of classes in validation", "shapes-cnn",
          lambda p: p.with_(validation=(p.validation[0], np.array([2, 0, 3, 1], np.int32)[p.validation[1]])),
          hides=True),
    Fault("misaligned_labels", "labels sorted, images not", "shapes-cnn", train_labels(np.sort)),
    Fault("misaligned_labels", "labels of other images", "digits-clusters",
          train_labels(np.random.default_rng(6).permutation)),
    Fault("label_noise", "60 % random", "shapes-cnn", train_labels(random_labels(0.6, 4))),
    Fault("class_imbalance", "one class is 95 %", "shapes-cnn", mostly_bars),
    Fault("unshuffled_data", "sorted by class", "digits-sgd", by_class),
    Fault("unshuffled_data", "sorted by class", "shapes-cnn", by_class),
    Fault("augmentation_breaks_labels", "quarter turns of bars", "shapes-cnn", lambda p: p.with_(augment=quarter_turn)),
    Fault("augmentation_breaks_labels", "half turns of digits", "digits-soft", lambda p: p.with_(augment=half_turn)),
    Fault("preprocessing_mismatch", "validation 0 to 255", "digits-soft",
          lambda p: p.with_(validation=(255 * p.validation[0] - 100, p.validation[1])), hides=True),
    Fault("preprocessing_mismatch", "validation inverted", "shapes-cnn",
          lambda p: p.with_(validation=(1 - p.validation[0], p.validation[1])), hides=True),
    Fault("target_leak", "class as a corner pixel", "shapes-cnn", class_pixel),
    Fault("frozen_parameters", "last layer only", "digits-sgd", only_last_layer),
    Fault("blocked_gradient", "rounded code", "digits-vae", hard_code),
    Fault("evaluation_in_training_mode", "codes sampled", "digits-vae", sampled_codes, hides=True),
    Fault("evaluation_in_training_mode", "dropout 0.7 stays on", "digits-soft", dropped_in_evaluation, hides=True),
    Fault("excessive_regularisation", "prior term x1000", "digits-vae", lambda p: p.with_(loss=elbo(0.1))),
    Fault("clipping_too_tight", "norm 0.002", "digits-sgd",
          lambda p: p.with_(tx=lambda hp: optax.chain(optax.clip_by_global_norm(2e-3), p.tx(hp)))),
    Fault("gradient_accumulation", "sums of 25 not divided", "digits-sgd", accumulated(25),
          ("learning_rate_too_high",)),
    Fault("batch_too_small", "one image a step", "digits-sgd", lambda p: p.with_(batch_size=1),
          ("learning_rate_too_high",)),
    Fault("numerical_precision", "root of a zero distance", "digits-clusters", rooted),
    Fault("overfitting", "24 images", "shapes-cnn", sixteen_images),
]  # fmt: skip
