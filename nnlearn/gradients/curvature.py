r"""The curvature of a loss: products with its Hessian, eigenvalues, their density, traces, and the loss along lines.

Everything is a function of ``function(params) -> scalar``, such as ``lambda params: loss_fn(params, batch, key)``, and
of products with a matrix, so no matrix of the size of the parameters squared is ever formed. A product with the Hessian
costs about as much as two gradients. All of it can be jitted and vmapped.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from nnlearn.checks import as_key, check_count, check_number
from nnlearn.tree import global_norm, safe_divide
from nnlearn.types import Key, OptState, Params, PyTree, Scalar

Product = Callable[[PyTree], PyTree]
"""The product of a symmetric matrix with a tree like the parameters."""


def hessian_product(function: Callable[[Params], jax.Array], params: Params, vector: PyTree) -> PyTree:
    r"""The product of a function's Hessian with a vector, :math:`H v`, the derivative of the gradient along ``v``.

    Args:
      function: ``function(params) -> scalar``.
      params: where the Hessian is taken.
      vector: a tree like ``params``.

    Returns:
      A tree like ``params``.

    Source: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian", Neural Computation 6.

    >>> hessian_product(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
    Array([4., 2.], dtype=float32)
    """
    return jax.jvp(jax.grad(function), (params,), (vector,))[1]


def gauss_newton_product(
    outputs: Callable[[Params], PyTree], loss: Callable[[PyTree], jax.Array], params: Params, vector: PyTree
) -> PyTree:
    r"""The product of the Gauss-Newton matrix with a vector, :math:`J^T H_{out} J v`.

    It is the Hessian of ``loss(outputs(params))`` without the curvature of ``outputs``, and positive semidefinite if
    the loss is convex. For a softmax cross-entropy or a squared error it is the Fisher matrix of the model.

    Args:
      outputs: ``outputs(params)``, such as the logits of a batch.
      loss: ``loss(outputs) -> scalar``.
      params: where the matrix is taken.
      vector: a tree like ``params``.

    Returns:
      A tree like ``params``.

    Source: Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural
    Computation 14.

    >>> outputs = lambda x: x**2
    >>> gauss_newton_product(outputs, jnp.sum, jnp.array([3.0]), jnp.array([1.0]))
    Array([0.], dtype=float32)
    >>> gauss_newton_product(outputs, lambda y: jnp.sum(y**2) / 2, jnp.array([3.0]), jnp.array([1.0]))
    Array([36.], dtype=float32)
    """
    made, change = jax.jvp(outputs, (params,), (vector,))
    curved = jax.jvp(jax.grad(loss), (made,), (change,))[1]
    return jax.vjp(outputs, params)[1](curved)[0]


class Spectrum(NamedTuple):
    """Eigenvalues that Lanczos found from one start, ascending; shape (steps,).

    Attributes:
      values: Ritz values, which approximate eigenvalues, the extreme ones first. Steps after the whole space has been
        searched repeat none: their weight is 0.
      weights: the share of the density at each value, from this start; they sum to 1.
      residuals: the distance of each value from an eigenvalue is at most this.
      largest: the eigenvector of the largest value, a tree like the parameters with norm 1.
    """

    values: jax.Array
    weights: jax.Array
    residuals: jax.Array
    largest: PyTree


def lanczos(product: Product, like: Params, key: Key | int = 0, steps: int = 32) -> Spectrum:
    r"""Eigenvalues of a symmetric matrix that is known by its products, by Lanczos' method.

    After k steps the matrix is :math:`T_k = Q_k^T A Q_k` on the space of :math:`v, A v, \dots, A^{k-1} v`, with a
    random ``v``. Its eigenvalues approximate those of A. Every new direction is orthogonalized against all earlier ones
    twice.

    Args:
      product: ``product(vector) -> vector``, such as ``functools.partial(hessian_product, function, params)``.
      like: a tree like the vectors; its dtype is that of the arithmetic.
      key: a random key or seed for the start.
      steps: the number of products, a Python int. The largest eigenvalue of a network's Hessian needs 10 to 30.

    Returns:
      A ``Spectrum``.

    Raises:
      ValueError: if ``steps`` is below 1.

    >>> matrix = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
    >>> lanczos(lambda vector: matrix @ vector, jnp.zeros(3), steps=3).values.round(3)
    Array([1., 2., 5.], dtype=float32)
    """
    flat, unravel = ravel_pytree(like)
    steps = min(check_count("steps", steps), max(flat.size, 1))
    start = jax.random.normal(as_key(key), flat.shape, flat.dtype)
    basis = jnp.zeros((steps, flat.size), flat.dtype)
    tiny = jnp.asarray(jnp.finfo(flat.dtype).eps, flat.dtype) * 10

    def turn(at, carry):
        basis, diagonal, beside, vector, size = carry
        basis = basis.at[at].set(vector)
        new = ravel_pytree(product(unravel(vector)))[0].astype(flat.dtype)
        diagonal = diagonal.at[at].set(jnp.vdot(vector, new))
        for _ in range(2):
            new = new - basis.T @ (basis @ new)
        size = jnp.maximum(size, jnp.abs(diagonal[at]) + jnp.linalg.norm(new))
        norm = jnp.linalg.norm(new)
        exhausted = norm <= tiny * size  # the space is invariant: the rest of the steps adds nothing
        beside = beside.at[at].set(jnp.where(exhausted, 0, norm))
        return basis, diagonal, beside, jnp.where(exhausted, 0, safe_divide(new, norm)), size

    zeros = jnp.zeros(steps, flat.dtype)
    first = basis, zeros, zeros, start / jnp.linalg.norm(start), jnp.zeros((), flat.dtype)
    basis, diagonal, beside, _, _ = jax.lax.fori_loop(0, steps, turn, first)
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    weights = jnp.square(vectors[0])
    largest = jnp.argmax(jnp.where(jnp.any(basis != 0, axis=1) @ jnp.square(vectors) > 0.5, values, -jnp.inf))
    residuals = jnp.abs(beside[-1] * vectors[-1])
    return Spectrum(values, weights, residuals, unravel(vectors[:, largest] @ basis))


class Extremes(NamedTuple):
    """The smallest and the largest eigenvalue, the eigenvector of the largest, and bounds of their errors."""

    low: jax.Array
    high: jax.Array
    direction: PyTree
    low_error: jax.Array
    high_error: jax.Array


def extreme_eigenvalues(product: Product, like: Params, key: Key | int = 0, steps: int = 32) -> Extremes:
    """The smallest and the largest eigenvalue of a symmetric matrix; arguments as in ``lanczos``.

    Returns:
      ``Extremes``. ``high`` is below the largest eigenvalue, ``low`` above the smallest; each is within its error of
      an eigenvalue.

    >>> matrix = jnp.diag(jnp.array([-1.0, 2.0, 5.0]))
    >>> found = extreme_eigenvalues(lambda vector: matrix @ vector, jnp.zeros(3))
    >>> found.low.round(3), found.high.round(3)
    (Array(-1., dtype=float32), Array(5., dtype=float32))
    """
    values, weights, residuals, largest = lanczos(product, like, key, steps)
    found = weights > 0
    high = jnp.argmax(jnp.where(found, values, -jnp.inf))
    low = jnp.argmin(jnp.where(found, values, jnp.inf))
    return Extremes(values[low], values[high], largest, residuals[low], residuals[high])


class Density(NamedTuple):
    """The density of eigenvalues as points with weights, shape (probes, steps); ``smooth`` makes it a curve."""

    values: jax.Array
    weights: jax.Array

    def smooth(self, at: jax.Array, width: Scalar) -> jax.Array:
        """The density at the points ``at``, as Gaussians of standard deviation ``width``; it integrates to 1."""
        distance = (at[:, None] - self.values.ravel()[None]) / width
        peaks = jnp.exp(-jnp.square(distance) / 2) / (width * math.sqrt(2 * math.pi))
        return peaks @ (self.weights.ravel() / self.values.shape[0])


def spectral_density(product: Product, like: Params, key: Key | int = 0, steps: int = 32, probes: int = 8) -> Density:
    """The density of the eigenvalues of a symmetric matrix, by Lanczos from several random starts.

    Args:
      product, like, key, steps: as in ``lanczos``.
      probes: the number of starts; the error of a share falls as 1 / sqrt(probes).

    Returns:
      A ``Density``: the mean over probes of ``sum_i weights_i * delta(x - values_i)``.

    Raises:
      ValueError: if ``probes`` is below 1.

    Source: Ghorbani, Krishnan, Xiao 2019, "An Investigation into Neural Net Optimization via Hessian Eigenvalue
    Density", arXiv:1901.10159.

    >>> matrix = jnp.diag(jnp.array([0.0, 0.0, 0.0, 4.0]))
    >>> density = spectral_density(lambda vector: matrix @ vector, jnp.zeros(4), steps=4, probes=200)
    >>> mean = jnp.mean(jnp.sum(density.values * density.weights, axis=1))  # the trace over the dimension
    >>> bool(jnp.abs(mean - 1) < 0.15)
    True
    """
    keys = jax.random.split(as_key(key), check_count("probes", probes))
    found = jax.lax.map(lambda each: lanczos(product, like, each, steps)[:2], keys)
    return Density(*found)


class TraceEstimate(NamedTuple):
    """A trace, and the standard error of this estimate."""

    trace: jax.Array
    error: jax.Array


def hutchinson_trace(product: Product, like: Params, key: Key | int = 0, probes: int = 32) -> TraceEstimate:
    r"""The trace of a symmetric matrix, :math:`E[z^T A z]` with random signs ``z``.

    Args:
      product, like, key: as in ``lanczos``.
      probes: the number of products, at least 2.

    Returns:
      The mean over probes and its standard error.

    Raises:
      ValueError: if ``probes`` is below 2.

    Source: Hutchinson 1990, Communications in Statistics 19.

    >>> matrix = jnp.array([[1.0, 0.5], [0.5, 3.0]])
    >>> found = hutchinson_trace(lambda vector: matrix @ vector, jnp.zeros(2), probes=200)
    >>> bool(jnp.abs(found.trace - 4) < 4 * found.error)
    True
    """
    flat, unravel = ravel_pytree(like)
    keys = jax.random.split(as_key(key), check_count("probes", probes, at_least=2))

    def one(key):
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.vdot(signs, ravel_pytree(product(unravel(signs)))[0])

    samples = jax.lax.map(one, keys)
    return TraceEstimate(jnp.mean(samples), jnp.std(samples, ddof=1) / math.sqrt(probes))


class Sharpness(NamedTuple):
    """The largest eigenvalue of the Hessian, preconditioned or not, and its limit at a learning rate.

    Attributes:
      value: the eigenvalue.
      limit: the largest value at which steps of this rate are stable on a quadratic; infinite without a rate.
      error: ``value`` is within this of an eigenvalue, and not above the largest.
      direction: the eigenvector, in the parameters, of norm 1.
    """

    value: jax.Array
    limit: jax.Array
    error: jax.Array
    direction: PyTree

    @property
    def ratio(self) -> jax.Array:
        """``value / limit``: above 1 the loss rises along ``direction`` if nothing else changes."""
        return self.value / self.limit


def sharpness(
    function: Callable[[Params], jax.Array],
    params: Params,
    *,
    learning_rate: Scalar = 0.0,
    momentum: Scalar = 0.0,
    dampened: bool = False,
    preconditioner: PyTree = None,
    key: Key | int = 0,
    steps: int = 32,
) -> Sharpness:
    r"""The largest curvature of a loss, and the limit above which steps of a given rate are unstable.

    On a quadratic, gradient descent is stable along an eigenvector while :math:`\lambda < 2 / \eta`; with heavy-ball
    momentum :math:`\beta` while :math:`\lambda < (2 + 2 \beta) / \eta`; if momentum is an average (``dampened``, as in
    Adam), :math:`\lambda < (2 + 2 \beta) / ((1 - \beta) \eta)`. For an optimizer that divides by a preconditioner P,
    :math:`\lambda` is that of :math:`P^{-1/2} H P^{-1/2}`.

    Args:
      function: ``function(params) -> scalar``, the loss on all data, or on a batch.
      params: where it is taken.
      learning_rate: of the optimizer; 0 gives no limit.
      momentum: the decay of its momentum, such as Adam's ``b1``.
      dampened: whether the momentum is an average of gradients, as in Adam, rather than their decaying sum.
      preconditioner: the positive diagonal of P, a tree like ``params``, such as ``adam_preconditioner(opt_state)``.
      key, steps: as in ``lanczos``.

    Returns:
      A ``Sharpness``.

    Raises:
      ValueError: if a number is out of range.

    Source: Cohen et al. 2021, "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
    arXiv:2103.00065; Adam: Cohen et al. 2022, arXiv:2207.14484.

    >>> found = sharpness(lambda x: jnp.sum(jnp.array([1.0, 3.0]) * x**2), jnp.ones(2), learning_rate=0.1)
    >>> round(float(found.value), 3), float(found.limit), round(float(found.ratio), 3)
    (6.0, 20.0, 0.3)
    """
    check_number("learning_rate", learning_rate, low=0.0)
    check_number("momentum", momentum, low=0.0, high=1.0, high_open=True)
    roots = None if preconditioner is None else jax.tree.map(jnp.sqrt, preconditioner)

    def divided(vector):
        return vector if roots is None else jax.tree.map(safe_divide, vector, roots)

    def product(vector):
        return divided(hessian_product(function, params, divided(vector)))

    found = extreme_eigenvalues(product, params, key, steps)
    limit = (2 + 2 * momentum) * (1 / (1 - momentum) if dampened else 1.0)
    limit = jnp.where(jnp.asarray(learning_rate) > 0, safe_divide(limit, jnp.asarray(learning_rate, float)), jnp.inf)
    direction = divided(found.direction)
    size = global_norm(direction)
    direction = jax.tree.map(lambda leaf: safe_divide(leaf, size.astype(leaf.dtype)), direction)
    return Sharpness(found.high, limit, found.high_error, direction)


def adam_preconditioner(opt_state: OptState, *, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> PyTree:
    r"""What Adam divides by, :math:`\sqrt{\nu / (1 - \beta_2^t)} + \epsilon`, from an optimizer's state.

    Args:
      opt_state: a state that contains ``nu`` and ``count`` once, as those of Adam, AdamW, NAdam and Lamb do.
      b2, eps: the optimizer's.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: if the state does not contain one ``nu``.

    >>> import optax
    >>> tx = optax.adam(0.1)
    >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> adam_preconditioner(state).round(3)
    Array([2.], dtype=float32)
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_has_second_moment)
    found = [node for node in nodes if _has_second_moment(node)]
    if len(found) != 1:
        raise ValueError(f"opt_state must contain one second moment nu, as Adam's does; it contains {len(found)}")
    seen = 1 - jnp.asarray(b2, jnp.float32) ** found[0].count
    return jax.tree.map(lambda nu: jnp.sqrt(safe_divide(nu, seen.astype(nu.dtype))) + eps, found[0].nu)


