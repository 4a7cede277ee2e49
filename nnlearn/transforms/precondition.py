"""Kronecker-factored preconditioners: the matrices of a leaf's two sides, their bases, and their roots."""

import math

import jax
import jax.numpy as jnp

from nnlearn.transforms.storage import Slot
from nnlearn.tree import rarely
from nnlearn.types import DTypeLike

Shape = tuple[int, ...]


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


@jax.custom_jvp
def next_basis(refresh: jax.Array, matrix: jax.Array, basis: jax.Array) -> jax.Array:
    """One step of orthogonal iteration towards the eigenvectors, ``QR(matrix @ basis)``; ``basis`` if not ``refresh``.

    Its derivative is zero: that of an eigenvector is infinite where two eigenvalues meet.
    """

    def turned(refresh, matrix, basis):  # also called where another run of a batch refreshes
        return jnp.where(refresh, jnp.linalg.qr(matrix @ basis)[0], basis)

    return rarely(refresh, turned, basis, refresh, matrix, basis)


@jax.custom_jvp
def inverse_root(refresh: jax.Array, matrix: jax.Array, root: jax.Array, exponent: float, ridge: jax.Array):
    r"""``matrix`` to the power ``-exponent``, by its eigenvalues; ``root``, the last one, if not ``refresh``.

    Eigenvalues below ``ridge`` times the largest count as that. The derivative is zero.
    """

    def power(refresh, matrix, root, exponent, ridge):
        values, vectors = jnp.linalg.eigh(matrix)
        smallest = ridge * jnp.max(values, initial=0.0)
        values = jnp.maximum(values, jnp.maximum(smallest, jnp.finfo(values.dtype).tiny))
        return jnp.where(refresh, (vectors * (values**-exponent)[None, :]) @ transpose(vectors), root)

    return rarely(refresh, power, root, refresh, matrix, root, exponent, ridge)


next_basis.defjvp(lambda primals, _: (next_basis(*primals), jnp.zeros_like(primals[2])))
inverse_root.defjvp(lambda primals, _: (inverse_root(*primals), jnp.zeros_like(primals[2])))

__all__ = ["apply_sides", "gram", "inverse_root", "next_basis", "side_slot", "sides_of", "transpose"]
