"""PSGD with Kronecker factors: preconditioners that are fitted by gradient steps, without any decomposition."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_count, check_number
from nnlearn.linalg import one_by_one
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction, moving_average
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.precondition import transpose
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, as_hyperparam, rarely, safe_divide
from nnlearn.types import (
    DTypeLike,
    GradientTransformationExtraArgs,
    MaskOrFn,
    PyTree,
    Scalar,
    ScalarOrSchedule,
    Schedule,
)

Shape = tuple[int, ...]
DAMPING = float(jnp.finfo(jnp.float32).eps) ** 0.5  # noise of this size, relative to the gradient, bounds the fit


class ScaleByKronState(NamedTuple):
    """The momentum, the two factors of each leaf, and the steps since the last fit."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    waited: jax.Array
    mu: PyTree
    left: PyTree
    right: PyTree


@comparable
def annealed_probability(
    max_prob: Scalar = 1.0, min_prob: Scalar = 0.03, decay: Scalar = 0.001, flat_start: Scalar = 500
) -> Schedule:
    """How often ``kron`` fits its factors: ``max_prob`` until ``flat_start``, then falling to ``min_prob``.

    >>> schedule = annealed_probability()
    >>> [round(float(schedule(step)), 3) for step in (0, 1000, 5000)]
    [1.0, 0.607, 0.03]
    """

    def schedule(count):
        real = jnp.result_type(float)
        highest, lowest, rate, start = (as_hyperparam(each, real) for each in (max_prob, min_prob, decay, flat_start))
        falling = highest * jnp.exp(-rate * (jnp.asarray(count, real) - start))
        return jnp.minimum(jnp.maximum(falling, lowest), highest)

    return schedule


ANNEALED = annealed_probability()


def _factor_shapes(shape: Shape, largest: int) -> tuple[Shape, Shape]:
    """The shapes of the two factors: square, diagonal, or (1,) of one that is not there.

    A leaf of more than two axes is a matrix of its last axis and all others.
    """
    if len(shape) < 2:
        return (1,), (math.prod(shape),)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    left, right = ((size, size) if 1 < size <= largest else (size,) for size in (rows, columns))
    return left, right


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor @ x if factor.ndim == 2 else factor[:, None] * x


def _solved(factor: jax.Array, x: jax.Array) -> jax.Array:
    """The inverse of the conjugate transpose of a factor, times a matrix."""
    return x / jnp.conj(factor)[:, None] if factor.ndim == 1 else _triangular_solution(factor, x)


# On a CPU XLA compiles a batch of solutions to a long program, and single ones to calls of LAPACK.
_triangular_solution = one_by_one(lambda factor, x: jax.scipy.linalg.solve_triangular(factor, x, trans="C"))


def _spectral_norm(x: jax.Array) -> jax.Array:
    """A tight lower bound of the largest eigenvalue of a positive matrix, from two products with its longest row."""
    largest = jnp.max(jnp.abs(x))
    x = safe_divide(x, largest)
    start = x[jnp.argmax(jnp.sum(abs_sq(x), axis=1))]
    found = x @ jnp.conj(start)
    return largest * array_norm(x @ safe_divide(found, array_norm(found)))


def _fitted(factor: jax.Array, a: jax.Array, b: jax.Array, rate: jax.Array) -> jax.Array:
    """One step of a factor; the columns of ``a`` and ``b`` are samples of its side."""
    if factor.ndim == 1:
        first, second = jnp.sum(abs_sq(a), axis=1), jnp.sum(abs_sq(b), axis=1)
        return factor - rate * safe_divide(first - second, jnp.max(first + second)) * factor
    first, second = a @ transpose(a), b @ transpose(b)
    return factor - rate * safe_divide(jnp.triu(first - second), _spectral_norm(first + second)) @ factor


@jax.custom_jvp
def next_factors(refresh, g, left, right, draw, rate):
    r"""One step of both factors towards whitening, if ``refresh``; the derivative is zero.

    With noise :math:`v`, :math:`A = Q_L g Q_R^*` and :math:`B = Q_L^{-*} v Q_R^{-1}`,

    .. math:: Q_L \leftarrow Q_L - \mu \frac{\operatorname{triu}(A A^* - B B^*)}{\|A A^* + B B^*\|} Q_L

    and the same with :math:`A^* A` and :math:`B^* B` on the right. The factors then get equal largest entries, which
    leaves their product as it is.
    """
    alone = left.shape == (1,) and g.shape[0] == 1  # a vector has one factor

    def fit(refresh, g, left, right, draw, rate):
        key = jax.random.fold_in(jax.random.key(0), draw.astype(jnp.uint32))
        noise = jax.random.normal(key, g.shape, jnp.float32).astype(g.dtype)
        g = g + DAMPING * jnp.mean(jnp.abs(g)) * noise
        a = transpose(_times(right, transpose(_times(left, g))))
        b = transpose(_solved(right, transpose(_solved(left, noise))))
        new_right = _fitted(right, transpose(a), transpose(b), rate)
        new_left = left if alone else _fitted(left, a, b, rate)
        if not alone:
            sizes = [jnp.max(jnp.abs(factor)) for factor in (new_left, new_right)]
            ratio = jnp.sqrt(sizes[1] / sizes[0])
            new_left, new_right = new_left * ratio, new_right / ratio
        return jnp.where(refresh, new_left, left), jnp.where(refresh, new_right, right)

    return rarely(refresh, fit, (left, right), refresh, g, left, right, draw, rate)


next_factors.defjvp(
    lambda primals, _: (next_factors(*primals), tuple(jnp.zeros_like(factor) for factor in primals[2:4]))
)


