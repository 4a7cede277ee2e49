"""Where each leaf of a packed tree lies: static data, worked out once."""

import dataclasses
import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nnlearn.packing.serialization import describe_sharding, find_sharding
from nnlearn.tree import is_function, path_name
from nnlearn.types import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf's place: its path in words, its shape, and the sharding it had, if it was spread over devices."""

    path: str
    shape: tuple[int, ...]
    sharding: NamedSharding | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def splits(self) -> tuple[tuple[int, Any, int], ...]:
        """For each sharded axis: (axis, mesh axes, number of parts), in the order that the buffer holds them."""
        if self.sharding is None:
            return ()
        mesh, spec = self.sharding.mesh, self.sharding.spec
        found = [
            (axis, names, math.prod(mesh.shape[name] for name in np.atleast_1d(names).tolist()))
            for axis, names in enumerate(spec)
            if names is not None
        ]
        return tuple(sorted(found, key=lambda split: str(split[1])))


@dataclasses.dataclass(frozen=True)
class Buffer:
    """What one buffer holds: the leaves of one dtype, label and placement, those of equal shape side by side."""

    name: str
    dtype: np.dtype
    label: Hashable
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    sharding: NamedSharding | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where each leaf lies: static, hashable, the same for a tree's parameters, gradients and moments.

    Attributes:
      treedef: the structure of the tree.
      leaves: what is known of each leaf, in the tree's order.
      buffers: which leaves each buffer holds, in which order.
    """

    treedef: Any
    leaves: tuple[Leaf, ...]
    buffers: tuple[Buffer, ...]

    @functools.cached_property
    def _identity(self):
        return (self.treedef, self.leaves, self.buffers)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        if self is other:  # compared at every call of a compiled step, nearly always with itself
            return True
        return isinstance(other, Layout) and hash(self) == hash(other) and self._identity == other._identity

    @functools.cached_property
    def index(self) -> dict[str, int | None]:
        """From a leaf's path to its position in the tree; None where several leaves have the path."""
        counts = Counter(self.paths)
        return {path: position if counts[path] == 1 else None for position, path in enumerate(self.paths)}

    @functools.cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each leaf: which buffer it is in, and at which offset of the buffer's last axis."""
        places = {}
        for number, buffer in enumerate(self.buffers):
            offset = 0
            for position, size in zip(buffer.leaves, self.sizes(buffer), strict=True):
                places[position] = (number, offset)
                offset += size
        return tuple(places[position] for position in range(len(self.leaves)))

    def sizes(self, buffer: Buffer) -> list[int]:
        """How much of the buffer's last axis each of its leaves takes."""
        parts = math.prod(buffer.shape[:-1])
        return [self.leaves[position].size // parts for position in buffer.leaves]

    def runs(self, buffer: Buffer) -> list[tuple[int, ...]]:
        """The buffer's leaves, those of equal shape and sharding together."""
        key = lambda position: (self.leaves[position].shape, self.leaves[position].splits)  # noqa: E731
        return [tuple(run) for _, run in itertools.groupby(buffer.leaves, key)]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every leaf's path, in the tree's order."""
        return tuple(leaf.path for leaf in self.leaves)

    def tree(self) -> PyTree:
        """The tree of shapes and dtypes that was packed."""
        dtypes = [self.buffers[number].dtype for number, _ in self.places]
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf, dtype in zip(self.leaves, dtypes, strict=True)]
        )

    @property
    def labels(self) -> PyTree | None:
        """The label of each leaf, as ``pack`` takes them; None if none has one."""
        labels = [self.buffers[number].label for number, _ in self.places]
        return None if all(label is None for label in labels) else self.treedef.unflatten(labels)

    def describe(self) -> dict[str, Any]:
        """All but the structure as values that JSON can hold; the reverse is ``layout_of``."""
        leaves = [(leaf.path, leaf.shape, describe_sharding(leaf.sharding)) for leaf in self.leaves]
        buffers = [
            (b.name, b.dtype.name, b.label, b.leaves, b.shape, describe_sharding(b.sharding)) for b in self.buffers
        ]
        return {"leaves": leaves, "buffers": buffers}

    def __reduce__(self):
        # as an empty tree, because a treedef pickles nodes of one's own classes so that they are not equal again
        return _from_tree, (self.treedef.unflatten(range(len(self.leaves))), self.describe())

    def __copy__(self) -> "Layout":
        return self

    def __deepcopy__(self, memo) -> "Layout":
        return self

    def __repr__(self) -> str:
        held = ", ".join(f"{b.name}[{'x'.join(map(str, b.shape))}] of {len(b.leaves)}" for b in self.buffers)
        return f"Layout({len(self.leaves)} leaves: {held})"


_KNOWN: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def layout_of(treedef: Any, facts: dict[str, Any]) -> Layout:
    """The layout of a structure and what ``Layout.describe`` said."""
    leaves = tuple(Leaf(path, tuple(shape), find_sharding(sharding)) for path, shape, sharding in facts["leaves"])
    buffers = tuple(
        Buffer(name, jnp.dtype(dtype), label, tuple(members), tuple(shape), find_sharding(sharding))
        for name, dtype, label, members, shape, sharding in facts["buffers"]
    )
    return layout_of_parts(treedef, leaves, buffers)


def layout_of_parts(treedef: Any, leaves: tuple[Leaf, ...], buffers: tuple[Buffer, ...]) -> Layout:
    """The layout of these leaves and buffers, one object for equal ones: comparing them is then comparing addresses."""
    layout = Layout(treedef, leaves, buffers)
    return _KNOWN.setdefault(layout, layout)


def _from_tree(tree: PyTree, facts: dict[str, Any]) -> Layout:
    return layout_of(jax.tree.structure(tree), facts)


def _spread(leaf: Any) -> NamedSharding | None:
    """The sharding of an array that lies in parts on several devices; None for one that is whole on each.

    Inside of a program only explicit meshes say where a value lies.
    """
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) else leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding | None) or sharding is None or sharding.is_fully_replicated:
        return None
    if not any(names is not None for names in sharding.spec):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))


def _check_array(path: str, leaf: Any) -> None:
    if isinstance(leaf, bool | int | float | complex):
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(f"parameter {path!r} is a {type(leaf).__name__}, not an array; keep it out of params")
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"parameter {path!r} has dtype {dtype}, which holds no numbers; keep it out of params")


def _labels_by_leaf(params: Params, labels: Any) -> list[Hashable]:
    """A label for each leaf, from a tree, a prefix of one or a function from parameters to one."""
    if is_function(labels):
        labels = labels(params)
    try:
        spread = jax.tree.map(lambda label, part: jax.tree.map(lambda _: label, part), labels, params)
    except ValueError as error:
        raise ValueError(f"labels must be a tree like the parameters, or a prefix of one: {error}") from error
    found = jax.tree.leaves(spread)
    for label in found:
        if not isinstance(label, str | bool | int | np.bool_):
            raise TypeError(f"labels must be strings, booleans or integers, got {label!r}")
    return [bool(label) if isinstance(label, np.bool_) else label for label in found]


def make_layout(params: Params, labels: Any = None) -> Layout:
    """The layout that ``pack`` gives a tree; arguments as there. Works on ``jax.ShapeDtypeStruct`` leaves too."""
    with_paths, treedef = jax.tree.flatten_with_path(params)
    leaves, groups = [], {}
    given = [None] * len(with_paths) if labels is None else _labels_by_leaf(params, labels)
    for position, ((path, array), label) in enumerate(zip(with_paths, given, strict=True)):
        _check_array(path_name(path), array)
        leaf = Leaf(path_name(path), tuple(np.shape(array)), _spread(array))
        leaves.append(leaf)
        mesh = leaf.sharding.mesh if leaf.splits else None
        front = tuple((names, parts) for _, names, parts in leaf.splits)
        key = (jax.dtypes.canonicalize_dtype(jnp.result_type(array)), type(label), label, mesh, front)
        groups.setdefault(key, []).append(position)
    buffers, names = [], set()
    others = {str(label) for label in given if not isinstance(label, str)}
    for (dtype, _, label, mesh, front), members in groups.items():
        members.sort(key=lambda position: leaves[position].shape)  # stable: equal shapes side by side, in tree order
        members.sort(key=lambda position: [axis for axis, _, _ in leaves[position].splits])
        parts = tuple(parts for _, parts in front)
        length = sum(leaves[position].size for position in members) // math.prod(parts)
        label_name = repr(label) if isinstance(label, str) and label in others else label  # "True" beside True
        name = dtype.name + ("" if label is None else f"/{label_name}") + "".join(f"@{axes}" for axes, _ in front)
        while name in names:  # such as equal axes of two meshes
            name += "'"
        names.add(name)
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*(axes for axes, _ in front), None))
        buffers.append(Buffer(name, dtype, label, tuple(members), (*parts, length), sharding))
    return layout_of_parts(treedef, tuple(leaves), tuple(buffers))


__all__ = ["Buffer", "Layout", "Leaf", "layout_of", "layout_of_parts", "make_layout"]