def _has_second_moment(node: Any) -> bool:
    return hasattr(node, "nu") and hasattr(node, "count")


def best_fixed_rate(low: Scalar, high: Scalar) -> tuple[jax.Array, jax.Array]:
    r"""The fixed rate with which gradient descent converges fastest on a quadratic, and its factor per step.

    With eigenvalues from :math:`\mu` to :math:`L` it is :math:`2 / (\mu + L)`, and the distance to the minimum shrinks
    by :math:`(L - \mu) / (L + \mu)` in each step.

    Args:
      low, high: the smallest and the largest eigenvalue, ``0 < low <= high``.

    Returns:
      ``(rate, factor)``.

    Raises:
      ValueError: if an eigenvalue is not positive.

    >>> rate, factor = best_fixed_rate(1.0, 10.0)
    >>> round(float(rate), 4), round(float(factor), 4)
    (0.1818, 0.8182)
    """
    check_number("low", low, low=0.0, low_open=True)
    check_number("high", high, low=0.0, low_open=True)
    total = jnp.asarray(low) + high
    return 2 / total, (jnp.asarray(high) - low) / total


def loss_along(
    function: Callable[[Params], jax.Array], params: Params, direction: PyTree, distances: jax.Array
) -> jax.Array:
    """The loss at ``params + t * direction`` for each ``t`` in ``distances``.

    With the update of a step as the direction, ``t = 1`` is where the step leads, and a minimum below 1 means that it
    is too long.

    Args:
      function: ``function(params) -> scalar``.
      params: the start.
      direction: a tree like ``params``.
      distances: shape (n,).

    Returns:
      The losses, shape (n,).

    >>> loss_along(lambda x: x**2, jnp.array(1.0), jnp.array(-1.0), jnp.array([0.0, 1.0, 2.0]))
    Array([1., 0., 1.], dtype=float32)
    """
    return jax.lax.map(lambda t: function(_moved(params, direction, t)), jnp.asarray(distances))


