"""Mixed precision as a policy: in which dtypes parameters are kept, the network calculates, and results come out."""

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
    """The dtypes of parameters, of calculation, and of results; integers and booleans stay what they are.

    ``policy.wrap(loss_fn)`` is a loss that casts parameters and inputs to ``compute`` on the way in, and the loss, aux
    and model state to ``output`` on the way out; targets stay as they are. Gradients come back in the dtype of
    ``params``, because the cast is part of what is differentiated. With ``compute=jnp.float16`` put
    ``dynamic_loss_scale`` around the optimizer.

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
    def wrap(self, loss_fn: LossFn, is_input: Callable[[str], bool] | None = None) -> LossFn:
        """The loss under this policy; ``hparams`` and ``model_state`` are handed on as they are.

        Args:
          loss_fn: see ``make_step``.
          is_input: ``is_input(path)`` tells of a leaf of the batch whether it is an input, to be cast; the path is such
            as ``"x"`` or ``"1/label"``, without the ``examples`` of a ``MaskedBatch``. ``lambda path: True`` casts all.
            None casts what is not a target: targets are all members of a tuple or list but the first, and leaves with
            a name (of a dict or class) of ``y``, ``target``, ``label``, their plurals, or these with something added,
            as in ``y_train`` or ``soft_labels``.

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
        # A weak dtype, as jnp.full(3, 2.0) has, would give way to that of the network's outputs.
        return leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf

    return jax.tree.map_with_path(cast, batch)


def _is_no_target(path: str) -> bool:
    """Whether a path is not that of a target: numbers are places in tuples and lists.

    >>> [path for path in ("x", "image", "0", "1", "y", "soft_labels", "yaw", "0/1") if _is_no_target(path)]
    ['x', 'image', '0', 'yaw', '0/1']
    """
    words = path.split("/")
    second = words[0].isdecimal() and int(words[0]) > 0
    return not second and not any(TARGET.fullmatch(word.lower()) for word in words)


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
