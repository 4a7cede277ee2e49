"""Quantiles, likelihoods and the evidence bound against plain formulas and torch, at the limits, and with masks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_masks_and_dtypes, check_number, check_reference, check_torch

from nnlearn.losses.likelihood import (
    gaussian_kl_divergence,
    gaussian_negative_log_likelihood,
    negative_evidence_lower_bound,
    poisson_negative_log_likelihood,
    quantile_loss,
)

RNG = np.random.default_rng(0)
X, Y, Z, W = RNG.normal(size=(4, 6, 3))
VARIANCES = np.exp(Z)
COUNTS = RNG.integers(0, 5, (6, 3))


def from_log(means, targets, log_variances, **options):
    return gaussian_negative_log_likelihood(means, targets, log_variances=log_variances, **options)


def plain_quantile(predictions, targets, quantile):
    error = targets - predictions
    return np.maximum(quantile * error, (quantile - 1) * error)


def plain_gaussian(means, targets, variances, full=False):
    return 0.5 * (np.log(variances) + (targets - means) ** 2 / variances + full * np.log(2 * np.pi))


def plain_poisson(log_rates, targets, full=False):
    return np.exp(log_rates) - targets * log_rates + full * np.vectorize(math.lgamma)(targets + 1.0)


def plain_kl(means, log_variances, prior_means=0.0, prior_log_variances=0.0):
    ratio = np.exp(log_variances) / np.exp(prior_log_variances)
    squares = (means - prior_means) ** 2 / np.exp(prior_log_variances)
    return 0.5 * np.sum(ratio + squares - 1 - np.log(ratio), -1)


def plain_bound(reconstruction_losses, divergences, beta=1.0):
    return np.mean(reconstruction_losses + beta * divergences)


CASES = {
    "quantile": (quantile_loss, plain_quantile, (X, Y), {"quantile": 0.8}),
    "quantiles": (quantile_loss, plain_quantile, (X, Y), {"quantile": np.array([0.1, 0.5, 0.9])}),
    "gaussian": (gaussian_negative_log_likelihood, plain_gaussian, (X, Y, VARIANCES), {}),
    "gaussian-log": (
        from_log,
        lambda m, t, v, **options: plain_gaussian(m, t, np.exp(v), **options),
        (X, Y, Z),
        {"full": True},
    ),
    "poisson": (poisson_negative_log_likelihood, plain_poisson, (X, COUNTS), {"full": True}),
    "kl": (gaussian_kl_divergence, plain_kl, (X, Y), {}),
    "kl-prior": (gaussian_kl_divergence, plain_kl, (X, Y, Z, W), {}),
    "bound": (negative_evidence_lower_bound, plain_bound, (X[:, 0], Y[:, 0]), {"beta": 0.5}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_those_of_a_plain_reference(case):
    check_reference(*case)


@pytest.mark.parametrize("name", ["quantile", "gaussian", "gaussian-log", "poisson", "kl-prior", "bound"])
def test_masks_and_dtypes(name):
    function, reference, arrays, options = CASES[name]

    def masked(*arrays, where=None, **options):
        shape = arrays[0].shape[:1] if name == "kl-prior" else arrays[0].shape
        if where is not None:
            where = jnp.broadcast_to(where.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
        return function(*arrays, where=where, **options)

    check_masks_and_dtypes(masked, reference, arrays, options)


# Against torch -------------------------------------------------------------------------------------------------------


def test_gaussian_equals_that_of_torch_also_below_the_smallest_variance():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.GaussianNLLLoss(full=True, eps=0.5, reduction="sum")
    ours = functools.partial(gaussian_negative_log_likelihood, full=True, epsilon=0.5)
    assert (VARIANCES < 0.5).any()
    check_torch(lambda *a: ours(*a).sum(), theirs, X, Y, VARIANCES)
    check_torch(lambda v: ours(X, Y, v).sum(), lambda v: theirs(torch.tensor(X), torch.tensor(Y), v), VARIANCES)


def test_poisson_equals_that_of_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.PoissonNLLLoss(reduction="sum")
    check_torch(lambda *a: poisson_negative_log_likelihood(*a).sum(), theirs, X, COUNTS)


def test_divergence_equals_that_of_torch():
    torch = pytest.importorskip("torch")

    def theirs(m, v, n, w):
        first, second = (torch.distributions.Normal(a, torch.exp(b / 2)) for a, b in ((m, v), (n, w)))
        return torch.distributions.kl_divergence(first, second).sum()

    check_torch(lambda *a: gaussian_kl_divergence(*a).sum(), theirs, X, Y, Z, W)


# Edges ---------------------------------------------------------------------------------------------------------------


def test_the_best_constant_is_the_quantile():
    targets = jnp.asarray(np.sort(RNG.exponential(size=101)), jnp.float32)
    costs = jax.jit(jax.vmap(lambda p: quantile_loss(jnp.full(101, p), targets, 0.9).mean()))(targets)
    assert np.argmin(costs) == 90


def test_half_the_absolute_error_has_zero_derivative_at_zero_error():
    assert jax.grad(lambda x: quantile_loss(x, 1.0, 0.5))(1.0) == 0


def test_extreme_log_variances():
    run = jax.jit(jax.value_and_grad(lambda m, v: from_log(m, 0.0, v), (0, 1)))
    floor = np.log(1e-6)
    for mean, given, value, slope in (
        (0.0, -1e4, 0.5 * floor, 0.5),
        (0.0, -np.inf, 0.5 * floor, 0.5),
        (1e-3, -1e4, 0.5 * (floor + 1), 0.0),  # the error equals the smallest deviation: the variance has no gradient
        (2e-3, -1e4, 0.5 * (floor + 4), -1.5),  # the error is larger: the variance grows
        (1e4, 1e4, 5e3, 0.5),
    ):
        found, (_, along) = run(jnp.float32(mean), jnp.float32(given))
        np.testing.assert_allclose([found, along], [value, slope], rtol=1e-5, atol=1e-4)


def test_a_variance_of_zero_can_grow_again():
    run = jax.jit(jax.value_and_grad(lambda v: gaussian_negative_log_likelihood(jnp.float32(1), 0.0, v)))
    value, grad = run(0.0)
    np.testing.assert_allclose([value, grad], [0.5 * (np.log(1e-6) + 1e6), 0.5 * (1e6 - 1e12)], rtol=1e-5)


def test_a_count_of_zero_at_a_rate_of_zero_has_no_loss():
    run = jax.jit(jax.vmap(jax.value_and_grad(poisson_negative_log_likelihood)))
    value, grad = run(jnp.array([-jnp.inf, -1e4, -1e4]), jnp.array([0, 0, 2]))
    np.testing.assert_allclose(value, [0, 0, 2e4])
    np.testing.assert_allclose(grad, [0, 0, -2])


@pytest.mark.parametrize("x64", [False, True])
def test_divergence_near_the_prior_is_accurate_and_never_negative(x64):
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        v = np.concatenate([10.0 ** np.arange(-15, 2), -(10.0 ** np.arange(-15, 2)), [0.249, 0.251, -0.249, -0.251]])
        v = v.astype(dtype)
        zeros = np.zeros((len(v), 1), dtype)
        run = jax.jit(jax.value_and_grad(lambda v: gaussian_kl_divergence(zeros, v).sum()))
        each = jax.jit(gaussian_kl_divergence)(zeros, v[:, None])
        w = np.float64(v)
        with np.errstate(invalid="ignore"):
            exact = 0.5 * np.where(np.abs(w) < 1e-3, w**2 / 2 + w**3 / 6 + w**4 / 24, np.expm1(w) - w)
        np.testing.assert_allclose(each, exact, rtol=1e-9 if x64 else 3e-6)
        assert (each >= 0).all()
        np.testing.assert_allclose(run(v[:, None])[1][:, 0], 0.5 * np.expm1(w), rtol=1e-12 if x64 else 1e-6)


def test_divergence_at_extremes():
    run = jax.jit(jax.value_and_grad(gaussian_kl_divergence, (0, 1)))
    value, grads = run(jnp.zeros(2), jnp.array([-1e4, 0.0]))
    np.testing.assert_allclose(value, 0.5 * (1e4 - 1), rtol=1e-6)
    assert all(np.isfinite(grad).all() for grad in grads)
    narrow = jax.jit(jax.value_and_grad(lambda m: gaussian_kl_divergence(m, jnp.full(1, -1e4), m + 0.0, -1e4)))
    value, grad = narrow(jnp.ones(1))  # equal distributions, with a variance below the range of float32
    assert value == 0 and not grad.any()


NUMBERS = {
    "quantile": (lambda v: quantile_loss(X, Y, v), [0.0, 0.5, 1.0]),
    "epsilon": (lambda v: gaussian_negative_log_likelihood(X, Y, VARIANCES, epsilon=v), [1e-6, 0.7, 100.0]),
    "epsilon-log": (lambda v: from_log(X, Y, Z, epsilon=v), [1e-6, 0.7, 100.0]),
    "beta": (lambda v: negative_evidence_lower_bound(X, Y, beta=v), [0.0, 1.0, 4.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_traced(name):
    check_number(*NUMBERS[name])


def test_the_bound_is_above_the_likelihood_of_a_linear_model():
    """With x = z + noise both are known: the bound is tight at the posterior, a normal of mean x/2 and variance 1/2."""
    x = np.float32(1.3)

    def bound(mean, log_variance):
        # The expected reconstruction loss is that at the mean plus half the variance.
        reconstruction = gaussian_negative_log_likelihood(mean, x, 1.0, full=True) + 0.5 * jnp.exp(log_variance)
        divergence = gaussian_kl_divergence(mean[None], log_variance[None])
        return negative_evidence_lower_bound(reconstruction, divergence)

    evidence = 0.5 * (np.log(2 * np.pi * 2) + x**2 / 2)
    run = jax.jit(jax.value_and_grad(bound, (0, 1)))
    value, grads = run(x / 2, np.float32(np.log(0.5)))
    np.testing.assert_allclose(value, evidence, rtol=1e-6)
    np.testing.assert_allclose(grads, 0, atol=1e-6)
    assert run(x, np.float32(0))[0] > evidence + 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantile_loss(X, Y[:3], 0.5), r"predictions \(6, 3\) and targets \(3, 3\) must have one shape"),
        (lambda: quantile_loss(X, Y, 1.5), r"quantile must be in \[0.0, 1.0\], got 1.5; 0.9 for 90 percent"),
        (lambda: quantile_loss(X, Y, [0.1, 0.9]), r"quantile must be a scalar or have shape \(3,\)"),
        (lambda: quantile_loss(X, Y, 0.5, where=np.ones(6, bool)), "where must have shape"),
        (lambda: gaussian_negative_log_likelihood(X, Y), "give exactly one of variances and log_variances"),
        (lambda: gaussian_negative_log_likelihood(X, Y, Z, log_variances=Z), "give exactly one of"),
        (lambda: gaussian_negative_log_likelihood(X, Y, Z), "variances must be >= 0, got"),
        (
            lambda: gaussian_negative_log_likelihood(X, Y, VARIANCES[0]),
            r"means \(6, 3\) and variances \(3,\)",
        ),
        (lambda: gaussian_negative_log_likelihood(X, Y, 1.0, epsilon=0.0), "epsilon must be in"),
        (lambda: poisson_negative_log_likelihood(X, COUNTS - 3), "targets must be >= 0, got a smallest value of -3"),
        (lambda: gaussian_kl_divergence(X, Y[:3]), r"means \(6, 3\) and log_variances \(3, 3\) must have one shape"),
        (lambda: gaussian_kl_divergence(X, Y, Z[0]), r"means \(6, 3\) and prior_means \(3,\) must have one shape"),
        (lambda: gaussian_kl_divergence(X, Y, axis=2), "axis 2 is out of bounds"),
        (lambda: negative_evidence_lower_bound(X, Y, beta=-1.0), "beta must be in"),
        (lambda: negative_evidence_lower_bound(X, Y[:3]), r"reconstruction_losses \(6, 3\) and divergences \(3, 3\)"),
    ],
)
def test_wrong_values_and_shapes_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantile_loss(COUNTS, Y, 0.5), "predictions must be of floating dtype"),
        (lambda: from_log(X, Y, COUNTS), "log_variances must be of floating dtype"),
        (lambda: gaussian_kl_divergence(X, COUNTS), "log_variances must be of floating dtype"),
        (lambda: poisson_negative_log_likelihood(X, COUNTS, where=COUNTS), "where must be boolean"),
    ],
)
def test_wrong_types_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_masked_entries_are_not_checked():
    where = COUNTS > 1
    counts, variances = np.where(where, COUNTS, -999), np.where(where, VARIANCES, -1.0)
    found = poisson_negative_log_likelihood(X, counts, where=where)
    np.testing.assert_allclose(found, np.where(where, plain_poisson(X, COUNTS), 0), rtol=1e-5)
    found = gaussian_negative_log_likelihood(X, Y, variances, where=where)
    np.testing.assert_allclose(found, np.where(where, plain_gaussian(X, Y, VARIANCES), 0), rtol=1e-5, atol=1e-6)
