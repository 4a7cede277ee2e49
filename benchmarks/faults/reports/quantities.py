"""Curves and quantities: small networks that predict numbers."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/418955: two linear layers and plain SGD diverge on y = x^2 + 3 for x to "
    "100, because the target is not scaled",
    "unnormalised_targets",
    "learning_rate_too_high",
    "exploding_gradients",
    "underfitting",
)
def parabola_of_two_linear_layers(mended):
    x = np.arange(100, dtype=np.float32)[:, None]
    y = x**2 + 3
    x = (x - x.mean()) / x.std()
    if mended:
        y = (y - y.mean()) / y.std()

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16 if mended else 1)(x)
            if mended:
                x = nn.relu(x)
            return nn.Dense(1)(x)

    net = Net()

    def mse(params, batch, key):
        inputs, targets = batch
        return jnp.mean((net.apply(params, inputs) - targets) ** 2)

    train = nnlearn.make_train(
        mse,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled((x, y), 25, remainder="drop"),
        lambda key: net.init(key, x),
        epochs=300,
        evaluate=lambda params: {"mse": mse(params, (x, y), None)},
        check_every=40,
    )
    return Case(train, {"lr": 0.05 if mended else 0.01}, net.apply, (x, y), "mse", mode="min")


@report(
    REPORTS,
    "https://stats.stackexchange.com/questions/280372: a network with two hidden layers cannot learn (x - 0.5)^2 and "
    "ends as a straight line; SGD at 0.001",
    "learning_rate_too_low",
    "underfitting",
)
def square_with_sgd_at_0_001(mended):
    inputs = np.float32([[0.01 * i] for i in range(100)])
    targets = (inputs - 0.5) ** 2

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        glorot = jax.nn.initializers.glorot_uniform()
        return [
            (glorot(k1, (1, 20)), jnp.zeros(20)),
            (glorot(k2, (20, 20)), jnp.zeros(20)),
            (glorot(k3, (20, 1)), jnp.zeros(1)),
        ]

    def model(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = params[-1]
        return x @ w + b

    def loss(params, batch, key):
        return optax.squared_error(model(params, batch["inputs"]), batch["targets"]).mean()

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adam(hp["rate"]) if mended else optax.sgd(hp["rate"]),
        nnlearn.generated(lambda key, step: {"inputs": inputs, "targets": targets}),
        init,
        steps=1000,
        evaluate=lambda params: {"mse": jnp.mean((model(params, inputs) - targets) ** 2)},
        check_every=50,
    )
    return Case(train, {"rate": 0.01 if mended else 0.001}, model, (inputs, targets), "mse", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/68962: one neuron shall learn Fahrenheit = 1.8 Celsius + 32 from "
    "13 pairs, after 500 epochs of Adam at 0.01 the bias is far off",
    "learning_rate_too_low",
    "underfitting",
    "unnormalised_targets",
    "unnormalised_inputs",
)
def celsius_to_fahrenheit(mended):
    celsius = np.array([-40, -25, -10, 0, 4, 8, 15, 22, 30, 38, 55, 80, 100], np.float64)
    fahrenheit = celsius * 1.8 + 32
    new = np.arange(-45.0, 110.0, 7.0)
    x, y, x_new, y_new = celsius, fahrenheit, new, new * 1.8 + 32
    if mended:
        x_new, x = (x_new - x.mean()) / x.std(), (x - x.mean()) / x.std()
        y_new, y = (y_new - y.mean()) / y.std(), (y - y.mean()) / y.std()

    def neuron(params, x):
        return params["weight"] * x + params["bias"]

    def loss(params, batch, key):
        return nnlearn.mean_squared_error(neuron(params, batch[0]), batch[1])

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((x, y), 13, remainder="drop"),
        lambda key: {"weight": random.uniform(key, (), minval=-1.0, maxval=1.0), "bias": jnp.zeros(())},
        epochs=500,
        evaluate=lambda params: {"mse": jnp.mean(jnp.square(neuron(params, x_new) - y_new))},
        check_every=25,
    )
    return Case(train, {"lr": 0.02 if mended else 0.01}, neuron, (x_new, y_new), "mse", mode="min")


@report(
    REPORTS,
    "https://datascience.stackexchange.com/questions/60170: Dense layers without activation learn the sum of two "
    "numbers, but not their product",
    "underfitting",
)
def product_without_activations(mended):
    rng = np.random.default_rng(1)
    numbers = rng.integers(1, 1000, size=(1200, 2))
    products = numbers[:, 0] * numbers[:, 1]
    X = numbers.astype("float32") / 1000
    Y = products.astype("float32")[:, None] / 1e6
    X_train, X_test, Y_train, Y_test = train_test_split(X, Y, test_size=200, random_state=0)
    act = jax.nn.relu if mended else (lambda h: h)

    def init(key):
        return eqx.filter(eqx.nn.MLP(2, 1, 48, 3, act, key=key), eqx.is_array)

    static = eqx.filter(eqx.nn.MLP(2, 1, 48, 3, act, key=random.key(0)), eqx.is_array, inverse=True)

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def loss_fn(params, batch, key):
        x, y = batch
        error = predict(params, x) - y
        return jnp.mean(error**2), {"rmse": jnp.sqrt(jnp.mean(error**2))}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled((X_train, Y_train), 100, remainder="drop"),
        init,
        epochs=100,
        evaluate=lambda params: {"mse": jnp.mean((predict(params, X_test) - Y_test) ** 2)},
        check_every=50,
    )
    return Case(train, {"lr": 0.001}, predict, (X_test, Y_test), "mse", mode="min")


@report(
    REPORTS,
    "https://stackoverflow.com/questions/44601367: a simple autoencoder gives 0.8, 0.89 and 0.91 for the row 1, 2, 3: "
    "its last layer is a sigmoid",
    "loss_output_mismatch",
    "saturated_activations",
    "unnormalised_targets",
)
def autoencoder_of_centimetres(mended):
    rows = load_iris().data
    if mended:
        rows = (rows - rows.mean(0)) / rows.std(0)
    train_rows, test_rows = train_test_split(rows, test_size=0.3, random_state=4)

    def init(key):
        k1, k2 = random.split(key)
        glorot = jax.nn.initializers.glorot_normal()
        return {
            "encoder": {"kernel": glorot(k1, (4, 3)), "bias": jnp.zeros(3)},
            "decoder": {"kernel": glorot(k2, (3, 4)), "bias": jnp.zeros(4)},
        }

    def reconstruct(params, x):
        code = x @ params["encoder"]["kernel"] + params["encoder"]["bias"]
        code = jnp.tanh(code) if mended else jax.nn.relu(code)
        out = code @ params["decoder"]["kernel"] + params["decoder"]["bias"]
        return out if mended else jax.nn.sigmoid(out)

    def loss(params, batch, key):
        return jnp.mean(jnp.square(reconstruct(params, batch) - batch))

    train = nnlearn.make_train(
        loss,
        lambda hp: nnlearn.rmsprop(hp["lr"]),
        nnlearn.shuffled(train_rows, 15, remainder="drop"),
        init,
        epochs=150,
        evaluate=lambda params: {"loss": loss(params, test_rows, None)},
        check_every=70,
    )
    return Case(train, {"lr": 0.003}, reconstruct, (test_rows, test_rows), "loss", mode="min")


@report(
    REPORTS,
    "http://ddrv.cn/?p=758668: a loss of distances between positions, sqrt(x^2 + y^2), is nan; the derivative of "
    "sqrt at 0 is infinite, and 1e-10 under the root helps",
    "numerical_precision",
    "exploding_gradients",
)
def distance_of_padded_tracks(mended):
    rng = np.random.RandomState(8)
    count, longest = 800, 14
    heading = np.cumsum(0.4 * rng.randn(count, longest), axis=1) + rng.uniform(0, 6.28, (count, 1))
    speed = rng.uniform(0.1, 0.5, (count, longest))
    velocity = speed[..., None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    alive = (np.arange(longest) < rng.randint(6, longest + 1, (count, 1)))[..., None].astype(np.float32)
    tracks = {
        "sensor": np.float32((velocity + 0.02 * rng.randn(*velocity.shape)) * alive),
        "position": np.float32(np.cumsum(velocity, axis=1) * alive),
        "alive": alive,
    }
    seen, unseen = ({k: v[part] for k, v in tracks.items()} for part in (slice(0, 640), slice(640, None)))
    units = 24

    def init(key):
        k1, k2, k3 = random.split(key, 3)
        return {
            "in": random.normal(k1, (2, units)) * 0.5,
            "rec": jax.nn.initializers.orthogonal()(k2, (units, units)),
            "bias": jnp.zeros(units),
            "out": random.normal(k3, (units, 2)) / units**0.5,
        }

    def follow(params, sensor):
        def step(h, x):
            h = jnp.tanh(x @ params["in"] + h @ params["rec"] + params["bias"])
            return h, h @ params["out"]

        start = jnp.zeros((sensor.shape[0], units))
        return jax.lax.scan(step, start, sensor.transpose(1, 0, 2))[1].transpose(1, 0, 2)

    def distance(params, batch, key):
        off = follow(params, batch["sensor"]) * batch["alive"] - batch["position"]
        squares = jnp.sum(off**2, axis=-1)
        metres = jnp.sqrt(squares + 1e-10) if mended else jnp.sqrt(squares)
        return jnp.sum(metres) / jnp.sum(batch["alive"])

    train = nnlearn.make_train(
        distance,
        lambda hp: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(hp["lr"])),
        nnlearn.shuffled(seen, 32, remainder="drop"),
        init,
        epochs=40,
        evaluate=lambda params: {"distance": distance(params, unseen, None)},
        check_every=40,
    )
    return Case(train, {"lr": 0.004}, None, None, "distance", mode="min")
