"""Functions of time and place: a differential equation, and an image as a field."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.ndimage import zoom
from sklearn import datasets

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report

REPORTS: list[Report] = []


@report(
    REPORTS,
    "https://github.com/NeuroDiffGym/neurodiffeq/issues/90 and https://github.com/lululxvi/deepxde/issues/608: "
    "a differential equation over a long time: low loss, wrong solution; answer: substitute s = t / t_max",
    "unnormalised_inputs",
    "saturated_activations",
)
def pinn_raw_time(mended):
    hour, k, room = 3600.0, 1.2e-3, 0.2  # T' = -k (T - room), T(0) = 1, t in seconds

    def exact(t):
        return room + (1 - room) * np.exp(-k * t)

    def init(key):
        sizes = (1, 50, 50, 1)
        glorot = jax.nn.initializers.glorot_normal()
        return [
            (glorot(k, (n, m)), jnp.zeros(m))
            for k, n, m in zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
        ]

    def net(params, t):
        h = jnp.reshape(t, (1,))
        for w, b in params[:-1]:
            h = jnp.tanh(h @ w + b)
        w, b = params[-1]
        return (h @ w + b)[0]

    span = 1.0 if mended else hour  # the answer: s = t / 3600, dT/ds = 3600 dT/dt
    rate = k * hour / span

    def residual(params, t):
        temperature, slope = jax.value_and_grad(net, 1)(params, t)
        return slope + rate * (temperature - room)

    def loss(params, t, key):
        ode = jnp.mean(jax.vmap(residual, (None, 0))(params, t) ** 2)
        ic = (net(params, 0.0) - 1.0) ** 2
        return ode + ic, {"ode": ode, "ic": ic}

    grid = np.linspace(0, span, 200, dtype=np.float32)
    truth = exact(np.linspace(0, hour, 200))

    def solution(params, t):
        return jax.vmap(net, (None, 0))(params, t)

    train = nnlearn.make_train(
        loss,
        optax.adam(1e-3),
        nnlearn.generated(lambda key, step: jax.random.uniform(key, (64,), maxval=span)),
        init,
        steps=2500,
        evaluate=lambda params: {"rmse": jnp.sqrt(jnp.mean((solution(params, grid) - truth) ** 2))},
        check_every=250,
    )
    return Case(train, {}, solution, (grid, truth), "rmse", "min")


@report(
    REPORTS,
    "https://github.com/lucidrains/siren-pytorch/issues/1 and https://github.com/JiaxiongQ/NeRC/issues/1: "
    "layers of sines need the initialisation of the paper, not that of nn.Linear",
    "bad_initialisation",
    "exploding_gradients",
)
def siren_default_initialisation(mended):
    side, hidden, w0 = 64, 48, 30.0
    axis = np.linspace(-1, 1, side)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    image = zoom(datasets.load_digits().images[7] / 8 - 1, side / 8, order=3)  # about [-1, 1]
    image = image.reshape(-1, 1)
    order = np.random.default_rng(0).permutation(side * side)
    seen, hidden_ones = order[:3072], order[3072:]

    def init(key):
        sizes = [2, hidden, hidden, hidden, 1]
        params = []
        for i, k in enumerate(jax.random.split(key, 4)):
            n, m = sizes[i : i + 2]
            bound = 1 / np.sqrt(n)  # as nn.Linear has it
            if mended:
                bound = 1 / n if i == 0 else np.sqrt(6 / n) / w0
            params.append({"w": jax.random.uniform(k, (n, m), minval=-bound, maxval=bound), "b": jnp.zeros(m)})
        return params

    def field(params, xy):
        h = xy
        for p in params[:-1]:
            h = jnp.sin(w0 * (h @ p["w"] + p["b"]))
        return h @ params[-1]["w"] + params[-1]["b"]

    def loss(params, batch, key):
        xy, value = batch
        return jnp.mean((field(params, xy) - value) ** 2)

    train = nnlearn.make_train(
        loss,
        optax.adam(5e-4),
        nnlearn.shuffled((grid[seen], image[seen]), 256, remainder="drop"),
        init,
        steps=600,
        evaluate=lambda params: {
            "psnr": 10 * jnp.log10(4 / jnp.mean((field(params, grid[hidden_ones]) - image[hidden_ones]) ** 2))
        },
        check_every=100,
    )
    return Case(train, {}, field, (grid[hidden_ones], image[hidden_ones]), "psnr")
