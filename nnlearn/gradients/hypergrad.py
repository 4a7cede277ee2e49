"""Derivatives of a whole run with respect to what it was set to: the learning rate, a schedule, weights of examples."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from nnlearn.types import PyTree, Scalar

FEW = 3  # numbers for which forward mode takes no more time than reverse mode, by measurement
MODES = ("auto", "forward", "reverse")


def hyper_value_and_grad(
    objective: Callable[..., Scalar], *, mode: Literal["auto", "forward", "reverse"] = "auto"
) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The value of an objective of a run, and its gradient with respect to the hyper-parameters.

    In reverse mode the cost does not grow with their number, and the memory is about that of the square root of the
    run's steps, as ``make_train`` keeps the state before each stretch of steps and works the rest out again. Forward
    mode carries a derivative along for each number: it costs about one more run for each, and memory that does not grow
    with the steps.

    In reverse mode ``jax.debug`` effects of a run occur again where steps are worked out again, and JAX refuses
    ``io_callback``; in forward mode both occur once a step.

    Args:
      objective: ``objective(hparams, *args) -> scalar``, such as the last validation loss of ``train(hparams, key)``.
        Through a ``train`` with stopping rules the derivative is that of the steps that were made.
      mode: ``"auto"`` is forward for three numbers or fewer, and else reverse.

    Returns:
      ``f(hparams, *args) -> (value, gradient)``, the gradient a tree like ``hparams``; to be jitted and vmapped.

    Raises:
      ValueError: ``mode`` is unknown, ``hparams`` holds no number, or the objective is no scalar.
      TypeError: a hyper-parameter is not floating.

    Source: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", arXiv:1703.01785;
    the memory, Griewank 1992, Optim. Methods Softw. 1.

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
        numbers = sum(jnp.size(leaf) for leaf in jax.tree.leaves(hparams))
        if numbers == 0:
            raise ValueError("hparams holds no number to differentiate with respect to")
        for leaf in jax.tree.leaves(hparams):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(f"hparams must be floating numbers to be differentiated, got {leaf!r}; write 1.0 for 1")

        def of_hparams(hparams):
            value = objective(hparams, *args)
            if jnp.shape(value) != ():
                raise ValueError(f"the objective must be a scalar, got shape {jnp.shape(value)}")
            return value

        if mode == "reverse" or (mode == "auto" and numbers > FEW):
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
