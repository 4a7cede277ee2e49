"""Packed trees derived from packed parameters: some of the leaves, arrays of other shapes, stacks of equal leaves."""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nnlearn.packing.layout import Buffer, Layout, Leaf, layout_of_parts, padded
from nnlearn.packing.packed import Packed, filled, whole
from nnlearn.packing.stacks import from_stack, to_stack
from nnlearn.types import MaskedNode

Shape = tuple[int, ...]
_ONE_BY_ONE = contextvars.ContextVar("one_by_one", default=False)


def with_shapes(layout: Layout, shape: Callable[[Shape], Shape] | Sequence[Shape]) -> Layout:
    """The layout of arrays that belong to the leaves but have other shapes, such as factored moments.

    The leaves keep their buffers and their order, so equal leaves still form one stack. The arrays are not sharded.

    Args:
      layout: the layout of the parameters.
      shape: maps the shape of a leaf to the shape of its array; or the shape of each leaf's array.

    >>> from nnlearn.packing import make_layout
    >>> layout = make_layout({"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
    >>> with_shapes(layout, lambda shape: shape[:-1])
    Layout(2 leaves: float32[5] of 2)
    """
    shapes = [shape(leaf.shape) for leaf in layout.leaves] if callable(shape) else shape
    leaves = tuple(Leaf(leaf.path, new) for leaf, new in zip(layout.leaves, shapes, strict=True))

    def reshaped(buffer: Buffer) -> Buffer:
        length = sum(leaves[position].size for position in buffer.leaves)
        return Buffer(buffer.name, buffer.dtype, buffer.label, buffer.leaves, (length,))

    return layout_of_parts(layout.treedef, leaves, tuple(map(reshaped, layout.buffers)))


def _part_of(layout: Layout, chosen: Sequence[bool]) -> Layout:
    """The layout of the chosen leaves; the others become ``MaskedNode``."""
    number = list(itertools.accumulate(chosen, initial=0))
    treedef = jax.tree.structure(layout.treedef.unflatten([0 if keep else MaskedNode() for keep in chosen]))
    buffers = []
    for buffer in layout.buffers:
        members = tuple(position for position in buffer.leaves if chosen[position])
        if members:
            parts = buffer.shape[:-1]
            length = sum(layout.leaves[position].size for position in members) // math.prod(parts)
            length = padded(length, _multiple(buffer))
            members = tuple(number[position] for position in members)
            buffers.append(Buffer(buffer.name, buffer.dtype, buffer.label, members, (*parts, length), buffer.sharding))
    leaves = tuple(leaf for leaf, keep in zip(layout.leaves, chosen, strict=True) if keep)
    return layout_of_parts(treedef, leaves, tuple(buffers))


def _multiple(buffer: Buffer) -> int:
    """The number to a multiple of which a part of a padded buffer is padded."""
    if buffer.is_even and buffer.sharding is not None:
        return buffer.sharding.num_devices
    return 1


def _pieces(layout: Layout, labels: Sequence[Hashable]) -> Iterator[tuple[int, list[tuple[Hashable, int]]]]:
    """For each buffer its number and its consecutive pieces, each of one label: ``(label, length)``."""
    for number, buffer in enumerate(layout.buffers):
        pairs = zip((labels[position] for position in buffer.leaves), layout.sizes(buffer), strict=True)
        groups = itertools.groupby(pairs, key=lambda pair: pair[0])
        yield number, [(label, sum(size for _, size in group)) for label, group in groups]


def divide(packed: Packed, labels: Sequence[Hashable], groups: Iterable[Hashable]) -> dict[Hashable, Packed]:
    """Divide packed parameters by a label for each leaf; the reverse is ``join``.

    Each part keeps the structure of the whole tree, with ``MaskedNode`` in place of the other leaves, so that unpacking
    it gives what ``optax.masked`` sees.

    Args:
      packed: packed parameters or gradients.
      labels: one label for each leaf, in the tree's order.
      groups: all labels that may occur; a label without leaves gets an empty part.

    >>> from nnlearn.packing import pack
    >>> packed = pack({"w": jnp.ones((2, 2)), "b": jnp.zeros(2)})
    >>> parts = divide(packed, ["vector", "matrix"], ["matrix", "vector"])
    >>> parts["matrix"]
    Packed(1 leaves: float32[4])
    """
    layout = packed.layout
    found: dict[Hashable, list] = {label: [] for label in groups}
    for number, pieces in _pieces(layout, labels):
        offset, cut = 0, {}
        array, buffer = packed.buffers[number], layout.buffers[number]
        if not isinstance(array, MaskedNode):
            array = whole(array, buffer)
        for label, length in pieces:
            if isinstance(array, MaskedNode):
                cut[label] = [array]
                continue
            part = array if array.shape[-1] == length else jax.lax.slice_in_dim(array, offset, offset + length, axis=-1)
            cut.setdefault(label, []).append(part)
            offset += length
        for label, parts in cut.items():
            found[label].append(parts)
    return {
        label: _packed(pieces, _part_of(layout, [other == label for other in labels]))
        for label, pieces in found.items()
    }