def kron_kernel(g, mu, left, right, *, b1, c1, refresh, draw, preconditioner_lr, **_):
    r"""One step of PSGD with Kronecker factors on a whole leaf (Li 2015, arXiv:1512.04202; Pooladzandi & Li 2024).

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
        \tilde u = Q_L^* Q_L \hat m_t Q_R^* Q_R, \quad u_t = \tilde u \min(1, 1.1 / \operatorname{rms}(\tilde u))

    with triangular or diagonal factors that ``next_factors`` fits to the debiased momentum, so that the update is
    white: :math:`P = Q^* Q` tends to the inverse root of its covariance.

    Returns:
      ``(u, m, Q_L, Q_R)``.
    """
    mu = moving_average(b1, g, mu)
    if not g.size:
        return g, mu, left, right
    matrix = (mu / c1).reshape(-1, g.shape[-1] if g.ndim > 1 else max(g.size, 1))
    rate = jnp.asarray(preconditioner_lr, right.dtype)
    left, right = next_factors(refresh != 0, matrix, left, right, draw, rate)
    update = _times(_adjoint(left), _times(left, matrix))
    update = transpose(_times(_adjoint(right), _times(right, transpose(update))))
    size = array_norm(update) / math.sqrt(update.size)
    return (update / jnp.maximum(1, size / 1.1)).reshape(g.shape), mu, left, right


def _adjoint(factor: jax.Array) -> jax.Array:
    return transpose(factor) if factor.ndim == 2 else jnp.conj(factor)


@comparable
def scale_by_kron(
    b1: Scalar = 0.9,
    preconditioner_update_probability: ScalarOrSchedule = ANNEALED,
    max_size_triangular: int = 8192,
    preconditioner_lr: Scalar = 0.1,
    preconditioner_init_scale: Scalar = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """PSGD-Kron's direction, see ``kron_kernel``; arguments as in ``kron``.

    Returns:
      A transformation with ``ScaleByKronState(count, waited, mu, left, right)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, g = scale_by_kron(b1=0.0), jnp.diag(jnp.array([4.0, 1.0]))
    >>> state, step = tx.init(g), jax.jit(tx.update)
    >>> for _ in range(100):
    ...     update, state = step(g, state)
    >>> jnp.diag(update).round(1)  # whitened
    Array([1., 1.], dtype=float32)
    """
    check_hyperparams(b1=b1, preconditioner_lr=preconditioner_lr, preconditioner_init_scale=preconditioner_init_scale)
    probability = preconditioner_update_probability
    if not callable(probability):
        check_number("preconditioner_update_probability", probability, low=0.0, high=1.0, low_open=True)
    largest = check_count("max_size_triangular", max_size_triangular)

    def first(side):
        def value(leaf):
            shape = _factor_shapes(leaf.shape, largest)[side]
            size = as_hyperparam(preconditioner_init_scale, leaf.dtype)
            size = size**0.5 if leaf.ndim > 1 else size if side == 1 else 1
            return size * (jnp.eye(shape[0], dtype=leaf.dtype) if len(shape) == 2 else jnp.ones(shape, leaf.dtype))

        return Slot(shape=lambda shape: _factor_shapes(shape, largest)[side], initial=value)

    def per_step(count, *, b1, waited, preconditioner_update_probability, **_):
        real = jnp.result_type(float)
        waited = waited + 1
        due = waited.astype(real) * as_hyperparam(preconditioner_update_probability, real) >= 1
        kept = {"waited": jnp.where(due, 0, waited), "refresh": due, "draw": count - 1}
        return kept | {"c1": bias_correction(b1, count)}

    return from_kernel(
        kron_kernel,
        ScaleByKronState,
        {"mu": Slot(dtype=as_storage("mu_dtype", mu_dtype)), "left": first(0), "right": first(1)},
        {"b1": b1, "preconditioner_update_probability": probability, "preconditioner_lr": preconditioner_lr},
        per_step,
        shared={"waited": lambda params: jnp.zeros([], jnp.int32)},
        whole_leaf=True,
        stack_equal=True,
    )


@comparable
def kron(
    learning_rate: ScalarOrSchedule = 0.001,
    b1: Scalar = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    preconditioner_update_probability: ScalarOrSchedule = ANNEALED,
    max_size_triangular: int = 8192,
    preconditioner_lr: Scalar = 0.1,
    preconditioner_init_scale: Scalar = 1.0,
    mu_dtype: DTypeLike | None = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""PSGD with Kronecker factors (Li 2015, arXiv:1512.04202; Pooladzandi & Li 2024, arXiv:2402.04553).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``kron_kernel``. Its factors need products and triangular solutions alone, no eigenvalues
    and no QR. All equal leaves run as one batch.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      b1: decay rate of the momentum, in [0, 1).
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      weight_decay_mask: True where weights decay, see ``adamw``.
      preconditioner_update_probability: the share of the steps at which factors are fitted, in (0, 1], or a schedule,
        such as ``annealed_probability()``; these steps are evenly spaced, not random.
      max_size_triangular: longest side with a triangular factor; longer ones have a diagonal one, as vectors have.
      preconditioner_lr: :math:`\mu >= 0` of the fit.
      preconditioner_init_scale: first value of the preconditioner's root, > 0.
      mu_dtype: dtype of the momentum; None for the parameter's dtype, float32 at least.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = kron(0.1, b1=0.0), jnp.zeros((2, 2))
    >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, -4.0])), tx.init(w), w)
    >>> bool(jnp.sqrt(jnp.mean(updates**2)) <= 0.111)
    True
    """
    return assemble(
        scale_by_kron(
            b1,
            preconditioner_update_probability,
            max_size_triangular,
            preconditioner_lr,
            preconditioner_init_scale,
            mu_dtype,
        ),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["annealed_probability", "kron", "kron_kernel", "next_factors", "scale_by_kron"]
