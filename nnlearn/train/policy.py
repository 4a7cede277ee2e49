"""Mixed precision as a policy: the dtypes of parameters, computation and results."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.checks import check_dtype
from nnlearn.data import MaskedBatch
from nnlearn.settings import comparable
from nnlearn.tree import path_name
from nnlearn.types import Batch, DTypeLike, LossFn, PyTree

TARGET = re.compile(r"(.*_)?(y|ys|targets?|labels?)(_.*)?")


class Policy(NamedTuple):
    """The dtypes of parameters, computation and results. Integers and booleans are never cast.

    ``policy.wrap(loss_fn)`` is a loss that casts parameters and inputs to ``compute`` first, and finally the loss, aux
    and model state to ``output``. Targets are not cast. Gradients have the dtype of ``params``, because the cast is
    part of the differentiated function. With ``compute=jnp.float16``, put ``dynamic_loss_scale`` around the optimizer.

    Attributes:
      params: the dtype of ``cast_params``.
      compute: the dtype in which the wrapped loss computes.
      output: the dtype of the results of the wrapped loss.

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
        """Cast the floating leaves of a tree to the dtype ``params``."""
        return cast_floating(tree, self.params)

    @comparable
    def wrap(self, loss_fn: LossFn, is_input: Callable[[str], bool] | None = None) -> LossFn:
        """The loss under this policy. ``hparams`` and ``model_state`` are passed through unchanged.

        Args:
          loss_fn: see ``make_step``.
          is_input: ``is_input(path)`` returns whether a leaf of the batch is an input and should be cast. Paths look
            like ``"x"`` or ``"1/label"``, without the ``examples`` of a ``MaskedBatch``. ``lambda path: True`` casts
            all. None casts everything but targets. Targets are all elements of a tuple or list except the first, and
            leaves whose name in a dict or class is ``y``, ``target``, ``label``, a plural of these, or one of these
            with a prefix or suffix, such as ``y_train`` or ``soft_labels``.

        >>> seen = []
        >>> loss_fn = Policy().wrap(lambda params, batch, key: seen.append(batch) or 0.0)
        >>> _ = loss_fn(jnp.ones(1), (jnp.ones(1), jnp.ones(1)), None)
        >>> seen
        [(Array([1], dtype=bfloat16), Array([1.], dtype=float32))]
        """
        for name, dtype in self._asdict().items():
            check_dtype(name, dtype)

        @functools.wraps(loss_fn)
        def wrapped(params, batch, key, **named):
            params = cast_floating(params, self.compute)
            batch = _cast_inputs(batch, self.compute, is_input or _is_no_target)
            return cast_floating(loss_fn(params, batch, key, **named), self.output)

        return wrapped


def _cast_inputs(batch: Batch, dtype: DTypeLike, is_input: Callable[[str], bool]) -> Batch:
    if isinstance(batch, MaskedBatch):
        return batch._replace(examples=_cast_inputs(batch.examples, dtype, is_input))

    def cast(path, leaf):
        if is_input(path_name(path)):
            return cast_floating(leaf, dtype)
        # A weak dtype, as that of jnp.full(3, 2.0), would be promoted to the dtype of the network's outputs.
        return leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf

    return jax.tree.map_with_path(cast, batch)


def _is_no_target(path: str) -> bool:
    """Whether a path is not that of a target. Numbers in a path are indices into tuples and lists.

    >>> [path for path in ("x", "image", "0", "1", "y", "soft_labels", "yaw", "0/1") if _is_no_target(path)]
    ['x', 'image', '0', 'yaw', '0/1']
    """
    words = path.split("/")
    second = words[0].isdecimal() and int(words[0]) > 0
    return not second and not any(TARGET.fullmatch(word.lower()) for word in words)


def cast_floating(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Cast the real floating leaves of a tree.

    >>> cast_floating((jnp.ones(1), jnp.ones(1, int)), jnp.bfloat16)
    (Array([1], dtype=bfloat16), Array([1], dtype=int32))
    """

    def cast(leaf):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf).astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)


__all__ = ["Policy", "cast_floating"]
