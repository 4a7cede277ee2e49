"""Large matrices in blocks, so that a matrix method never meets a side longer than a block."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.checks import check_count
from nnlearn.packing import is_packed, pack, pack_like, unpack
from nnlearn.settings import comparable
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, PyTree


def _cuts(size: int, block: int) -> list[int]:
    """The first index of each part but the first, for parts of nearly equal length, at most ``block``."""
    parts = math.ceil(size / block)
    return [round(number * size / parts) for number in range(1, parts)]


def _divided(leaf: Any, block: int) -> PyTree:
    """A leaf, or a dict of the blocks of its last two axes."""
    shape = jnp.shape(leaf)
    if len(shape) < 2 or max(shape[-2:]) <= block:
        return leaf
    rows, columns = ([0, *_cuts(size, block), size] for size in shape[-2:])

    def part(i, j):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            new = (*shape[:-2], rows[i + 1] - rows[i], columns[j + 1] - columns[j])
            return jax.ShapeDtypeStruct(new, leaf.dtype)
        return leaf[..., rows[i] : rows[i + 1], columns[j] : columns[j + 1]]

    return {f"{i},{j}": part(i, j) for i in range(len(rows) - 1) for j in range(len(columns) - 1)}


def _joined(parts: PyTree, like: Any, block: int) -> jax.Array:
    shape = jnp.shape(like)
    if len(shape) < 2 or max(shape[-2:]) <= block:
        return parts
    rows, columns = (len(_cuts(size, block)) + 1 for size in shape[-2:])
    lines = [jnp.concatenate([parts[f"{i},{j}"] for j in range(columns)], axis=-1) for i in range(rows)]
    return jnp.concatenate(lines, axis=-2)


@comparable
def in_blocks(tx: GradientTransformation, size: int) -> GradientTransformationExtraArgs:
    """Let a matrix method see each large matrix as blocks of at most ``size`` x ``size``, each a leaf of its own.

    A method with a matrix for each side, such as ``shampoo``, ``soap`` or ``kron``, then needs memory and time that
    grow with the number of blocks, not with the cube of a side (Anil et al. 2020, arXiv:2002.09018). Blocks have nearly
    equal sizes, so that they run as one batch. Elementwise methods give the same updates, in a slower way.

    Args:
      tx: the optimizer or transformation.
      size: longest side of a block, a Python int >= 1. Sides of the last two axes count, others are batches.

    Raises:
      ValueError: if ``size`` is below 1.

    >>> import nnlearn
    >>> tx, w = in_blocks(nnlearn.shampoo(0.1), 32), jnp.ones((64, 48))
    >>> sorted({leaf.shape for leaf in jax.tree.leaves(tx.init(w)) if leaf.ndim == 2})
    [(24, 24), (32, 24), (32, 32)]
    """
    block = check_count("size", size)
    tx = with_extra_args_support(tx)

    def divided(tree) -> Any:
        """The tree of blocks, packed if the tree is."""
        if tree is None:
            return None
        parts = jax.tree.map(lambda leaf: _divided(leaf, block), unpack(tree))
        return pack(parts) if is_packed(tree) else parts

    def init(params):
        return tx.init(divided(params))

    def update(updates, state, params=None, **extra_args) -> Any:
        change, state = tx.update(divided(updates), state, divided(params), **extra_args)
        whole = unpack(updates)
        joined = jax.tree.map(lambda like, parts: _joined(parts, like, block), whole, unpack(change))
        return pack_like(updates.layout, joined) if is_packed(updates) else joined, state

    return GradientTransformationExtraArgs(init, update)


__all__ = ["in_blocks"]
