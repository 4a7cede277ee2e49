"""Packed parameters as the tree that was packed, in NumPy, and back: nothing is compiled."""

from typing import Any

import jax
import numpy as np

from nnlearn.packing import Packed
from nnlearn.packing.packed import to_flat, to_leaf
from nnlearn.types import PyTree


def leaf_tree(packed: Packed) -> PyTree:
    """The packed tree with NumPy leaves; a mask or a ``MaskedNode`` in a buffer's place stands for each of its leaves.

    >>> import jax.numpy as jnp, nnlearn
    >>> leaf_tree(nnlearn.pack({"b": jnp.zeros(1), "w": jnp.ones(2)}))
    {'b': array([0.], dtype=float32), 'w': array([1., 1.], dtype=float32)}
    """
    layout = packed.layout
    buffers = [np.asarray(buffer) if hasattr(buffer, "shape") else buffer for buffer in packed.buffers]
    leaves: list[Any] = [None] * len(layout.leaves)
    for buffer, array in zip(layout.buffers, buffers, strict=True):
        for position, size in zip(buffer.leaves, layout.sizes(buffer), strict=True):
            offset, leaf = layout.places[position][1], layout.leaves[position]
            if not isinstance(array, np.ndarray):
                leaves[position] = array
            elif leaf.splits:
                leaves[position] = np.asarray(to_leaf(jax.numpy.asarray(array[..., offset : offset + size]), leaf))
            else:
                leaves[position] = array[..., offset : offset + size].reshape((*array.shape[:-1], *leaf.shape))
    return layout.treedef.unflatten(leaves)


def leaf_shapes(packed: Packed) -> PyTree:
    """The packed tree with ``jax.ShapeDtypeStruct`` leaves."""
    layout = packed.layout
    leaves: list[Any] = []
    for leaf, (number, _) in zip(layout.leaves, layout.places, strict=True):
        array = packed.buffers[number]
        if not hasattr(array, "shape"):
            leaves.append(array)
            continue
        lead = array.shape[: len(array.shape) - len(layout.buffers[number].shape)]
        leaves.append(jax.ShapeDtypeStruct((*lead, *leaf.shape), array.dtype))
    return layout.treedef.unflatten(leaves)


def fill_buffers(like: Packed, tree: PyTree) -> list[Any]:
    """The buffers of ``like``'s layout, in NumPy, from a tree as ``leaf_shapes`` describes it."""
    layout = like.layout
    arrays = layout.treedef.flatten_up_to(tree)
    filled: list[Any] = []
    for buffer, old in zip(layout.buffers, like.buffers, strict=True):
        if not hasattr(old, "shape"):
            filled.append(old)
            continue
        parts = []
        for position in buffer.leaves:
            leaf, array = layout.leaves[position], np.asarray(arrays[position])
            lead = array.shape[: array.ndim - len(leaf.shape)]
            flat = to_flat(jax.numpy.asarray(array), leaf) if leaf.splits else array.reshape((*lead, leaf.size))
            parts.append(np.asarray(flat))
        array = np.concatenate(parts, axis=-1)
        missing = buffer.shape[-1] - array.shape[-1]
        filled.append(np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array)
    return filled


__all__ = ["fill_buffers", "leaf_shapes", "leaf_tree"]
