"""What is one device's and what is all devices', in a step that runs on many of them along a mapped axis."""

import functools

import jax
import jax.numpy as jnp

from nnlearn.types import Key, PyTree

AxisName = str | tuple[str, ...]


def device_key(key: Key, axis_name: AxisName | None) -> Key:
    """A key of this device's own."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def varying(leaf: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The leaf as another one on each device: in ``shard_map`` the gradient would be summed over the devices else."""
    if axis_name is None:
        return leaf
    leaf = jnp.asarray(leaf)
    axes = jax.typeof(jax.lax.axis_index(axis_name)).manual_axis_type.varying
    missing = axes - jax.typeof(leaf).manual_axis_type.varying
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf


def equal_on_all(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """The tree, which is the same on all devices, with a derivative that is too: the mean of what each device adds.

    In ``shard_map`` the sum over devices is the same on all without it. In ``vmap``, ``pmap`` and an unchecked
    ``shard_map`` each device would have the derivative of its own part, as often as there are devices.
    """

    def mark(leaf):
        inexact = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return _equal_on_all(leaf, axis_name) if inexact else leaf

    return tree if axis_name is None else jax.tree.map(mark, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _equal_on_all(leaf: jax.Array, axis_name: AxisName) -> jax.Array:
    return leaf


@_equal_on_all.defjvp
def _equal_on_all_jvp(axis_name, primals, tangents):
    return primals[0], jax.lax.pmean(tangents[0], axis_name)


def of_first_device(leaf, axis_name: AxisName) -> jax.Array:
    """The first device's value on all, for what cannot be averaged: integers, booleans and keys."""
    bits = jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
    numbers = bits.astype(jnp.int32) if bits.dtype == bool else bits
    first = jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == 0, numbers, 0), axis_name).astype(bits.dtype)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(leaf)) if is_key(leaf) else first


def is_key(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


__all__ = ["AxisName", "device_key", "equal_on_all", "is_key", "of_first_device", "varying"]
