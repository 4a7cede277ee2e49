"""Kronecker-factored preconditioners: the matrices of a leaf's two sides, their bases, and their roots."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnlearn.linalg import one_by_one
from nnlearn.transforms.storage import Slot
from nnlearn.tree import as_hyperparam, batch_rows, rarely
from nnlearn.types import DTypeLike, PyTree, Scalar

Shape = tuple[int, ...]
GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread over the unit interval however many there are


def sides_of(shape: Shape, largest: int) -> tuple[int, int]:
    """The sizes of the left and the right matrix of a leaf; 0 for a side without one.

    A leaf of more than two axes is a matrix of its last axis and all others, as a convolution kernel is. Vectors and
    sides longer than ``largest`` have none.

    >>> sides_of((3, 3, 8, 16), 128), sides_of((500, 16), 128), sides_of((16,), 128)
    ((72, 16), (0, 16), (0, 0))
    """
    if len(shape) < 2:
        return 0, 0
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (rows if 1 < rows <= largest else 0), (columns if 1 < columns <= largest else 0)


def side_slot(side: int, largest: int, dtype: DTypeLike | None = None, *, identity: bool = False) -> Slot:
    """A square matrix for one side of each leaf, zero at first or the identity; (1, 1) where the leaf has none."""

    def shape(leaf: Shape) -> Shape:
        return (max(sides_of(leaf, largest)[side], 1),) * 2

    def first(leaf):
        return jnp.eye(shape(leaf.shape)[0], dtype=leaf.dtype)

    return Slot(dtype=dtype, shape=shape, initial=first if identity else None)


def transpose(x: jax.Array) -> jax.Array:
    """The conjugate transpose of a matrix."""
    return jnp.conj(x).T


def gram(g: jax.Array, side: int) -> jax.Array:
    """The products of the rows of a matrix (side 0) or of its columns (side 1) with one another."""
    return g @ transpose(g) if side == 0 else transpose(g) @ g


def apply_sides(g: jax.Array, left: jax.Array | None, right: jax.Array | None) -> jax.Array:
    """``left @ g @ right``; None is the identity."""
    g = g if left is None else left @ g
    return g if right is None else g @ right


def spread_phases(tree: PyTree) -> list[float]:
    """A phase in [0, 1) for each leaf, such that equal leaves are evenly spread.

    >>> spread_phases([jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros((3, 3))])
    [0.0, 0.5, 0.618...]
    """
    groups: dict[Shape, list[int]] = {}
    leaves = jax.tree.leaves(tree)
    for position, leaf in enumerate(leaves):
        groups.setdefault(jnp.shape(leaf), []).append(position)
    phases = [0.0] * len(leaves)
    for number, positions in enumerate(groups.values()):
        for index, position in enumerate(positions):
            phases[position] = (number * GOLDEN + index / len(positions)) % 1
    return phases


def is_due(step: jax.Array, every: Scalar, phase: jax.Array) -> jax.Array:
    """Whether a leaf of that phase refreshes its preconditioner: at step 0, and then at every ``every``-th step."""
    every = as_hyperparam(every, step.dtype)
    return (step < 1) | ((step + jnp.floor(phase * every)) % every < 1)


def where_due(when: jax.Array, slow: Callable[..., jax.Array], fast: jax.Array, *operands: Any) -> jax.Array:
    """``rarely`` for a condition that differs within a batch: ``slow`` runs for the members that are due alone.

    It runs for one after another, where ``rarely`` runs it for all as one batch.
    """

    @jax.custom_batching.custom_vmap
    def each(when, fast, *operands):
        order = jnp.argsort(~when)  # those that are due come first

        def body(number, fast):
            row = order[number]
            return fast.at[row].set(slow(*(operand[row] for operand in operands)))

        return jax.lax.fori_loop(0, jnp.sum(when), body, fast)

    @each.def_vmap
    def each_in_a_batch(size, batched, *arrays):
        arrays = batch_rows(size, tuple(batched), arrays)
        flat = each(*(array.reshape(-1, *array.shape[2:]) for array in arrays))
        return flat.reshape(arrays[1].shape), True

    @jax.custom_batching.custom_vmap
    def choose(when, fast, *operands):
        return jax.lax.cond(when, lambda fast, *operands: slow(*operands), lambda fast, *_: fast, fast, *operands)

    @choose.def_vmap
    def choose_in_a_batch(size, batched, *arrays):
        return each(*batch_rows(size, tuple(batched), arrays)), True

    return choose(when, fast, *map(jnp.asarray, operands))


_orthonormal = one_by_one(lambda x: jnp.linalg.qr(x)[0])
_eigen = one_by_one(lambda x: tuple(jnp.linalg.eigh(x)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def next_basis(refresh: jax.Array, matrix: jax.Array, basis: jax.Array, choose: Callable = rarely) -> jax.Array:
    """One step of orthogonal iteration towards the eigenvectors, ``QR(matrix @ basis)``; ``basis`` if not ``refresh``.

    Its derivative is zero: that of an eigenvector is infinite where two eigenvalues meet. ``choose`` is ``rarely``, or
    ``where_due`` if ``refresh`` differs within a batch.
    """

    def turned(refresh, matrix, basis):  # also called where another run of a batch refreshes
        return jnp.where(refresh, _orthonormal(matrix @ basis), basis)

    return choose(refresh, turned, basis, refresh, matrix, basis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def inverse_root(
    refresh: jax.Array,
    matrix: jax.Array,
    root: jax.Array,
    exponent: float,
    ridge: jax.Array,
    choose: Callable = rarely,
) -> jax.Array:
    r"""``matrix`` to the power ``-exponent``, by its eigenvalues; ``root``, the last one, if not ``refresh``.

    Eigenvalues below ``ridge`` times the largest count as that. The derivative is zero. ``choose`` as above.
    """

    def power(refresh, matrix, root, exponent, ridge):
        values, vectors = _eigen(matrix)
        smallest = ridge * jnp.max(values, initial=0.0)
        values = jnp.maximum(values, jnp.maximum(smallest, jnp.finfo(values.dtype).tiny))
        return jnp.where(refresh, (vectors * (values**-exponent)[None, :]) @ transpose(vectors), root)

    return choose(refresh, power, root, refresh, matrix, root, exponent, ridge)


next_basis.defjvp(lambda choose, primals, _: (next_basis(*primals, choose), jnp.zeros_like(primals[2])))
inverse_root.defjvp(lambda choose, primals, _: (inverse_root(*primals, choose), jnp.zeros_like(primals[2])))

__all__ = [
    "apply_sides",
    "gram",
    "inverse_root",
    "is_due",
    "next_basis",
    "side_slot",
    "sides_of",
    "spread_phases",
    "transpose",
    "where_due",
]
