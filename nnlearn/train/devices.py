"""What is one device's and what is all devices', in a step that runs on many of them along a mapped axis."""

import functools

import jax
import jax.numpy as jnp

from nnlearn.types import Key

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def equal_on_all(leaf: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The leaf, which is the same on all devices, as its derivative then is too."""
    return leaf


@equal_on_all.defjvp
def _equal_on_all_jvp(axis_name, primals, tangents):
    return primals[0], tangents[0] if axis_name is None else jax.lax.pmean(tangents[0], axis_name)


def of_first_device(leaf, axis_name: AxisName) -> jax.Array:
    """The first device's value on all, for what cannot be averaged: integers, booleans and keys."""
    bits = jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
    numbers = bits.astype(jnp.int32) if bits.dtype == bool else bits
    first = jax.lax.psum(jnp.where(jax.lax.axis_index(axis_name) == 0, numbers, 0), axis_name).astype(bits.dtype)
    return jax.random.wrap_key_data(first, impl=jax.random.key_impl(leaf)) if is_key(leaf) else first


def is_key(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


__all__ = ["AxisName", "device_key", "equal_on_all", "is_key", "of_first_device", "varying"]
