"""The shardings of an optimizer's state: each array follows its parameter."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nnlearn.sharding.rules import checked_spec, names_of, spread
from nnlearn.sharding.zero import ZeroState
from nnlearn.types import PyTree


def follow(opt_state: PyTree, params: PyTree, placed: PyTree) -> PyTree:
    """The sharding of each array of an optimizer's state.

    An array whose path contains that of a parameter belongs to the parameter, as ``0/mu/blocks/0/kernel`` belongs to
    ``blocks/0/kernel``. If it has the parameter's shape, it has its sharding. If it lacks some of its axes, as factored
    moments do, the others are sharded alike. An array of another shape is sharded over the same mesh axes along its
    longest axis that they divide. All other arrays are replicated. Inside ``zero`` the data axis is added.

    Args:
      opt_state: arrays or shapes, from ``tx.init(params)``.
      params: arrays or shapes.
      placed: a tree of ``NamedSharding`` like the parameters.

    Returns:
      A tree of ``NamedSharding`` like the state.

    >>> import jax.numpy as jnp, optax
    >>> from nnlearn.sharding import make_mesh, shardings
    >>> params = {"w": jnp.ones((4, 2))}
    >>> placed = shardings(params, make_mesh("data=1"), {"w": "data"})
    >>> follow(optax.adam(0.1).init(params), params, placed)[0].mu["w"].spec
    P('data',)
    """
    owners = {}
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(placed), strict=True):
        owners[_words(path)] = (tuple(np.shape(leaf)), sharding)
    meshes = [sharding.mesh for _, sharding in owners.values()]
    return _follow(opt_state, owners, (), meshes[0]) if meshes else opt_state


def _words(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _follow(state: PyTree, owners: dict, axes: tuple[str, ...], mesh: Any) -> PyTree:
    def place(path, leaf):
        if isinstance(leaf, ZeroState):
            return ZeroState(_follow(leaf.inner, owners, (*axes, *leaf.axes), mesh), leaf.axes)
        shape = tuple(np.shape(leaf))
        found = _owner(_words(path), owners, shape)
        spec = PartitionSpec() if found is None else _spec_like(shape, *found)
        if found is not None:
            spec = spread(spec, shape, axes, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state, is_leaf=lambda node: isinstance(node, ZeroState))


def _owner(words: tuple[str, ...], owners: dict, shape: tuple[int, ...]) -> tuple | None:
    """The parameter with the longest path inside the path of an array of the state."""
    if () in owners:  # the parameters are one array
        return owners[()] if owners[()][0] == shape else None
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length, -1, -1):
            if words[start : start + length] in owners:
                return owners[words[start : start + length]]
    return None


def _spec_like(shape: tuple[int, ...], owner: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """The spec of an array of a shape that belongs to a parameter."""
    mesh, spec = sharding.mesh, sharding.spec
    if shape == owner:
        return spec
    entries = (*spec, *(None,) * (len(owner) - len(spec)))
    kept, at = [], 0
    for length in shape:  # the axes of the parameter that the array has, in order
        while at < len(owner) and owner[at] != length:
            at += 1
        if at == len(owner):
            axes = tuple(name for names in entries for name in names_of(names))
            return spread(PartitionSpec(), shape, axes, mesh)
        kept.append(entries[at])
        at += 1
    return checked_spec(tuple(kept), "state", shape, mesh)


__all__ = ["follow"]
