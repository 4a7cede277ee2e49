"""Masks, labels and other rules about leaves, for packed parameters."""

import math
from collections.abc import Callable

import jax
import numpy as np

from nnlearn.packing.layout import Layout
from nnlearn.packing.packed import Packed, is_packed
from nnlearn.settings import comparable
from nnlearn.tree import is_function
from nnlearn.types import Params, PyTree

MANY_LEAVES = 16
SMALL_LEAF = 100_000


@comparable
def per_buffer(rule: PyTree | Callable[[Params], PyTree]) -> Callable[[Params], PyTree]:
    """Extend a rule about leaves to packed parameters.

    Masks and labels for ``optax.masked``, ``optax.partition`` and others depend on the shapes and paths of leaves. On
    packed parameters they would see the buffers and be wrong. The returned function applies the rule to the leaves, and
    returns one answer for each buffer.

    Args:
      rule: a tree of booleans or labels like the unpacked parameters, or a prefix of it; or a function from parameters
        to either, which sees shapes and dtypes.

    Returns:
      A function from parameters, packed or not, to the answers.

    Raises:
      ValueError: when called, if the answers for leaves of one buffer differ; pack them with ``labels=rule``.

    >>> from nnlearn import pack
    >>> import jax.numpy as jnp
    >>> decays = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    >>> packed = pack({"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}, labels=decays)
    >>> per_buffer(decays)(packed)
    Packed(2 leaves: float32/False: False, float32/True: True)
    """

    def on(params):
        if not is_packed(params):
            return rule(params) if is_function(rule) else rule
        layout = params.layout
        answers = _answers(layout, rule)
        for buffer in layout.buffers:
            for position in buffer.leaves:
                if answers[position] != answers[buffer.leaves[0]]:
                    first, other = layout.leaves[buffer.leaves[0]].path, layout.leaves[position].path
                    raise ValueError(
                        f"the rule says {answers[buffer.leaves[0]]!r} for {first!r} and {answers[position]!r} for "
                        f"{other!r}, which share the buffer {buffer.name!r}: pack them separately, with labels=rule"
                    )
        return Packed([answers[buffer.leaves[0]] for buffer in layout.buffers], layout)

    return on


def _answers(layout: Layout, rule) -> list:
    tree = layout.tree()
    answers = rule(tree) if is_function(rule) else rule
    spread = jax.tree.map(lambda answer, part: jax.tree.map(lambda _: answer, part), answers, tree)
    return jax.tree.leaves(spread)


def worth_packing(params: Params) -> bool:
    """Whether packing these parameters is likely to make training faster.

    True for at least 16 leaves of at most 100,000 elements on average. Measurements on CPUs gave these limits.

    >>> import jax.numpy as jnp
    >>> worth_packing([jnp.ones(10)] * 100), worth_packing([jnp.ones(10)] * 2)
    (True, False)
    """
    sizes = [math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
    return len(sizes) >= MANY_LEAVES and sum(sizes) <= SMALL_LEAF * len(sizes)


__all__ = ["per_buffer", "worth_packing"]
