"""Rprop: step sizes that follow the signs of the gradient, for full batches."""

from typing import Any

import jax.numpy as jnp
from optax import ScaleByRpropState

from nnlearn.settings import comparable
from nnlearn.transforms.plumbing import from_kernel
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale
from nnlearn.transforms.storage import Slot
from nnlearn.types import DTypeLike, GradientTransformationExtraArgs, Scalar


def rprop_kernel(g, step_sizes, prev_updates, *, eta_minus, eta_plus, min_step_size, max_step_size):
    r"""One step of Rprop without weight backtracking (Riedmiller & Braun 1993; iRprop-, Igel & Hüsken 2000).

    .. math::
        \Delta_t = \operatorname{clip}(\Delta_{t-1} \eta^\pm, \Delta_{\min}, \Delta_{\max}), \quad
        u_t = \Delta_t \operatorname{sign}(g_t)

    A step size grows by :math:`\eta^+` where the gradient keeps its sign. Where the sign changes it shrinks by
    :math:`\eta^-`, and the parameter rests for one step. Returns ``(u, step sizes, u)``.
    """
    agreement = g * prev_updates
    changed = jnp.clip(step_sizes * jnp.where(agreement > 0, eta_plus, eta_minus), min_step_size, max_step_size)
    step_sizes = jnp.where(agreement == 0, step_sizes, changed)
    update = jnp.where(agreement < 0, 0, step_sizes * jnp.sign(g))
    return update, step_sizes, update


@comparable
def scale_by_rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformationExtraArgs:
    """Rprop's direction, see ``rprop_kernel``; arguments as in ``rprop``.

    Returns:
      A transformation with ``ScaleByRpropState(step_sizes, prev_updates)``.

    Raises:
      ValueError: if a hyper-parameter is out of its range.

    >>> tx = scale_by_rprop(0.1)
    >>> tx.update(jnp.array([7.0, -0.2]), tx.init(jnp.zeros(2)))[0]
    Array([ 0.1, -0.1], dtype=float32)
    """
    hyperparams: dict[str, Any] = {
        "eta_minus": eta_minus,
        "eta_plus": eta_plus,
        "min_step_size": min_step_size,
        "max_step_size": max_step_size,
    }
    check_hyperparams(learning_rate=learning_rate, **hyperparams)
    slots = {"step_sizes": Slot(fill=learning_rate), "prev_updates": Slot()}
    return from_kernel(rprop_kernel, ScaleByRpropState, slots, hyperparams)


@comparable
def rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    """Rprop, resilient propagation (Riedmiller & Braun 1993), see ``rprop_kernel``. Parameters are real.

    It follows PyTorch's trajectory. That of optax is one step late: its update is the one of the step before.

    Args:
      learning_rate: first step size, a number >= 0.
      eta_minus: factor where a gradient changes its sign, >= 0.
      eta_plus: factor where it keeps it, >= 0.
      min_step_size, max_step_size: bounds of the step sizes, >= 0.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    >>> tx = rprop(0.1)
    >>> tx.update(jnp.array([7.0, -0.2]), tx.init(jnp.zeros(2)))[0]
    Array([-0.1,  0.1], dtype=float32)
    """
    return assemble(
        scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size),
        scale(-1.0),
        master_dtype=master_dtype,
    )


__all__ = ["rprop", "rprop_kernel", "scale_by_rprop"]
