"""Operations on whole leaves of packed parameters.

Leaves of equal shape lie side by side in a buffer. Operations on whole leaves, such as a norm for each layer or a
matrix method, run on them as one stack: one operation for each shape, not one for each leaf.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.packing.layout import Buffer, Layout, Leaf
from nnlearn.packing.packed import Packed, filled, is_packed, to_flat, to_leaf, whole
from nnlearn.tree import array_norm
from nnlearn.types import MaskedNode, PyTree


def map_stacks(function: Callable[..., jax.Array], *packed: Packed) -> Packed:
    """Map a function over stacks of leaves of equal shape, without unpacking them.

    Args:
      function: from arrays of shape (count, *shape), one for each tree, to one array of the same shape. It must treat
        the ``count`` leaves independently and alike, as ``jax.vmap`` of a function of one leaf does.
      *packed: trees of one layout.

    Returns:
      ``Packed``. For one value per leaf use ``stack_values``.

    >>> from nnlearn import pack
    >>> packed = pack({"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), 3.0), "c": jnp.ones(2)})
    >>> map_stacks(jax.vmap(lambda leaf: leaf / jnp.sum(leaf)), packed)["b"]
    Array([[0.25, 0.25],
           [0.25, 0.25]], dtype=float32)
    """
    layout = packed[0].layout
    buffers = []
    for index, buffer in enumerate(layout.buffers):
        if isinstance(packed[0].buffers[index], MaskedNode):
            buffers.append(MaskedNode())
            continue
        results = [
            from_stack(function(*stacks), layout.leaves[run[0]])
            for run, stacks in _stacks(layout, buffer, [tree.buffers[index] for tree in packed])
        ]
        buffers.append(filled(results, buffer))
    return Packed(buffers, layout)


def stack_values(function: Callable[..., jax.Array], *packed: Packed) -> jax.Array:
    """Compute one value for each leaf, with a function on stacks of leaves of equal shape.

    Args:
      function: from arrays of shape (count, *shape), one for each tree, to an array of shape (count,).
      *packed: trees of one layout.

    Returns:
      An array of shape (leaves,), in the tree's order.

    >>> from nnlearn import pack
    >>> packed = pack({"a": jnp.ones((2, 2)), "b": jnp.ones(3), "c": jnp.ones((2, 2))})
    >>> stack_values(jax.vmap(jnp.sum), packed)
    Array([4., 3., 4.], dtype=float32)
    """
    layout, order, values = packed[0].layout, [], []
    for index, buffer in enumerate(layout.buffers):
        for run, stacks in _stacks(layout, buffer, [tree.buffers[index] for tree in packed]):
            order.extend(run)
            values.append(function(*stacks))
    return jnp.concatenate(values)[np.argsort(order)] if values else jnp.zeros([0])


def _stacks(
    layout: Layout, buffer: Buffer, arrays: Sequence[jax.Array]
) -> Iterator[tuple[tuple[int, ...], list[jax.Array]]]:
    """Yield each run of equal leaves of a buffer, with its part of each array as (count, *shape)."""
    offset, sizes = 0, dict(zip(buffer.leaves, layout.sizes(buffer), strict=True))
    arrays = [whole(array, buffer) for array in arrays]
    for run in layout.runs(buffer):
        size = sizes[run[0]]
        parts = [jax.lax.slice_in_dim(array, offset, offset + len(run) * size, axis=-1) for array in arrays]
        yield run, [to_stack(part, len(run), layout.leaves[run[0]]) for part in parts]
        offset += len(run) * size


def to_stack(flat: jax.Array, count: int, leaf: Leaf) -> jax.Array:
    """Reshape part of a buffer with ``count`` equal leaves, (*parts, count * size), to (count, *shape)."""
    each = jnp.reshape(flat, (*flat.shape[:-1], count, flat.shape[-1] // count))
    return to_leaf(jnp.moveaxis(each, -2, 0), leaf)


def from_stack(stack: jax.Array, leaf: Leaf) -> jax.Array:
    """Reverse ``to_stack``."""
    flat = jnp.moveaxis(to_flat(stack, leaf), 0, -2)
    return jnp.reshape(flat, (*flat.shape[:-2], flat.shape[-2] * flat.shape[-1]))


def leaf_norms(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of each leaf, shape (leaves,), in the tree's order; packed or not.

    A packed tree takes one reduction for each shape. Sums are in float32 or better.

    >>> leaf_norms({"a": jnp.array([3.0, 4.0]), "b": jnp.array(-1.0)})
    Array([5., 1.], dtype=float32)
    """

    def norm(leaf):
        return array_norm(leaf).astype(jnp.float32)

    if is_packed(tree):
        return stack_values(jax.vmap(norm), tree)
    norms = [norm(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(norms) if norms else jnp.zeros([0])


__all__ = ["from_stack", "leaf_norms", "map_stacks", "stack_values", "to_stack"]
