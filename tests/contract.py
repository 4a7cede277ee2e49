"""The table that every optimizer is held to, and the runs that the tests share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnlearn


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
      name: its name in nnlearn and optax.
      varied: every numeric hyper-parameter, away from its default.
      flags: settings that Python branches on, tried beside the default.
      bowl, rosenbrock: (learning rate, steps) that get to the minimum.
      complex: whether optax takes complex parameters in a way that makes sense.
      torch: from (torch, parameters) to the torch optimizer that does the same.
      torch_settings: nnlearn's settings that torch's correspond to.
    """

    name: str
    varied: dict[str, float]
    flags: tuple[dict[str, Any], ...] = ()
    bowl: tuple[float, int] = (0.1, 300)
    rosenbrock: tuple[float, int] = (0.1, 5000)
    complex: bool = True
    torch: Callable | None = None
    torch_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ours(self):
        return getattr(nnlearn, self.name)

    @property
    def theirs(self):
        return getattr(optax, self.name)


MOMENTS = {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "eps": 1e-4}
NESTEROV = ({"nesterov": True},)

CASES = [
    Case(
        "sgd",
        {"learning_rate": 0.03, "momentum": 0.8},
        NESTEROV,
        torch=lambda torch, params: torch.optim.SGD(params, lr=0.03, momentum=0.8, nesterov=True),
        torch_settings={"learning_rate": 0.03, "momentum": 0.8, "nesterov": True},
        rosenbrock=(0.001, 5000),
    ),
    Case(
        "rmsprop",
        {"learning_rate": 0.003, "decay": 0.8, "eps": 1e-4, "initial_scale": 0.5, "momentum": 0.7},
        ({"eps_in_sqrt": False}, {"centered": True}, {"bias_correction": True}, {"nesterov": True, "centered": True}),
        torch=lambda torch, params: torch.optim.RMSprop(
            params, lr=0.003, alpha=0.8, eps=1e-4, momentum=0.7, centered=True
        ),
        torch_settings={
            "learning_rate": 0.003,
            "decay": 0.8,
            "eps": 1e-4,
            "momentum": 0.7,
            "centered": True,
            "eps_in_sqrt": False,
        },
        rosenbrock=(0.01, 5000),
    ),
    Case(
        "adagrad",
        {"learning_rate": 0.3, "initial_accumulator_value": 0.4, "eps": 1e-3},
        bowl=(0.5, 600),
        torch=lambda torch, params: torch.optim.Adagrad(params, lr=0.3, initial_accumulator_value=0.4, eps=0.0),
        torch_settings={"learning_rate": 0.3, "initial_accumulator_value": 0.4, "eps": 0.0},
        rosenbrock=(1.0, 5000),
    ),
    Case(
        "adadelta",
        {"learning_rate": 0.3, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.01},
        bowl=(5.0, 1000),
        complex=False,
        rosenbrock=(1.0, 5000),
    ),
    Case(
        "adam",
        MOMENTS | {"eps_root": 1e-3},
        NESTEROV,
        torch=lambda torch, params: torch.optim.Adam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4),
        torch_settings=MOMENTS,
    ),
    Case(
        "amsgrad",
        MOMENTS | {"eps_root": 1e-3},
        ({"bias_correction_mu": False}, {"bias_correction_nu": False}),
        rosenbrock=(1.0, 5000),
    ),
    Case("adamax", MOMENTS, rosenbrock=(0.3, 5000)),
    Case("adamaxw", MOMENTS | {"weight_decay": 0.02}, rosenbrock=(0.3, 5000)),
    Case(
        "nadam",
        MOMENTS | {"eps_root": 1e-3},
        # torch's momentum schedule reaches b1 at once when it decays fast
        torch=lambda torch, params: torch.optim.NAdam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4, momentum_decay=1e6),
        torch_settings=MOMENTS,
    ),
    Case("nadamw", MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02}),
    Case(
        "adamw",
        MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02},
        NESTEROV,
        torch=lambda torch, params: torch.optim.AdamW(params, lr=0.03, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.02),
        torch_settings=MOMENTS | {"weight_decay": 0.02},
    ),
    Case("adabelief", MOMENTS | {"eps_root": 1e-3}, NESTEROV),
    Case("radam", MOMENTS | {"eps_root": 1e-3, "threshold": 6.0}, NESTEROV, rosenbrock=(0.003, 20000)),
    Case("yogi", MOMENTS, rosenbrock=(0.3, 5000)),
    Case(
        "lion",
        {"learning_rate": 0.03, "b1": 0.8, "b2": 0.95, "weight_decay": 0.02},
        bowl=(0.01, 1000),
        rosenbrock=(0.003, 5000),
    ),
    Case("lamb", MOMENTS | {"eps_root": 1e-3, "weight_decay": 0.02}, bowl=(0.02, 600), rosenbrock=(0.01, 5000)),
    Case(
        "lars",
        {"learning_rate": 0.3, "weight_decay": 0.02, "trust_coefficient": 0.05, "eps": 1e-2, "momentum": 0.7},
        NESTEROV,
        bowl=(1.0, 4000),
        rosenbrock=(1.0, 5000),
    ),
    Case("sign_sgd", {"learning_rate": 0.03}, bowl=(0.01, 1000), rosenbrock=(0.003, 5000)),
]

EVERYDAY = ("sgd", "adam", "adamw", "lion", "rmsprop")  # their long runs are compared in every gate

BY_NAME = {case.name: case for case in CASES}
STEPS = 200


def make_params(dtype=jnp.float32):
    """A small tree: matrix, vector, scalar."""
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(4, 3)), "b": random.normal(size=3), "s": np.array(0.7)}
    if jnp.issubdtype(dtype, jnp.complexfloating):
        params = {name: value + 1j * random.normal(size=np.shape(value)) for name, value in params.items()}
    return {name: jnp.asarray(value, dtype) for name, value in params.items()}


def make_noise(steps, dtype=jnp.float32):
    """Gradient noise for every step, stacked; it keeps moments away from trivial values."""
    random = np.random.default_rng(1)

    def like(param):
        noise = random.normal(size=(steps, *param.shape))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            noise = noise + 1j * random.normal(size=noise.shape)
        return jnp.asarray(0.3 * noise, dtype)

    return jax.tree.map(like, make_params(dtype))


def gradient(params, noise):
    """Of a bowl with a minimum at 0.5, plus noise."""
    return jax.tree.map(lambda p, n: (p - jnp.asarray(0.5, p.dtype)).astype(n.dtype) + n, params, noise)


def run(tx, params, noise):
    """As many steps as there is noise, in one scan: final parameters and state."""

    def step(carry, noise):
        params, state = carry
        updates, state = tx.update(gradient(params, noise), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), noise)[0]


def named_states(state):
    """The arrays of a state by name: counts, moments and traces, wherever they stand."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        names = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names:
            found[tuple([names[-1], *keys])] = leaf
    return found


def relative_error(ours, theirs):
    """Largest difference of two arrays, in units of the largest number of the second."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if np.iscomplexobj(theirs) and not np.iscomplexobj(ours):
        assert np.all(theirs.imag == 0)  # optax keeps a mean of squares as a complex number
        theirs = theirs.real
    scale = max(np.max(np.abs(theirs), initial=0.0), 1e-30)
    return float(np.max(np.abs(ours.astype(complex) - theirs.astype(complex)), initial=0.0) / scale)
