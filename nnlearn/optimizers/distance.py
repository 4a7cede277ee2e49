"""Step sizes without a learning rate, from the distance travelled over the size of gradients: DoG and DoWG."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from optax.contrib import DoGState, DoWGState

from nnlearn.settings import comparable
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.plumbing import from_kernel, number, total, wide_real
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import Slot, as_storage
from nnlearn.tree import abs_sq, array_norm, as_hyperparam, global_norm, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule

START = Slot(initial=lambda param: param)


def _distance_kernel(g, param, init_params, *, rate, **_):
    del param
    return rate * g, init_params


def _decay_if(weight_decay: ScalarOrSchedule | None, mask: MaskOrFn) -> GradientTransformationExtraArgs:
    return add_decayed_weights(0.0 if weight_decay is None else weight_decay, mask)


@comparable
def dog(
    learning_rate: ScalarOrSchedule = 1.0,
    init_step: tuple[Literal["distance", "learning_rate", "heuristic"], Scalar] = ("heuristic", 1e-6),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""DoG, distance over gradients (Ivgi, Hinder & Carmon 2023, arXiv:2302.12022).

    .. math:: w_t = w_{t-1} - \alpha \frac{r_t}{\sqrt{\sum_{i \le t} \|g_i\|^2 + \epsilon}} g_t, \quad
        r_t = \max(r_\epsilon, \max_{i<t} \|w_i - w_0\|)

    Average the iterates, as with ``average_params``, to evaluate.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule; the paper has 1.
      init_step: the first distance: ``("distance", r)``; ``("heuristic", c)`` for :math:`c (1 + \|w_0\|)`; or
        ``("learning_rate", r)``, the first step size.
      eps: added to the sum of squares, >= 0.
      weight_decay: added to the gradient times the weights, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation with ``DoGState(is_init_step, init_params, max_dist, sum_sq_norm_grads)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = dog(init_step=("distance", 0.5)), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.5], dtype=float32)
    """
    kind, first = init_step
    if kind not in ("distance", "learning_rate", "heuristic"):
        raise ValueError(f"init_step must begin with 'distance', 'learning_rate' or 'heuristic', got {init_step!r}")
    check_hyperparams(initial_scale=first, eps=eps)

    def farthest(params):
        real = wide_real(params)
        start: Any = as_hyperparam(first, real)
        if kind == "heuristic":
            start = start * (1 + global_norm(params).astype(real))
        return jnp.asarray(0.0 if kind == "learning_rate" else start, real)

    def per_step(count, *, updates, params, init_params, is_init_step, max_dist, sum_sq_norm_grads, first, eps):
        del count
        real = max_dist.dtype
        distance = safe_sqrt(total(lambda p, start: abs_sq(p - start), params, init_params))
        max_dist = jnp.maximum(max_dist, distance.astype(real))
        squares = sum_sq_norm_grads + total(abs_sq, updates).astype(real)
        rate = max_dist * safe_divide(1, safe_sqrt(squares + as_hyperparam(eps, real)))
        if kind == "learning_rate":
            rate = jnp.where(is_init_step, jnp.asarray(first, real), rate)
        return {"rate": rate, "max_dist": max_dist, "sum_sq_norm_grads": squares, "is_init_step": False}

    tx = from_kernel(
        _distance_kernel,
        DoGState,
        {"init_params": START},
        {"first": first, "eps": eps},
        per_step,
        shared={"is_init_step": True, "max_dist": farthest, "sum_sq_norm_grads": number(0.0)},
        needs_params="dog",
    )
    return assemble(_decay_if(weight_decay, mask), tx, scale_by_learning_rate(learning_rate), master_dtype=master_dtype)


