"""The layout of a packed tree: the place of each leaf, static data that is computed once."""

import dataclasses
import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nnlearn.packing.serialization import describe_sharding, find_sharding
from nnlearn.tree import is_function, path_name
from nnlearn.types import PyTree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf: its path, its shape, and its sharding if it was divided among devices."""

    path: str
    shape: tuple[int, ...]
    sharding: NamedSharding | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def splits(self) -> tuple[tuple[int, Any, int], ...]:
        """For each sharded axis: (axis, mesh axes, number of parts), in the order of the buffer's leading axes."""
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
    """A buffer: the leaves of one dtype, label and sharding, with leaves of equal shape side by side.

    Attributes:
      name: the dtype, label and mesh axes in words.
      leaves: positions of the leaves in the tree.
      shape: the shape of the array: a leading axis for each sharded axis, and the elements. The last axis may be longer
        than the leaves together; the rest is 0.
      sharding: of the array; if its last axis is sharded, the parts do not follow the leaves.
    """

    name: str
    dtype: np.dtype
    label: Hashable
    leaves: tuple[int, ...]
    shape: tuple[int, ...]
    sharding: NamedSharding | None = None

    @property
    def is_even(self) -> bool:
        """Whether the devices have equal parts of the buffer, whatever its leaves are."""
        return self.sharding is not None and self.sharding.spec[len(self.shape) - 1] is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Layout(Generic[T]):
    """The place of each leaf: static, hashable, the same for a tree's parameters, gradients and moments.

    Attributes:
      treedef: the structure of the tree.
      leaves: the leaves, in the tree's order.
      buffers: the buffers, each with its leaves.
    """

    treedef: Any
    leaves: tuple[Leaf, ...]
    buffers: tuple[Buffer, ...]

    @functools.cached_property
    def _identity(self) -> tuple:
        return (self.treedef, self.leaves, self.buffers)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        if self is other:  # every call of a compiled step compares it, nearly always with itself
            return True
        return isinstance(other, Layout) and hash(self) == hash(other) and self._identity == other._identity

    @functools.cached_property
    def index(self) -> dict[str, int | None]:
        """From a leaf's path to its position in the tree; None if several leaves have the path."""
        counts = Counter(self.paths)
        return {path: position if counts[path] == 1 else None for position, path in enumerate(self.paths)}

    @functools.cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each leaf: the index of its buffer, and its offset along the buffer's last axis."""
        places = {}
        for index, buffer in enumerate(self.buffers):
            offset = 0
            for position, size in zip(buffer.leaves, self.sizes(buffer), strict=True):
                places[position] = (index, offset)
                offset += size
        return tuple(places[position] for position in range(len(self.leaves)))

    def sizes(self, buffer: Buffer) -> list[int]:
        """The length of each leaf of a buffer along the buffer's last axis."""
        parts = math.prod(buffer.shape[:-1])
        return [self.leaves[position].size // parts for position in buffer.leaves]

    def runs(self, buffer: Buffer) -> list[tuple[int, ...]]:
        """The leaves of a buffer, grouped by shape and sharding."""
        key = lambda position: (self.leaves[position].shape, self.leaves[position].splits)  # noqa: E731
        return [tuple(run) for _, run in itertools.groupby(buffer.leaves, key)]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every leaf's path, in the tree's order."""
        return tuple(leaf.path for leaf in self.leaves)

    def tree(self) -> PyTree:
        """The tree of shapes and dtypes that was packed."""
        dtypes = [self.buffers[index].dtype for index, _ in self.places]
        return self.treedef.unflatten(
            [jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf, dtype in zip(self.leaves, dtypes, strict=True)]
        )

    @property
    def labels(self) -> PyTree | None:
        """The label of each leaf, as for ``pack``; None without labels."""
        labels = [self.buffers[index].label for index, _ in self.places]
        return None if all(label is None for label in labels) else self.treedef.unflatten(labels)

    def describe(self) -> dict[str, Any]:
        """Everything but the structure as JSON values; ``layout_of`` is the reverse."""
        leaves = [(leaf.path, leaf.shape, describe_sharding(leaf.sharding)) for leaf in self.leaves]
        buffers = [
            (b.name, b.dtype.name, b.label, b.leaves, b.shape, describe_sharding(b.sharding)) for b in self.buffers
        ]
        return {"leaves": leaves, "buffers": buffers}

    def __reduce__(self):
        # as a tree of positions, because a pickled treedef with custom nodes is not equal to itself after loading
        return _from_tree, (self.treedef.unflatten(range(len(self.leaves))), self.describe())

    def __copy__(self) -> "Layout[T]":
        return self

    def __deepcopy__(self, memo) -> "Layout[T]":
        return self

    def __repr__(self) -> str:
        held = ", ".join(f"{b.name}[{'x'.join(map(str, b.shape))}] of {len(b.leaves)}" for b in self.buffers)
        return f"Layout({len(self.leaves)} leaves: {held})"


_KNOWN: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def layout_of(treedef: Any, facts: dict[str, Any]) -> Layout[Any]:
    """The layout with this structure and description (see ``Layout.describe``)."""
    leaves = tuple(Leaf(path, tuple(shape), find_sharding(sharding)) for path, shape, sharding in facts["leaves"])
    buffers = tuple(
        Buffer(name, jnp.dtype(dtype), label, tuple(members), tuple(shape), find_sharding(sharding))
        for name, dtype, label, members, shape, sharding in facts["buffers"]
    )
    return layout_of_parts(treedef, leaves, buffers)


def layout_of_parts(treedef: Any, leaves: tuple[Leaf, ...], buffers: tuple[Buffer, ...]) -> Layout:
    """The layout of these leaves and buffers."""
    layout = Layout(treedef, leaves, buffers)
    return _KNOWN.setdefault(layout, layout)  # equal layouts are one object, so comparisons are fast


def _from_tree(tree: PyTree, facts: dict[str, Any]) -> Layout:
    return layout_of(jax.tree.structure(tree), facts)


def _spread(leaf: Any) -> NamedSharding | None:
    """The sharding of an array that is divided among devices; None for one that is replicated.

    Inside a program only explicit meshes show the sharding of a value.
    """
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding | None) or sharding is None:
        return None
    # an axis of one device divides nothing, but on explicit meshes it is part of the type of an array
    if sharding.is_fully_replicated and AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    if not any(names is not None for names in sharding.spec):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))


def _check_array(path: str, leaf: Any) -> None:
    if isinstance(leaf, bool | int | float | complex):
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        raise TypeError(f"parameter {path!r} is a {type(leaf).__name__}, not an array; remove it from params")
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"parameter {path!r} has dtype {dtype}, which is not numeric; remove it from params")


def _labels_by_leaf(params: PyTree, labels: Any) -> list[Hashable]:
    """A label for each leaf, from a tree, a prefix of it, or a function from parameters to either."""
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


def padded(length: int, multiple: int) -> int:
    """The length of a buffer that a number of devices can share.

    >>> padded(5, 4), padded(8, 4)
    (8, 8)
    """
    return -(-length // multiple) * multiple


def make_layout(
    params: T, labels: Any = None, *, sharding: NamedSharding | None = None, multiple: int = 1
) -> Layout[T]:
    """Return the layout that ``pack`` uses for a tree.

    Args:
      params: a pytree of arrays or ``jax.ShapeDtypeStruct`` of any shapes.
      labels: separate leaves of one dtype, as for ``pack``: a tree of strings, booleans or integers like the
        parameters, a prefix of it, or a function from parameters to either; None for no separation.
      sharding: shard each buffer evenly along its only axis, and ignore the shardings of the leaves. Unpacking then
        gathers a whole buffer.
      multiple: pad buffers with zeros to a multiple of this length.

    Returns:
      The ``Layout``. It is static and hashable, and equal layouts are one object.

    Raises:
      TypeError: if a leaf is not a numeric array, or a label is not a string, boolean or integer.
      ValueError: if the labels do not match the tree.

    >>> make_layout({"w": jax.ShapeDtypeStruct((2, 3), "float32"), "b": jax.ShapeDtypeStruct((3,), "float32")})
    Layout(2 leaves: float32[9] of 2)
    """
    with_paths, treedef = jax.tree.flatten_with_path(params)
    leaves, groups = [], {}
    given = [None] * len(with_paths) if labels is None else _labels_by_leaf(params, labels)
    for position, ((path, array), label) in enumerate(zip(with_paths, given, strict=True)):
        _check_array(path_name(path), array)
        leaf = Leaf(path_name(path), tuple(np.shape(array)), None if sharding is not None else _spread(array))
        leaves.append(leaf)
        mesh = leaf.sharding.mesh if leaf.sharding is not None and leaf.splits else None
        front = tuple((names, parts) for _, names, parts in leaf.splits)
        key = (jax.dtypes.canonicalize_dtype(jnp.result_type(array)), type(label), label, mesh, front)
        groups.setdefault(key, []).append(position)
    buffers, names = [], set()
    others = {str(label) for label in given if not isinstance(label, str)}
    if sharding is not None:
        multiple = math.lcm(multiple, sharding.num_devices)
    for (dtype, _, label, mesh, front), members in groups.items():
        members.sort(
            key=lambda position: leaves[position].shape
        )  # stable, so equal shapes are side by side in tree order
        members.sort(key=lambda position: [axis for axis, _, _ in leaves[position].splits])
        parts = tuple(parts for _, parts in front)
        length = padded(sum(leaves[position].size for position in members) // math.prod(parts), multiple)
        label_name = repr(label) if isinstance(label, str) and label in others else label  # "True" beside True
        name = dtype.name + ("" if label is None else f"/{label_name}") + "".join(f"@{axes}" for axes, _ in front)
        while name in names:  # such as equal axes of two meshes
            name += "'"
        names.add(name)
        own = NamedSharding(mesh, PartitionSpec(*(axes for axes, _ in front), None)) if mesh is not None else sharding
        buffers.append(Buffer(name, dtype, label, tuple(members), (*parts, length), own))
    return layout_of_parts(treedef, tuple(leaves), tuple(buffers))


__all__ = ["Buffer", "Layout", "Leaf", "layout_of", "layout_of_parts", "make_layout", "padded"]
