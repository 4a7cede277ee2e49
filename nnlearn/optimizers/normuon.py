"""NorMuon: Muon with a second moment for each neuron."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from nnlearn.optimizers.muon import (
    Coefficients,
    DimensionNumbers,
    axes_of,
    coefficients_of,
    scale_by_muon,
    spread_over,
    with_adamw,
)
from nnlearn.settings import comparable
from nnlearn.transforms.averages import bias_correction
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.storage import Slot
from nnlearn.tree import abs_sq, array_norm, safe_divide, safe_sqrt
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, MaskOrFn, PyTree, Scalar, ScalarOrSchedule


class ScaleByNeuronState(NamedTuple):
    """The second moment of the orthogonal update for each output."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: PyTree


def neuron_kernel(dims, u, nu, *, neuron_b2, eps, c2):
    r"""Scale an orthogonal update to one size for each neuron (Li et al. 2025, arXiv:2510.05491, algorithm 1).

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) \operatorname{mean}_{inputs} u^2, \quad
        \tilde u = \frac{u}{\sqrt{\hat v_t} + \epsilon}, \quad u \leftarrow 0.2 \sqrt{n} \frac{\tilde u}{\|\tilde u\|}

    Returns:
      ``(u, v)``, with the norm and :math:`n` numbers of each matrix.
    """
    batch, rows, _ = axes_of(dims, u.ndim)
    nu = neuron_b2 * nu + (1 - neuron_b2) * jnp.mean(abs_sq(u), axis=rows, keepdims=True)
    u = safe_divide(u, safe_sqrt(nu / c2) + eps)
    axes = tuple(axis for axis in range(u.ndim) if axis not in batch)
    size = math.prod(u.shape[axis] for axis in axes)
    return 0.2 * math.sqrt(size) * safe_divide(u, array_norm(u, axes)), nu


@comparable
def scale_by_neuron(
    neuron_b2: Scalar = 0.95, eps: Scalar = 1e-8, *, weight_dimension_numbers: DimensionNumbers | None = None
) -> GradientTransformationExtraArgs:
    """NorMuon's scaling of an orthogonal update, see ``neuron_kernel``; it follows ``scale_by_muon``.

    Args:
      neuron_b2: decay rate of the second moment of each output, in [0, 1).
      eps: added to the divisor, >= 0.
      weight_dimension_numbers: see ``scale_by_muon``.

    Returns:
      A transformation with ``ScaleByNeuronState(count, nu)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, u = scale_by_neuron(), jnp.array([[1.0, 0.1], [1.0, 0.1]])
    >>> tx.update(u, tx.init(u))[0].round(3)
    Array([[0.2, 0.2],
           [0.2, 0.2]], dtype=float32)
    """
    check_hyperparams(neuron_b2=neuron_b2, eps=eps)
    spec = weight_dimension_numbers

    def shape(leaf):
        if spec is not None and not isinstance(spec, MuonDimensionNumbers):
            return leaf  # the axes of each leaf are not known from its shape: keep the mean in every element
        _, rows, _ = axes_of(spec, len(leaf))
        return tuple(1 if axis in rows else size for axis, size in enumerate(leaf))

    def kernel(dims, u, nu, **numbers):
        held = nu
        u, nu = neuron_kernel(dims, u, nu, **numbers)
        return u, jnp.broadcast_to(nu, held.shape)

    return from_kernel(
        kernel,
        ScaleByNeuronState,
        {"nu": Slot(real=True, shape=shape)},
        {"neuron_b2": neuron_b2, "eps": eps},
        lambda count, *, neuron_b2, **_: {"c2": bias_correction(neuron_b2, count)},
        whole_leaf=True,
        settings=functools.partial(spread_over, spec),
    )


@comparable
def normuon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients | str = "polar_express",
    ns_steps: Scalar = 5,
    beta: Scalar = 0.95,
    neuron_b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    *,
    nesterov: bool = True,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""NorMuon, Muon with a second moment for each neuron (Li et al. 2025, arXiv:2510.05491).

    .. math:: w_t = w_{t-1} - \alpha (u_t + \lambda w_{t-1})

    with the :math:`u_t` of ``neuron_kernel`` on that of ``muon_kernel``; the step has the size of AdamW's.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      neuron_b2: decay rate of the second moment of each output, in [0, 1).
      ns_coeffs, ns_steps, beta, eps, weight_decay, weight_decay_mask, nesterov: see ``muon``.
      adam_b1, adam_b2, adam_eps_root, adam_weight_decay, adam_learning_rate: see ``muon``.
      muon_weight_dimension_numbers: see ``muon``; ``matrix_rules`` chooses by names and shapes.
      mu_dtype, nu_dtype, master_dtype: see ``muon``.

    Raises:
      ValueError: if a hyper-parameter is out of its range, or a leaf that Muon takes is no matrix.

    >>> tx, w = normuon(0.1), {"w": jnp.eye(2), "b": jnp.zeros(1)}
    >>> updates, _ = tx.update({"w": jnp.diag(jnp.array([-3.0, 1.0])), "b": jnp.ones(1)}, tx.init(w), w)
    >>> updates["w"].round(3)
    Array([[ 0.028, -0.   ],
           [-0.   , -0.028]], dtype=float32)
    """
    spec = muon_weight_dimension_numbers
    coefficients = coefficients_of(ns_coeffs)
    directions = [
        scale_by_muon(coefficients, ns_steps, beta, eps, mu_dtype, nesterov=nesterov, weight_dimension_numbers=spec),
        scale_by_neuron(neuron_b2, eps, weight_dimension_numbers=spec),
    ]
    return with_adamw(
        directions,
        spec,
        learning_rate,
        eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        master_dtype=master_dtype,
    )


__all__ = ["neuron_kernel", "normuon", "scale_by_neuron"]
