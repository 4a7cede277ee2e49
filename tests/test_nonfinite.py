"""The operation that makes a result infinite or NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.programs.nonfinite import find_nonfinite

X = jnp.array([2.0, 0.0, 3.0])


def masked(x):
    return jnp.sum(jax.nn.softmax(jnp.where(x > 1, x, -jnp.inf)))


def loop(x):
    def turn(h, t):
        return h - 1, jnp.log(h)

    return jax.lax.scan(turn, x[0] + 1, jnp.arange(5))[1]


def branch(x):
    return jax.lax.cond(x[0] > 1, lambda x: 1 / x, lambda x: x, x)


def guarded_too_late(x):
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0))


CASES = {
    "a logarithm": (lambda x: jnp.sum(jnp.log(x)), ("log", "inf", False, ())),
    "overflow": (lambda x: jnp.exp(x * 100).sum(), ("exp", "inf", False, ())),
    "the first of two": (lambda x: jnp.exp(jnp.log(-x - 1)) / 0, ("log", "nan", False, ())),
    "a mask is not blamed": (masked, None),
    "all masked": (lambda x: masked(x * 0), ("sub", "nan", False, ())),
    "masked again": (lambda x: jnp.where(x > 0, 1 / x, 0), None),
    "a loop": (loop, ("log", "inf", False, (3,))),
    "a branch": (branch, ("div", "inf", False, ())),
    "backward": (jax.grad(guarded_too_late), ("div", "inf", False, ())),
    "a call": (jax.jit(lambda x: jnp.sum(jnp.sqrt(x - 1))), ("sqrt", "nan", False, ())),
}


@pytest.mark.parametrize("name", CASES)
def test_the_operation_is_found(name):
    function, expected = CASES[name]
    found = find_nonfinite(function, X)
    if expected is None:
        assert found is None
        return
    assert found.operation == expected[0] and found.value == expected[1] and found.iterations == expected[3]
    assert found.where.file == __file__ and (found.operands or name == "all masked")


def test_an_argument_and_the_results_are_named():
    found = find_nonfinite(lambda tree: {"a": tree["x"] * 2, "b": jnp.ones(2)}, {"x": jnp.array([jnp.nan])})
    assert (found.operation, found.where.scope, found.results) == ("input", "0/x", ("a",))


def test_a_gradient_in_a_network():
    model = nnlearn.models.mlp((3, 4, 2), activation="tanh")
    params = model.init(jax.random.key(0))

    def loss(params, x):
        logits = model.apply(params, x)
        return jnp.mean(jnp.sqrt(jnp.sum((logits - logits) ** 2, axis=1)))

    assert find_nonfinite(loss, params, jnp.ones((2, 3))) is None
    found = find_nonfinite(jax.grad(loss), params, jnp.ones((2, 3)))
    assert found.where.function == "loss" and len(found.results) == len(jax.tree.leaves(params))
    np.testing.assert_array_equal(found.operands[-1], [0, 0])
