"""Derivatives of a whole run with respect to its hyper-parameters, such as learning rates or weights of examples."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from nnlearn.types import PyTree, Scalar

FEW = 3  # with up to this many scalars, forward mode was measured to take no more time than reverse mode
MODES = ("auto", "forward", "reverse")


def hyper_value_and_grad(
    objective: Callable[..., Scalar], *, mode: Literal["auto", "forward", "reverse"] = "auto"
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The value of an objective of a run, and its gradient with respect to the hyper-parameters.

    In reverse mode the cost does not grow with the number of hyper-parameters, and the memory is about that of the
    square root of the run's steps: ``make_train`` keeps the state before each stretch of steps and recomputes the
    rest. Forward mode carries one derivative per scalar: each costs about one more run, and the memory does not grow
    with the steps.

    In reverse mode ``jax.debug`` effects occur again when steps are recomputed, and JAX refuses ``io_callback``. In
    forward mode both occur once per step.

    Args:
      objective: ``objective(hparams, *args) -> scalar``, such as the last validation loss of ``train(hparams, key)``.
        If ``train`` has stopping rules, the derivative is that of the steps that were made.
      mode: ``"auto"`` is forward mode for up to three scalars, and reverse mode for more.

    Returns:
      ``f(hparams, *args) -> (value, gradient)``, where the gradient is a tree like ``hparams``. It can be jitted and
      vmapped.

    Raises:
      ValueError: if ``mode`` is unknown, ``hparams`` is empty, or the objective is not a scalar.
      TypeError: if a hyper-parameter is not floating.

    Source: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", arXiv:1703.01785;
    the memory: Griewank 1992, Optim. Methods Softw. 1.

    >>> import nnlearn
    >>> batches = nnlearn.generated(lambda key, step: step)
    >>> train = nnlearn.make_train(lambda p, b, k: p**2, nnlearn.sgd, batches, jnp.ones(()), steps=3)
    >>> f = jax.jit(hyper_value_and_grad(lambda rate: train(rate, 0)[0].params ** 2))
    >>> f(0.1)  # (1 - 2 * rate) ** 6 and its derivative
    (Array(0.262144, dtype=float32), Array(-3.93216, dtype=float32))
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")

    def value_and_grad(hparams: PyTree, *args: Any) -> tuple[jax.Array, PyTree]:
        size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(hparams))
        if size == 0:
            raise ValueError("hparams is empty: there is no scalar to differentiate with respect to")
        for leaf in jax.tree.leaves(hparams):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(f"hparams must be floating to be differentiated, got {leaf!r}; write 1.0 for 1")

        def of_hparams(hparams):
            value = objective(hparams, *args)
            if jnp.shape(value) != ():
                raise ValueError(f"the objective must be a scalar, got shape {jnp.shape(value)}")
            return value

        if mode == "reverse" or (mode == "auto" and size > FEW):
            return jax.value_and_grad(of_hparams)(hparams)
        return _forward(of_hparams, hparams)

    return value_and_grad


def _forward(objective: Callable[[PyTree], Scalar], hparams: PyTree) -> tuple[jax.Array, PyTree]:
    flat, unravel = ravel_pytree(hparams)

    def along(direction):
        return jax.jvp(lambda flat: objective(unravel(flat)), (flat,), (direction,))

    if flat.size == 1:
        value, slope = along(jnp.ones_like(flat))
        return value, unravel(slope[None].astype(flat.dtype))
    value, slopes = jax.vmap(along, out_axes=(None, 0))(jnp.eye(flat.size, dtype=flat.dtype))
    return value, unravel(slopes.astype(flat.dtype))


__all__ = ["hyper_value_and_grad"]
