"""The page of landscapes: its paths are those of runs today, and its minima are minima."""

import base64
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def landscape():
    sys.path.insert(0, str(DOCS / "_ext"))
    import landscape

    sys.path.remove(str(DOCS / "_ext"))
    return landscape


def test_the_stored_paths_are_those_of_runs(landscape):
    stored = json.loads(re.search(r'id="data">(.*?)</script>', landscape.OUT.read_text()).group(1))
    name, optimizer, rate, momentum = "Rosenbrock's valley", "adam", 4, 3
    function = landscape.FUNCTIONS[name]
    path, values = jax.jit(
        lambda rate, momentum: landscape.descend(function, landscape.OPTIMIZERS[optimizer], rate, momentum)
    )(landscape.RATES[rate], landscape.MOMENTA[momentum])
    codes = np.frombuffer(base64.b64decode(stored["functions"][name]["paths"][optimizer]["path"]), "<u2")
    shape = len(landscape.MOMENTA), len(landscape.RATES), len(landscape.kept_steps()), 2
    left, right, bottom, top = function.view
    span = 3 * np.array([right - left, top - bottom])
    drawn = codes.reshape(shape)[momentum, rate] / (landscape.OUTSIDE - 1) * span + [2 * left - right, 2 * bottom - top]
    np.testing.assert_allclose(drawn, path[landscape.kept_steps()], atol=2e-3)
    assert stored["functions"].keys() == landscape.FUNCTIONS.keys()
    assert values[-1] < values[0]


def test_the_stars_are_minima(landscape):
    for function in landscape.FUNCTIONS.values():
        for x, y in function.minima:
            point = jnp.array([x, y], float)
            assert function.value(*point) == pytest.approx(0, abs=1e-6)
            np.testing.assert_allclose(jax.grad(lambda p, f=function: f.value(*p))(point), 0, atol=1e-3)
