"""Values that differ between devices or are equal on all, in a step that runs along a mapped axis."""

import functools

import jax
import jax.numpy as jnp

from nnlearn.types import Key, PyTree

AxisName = str | tuple[str, ...]


def device_key(key: Key, axis_name: AxisName | None) -> Key:
    """A random key that is different on each device."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def varying(leaf: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Mark the leaf as different on each device: ``shard_map`` would otherwise sum its gradient over the devices."""
    if axis_name is None:
        return leaf
    leaf = jnp.asarray(leaf)
    return _vary_over(leaf, _varying_axes(jax.lax.axis_index(axis_name)))


def varying_like(leaf: jax.Array, examples: PyTree) -> jax.Array:
    """Mark the leaf as different on every device that holds other examples, in ``shard_map``.

    The derivative with respect to a leaf that is equal on all devices would be summed over the devices, and so mix
    examples.
    """
    return _vary_over(leaf, {axis for array in jax.tree.leaves(examples) for axis in _varying_axes(array)})


def _vary_over(leaf: jax.Array, axes: frozenset[str] | set[str]) -> jax.Array:
    missing = axes - set(_varying_axes(leaf))
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf


def _varying_axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def equal_on_all(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    """The tree, equal on all devices, with a derivative that is equal too: the mean of the devices' contributions.

    In ``shard_map`` the sum over devices is the same on all without it. In ``vmap``, ``pmap`` and an unchecked
    ``shard_map`` each device would otherwise have the derivative of its own part, times the number of devices.
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
    """The first device's value on all, for integers, booleans and keys, which have no mean."""
    bits = jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
    summable = bits.astype(jnp.int32) if bits.dtype == bool else bits
    first = jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == 0, summable, 0), axis_name).astype(bits.dtype)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(leaf)) if is_key(leaf) else first


def is_key(leaf) -> bool:
    """Whether a leaf is a typed random key."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


__all__ = ["AxisName", "device_key", "equal_on_all", "is_key", "of_first_device", "varying", "varying_like"]
