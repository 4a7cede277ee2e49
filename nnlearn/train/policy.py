"""Mixed precision as a policy: in which dtypes parameters are kept, the network calculates, and results come out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_dtype
from nnlearn.settings import comparable
from nnlearn.types import DTypeLike, LossFn, PyTree


class Policy(NamedTuple):
    """The dtypes of parameters, of calculation, and of results; integers and booleans stay what they are.

    ``policy.wrap(loss_fn)`` is a loss that casts parameters and batch to ``compute`` on the way in, and the loss, aux
    and model state to ``output`` on the way out. Gradients come back in the dtype of ``params``, because the cast is
    part of what is differentiated. With ``compute=jnp.float16`` put ``dynamic_loss_scale`` around the optimizer.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.

    >>> policy = Policy(compute=jnp.bfloat16)
    >>> loss_fn = policy.wrap(lambda params, batch, key: jnp.sum(params * batch))
    >>> jax.value_and_grad(loss_fn)(jnp.ones(2), jnp.ones(2), None)
    (Array(2., dtype=float32), Array([1., 1.], dtype=float32))
    """

    params: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.bfloat16
    output: DTypeLike = jnp.float32

    def cast_params(self, tree: PyTree) -> PyTree:
        """A tree with its floating leaves in the dtype of ``params``."""
        return cast_floating(tree, self.params)

    @comparable
    def wrap(self, loss_fn: LossFn) -> LossFn:
        """The loss under this policy; ``hparams`` and ``model_state`` are handed on as they are."""
        for name, dtype in self._asdict().items():
            check_dtype(name, dtype)

        @functools.wraps(loss_fn)
        def wrapped(params, batch, key, **named):
            params, batch = cast_floating((params, batch), self.compute)
            return cast_floating(loss_fn(params, batch, key, **named), self.output)

        return wrapped


def cast_floating(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """A tree with its real floating leaves in another dtype.

    >>> cast_floating((jnp.ones(1), jnp.ones(1, int)), jnp.bfloat16)
    (Array([1], dtype=bfloat16), Array([1], dtype=int32))
    """

    def cast(leaf):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf).astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)


__all__ = ["Policy", "cast_floating"]
