"""A tree of many leaves as a few large buffers, and back.

An optimizer has a cost for every leaf: it traces, compiles and launches a kernel. ``pack`` concatenates all leaves of
one dtype into one buffer, once. Training then stores the parameters, gradients and moments in that form, and only the
model sees the leaves. The backward pass of ``unpack`` is one concatenation per buffer, so the gradient is packed too.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeGuard, TypeVar, overload

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nnlearn.native.split import split
from nnlearn.packing.layout import Buffer, Layout, Leaf, layout_of, make_layout
from nnlearn.packing.serialization import export_structure, import_structure, register_with_flax
from nnlearn.sharding.axes import explicit_spec
from nnlearn.types import MaskedNode, PyTree

T = TypeVar("T")


@jax.tree_util.register_pytree_with_keys_class
class Packed(Generic[T]):
    """A tree of arrays in a few large buffers, as ``pack`` returns it; ``T`` is the type of the tree.

    It is a pytree whose leaves are the buffers, so elementwise functions work on it: ``jax.tree.map``, transformations
    of optax and nnlearn, ``jit``, ``grad``, ``vmap``, ``scan``, donation. ``packed["encoder/0/kernel"]`` is one leaf,
    for inspection; ``unpack`` returns the tree.

    Attributes:
      buffers: the arrays; in a mask or a masked state, one value for each buffer.
      layout: the place of each leaf; static.

    >>> packed = pack({"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)})
    >>> packed
    Packed(2 leaves: float32[9])
    >>> packed["bias"]
    Array([0., 0., 0.], dtype=float32)
    >>> jax.tree.map(lambda buffer: 2 * buffer, packed)["kernel"]
    Array([[2., 2., 2.],
           [2., 2., 2.]], dtype=float32)
    """

    _is_known_to_flax = False

    buffers: tuple[Any, ...]
    layout: Layout[T]

    def __init__(self, buffers: Sequence[Any], layout: Layout[T]):
        self.buffers, self.layout = tuple(buffers), layout
        if not Packed._is_known_to_flax:  # flax may be imported at any time
            Packed._is_known_to_flax = register_with_flax(Packed, unpack, pack_like)

    def tree_flatten_with_keys(self):
        names = [jax.tree_util.DictKey(buffer.name) for buffer in self.layout.buffers]
        return tuple(zip(names, self.buffers, strict=True)), self.layout

    def tree_flatten(self):
        return self.buffers, self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout[T], buffers: Sequence[Any]) -> "Packed[T]":
        return cls(buffers, layout)

    def keys(self) -> tuple[str, ...]:
        """The paths of all leaves, in the tree's order; ``dict(packed)`` maps each path to its leaf."""
        return self.layout.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.layout.leaves)

    def __contains__(self, path: str) -> bool:
        return path in self.layout.index

    def __getitem__(self, path: str) -> jax.Array:
        """The leaf at ``path``, such as ``encoder/0/kernel``."""
        if path not in self.layout.index:
            near = difflib.get_close_matches(str(path), self.layout.paths, n=3) or self.layout.paths[:3]
            raise KeyError(f"no leaf at {path!r}; there are {len(self)}, such as {', '.join(map(repr, near))}")
        position = self.layout.index[path]
        if position is None:
            raise KeyError(f"several leaves have the path {path!r}, because a key contains a slash: use unpack(...)")
        index, offset = self.layout.places[position]
        buffer, array = self.layout.buffers[index], self.buffers[index]
        _check_buffer(buffer, array)
        size = self.layout.leaves[position].size // math.prod(buffer.shape[:-1])
        array = jax.lax.slice_in_dim(whole(array, buffer), offset, offset + size, axis=-1)
        return to_leaf(array, self.layout.leaves[position])

    def __repr__(self) -> str:
        def show(buffer, array):
            shape = "x".join(map(str, jnp.shape(array)))
            dtype = getattr(array, "dtype", None)
            name = buffer.name if dtype is None or dtype == buffer.dtype else f"{dtype} for {buffer.name}"
            return f"{name}[{shape}]" if dtype is not None else f"{buffer.name}: {array!r}"

        held = ", ".join(show(*pair) for pair in zip(self.layout.buffers, self.buffers, strict=True))
        return f"Packed({len(self)} leaves: {held})" if held else f"Packed({len(self)} leaves)"


def to_flat(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Reshape a leaf to part of a buffer: (..., *shape) to (..., *parts, size), one axis of parts per sharded axis."""
    lead = jnp.ndim(array) - len(leaf.shape)
    if not leaf.splits:
        return jnp.reshape(array, (*array.shape[:lead], leaf.size))
    cut, fronts = list(array.shape[:lead]), []
    for axis, length in enumerate(leaf.shape):
        parts = {at: parts for at, _, parts in leaf.splits}.get(axis)
        if parts is not None:
            fronts.append((axis, len(cut)))
            cut.append(parts)
        cut.append(length // (parts or 1))
    position = dict(fronts)
    moved = [position[axis] for axis, _, _ in leaf.splits]
    array = _reshape(array, cut, leaf, dict(zip(moved, leaf.splits, strict=True)))
    array = jnp.moveaxis(array, moved, range(lead, lead + len(moved)))
    kept = array.shape[: lead + len(moved)]
    shape = (*kept, leaf.size // math.prod(kept[lead:]))
    return _reshape(array, shape, leaf, dict(enumerate(leaf.splits, lead)))


def to_leaf(flat: jax.Array, leaf: Leaf) -> jax.Array:
    """Reverse ``to_flat``; axes in front of the buffer's own, such as those of ``vmap``, stay in front."""
    lead = jnp.ndim(flat) - len(leaf.splits) - 1
    if not leaf.splits:
        return jnp.reshape(flat, (*flat.shape[:lead], *leaf.shape))
    parts = {axis: count for axis, _, count in leaf.splits}
    local = [length // parts.get(axis, 1) for axis, length in enumerate(leaf.shape)]
    array = _reshape(flat, (*flat.shape[:-1], *local), leaf, dict(enumerate(leaf.splits, lead)))
    # each axis of parts moves back in front of the rest of its axis
    targets, position = {}, lead
    for axis in range(len(leaf.shape)):
        if axis in parts:
            targets[axis] = position
            position += 1
        position += 1
    array = jnp.moveaxis(array, range(lead, lead + len(parts)), [targets[axis] for axis, _, _ in leaf.splits])
    return _reshape(array, (*array.shape[:lead], *leaf.shape), leaf, {lead + split[0]: split for split in leaf.splits})


def _reshape(array: jax.Array, shape: Sequence[int], leaf: Leaf, places: dict[int, tuple]) -> jax.Array:
    """Reshape; on explicit meshes, name the sharding of the result, which JAX cannot infer."""
    inferred = len(leaf.splits) == 0 or (len(leaf.splits) == 1 and leaf.splits[0][2] > 1)
    if leaf.sharding is None or inferred or not _is_explicit(leaf.sharding.mesh):
        return jnp.reshape(array, shape)
    spec = PartitionSpec(*(places[axis][1] if axis in places else None for axis in range(len(shape))))
    return jax.lax.reshape(array, shape, out_sharding=NamedSharding(leaf.sharding.mesh, spec))


def _is_explicit(mesh) -> bool:
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def pack(params: T, labels: Any = None) -> Packed[T]:
    """Concatenate the leaves of a tree into one buffer for each dtype, label and sharding.

    Args:
      params: a pytree of arrays of any shapes, including scalars and empty arrays.
      labels: separate leaves of one dtype, such as weights with and without decay: a tree of strings, booleans or
        integers like the parameters, a prefix of it, or a function from parameters to either. A mask for weight decay
        is valid.

    Returns:
      ``Packed``. Leaves that are divided among devices (a ``NamedSharding`` over a mesh) share a buffer with leaves
      divided over the same mesh axes. Each device concatenates its own parts, so packing moves nothing between devices.
      Inside ``jit`` only explicit meshes show the sharding of a leaf, so pack outside.

    Raises:
      TypeError: if a leaf is not a numeric array, or a label is not a string, boolean or integer.
      ValueError: if the labels do not match the tree, or a leaf is divided over an Auto axis of a mesh with Explicit
        axes.

    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2), "half": jnp.ones(3, jnp.bfloat16)}
    >>> pack(params)
    Packed(3 leaves: float32[6], bfloat16[3])
    >>> pack(params, labels=lambda params: jax.tree.map(lambda leaf: "decay" if leaf.ndim > 1 else "free", params))
    Packed(3 leaves: float32/free[2], bfloat16/free[3], float32/decay[4])
    """
    layout = make_layout(params, labels)
    return pack_like(layout, params)


def pack_like(layout: Layout[T], params: T) -> Packed[T]:
    """Pack a tree in a given layout, for example the moments or the gradients of packed parameters.

    Args:
      layout: the layout of packed parameters, ``packed.layout``.
      params: a tree with the structure and shapes of the layout. Its leaves may have other dtypes, and leading axes
        such as those of ``vmap``. A ``MaskedNode`` may stand for all leaves of a buffer.

    Returns:
      ``Packed`` with that layout.

    Raises:
      ValueError: if the structure of the tree or a shape does not match the layout, or a leaf is divided over an Auto
        axis of a mesh with Explicit axes.

    >>> packed = pack({"w": jnp.ones((2, 2)), "b": jnp.zeros(2)})
    >>> moments = pack_like(packed.layout, {"w": jnp.full((2, 2), 3.0), "b": jnp.ones(2)})
    >>> (packed.buffers[0] + moments.buffers[0]).tolist()
    [1.0, 1.0, 4.0, 4.0, 4.0, 4.0]
    """
    try:
        arrays = layout.treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(f"the tree does not have the structure that was packed: {error}") from error

    def flat(position):
        array, leaf = jnp.asarray(arrays[position]), layout.leaves[position]
        if array.shape[max(array.ndim - len(leaf.shape), 0) :] != leaf.shape:
            raise ValueError(f"leaf {leaf.path!r} has shape {array.shape}, but {leaf.shape} was packed")
        _check_mesh(leaf)
        return to_flat(array, leaf)

    def fill(buffer):
        if all(isinstance(arrays[position], MaskedNode) for position in buffer.leaves):
            return MaskedNode()
        parts = [flat(position) for position in buffer.leaves]
        return filled(parts, buffer)

    return Packed([fill(buffer) for buffer in layout.buffers], layout)


def filled(parts: Sequence[jax.Array], buffer: Buffer) -> jax.Array:
    """Concatenate parts along the last axis to a buffer, pad it with zeros, and place it."""
    array = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    missing = buffer.shape[-1] - array.shape[-1]
    if missing:
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
    return place(array, buffer.sharding)


def whole(array: jax.Array, buffer: Buffer) -> jax.Array:
    """A buffer whose leaves can be taken apart: gathered if its parts do not follow the leaves."""
    if buffer.is_even and buffer.sharding is not None:
        return place(array, NamedSharding(buffer.sharding.mesh, PartitionSpec(*(None,) * array.ndim)))
    *front, last = explicit_spec(array)
    if last is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(jax.typeof(array).sharding.mesh, PartitionSpec(*front, None)))


def _check_mesh(leaf: Leaf) -> None:
    """Reject a leaf divided over an Auto axis of a mesh with Explicit axes: JAX cannot express its sharding."""
    if leaf.sharding is None or not leaf.splits or not _is_explicit(leaf.sharding.mesh):
        return
    kinds = dict(zip(leaf.sharding.mesh.axis_names, leaf.sharding.mesh.axis_types, strict=True))
    used = [name for _, names, _ in leaf.splits for name in ((names,) if isinstance(names, str) else names)]
    if any(kinds[name] != jax.sharding.AxisType.Explicit for name in used):
        raise ValueError(
            f"leaf {leaf.path!r} is sharded as {leaf.sharding.spec} over a mesh of Auto and Explicit axes, and cannot "
            "be packed: leave the parameters unpacked, or make all axes of the mesh of one kind"
        )


def place(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Give an array this sharding; nothing moves if it already has it."""
    if sharding is None or array.ndim != len(sharding.spec):
        return array
    if _is_explicit(sharding.mesh):
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def is_packed(node: Any) -> TypeGuard[Packed[Any]]:
    """Whether ``node`` is a ``Packed``; for ``jax.tree.map(..., is_leaf=is_packed)``.

    >>> is_packed(pack({"w": jnp.ones(2)})), is_packed({"w": jnp.ones(2)})
    (True, False)
    """
    return isinstance(node, Packed)


@overload
def unpack(packed: Packed[T]) -> T: ...
@overload
def unpack(packed: PyTree) -> PyTree: ...
def unpack(packed: PyTree) -> PyTree:
    """Return the tree that was packed. In a larger tree, such as an optimizer's state, unpack every ``Packed``.

    Its derivative is one concatenation per buffer. A tree without a ``Packed`` is returned unchanged.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> jax.tree.map(jnp.shape, unpack(pack(params)))
    {'bias': (3,), 'kernel': (2, 3)}
    >>> gradient = jax.grad(lambda packed: unpack(packed)["kernel"].sum())(pack(params))
    >>> gradient
    Packed(2 leaves: float32[9])
    """
    return jax.tree.map(lambda node: _unpack(node) if is_packed(node) else node, packed, is_leaf=is_packed)


def _check_buffer(buffer: Buffer, array: jax.Array) -> None:
    if jnp.shape(array)[-len(buffer.shape) :] != buffer.shape:
        raise ValueError(
            f"buffer {buffer.name!r} holds an array of shape {jnp.shape(array)}, but its leaves were packed as "
            f"{buffer.shape}; only axes in front of it may be added"
        )


def _unpack(packed: Packed[Any]) -> PyTree:
    layout = packed.layout
    leaves: list[Any] = [None] * len(layout.leaves)
    for buffer, array in zip(layout.buffers, packed.buffers, strict=True):
        if not hasattr(array, "shape"):  # in a mask or a masked state, the buffer's value is that of each leaf
            for position in buffer.leaves:
                leaves[position] = array
            continue
        _check_buffer(buffer, array)
        # the transpose is one concatenation; that of slicing is a padding and an addition for each leaf
        sizes, array = layout.sizes(buffer), whole(array, buffer)
        rest = buffer.shape[-1] - sum(sizes)
        parts = split(array, [*sizes, rest] if rest else sizes) if len(sizes) > 1 or rest else [array]
        for position, part in zip(buffer.leaves, parts, strict=False):
            leaf = layout.leaves[position]
            leaves[position] = place(to_leaf(part, leaf), leaf.sharding)
    return layout.treedef.unflatten(leaves)


jax.export.register_pytree_node_serialization(
    Packed,
    serialized_name="nnlearn.Packed",
    serialize_auxdata=lambda layout: export_structure(layout.treedef, layout.describe()),
    deserialize_auxdata=lambda content: layout_of(*import_structure(content)),
    from_children=lambda aux_data, children: Packed(children, aux_data),
)

__all__ = ["Packed", "filled", "is_packed", "pack", "pack_like", "place", "to_flat", "to_leaf", "unpack", "whole"]