def _packed(pieces: Sequence[Sequence], layout: Layout) -> Packed:
    """A packed tree from the pieces of each buffer; a piece may be a ``MaskedNode``."""
    pairs = zip(pieces, layout.buffers, strict=True)
    buffers = [parts[0] if isinstance(parts[0], MaskedNode) else filled(parts, buffer) for parts, buffer in pairs]
    return Packed(buffers, layout)


def join(layout: Layout, labels: Sequence[Hashable], parts: Mapping[Hashable, Packed]) -> Packed:
    """Join the parts that ``divide`` made to a packed tree of that layout."""
    ahead = {label: iter(zip(part.buffers, part.layout.buffers, strict=True)) for label, part in parts.items()}
    arrays: list = []
    for number, pieces in _pieces(layout, labels):
        held = {label: next(ahead[label]) for label in dict.fromkeys(label for label, _ in pieces)}
        offsets, found = dict.fromkeys(held, 0), []
        if any(isinstance(array, MaskedNode) for array, _ in held.values()):
            arrays.append(MaskedNode())
            continue
        held = {label: whole(*pair) for label, pair in held.items()}
        for label, length in pieces:
            start, array = offsets[label], held[label]
            is_all = array.shape[-1] == length
            found.append(array if is_all else jax.lax.slice_in_dim(array, start, start + length, axis=-1))
            offsets[label] = start + length
        arrays.append(filled(found, layout.buffers[number]))
    return Packed(arrays, layout)


def stack_of(packed: Packed, run: Sequence[int]) -> jax.Array:
    """Leaves of equal shape that lie side by side in one buffer, as one array (count, *shape)."""
    number, offset = packed.layout.places[run[0]]
    leaf = packed.layout.leaves[run[0]]
    length = leaf.size // math.prod(packed.layout.buffers[number].shape[:-1]) * len(run)
    array = whole(packed.buffers[number], packed.layout.buffers[number])
    part = jax.lax.slice_in_dim(array, offset, offset + length, axis=-1)
    return to_stack(part, len(run), leaf)


def from_stacks(layout: Layout, stacks: Mapping[tuple[int, ...], jax.Array]) -> Packed:
    """The packed tree of these stacks, by the positions of their leaves; buffers without any become ``MaskedNode``."""
    buffers: list = [[] for _ in layout.buffers]
    for run, stack in stacks.items():
        leaf = layout.leaves[run[0]]
        buffers[layout.places[run[0]][0]].append(from_stack(stack if leaf.splits else _replicated(stack), leaf))
    for number, parts in enumerate(buffers):
        buffers[number] = filled(parts, layout.buffers[number]) if parts else MaskedNode()
    return Packed(buffers, layout)


def _replicated(array: jax.Array) -> jax.Array:
    """Replicate the array on every device if an explicit mesh shows that it is sharded."""
    sharding = jax.typeof(array).sharding
    if all(names is None for names in sharding.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Make ``each_leaf`` run its function on one leaf after another, which shows what it does to each."""
    token = _ONE_BY_ONE.set(True)
    try:
        yield
    finally:
        _ONE_BY_ONE.reset(token)


def each_leaf(function: Callable[..., tuple], *stacks: jax.Array) -> tuple[jax.Array, ...]:
    """Run a function on each leaf of stacks of equal leaves, as one batch.

    This is ``jax.vmap``. Within ``one_by_one``, and for a stack of one leaf, the function is called for each leaf.

    Args:
      function: from one leaf of each stack to a tuple of arrays.
      *stacks: arrays (count, *shape) with one count.

    >>> each_leaf(lambda x, y: (x @ y,), jnp.ones((3, 2, 4)), jnp.ones((3, 4, 5)))[0].shape
    (3, 2, 5)
    """
    count = stacks[0].shape[0]
    if count > 1 and not _ONE_BY_ONE.get():
        return jax.vmap(function)(*stacks)
    rows = [
        function(*(jax.lax.index_in_dim(stack, index, keepdims=False) for stack in stacks)) for index in range(count)
    ]
    return tuple(jnp.stack(column) for column in zip(*rows, strict=True))


__all__ = ["divide", "each_leaf", "from_stacks", "join", "one_by_one", "stack_of", "with_shapes"]