@comparable
def dowg(
    learning_rate: ScalarOrSchedule = 1.0,
    init_estim_sq_dist: Scalar | None = None,
    eps: Scalar = 1e-4,
    weight_decay: ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""DoWG, distance over weighted gradients (Khaled, Mishchenko & Jin 2023, arXiv:2305.16284, algorithm 1).

    .. math:: r_t = \max(r_{t-1}, \|w_{t-1} - w_0\|^2), \quad v_t = v_{t-1} + r_t \|g_t\|^2, \quad
        w_t = w_{t-1} - \alpha \frac{r_t}{\sqrt{v_t} + \epsilon} g_t

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule; the paper has 1.
      init_estim_sq_dist: :math:`r_0`; None for ``eps``.
      eps: added to the divisor, >= 0.
      weight_decay: added to the gradient times the weights, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Returns:
      A transformation with ``DoWGState(init_params, weighted_sq_norm_grads, estim_sq_dist)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = dowg(init_estim_sq_dist=0.25, eps=0.0), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([-0.5], dtype=float32)
    """
    check_hyperparams(init_estim_sq_dist=init_estim_sq_dist, eps=eps)

    def per_step(count, *, updates, params, init_params, weighted_sq_norm_grads, estim_sq_dist, eps):
        del count
        real = estim_sq_dist.dtype
        square = total(lambda p, start: abs_sq(p - start), params, init_params).astype(real)
        farthest = jnp.maximum(estim_sq_dist, square)
        weighted = weighted_sq_norm_grads + farthest * total(abs_sq, updates).astype(real)
        rate = safe_divide(farthest, safe_sqrt(weighted) + as_hyperparam(eps, real))
        return {"rate": rate, "weighted_sq_norm_grads": weighted, "estim_sq_dist": farthest}

    first = eps if init_estim_sq_dist is None else init_estim_sq_dist
    tx = from_kernel(
        _distance_kernel,
        DoWGState,
        {"init_params": START},
        {"eps": eps},
        per_step,
        shared={"weighted_sq_norm_grads": number(0.0), "estim_sq_dist": number(first)},
        needs_params="dowg",
    )
    return assemble(_decay_if(weight_decay, mask), tx, scale_by_learning_rate(learning_rate), master_dtype=master_dtype)


class ScaleByDistanceOverGradientsState(NamedTuple):
    """The farthest distance and the sum of squares of each leaf, and the first parameters."""

    max_dist: PyTree
    grad_sum_of_squares: PyTree
    init_params: PyTree


@comparable
def scale_by_distance_over_gradients(
    reps_rel: Scalar = 1e-6,
    eps: Scalar = 1e-8,
    param_dtype: DTypeLike = jnp.float32,
    global_scale: Scalar = 1.0,
) -> GradientTransformationExtraArgs:
    """DoG for each leaf by itself (Ivgi, Hinder & Carmon 2023, arXiv:2302.12022, section 3.3), see ``dog``.

    Args:
      reps_rel: first distance, relative to 1 plus the norm of the leaf, >= 0.
      eps: added to the sum of squares, >= 0.
      param_dtype: dtype of the copy of the first parameters.
      global_scale: multiplies the step size, >= 0.

    Returns:
      A transformation with ``ScaleByDistanceOverGradientsState(max_dist, grad_sum_of_squares, init_params)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = scale_by_distance_over_gradients(reps_rel=0.5), jnp.zeros(1)
    >>> tx.update(jnp.array([4.0]), tx.init(w), w)[0]
    Array([0.5], dtype=float32)
    """
    check_hyperparams(reps_rel=reps_rel, eps=eps, global_scale=global_scale)

    def kernel(g, param, max_dist, squares, start, *, eps, global_scale):
        max_dist = jnp.maximum(max_dist, array_norm(param - start))
        squares = squares + jnp.sum(abs_sq(g))
        return global_scale * max_dist * safe_divide(1, safe_sqrt(squares[0] + eps)) * g, max_dist, squares, start

    def first(leaf):
        return as_hyperparam(reps_rel, leaf.dtype) * (1 + array_norm(leaf))

    return from_kernel(
        kernel,
        ScaleByDistanceOverGradientsState,
        {
            "max_dist": Slot(real=True, shape=lambda shape: (), initial=first),
            "grad_sum_of_squares": Slot(real=True, shape=lambda shape: (1,)),
            "init_params": Slot(dtype=as_storage("param_dtype", param_dtype), initial=lambda leaf: leaf),
        },
        {"eps": eps, "global_scale": global_scale},
        needs_params="scale_by_distance_over_gradients",
        whole_leaf=True,
    )


__all__ = ["START", "dog", "dowg", "scale_by_distance_over_gradients"]