def loss_on_plane(
    function: Callable[[Params], jax.Array],
    params: Params,
    first: PyTree,
    second: PyTree,
    xs: jax.Array,
    ys: jax.Array,
) -> jax.Array:
    """The loss at ``params + x * first + y * second``.

    Args:
      function: ``function(params) -> scalar``.
      params: the centre.
      first, second: trees like ``params``, such as two directions from ``filter_normalized``.
      xs, ys: shapes (n,) and (m,).

    Returns:
      The losses, shape (m, n).

    >>> loss_on_plane(jnp.sum, jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), jnp.arange(2.0), jnp.ones(1))
    Array([[1., 2.]], dtype=float32)
    """
    return jax.lax.map(lambda y: loss_along(function, _moved(params, second, y), first, xs), jnp.asarray(ys))


def _moved(params: Params, direction: PyTree, distance: jax.Array) -> Params:
    return jax.tree.map(lambda leaf, change: leaf + distance.astype(leaf.dtype) * change, params, direction)


def filter_normalized(direction: PyTree, params: Params) -> PyTree:
    r"""A direction with the norm of the parameters in every filter, so that plots of different networks compare.

    A filter is what leads to one unit: a column of a matrix, a kernel of a convolution, with the unit along the last
    axis. Leaves with fewer than two axes, such as biases, get direction 0.

    Args:
      direction: a tree like ``params``, such as random numbers.
      params: the parameters.

    Returns:
      A tree like ``params``.

    Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", arXiv:1712.09913.

    >>> filter_normalized(jnp.ones((2, 2)), jnp.array([[3.0, 0.0], [4.0, 0.0]])).round(3)
    Array([[3.536, 0.   ],
           [3.536, 0.   ]], dtype=float32)
    """

    def one(change, leaf):
        if jnp.ndim(leaf) < 2:
            return jnp.zeros_like(change)
        axes = tuple(range(leaf.ndim - 1))
        sizes = (jnp.sqrt(jnp.sum(jnp.square(each), axes, keepdims=True)) for each in (leaf, change))
        return change * safe_divide(*sizes)

    return jax.tree.map(one, direction, params)


__all__ = [
    "Density",
    "Extremes",
    "Sharpness",
    "Spectrum",
    "TraceEstimate",
    "adam_preconditioner",
    "best_fixed_rate",
    "extreme_eigenvalues",
    "filter_normalized",
    "gauss_newton_product",
    "hessian_product",
    "hutchinson_trace",
    "lanczos",
    "loss_along",
    "loss_on_plane",
    "sharpness",
    "spectral_density",
]
