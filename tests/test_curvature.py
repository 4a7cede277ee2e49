"""Curvature against exact Hessians of a small network in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import nnlearn
from nnlearn.gradients import curvature


@pytest.fixture(scope="module")
def exact():
    """A network, its loss, and the exact Hessian and Gauss-Newton matrix."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x, y = jax.random.normal(keys[0], (20, 3), float), jax.random.normal(keys[1], (20, 2), float)
        first, second = (
            jax.random.normal(key, shape, float) for key, shape in zip(keys[2:], ((3, 6), (6, 2)), strict=True)
        )
        params = {"first": first, "second": second}

        def outputs(params):
            return jnp.tanh(x @ params["first"]) @ params["second"]

        def error(outputs):
            return jnp.mean((outputs - y) ** 2)

        def loss(params):
            return error(outputs(params))

        flat, unravel = ravel_pytree(params)

        @jax.jit
        def matrices(flat):
            jacobian = jax.jacobian(lambda flat: outputs(unravel(flat)).ravel())(flat)
            return jax.hessian(lambda flat: loss(unravel(flat)))(flat), 2 / 40 * jacobian.T @ jacobian

        hessian, gauss_newton = map(np.asarray, matrices(flat))
        yield params, loss, outputs, error, hessian, gauss_newton


def test_products_and_extreme_eigenvalues_are_exact(exact):
    params, loss, outputs, error, hessian, gauss_newton = exact
    vector = jax.tree.map(lambda leaf: jnp.cos(leaf), params)
    flat = ravel_pytree(vector)[0]

    @jax.jit
    def measure(params):
        product = functools.partial(curvature.hessian_product, loss, params)
        return (
            product(vector),
            curvature.gauss_newton_product(outputs, error, params, vector),
            curvature.extreme_eigenvalues(product, params, steps=30),
            curvature.hutchinson_trace(product, params, probes=400),
            curvature.spectral_density(product, params, steps=30, probes=40),
        )

    product, newton, found, trace, density = measure(params)
    np.testing.assert_allclose(ravel_pytree(product)[0], hessian @ flat, rtol=1e-9)
    np.testing.assert_allclose(ravel_pytree(newton)[0], gauss_newton @ flat, rtol=1e-9)
    values, vectors = np.linalg.eigh(hessian)
    np.testing.assert_allclose(found.high, values[-1], rtol=1e-6)
    np.testing.assert_allclose(found.low, values[0], rtol=1e-6)
    assert abs(found.high - values[-1]) <= found.high_error + 1e-12
    assert abs(abs(ravel_pytree(found.direction)[0] @ vectors[:, -1]) - 1) < 1e-6
    assert abs(trace.trace - np.trace(hessian)) < 4 * trace.error
    beside = hessian - np.diag(np.diag(hessian))
    np.testing.assert_allclose(trace.error, np.sqrt(2 * np.sum(beside**2) / 400), rtol=0.2)
    grid = np.linspace(values[0] - 1, values[-1] + 1, 400)
    curve = density.smooth(jnp.asarray(grid), 0.3)
    exactly = np.mean(np.exp(-(((grid[:, None] - values) / 0.3) ** 2) / 2) / (0.3 * np.sqrt(2 * np.pi)), axis=1)
    assert np.trapezoid(np.abs(curve - exactly), grid) < 0.25 and abs(np.trapezoid(curve, grid) - 1) < 1e-3


@pytest.mark.slow
def test_sharpness_with_adams_preconditioner(exact):
    params, loss, _, _, hessian, _ = exact
    tx = optax.adam(0.01)
    state = tx.init(params)
    _, state = tx.update(jax.grad(loss)(params), state, params)
    weights = curvature.adam_preconditioner(state)
    flat = np.asarray(ravel_pytree(weights)[0])
    measure = jax.jit(
        lambda params: curvature.sharpness(
            loss, params, learning_rate=0.01, momentum=0.9, dampened=True, preconditioner=weights, steps=30
        )
    )
    found = measure(params)
    values = np.linalg.eigvalsh(hessian / np.sqrt(flat[:, None] * flat[None]))
    np.testing.assert_allclose(found.value, values[-1], rtol=1e-6)
    np.testing.assert_allclose(found.limit, 3800, rtol=1e-6)
    np.testing.assert_allclose(nnlearn.global_norm(found.direction), 1, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_limit_is_where_gradient_descent_turns_unstable(momentum):
    def end(rate):
        tx = nnlearn.sgd(rate, momentum)
        train = nnlearn.make_train(
            lambda p, b, k: 2.0 * p**2, tx, nnlearn.generated(lambda key, step: step), jnp.ones(()), steps=300
        )
        return jnp.abs(train({}, 0)[0].params)

    found = curvature.sharpness(lambda p: 2.0 * p**2, jnp.ones(()), learning_rate=1.0, momentum=momentum)
    edge = float(found.limit / found.value)  # the rate at which the value equals the limit
    below, above = jax.jit(jax.vmap(end))(edge * jnp.array([0.95, 1.05]))
    assert below < 1e-3 and above > 1e3


@pytest.mark.slow
def test_a_matrix_of_low_rank_and_a_plane():
    matrix = jnp.outer(jnp.ones(5), jnp.ones(5))
    found = curvature.extreme_eigenvalues(lambda v: matrix @ v, jnp.zeros(5), steps=5)
    np.testing.assert_allclose([found.low, found.high], [0, 5], atol=1e-5)
    assert bool(jnp.all(jnp.isfinite(jnp.array(curvature.lanczos(lambda v: 0 * v, jnp.zeros(5)).values))))
    plane = curvature.loss_on_plane(
        lambda p: p[0] + 10 * p[1], jnp.zeros(2), *jnp.eye(2), jnp.arange(3.0), jnp.arange(2.0)
    )
    np.testing.assert_array_equal(plane, [[0, 1, 2], [10, 11, 12]])
    with pytest.raises(ValueError, match="one second moment"):
        curvature.adam_preconditioner(nnlearn.sgd(0.1).init(jnp.zeros(1)))
