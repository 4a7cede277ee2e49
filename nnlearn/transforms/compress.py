"""Any optimizer in fewer bytes: its state in 8-bit codes, parameters in 16 bits, master copies in 24."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support

from nnlearn.checks import as_key, check_count
from nnlearn.packing import Packed, is_packed
from nnlearn.settings import comparable
from nnlearn.transforms.averages import increment
from nnlearn.transforms.codes import BLOCK, Coded, decode, encode, join, round_to_bfloat16, split
from nnlearn.transforms.storage import start_of
from nnlearn.transforms.wrapping import require_params
from nnlearn.tree import matching
from nnlearn.types import GradientTransformation, GradientTransformationExtraArgs, Key, MaskedNode, OptState, PyTree

COPIES = frozenset("average cache init_params init_particles master params0 slow x0 z".split())  # noqa: SIM905


class CompressedState(NamedTuple):
    """The state of ``compress_state``: large float arrays of ``inner_state`` are ``Coded``."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rng_key: Key
    inner_state: OptState


class RoundedParamsState(NamedTuple):
    """The state of ``round_stochastically``."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rng_key: Key
    inner_state: OptState


class CompactMasterState(NamedTuple):
    """The state of ``compact_master``; ``rest`` has the int8 parts of the master copies."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rng_key: Key
    rest: PyTree
    inner_state: OptState


