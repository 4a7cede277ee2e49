"""Decompositions of stacks of matrices that are safe on a CPU."""

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of matrices whose ``vmap`` takes them one by one on a CPU, and as a batch elsewhere.

    LAPACK calls on a batch wait inside of XLA's thread pool for other threads of the same pool. Two at the same time
    can wait for ever (seen with jaxlib 0.10.2 on two cores). A call on one matrix does not wait.

    Args:
      function: takes and returns arrays.

    >>> import jax.numpy as jnp
    >>> stack = jnp.stack([jnp.eye(2), 4 * jnp.eye(2)])
    >>> jax.vmap(one_by_one(jnp.linalg.inv))(stack)[1]
    Array([[0.25, 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    single = jax.custom_batching.custom_vmap(lambda *arrays: function(*arrays))

    @single.def_vmap
    def batched(size, is_batched, *arrays):
        axes = tuple(0 if each else None for each in is_batched)

        def in_turn(*arrays):
            def one(moving):
                rest = iter(moving)
                return single(*(next(rest) if each else array for array, each in zip(arrays, is_batched, strict=True)))

            return jax.lax.map(one, [array for array, each in zip(arrays, is_batched, strict=True) if each])

        result = jax.lax.platform_dependent(*arrays, cpu=in_turn, default=jax.vmap(function, axes))
        return result, jax.tree.map(lambda _: True, result)

    return single


__all__ = ["one_by_one"]
