"""Odd matrix polynomials of stacks of small matrices as a C kernel, see ``polynomial.c``."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from nnlearn.native.kernel import call_kernel, runs_here

SOURCE = Path(__file__).with_name("polynomial.c")
SMALL, LARGE = 16, 512  # lengths of the shorter side for which this is faster than XLA's products
WIDE = 2  # from this ratio of the sides on, products of small matrices take the place of products with the wide one


@dataclasses.dataclass(frozen=True)
class PolynomialKernel:
    """A ``Kernel`` from matrices (count, rows, columns) and coefficients (steps, 3) to the last polynomial's value."""

    handler = "polynomials"
    flags = ("-ffp-contract=fast", f"-DWIDE={WIDE}")
    in_place = ()

    @property
    def source(self) -> str:
        return SOURCE.read_text()

    def results(self, x, coefficients):
        return [ShapedArray(x.shape, x.dtype)]

    def reference(self, x: jax.Array, coefficients: jax.Array) -> list[jax.Array]:
        return [jax.vmap(polynomials_by_xla, in_axes=(0, None))(x, coefficients)]

    def vmapped(self, axes, x, coefficients):
        if axes[1] is not None or axes[0] is None:
            return jax.vmap(self.reference, in_axes=axes)(x, coefficients), [0]
        moved = jnp.moveaxis(x, axes[0], 0)
        flat = jnp.reshape(moved, (-1, *moved.shape[2:]))
        return [jnp.reshape(call_kernel(self, flat, coefficients)[0], moved.shape)], [0]


def polynomials_by_xla(x: jax.Array, coefficients: jax.Array) -> jax.Array:
    """The polynomials of one matrix by JAX's operations."""
    if x.shape[0] > x.shape[1]:
        return polynomials_by_xla(x.T, coefficients).T
    if x.shape[1] >= WIDE * x.shape[0] and len(coefficients) > 1:
        return _in_gram_form(x, coefficients)
    for row in coefficients:
        gram = x @ jnp.conj(x).T
        x = row[0] * x + (row[1] * gram + row[2] * (gram @ gram)) @ x
    return x


def _in_gram_form(x: jax.Array, coefficients: jax.Array) -> jax.Array:
    r"""The same of a wide matrix with two products of its size for several polynomials.

    .. math::
        A_0 = X X^\top, \quad F_k = a + b A_k + c A_k^2, \quad A_{k+1} = F_k A_k F_k, \quad
        X \leftarrow F_k \cdots F_0 X

    The factors commute, as all are polynomials of :math:`A_0`. Its rounding errors hide singular values below the root
    of the precision, so it starts again from the new :math:`X`, first after two polynomials, then after three.
    """
    step = 0
    while step < len(coefficients):
        part = coefficients[step : step + (3 if step else 2)]
        step += len(part)
        gram = x @ jnp.conj(x).T
        product: Any = None
        for number, row in enumerate(part):
            inner = row[1] * gram + row[2] * (gram @ gram)
            if product is None:
                product = inner + row[0] * jnp.eye(len(x), dtype=x.dtype)
            else:
                product = row[0] * product + inner @ product
            if number + 1 < len(part):
                once = row[0] * gram + inner @ gram
                gram = row[0] * once + inner @ once
        x = product @ x
    return x


def polynomials(x: jax.Array, coefficients: jax.Array) -> jax.Array:
    r"""Apply odd polynomials to the singular values of a matrix, one after another.

    .. math:: X \leftarrow a X + (b A + c A^2) X, \quad A = X X^\top

    Args:
      x: a matrix.
      coefficients: (steps, 3), a row for each polynomial.

    >>> polynomials(2 * jnp.eye(2), jnp.array([[1.0, 2.0, 0.5]]))
    Array([[34.,  0.],
           [ 0., 34.]], dtype=float32)
    """
    fits = x.dtype == coefficients.dtype == jnp.float32 and SMALL <= min(x.shape) <= LARGE
    if fits and runs_here(x, coefficients):
        return call_kernel(PolynomialKernel(), x[None], coefficients)[0][0]
    return polynomials_by_xla(x, coefficients)


__all__ = ["polynomials"]
