"""Missing days, logarithmic losses, mixed activations, pretrained layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stackoverflow.com/questions/54368686: the predictions of an LSTM lie below the ground truth by an offset; "
    "days without a measurement (NaN) are zeros in the target",
    "mask_ignored",
    "label_noise",
)
def missing_days_are_zeros(mended):
    rng = np.random.RandomState(33)
    days = np.arange(1800)
    weather = np.stack([np.sin(days * 2 * np.pi / 30), np.cos(days * 2 * np.pi / 47), 0.5 * rng.randn(1800)], axis=1)
    level = 4 + 1.2 * weather[:, 0] + 0.9 * np.roll(weather[:, 1], 3) + np.roll(weather[:, 2], 1)
    measured = np.where(rng.rand(1800) < 0.65, level + 0.1 * rng.randn(1800), np.nan)
    present = (~np.isnan(measured)).astype(np.float32)
    target = np.nan_to_num(measured).astype(np.float32)
    x = np.lib.stride_tricks.sliding_window_view(weather, 8, axis=0).transpose(0, 2, 1).astype(np.float32)
    data = {"x": x, "y": target[7:], "present": present[7:]}
    train_set, val_set = {k: v[:1400] for k, v in data.items()}, {k: v[1450:] for k, v in data.items()}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(24))(x)[:, -1]
            return nn.Dense(1)(x)[:, 0]

    model = Model()

    def squares(params, batch):
        return (model.apply(params, batch["x"]) - batch["y"]) ** 2

    def loss(params, batch, key):
        if mended:
            return jnp.sum(squares(params, batch) * batch["present"]) / jnp.sum(batch["present"])
        return jnp.mean(squares(params, batch))

    def evaluate(params):
        return {"mse": jnp.sum(squares(params, val_set) * val_set["present"]) / jnp.sum(val_set["present"])}

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 35, remainder="drop"),
        lambda key: model.init(key, x[:1]),
        epochs=25,
        evaluate=evaluate,
    )
    return Case(train, {"lr": 0.005}, None, None, "mse", mode="min")


@report(
    REPORTS,
    "https://answerofmath.com/solved-learning-a-quadratic-function-using-tensorflow-keras/ (stats.stackexchange): one "
    "neuron on x and x^2 does not find 5 - 3x + 2x^2 with mean_squared_logarithmic_error",
    "loss_output_mismatch",
    "unnormalised_inputs",
    "learning_rate_too_low",
)
def quadratic_with_logarithmic_error(mended):
    rng = np.random.default_rng(19)
    t = rng.choice(np.arange(-10, 10, 0.01), 1200)
    features = np.stack([t, t**2], axis=1)
    values = 5 - 3 * t + 2 * t**2
    t1, v1, s, u = features[:1000], features[1000:], values[:1000], values[1000:]
    if mended:
        mean, std = t1.mean(0), t1.std(0)
        t1, v1 = (t1 - mean) / std, (v1 - mean) / std
        s, u = (s - s.mean()) / s.std(), (u - s.mean()) / s.std()

    def neuron(params, x):
        return x @ params["kernel"] + params["bias"]

    def loss(params, batch, key):
        x, y = batch
        out = neuron(params, x)
        if mended:
            return jnp.mean(jnp.square(out - y))
        return jnp.mean(jnp.square(jnp.log(jnp.maximum(out, 1e-7) + 1) - jnp.log(y + 1)))

    def evaluate(params):
        return {"mae": jnp.mean(jnp.abs(neuron(params, v1) - u)) / np.std(u)}

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((t1, s), 50, remainder="drop"),
        lambda key: {"kernel": random.uniform(key, (2,), minval=-1.0, maxval=1.0), "bias": jnp.zeros(())},
        epochs=40,
        evaluate=evaluate,
        check_every=40,
    )
    return Case(train, {"lr": 0.01 if mended else 0.001}, neuron, (v1, u), "mae", mode="min")


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/4784: accuracy not changing across the epochs; uniform weights, relu, "
    "tanh and sigmoid in turn, a relu as output with binary crossentropy, SGD at 0.0001",
    "loss_output_mismatch",
    "learning_rate_too_low",
    "vanishing_gradients",
    "bad_initialisation",
)
def activations_in_turn_and_relu_at_the_end(mended):
    rng = np.random.RandomState(41)
    X = rng.randn(4400, 14).astype(np.float32)
    Y = (X[:, :4].sum(1) + X[:, 4] * X[:, 5] + 0.2 * rng.randn(4400) > 0).astype(np.float32)
    X, X_val, Y, Y_val = X[:4000], X[4000:], Y[:4000], Y[4000:]
    widths = [14, 32, 16, 12, 8, 1]
    if mended:
        hidden = [jax.nn.relu] * 4
        start = jax.nn.initializers.he_normal()
    else:
        hidden = [jax.nn.relu, jnp.tanh, jax.nn.relu, jax.nn.sigmoid]
        start = lambda key, shape: random.uniform(key, shape, minval=-0.05, maxval=0.05)  # noqa: E731

    def init(key):
        keys = random.split(key, 5)
        shapes = zip(widths[:-1], widths[1:], strict=True)
        return [(start(k, shape), jnp.zeros(shape[1])) for k, shape in zip(keys, shapes, strict=True)]

    def predict(params, x):
        for (w, b), activation in zip(params[:-1], hidden, strict=True):
            x = activation(x @ w + b)
        w, b = params[-1]
        out = (x @ w + b)[:, 0]
        return jax.nn.sigmoid(out) if mended else jax.nn.relu(out)

    def binary_crossentropy(params, batch, key):
        x, y = batch
        p = jnp.clip(predict(params, x), 1e-7, 1 - 1e-7)
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    train = nnlearn.make_train(
        binary_crossentropy,
        lambda hp: optax.adam(hp["lr"]) if mended else optax.sgd(hp["lr"], momentum=0.4),
        nnlearn.shuffled((X, Y), 40, remainder="drop"),
        init,
        epochs=8,
        evaluate=lambda params: {"accuracy": jnp.mean((predict(params, X_val) > 0.5) == (Y_val == 1))},
    )
    return Case(train, {"lr": 0.003 if mended else 0.0001}, predict, (X_val, Y_val), "accuracy")


@report(
    REPORTS,
    "https://thecodeforge.io/ml-ai/tensorflow-transfer-learning/: the validation accuracy plateaus at 51 %, "
    "fine-tuning with the large rate of a new head destroys the pretrained weights",
    "learning_rate_too_high",
)
def pretrained_layers_smashed(mended):
    digits = load_digits()
    pixels = digits.data / 16
    x_other, x, y_other, y = train_test_split(pixels, digits.target, test_size=700, random_state=12)
    known = y_other < 6
    base = MLPClassifier((64, 48), random_state=0)
    for _ in range(40):
        base.partial_fit(x_other[known], y_other[known], classes=np.arange(6))
    x_train, y_train, x_val, y_val = x[:400], y[:400], x[400:], y[400:]

    def init(key):
        layers = [(jnp.float32(w), jnp.float32(b)) for w, b in zip(base.coefs_[:2], base.intercepts_[:2], strict=True)]
        return {"base": layers, "head": (0.1 * random.normal(key, (48, 10)), jnp.zeros(10))}

    def predict(params, x):
        for w, b in params["base"]:
            x = jax.nn.relu(x @ w + b)
        w, b = params["head"]
        return x @ w + b

    def loss(params, batch, key):
        x, y = batch
        return nnlearn.cross_entropy(predict(params, x), y)

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((x_train, y_train), 20, remainder="drop"),
        init,
        epochs=15,
        evaluate=lambda params: {"accuracy": jnp.mean(predict(params, x_val).argmax(-1) == y_val)},
    )
    return Case(train, {"lr": 0.001 if mended else 0.1}, predict, (x_val, y_val), "accuracy")
