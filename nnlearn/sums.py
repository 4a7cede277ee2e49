"""Sums of many terms whose rounding errors do not accumulate.

A float32 sum stops growing once a term is below its last digit: ten million terms of 0.1 sum to 1,087,937. A ``Total``
carries the rounding error of the sum and adds it to the next term.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnlearn.tree import compute_dtype


class Total(NamedTuple):
    """A sum of many terms as two scalars: the rounded sum and its rounding error."""

    rounded: jax.Array
    rest: jax.Array

    @property
    def value(self) -> jax.Array:
        """The sum."""
        return self.rounded + self.rest

    def plus(self, term: jax.Array) -> "Total":
        """Add one term, in this sum's dtype; differentiable."""
        return Total(*_two_sum(self.rounded, term.astype(self.rounded.dtype) + self.rest))


def zero_total(dtype=jnp.float32) -> Total:
    """Return the sum of no terms, in ``dtype`` or float32 if that is wider.

    Source: Kahan 1965, "Further remarks on reducing truncation errors", Commun. ACM 8; the exact error of one addition
    is Knuth's, The Art of Computer Programming, volume 2, section 4.2.2.

    >>> total = jax.lax.fori_loop(0, 10_000, lambda _, total: total.plus(jnp.float32(0.1)), zero_total())
    >>> total.value
    Array(1000., dtype=float32)
    """
    dtype = compute_dtype(dtype)
    return Total(jnp.zeros([], dtype), jnp.zeros([], dtype))


def long_sum(terms: jax.Array) -> jax.Array:
    """Sum over the leading axis by pairs, in float32 or better; the error grows with the logarithm of the length.

    Args:
      terms: shape (terms, ...), of any dtype; integers are summed as float32. Infinity and NaN count as in ``jnp.sum``.

    Returns:
      Shape (...), ``terms``' own dtype, or float32 if that is wider.

    >>> long_sum(jnp.full(100, 2500.0, jnp.float16))
    Array(250000., dtype=float32)
    """
    terms = jnp.asarray(terms)
    terms = terms.astype(compute_dtype(terms.dtype))
    if jnp.issubdtype(terms.dtype, jnp.complexfloating):
        return jax.lax.complex(_long_sum(jnp.real(terms)), _long_sum(jnp.imag(terms)))
    return _long_sum(terms)


@jax.custom_jvp
def _long_sum(terms):
    # Halves are added repeatedly. A reduction that carries its rounding error crashes XLA's compiler for CPUs.
    while len(terms) > 1:
        half = len(terms) // 2
        rest, terms = terms[2 * half :], terms[:half] + terms[half : 2 * half]
        if len(rest):
            terms = terms.at[-1].add(rest[0]) if half > 1 else terms + rest
    return terms[0] if len(terms) else jnp.zeros(terms.shape[1:], terms.dtype)


@_long_sum.defjvp
def _long_sum_jvp(primals, tangents):
    return _long_sum(*primals), jnp.sum(tangents[0], axis=0)


def _two_sum(a, b):
    """Return ``a + b`` rounded and its exact rounding error, which is 0 where the sum is not finite."""
    rounded = a + b
    part = rounded - a
    rest = jax.lax.stop_gradient((a - (rounded - part)) + (b - part))
    return rounded, jnp.where(jnp.isfinite(rounded), rest, jnp.zeros_like(rest))


__all__ = ["Total", "long_sum", "zero_total"]