def _seeds(key: Key, count: jax.Array, number: int) -> jax.Array:
    """A seed for each array of a step (number,)."""
    return jax.random.bits(jax.random.fold_in(key, count), (number,), jnp.uint32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["buffers"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class PackedCodes:
    """Packed arrays of which some buffers are ``Coded``."""

    buffers: tuple
    layout: Any


def _on_buffers(function: Callable[[Any, Any], Any], tree: PyTree, is_leaf: Callable) -> PyTree:
    """Map ``function(path, leaf)``, where the buffers of a packed tree are its leaves and ``PackedCodes`` its node."""

    def on_node(path, node):
        if is_packed(node):
            return PackedCodes(tuple(function(path, buffer) for buffer in node.buffers), node.layout)
        if isinstance(node, PackedCodes):
            return Packed([function(path, buffer) for buffer in node.buffers], node.layout)
        return function(path, node)

    def stop(node):
        return is_packed(node) or isinstance(node, PackedCodes) or is_leaf(node)

    return jax.tree.map_with_path(on_node, tree, is_leaf=stop)


def _is_coded(node: Any) -> bool:
    return isinstance(node, Coded)


def _name_of(path: tuple) -> set[str]:
    return {str(getattr(entry, "name", getattr(entry, "key", ""))) for entry in path}


@comparable
def compress_state(
    tx: GradientTransformation,
    bits: int = 8,
    *,
    key: Key | int = 0,
    min_size: int = BLOCK,
    exclude: Collection[str] = COPIES,
) -> GradientTransformationExtraArgs:
    """Keep the state of any transformation, nnlearn's or optax's, in 8 bits a number.

    Each update decodes the state, runs ``tx`` on it in float32, and codes the new state with stochastic rounding, so
    that the expected state is exact: rounding to the nearest code is a bias that shifts the final loss. The codes are
    those of ``codes.encode``, in blocks of 256 numbers of the flat array; Adam's moments take 2.03 bytes a parameter.
    They follow Dettmers et al. 2022, arXiv:2110.02861, in the blocks alone.

    Args:
      tx: the transformation. It may be vmapped and packed. Derivatives through its state are zero.
      bits: 8. Four bits are too few for second moments: the final loss was 6 to 36 % higher.
      key: a random key or a seed, for the rounding.
      min_size: smaller arrays stay as they are.
      exclude: names of fields that stay as they are; by default copies of parameters.

    Returns:
      A transformation with ``CompressedState(count, rng_key, inner_state)``.

    Raises:
      ValueError: if ``bits`` is not 8.

    >>> import nnlearn
    >>> tx = compress_state(nnlearn.adamw(1e-3))
    >>> params = {"w": jnp.ones((64, 64))}
    >>> state = tx.init(params)
    >>> moments = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
    >>> sum(leaf.nbytes for leaf in moments) / params["w"].size
    2.03125
    >>> updates, state = tx.update(params, state, params)
    >>> updates["w"][0, 0].round(6)
    Array(-0.001, dtype=float32)
    """
    if bits != 8:
        raise ValueError(f"bits must be 8, got {bits!r}: four bits are too few for second moments")
    inner, start = with_extra_args_support(tx), as_key(key)
    min_size, exclude = check_count("min_size", min_size), frozenset(exclude)

    def is_compressed(path, leaf) -> bool:
        dtype = jnp.result_type(leaf)
        return dtype in (jnp.float32, jnp.float64) and leaf.size >= min_size and not (_name_of(path) & exclude)

    def coded(state, key, count):
        seeds = iter(_seeds(key, count, max(len(jax.tree.leaves(state)), 1)))

        def on_leaf(path, leaf):
            if isinstance(leaf, MaskedNode):
                return leaf
            seed = next(seeds)
            return encode(leaf, seed) if is_compressed(path, leaf) else leaf

        return _on_buffers(on_leaf, state, lambda node: False)

    def init(params):
        def first(params):
            return coded(inner.init(params), start, jnp.zeros([], jnp.int32))

        return CompressedState(jnp.zeros([], jnp.int32), jnp.array(start, copy=True), start_of(first, params))

    def update(updates, state, params=None, **extra_args):
        inner_state = _on_buffers(
            lambda _, node: decode(node) if _is_coded(node) else node, state.inner_state, _is_coded
        )
        change, inner_state = inner.update(updates, inner_state, params, **extra_args)
        count = increment(state.count)
        inner_state = coded(inner_state, state.rng_key, count)
        return change, CompressedState(count, state.rng_key, inner_state)

    return GradientTransformationExtraArgs(init, update)


def _is_bfloat16(leaf: Any) -> bool:
    return jnp.result_type(leaf) == jnp.bfloat16


@comparable
def round_stochastically(tx: GradientTransformation, *, key: Key | int = 0) -> GradientTransformationExtraArgs:
    """Round bfloat16 parameters stochastically after each update, so that small updates count in the mean.

    Rounded to the nearest, a weight of 1.0 does not feel a step below 0.002. Put it around the whole optimizer. The
    update that it returns takes the parameters to the rounded ones exactly.

    Args:
      tx: the optimizer; it sees the parameters in bfloat16 and its updates stay in float32.
      key: a random key or a seed.

    Returns:
      A transformation with ``RoundedParamsState(count, rng_key, inner_state)``; other parameters than bfloat16 are
      updated as ever.

    >>> import nnlearn
    >>> tx, params = round_stochastically(nnlearn.sgd(1e-4)), jnp.ones(1000, jnp.bfloat16)
    >>> state = tx.init(params)
    >>> for _ in range(10):
    ...     updates, state = tx.update(jnp.ones(1000), state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> bool(abs(jnp.mean(params.astype(float)) - 0.999) < 2e-4)
    True
    """
    inner, start = with_extra_args_support(tx), as_key(key)

    def init(params):
        return RoundedParamsState(jnp.zeros([], jnp.int32), jnp.array(start, copy=True), inner.init(params))

    def update(updates, state, params: Any = None, **extra_args):
        require_params(params, "round_stochastically")
        change, inner_state = inner.update(_widened(updates), state.inner_state, params, **extra_args)
        count = increment(state.count)
        leaves, treedef = jax.tree.flatten(change)
        seeds = _seeds(state.rng_key, count, max(len(leaves), 1))

        def on_leaf(index, step, param):
            if not _is_bfloat16(param):
                return step
            wide = param.astype(jnp.float32)
            return round_to_bfloat16(wide + step.astype(jnp.float32), seeds[index]).astype(jnp.float32) - wide

        rows = zip(leaves, jax.tree.leaves(matching(params, change)), strict=True)
        change = treedef.unflatten([on_leaf(index, *row) for index, row in enumerate(rows)])
        return change, RoundedParamsState(count, state.rng_key, inner_state)

    return GradientTransformationExtraArgs(init, update)


def _widened(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _is_bfloat16(leaf) else leaf, tree)


@comparable
def compact_master(tx: GradientTransformation, *, key: Key | int = 0) -> GradientTransformationExtraArgs:
    """Train bfloat16 parameters through master copies of 24 bits: the parameter itself and 8 more bits in the state.

    With ``compress_state`` inside, AdamW takes 5 bytes a parameter besides the gradient, parameters included, where
    float32 takes 12. The 24 bits are rounded stochastically.

    Args:
      tx: the optimizer; it sees the master copies in float32.
      key: a random key or a seed.

    Returns:
      A transformation with ``CompactMasterState(count, rng_key, rest, inner_state)``; other parameters than bfloat16
      are updated as ever. Let nothing follow in a chain.

    >>> import nnlearn
    >>> tx = compact_master(compress_state(nnlearn.adamw(1e-4)))
    >>> params = jnp.ones((64, 64), jnp.bfloat16)
    >>> state = tx.init(params)
    >>> (sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > 1) + params.nbytes) / params.size
    5.03125
    >>> for _ in range(20):
    ...     updates, state = tx.update(params, state, params)
    ...     params = nnlearn.apply_updates(params, updates)
    >>> params[0, 0].astype(float) < 1.0
    Array(True, dtype=bool)
    """
    inner, start = with_extra_args_support(tx), as_key(key)

    def init(params):
        rest = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf) if _is_bfloat16(leaf) else (0,), jnp.int8), params)
        inner_state = start_of(lambda params: inner.init(_widened(params)), params)
        return CompactMasterState(jnp.zeros([], jnp.int32), jnp.array(start, copy=True), rest, inner_state)

    def update(updates, state, params: Any = None, **extra_args):
        require_params(params, "compact_master")
        params = matching(params, updates)
        master = jax.tree.map(
            lambda param, rest: join(param, rest) if _is_bfloat16(param) else param, params, state.rest
        )
        change, inner_state = inner.update(_widened(updates), state.inner_state, master, **extra_args)
        count = increment(state.count)
        leaves, treedef = jax.tree.flatten(change)
        seeds = _seeds(state.rng_key, count, max(len(leaves), 1))

        def on_leaf(index, step, old, param, rest):
            if not _is_bfloat16(param):
                return step, rest
            top, rest = split(old + step.astype(jnp.float32), seeds[index])
            return top.astype(jnp.float32) - param.astype(jnp.float32), rest

        columns = zip(leaves, *map(jax.tree.leaves, (master, params, state.rest)), strict=True)
        rows = [on_leaf(index, *row) for index, row in enumerate(columns)]
        change, rest = (treedef.unflatten([row[number] for row in rows]) for number in range(2))
        return change, CompactMasterState(count, state.rng_key, rest, inner_state)

    return GradientTransformationExtraArgs(init, update)


__all__ = ["CompactMasterState", "CompressedState", "RoundedParamsState", "compact_master", "compress_state",
           "round_stochastically"]  # fmt: skip
