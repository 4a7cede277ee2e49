"""Writes ``docs/_static/landscape.html``: paths of descent on small functions. ``python docs/_ext/landscape.py``.

Every path is a run of nnlearn, computed here for all rates and momenta as one program for each function and optimizer.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nnlearn
from nnlearn.figures.page.thin import encode
from nnlearn.figures.page.write import document, header
from nnlearn.files import replacing

HERE = Path(__file__).parent
OUT = HERE.parent / "_static" / "landscape.html"
STEPS, POINTS = 300, 61
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 1, 13))
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95)
GRID = (160, 120)
SOLVED = 1e-3
OUTSIDE = 65535  # of a path that has left the picture by far, or is not finite


class Function(NamedTuple):
    """A function of (x, y) with minimum 0.

    Attributes:
      text: the formula.
      value: ``value(x, y)``.
      start: where descent begins.
      view: left, right, bottom and top of the picture.
      minima: its lowest points.
    """

    text: str
    value: Callable
    start: tuple[float, float]
    view: tuple[float, float, float, float]
    minima: tuple[tuple[float, float], ...]


FUNCTIONS = {
    "bowl": Function(
        "(x² + 20 y²) / 2", lambda x, y: (x**2 + 20 * y**2) / 2, (-2.5, 1.0), (-3.2, 3.2, -2.4, 2.4), ((0, 0),)
    ),
    "Rosenbrock's valley": Function(
        "(1 − x)² + 10 (y − x²)²",
        lambda x, y: (1 - x) ** 2 + 10 * (y - x**2) ** 2,
        (-1.2, 1.6),
        (-2.0, 2.0, -1.0, 2.0),
        ((1, 1),),
    ),
    "Himmelblau's four minima": Function(
        "(x² + y − 11)² + (x + y² − 7)²",
        lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
        (-0.5, -1.0),
        (-6.4, 6.4, -4.8, 4.8),
        ((3, 2), (-2.805118, 3.131312), (-3.779310, -3.283186), (3.584428, -1.848126)),
    ),
    "saddle": Function(
        "x² − y² + y⁴ / 2 + 1 / 2",
        lambda x, y: x**2 - y**2 + y**4 / 2 + 0.5,
        (1.7, 0.001),
        (-2.4, 2.4, -1.8, 1.8),
        ((0, 1), (0, -1)),
    ),
    "egg box": Function(
        "x² + y² + 2 (2 − cos 4x − cos 4y)",
        lambda x, y: x**2 + y**2 + 2 * (2 - jnp.cos(4 * x) - jnp.cos(4 * y)),
        (-2.6, 1.9),
        (-3.2, 3.2, -2.4, 2.4),
        ((0, 0),),
    ),
}
OPTIMIZERS = {
    "sgd": lambda rate, momentum: nnlearn.sgd(rate, momentum),
    "nesterov": lambda rate, momentum: nnlearn.sgd(rate, momentum, nesterov=True),
    "rmsprop": lambda rate, momentum: nnlearn.rmsprop(rate, momentum=momentum),
    "adam": lambda rate, momentum: nnlearn.adam(rate, b1=momentum),
    "adopt": lambda rate, momentum: nnlearn.adopt(rate, b1=momentum),
    "lion": lambda rate, momentum: nnlearn.lion(rate, b1=momentum),
    "schedule-free": lambda rate, momentum: nnlearn.schedule_free_sgd(rate, b1=jnp.maximum(momentum, 0.01)),
}


def kept_steps() -> np.ndarray:
    """The steps that the page shows: all at first, fewer later."""
    return np.unique(np.round(np.linspace(0, 1, POINTS) ** 1.6 * STEPS).astype(int))


def descend(function: Function, make_tx: Callable, rate, momentum):
    """Positions after 0, 1, ... steps, shape (steps + 1, 2), and the values there."""
    tx, start = make_tx(rate, momentum), jnp.array(function.start)

    def loss_fn(params, batch, key):
        return function.value(*params)

    step = nnlearn.make_step(loss_fn, tx, record=())

    def one(state, _):
        state, info = step(state, None)
        return state, (state.params, info.loss)

    last, (path, losses) = jax.lax.scan(one, nnlearn.init_state(start, tx), length=STEPS)
    return jnp.concatenate([start[None], path]), jnp.append(losses, function.value(*last.params))


def all_paths(function: Function, make_tx: Callable):
    """All rates and momenta at once: positions, shape (momenta, rates, steps + 1, 2), and values."""
    over_rates = jax.vmap(lambda rate, momentum: descend(function, make_tx, rate, momentum), in_axes=(0, None))
    over_both = jax.jit(jax.vmap(over_rates, in_axes=(None, 0)))
    return over_both(jnp.array(RATES), jnp.array(MOMENTA))


def coded(paths: np.ndarray, view: tuple[float, float, float, float]) -> str:
    """Positions at the kept steps as base64 of 16-bit integers, over three times the view."""
    left, right, bottom, top = view
    low = np.array([2 * left - right, 2 * bottom - top])
    span = 3 * np.array([right - left, top - bottom])
    unit = (np.asarray(paths, np.float64)[..., kept_steps(), :] - low) / span
    is_inside = np.all((unit >= 0) & (unit <= 1), axis=-1, keepdims=True)
    codes = np.where(is_inside, np.round(np.where(is_inside, unit, 0) * (OUTSIDE - 1)), OUTSIDE)
    return base64.b64encode(codes.astype("<u2").tobytes()).decode()


def heights(function: Function) -> str:
    """The function over the view as bytes, in the logarithm."""
    left, right, bottom, top = function.view
    x, y = np.meshgrid(np.linspace(left, right, GRID[0]), np.linspace(top, bottom, GRID[1]))
    logs = np.log(np.asarray(function.value(x, y)) + 0.02)
    unit = (logs - logs.min()) / (logs.max() - logs.min())
    return base64.b64encode(np.round(255 * unit).astype(np.uint8).tobytes()).decode()


def results(values: np.ndarray) -> dict:
    """The last value of each path, and the first step from which the function is below ``SOLVED``; -1 if none."""
    values = np.asarray(values, np.float64)
    low = np.where(np.isfinite(values), values, np.inf) < SOLVED
    stays = np.flip(np.logical_and.accumulate(np.flip(low, -1), -1), -1)
    first = np.where(stays.any(-1), stays.argmax(-1), -1)
    return {"last": encode(values[..., -1]), "solved": encode(first)}


def numbers() -> dict:
    """Everything that the script of the page draws."""
    functions = {}
    for name, function in FUNCTIONS.items():
        paths = {}
        for optimizer, make_tx in OPTIMIZERS.items():
            positions, values = all_paths(function, make_tx)
            paths[optimizer] = {"path": coded(positions, function.view), **results(values)}
        functions[name] = {"text": function.text, "view": function.view, "start": function.start}
        functions[name] |= {"minima": function.minima, "heights": heights(function), "paths": paths}
    common = {"rates": RATES, "momenta": MOMENTA, "steps": kept_steps().tolist(), "grid": GRID, "solved": SOLVED}
    return {"functions": functions, **common}


def page() -> str:
    line = f"paths of descent, computed by nnlearn {nnlearn.__version__}"
    body = header("Landscapes", line) + '<main id="main"></main>'
    return document("Landscapes", body, numbers(), (HERE / "landscape.js").read_text())


def main() -> None:
    with replacing(OUT) as file:
        file.write(page())
    print(f"{OUT}: {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
