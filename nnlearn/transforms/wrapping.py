"""Transformations around functions and other transformations: on whole trees, on unpacked leaves, on a condition."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.packing import is_packed, pack_like, unpack
from nnlearn.settings import comparable
from nnlearn.types import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Params,
    PyTree,
    Updates,
)


def from_map(function: Callable[..., Updates], needs_params: str = "") -> GradientTransformationExtraArgs:
    """A stateless transformation from ``function(updates, params) -> updates``.

    Args:
      function: works on whole trees.
      needs_params: the transformation's name if it cannot do without parameters.
    """

    def init(params):
        del params
        return EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if needs_params:
            require_params(params, needs_params)
        return function(updates, params), state

    return GradientTransformationExtraArgs(init, update)


@comparable
def by_leaf(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Let a transformation see the leaves of packed parameters, one by one, as if they were not packed.

    Elementwise transformations do not need it: they run on the buffers. One that works with whole leaves, such as a
    trust ratio, does, unless it is nnlearn's, which knows what to do. It pays for every leaf again, in time to compile
    and to run, so put it around that link of a chain alone. On parameters that are not packed it changes nothing.

    Args:
      inner: any transformation, nnlearn's or optax's. Its state holds leaves.

    >>> import nnlearn, optax
    >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3])}
    >>> tx, packed = by_leaf(optax.scale_by_trust_ratio()), nnlearn.pack(params)
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, packed), tx.init(packed), packed)
    >>> updates["b"]
    Array([0.3], dtype=float32)
    """
    inner = with_extra_args_support(inner)

    def init(params):
        return inner.init(unpack(params))

    def update(updates, state, params=None, **extra_args) -> Any:
        change, state = inner.update(unpack(updates), state, unpack(params), **unpack(extra_args))
        return pack_like(updates.layout, change) if is_packed(updates) else change, state

    return GradientTransformationExtraArgs(init, update)


def require_params(params: Params | None, name: str) -> None:
    """Raise if ``update`` was called without the parameters that the transformation ``name`` needs."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params)")


def run_or_hold(
    go: jax.Array,
    inner: GradientTransformationExtraArgs,
    updates: Updates,
    inner_state: PyTree,
    params: Params | None,
    extra_args: dict,
) -> tuple[Updates, PyTree]:
    """Run ``inner`` where ``go`` holds; else return zero updates and the state as it was.

    A real conditional: the branch not taken costs nothing. The state keeps its dtypes even if ``inner`` would widen
    them.
    """

    def run():
        change, new_state = inner.update(updates, inner_state, params, **extra_args)
        return change, jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), new_state, inner_state)

    # eval_shape sees the dtypes that come out, which need not be those that go in; what goes in has the sharding
    held = jax.tree.map(lambda out, like: jnp.zeros_like(like, dtype=out.dtype), jax.eval_shape(run)[0], updates)
    return jax.lax.cond(go, run, lambda: (held, inner_state))


__all__ = ["by_leaf", "from_map", "require_params", "run_or_hold"]
