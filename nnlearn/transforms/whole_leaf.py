"""Functions of whole leaves over trees: one leaf after another, or all leaves of one shape as a batch.

Packed parameters hold equal leaves side by side, so a matrix method runs once for each shape. Leaves that are not
packed run one by one, or are stacked for the call where a method asks for that.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.packing import Packed, is_packed
from nnlearn.packing.parts import each_leaf, from_stacks, stack_of, with_shapes
from nnlearn.sharding.axes import automatic, explicit_spec
from nnlearn.tree import matching, path_name
from nnlearn.types import MaskedNode, PyTree

Shape = tuple[int, ...]
ShapeRule = Callable[[Shape], Shape] | Sequence[Shape] | None
"""From a leaf's shape to that of an array that belongs to it, or the shapes for all leaves; None for the same shape."""


def map_whole_leaves(
    function: Callable[..., tuple],
    names: Sequence[str],
    trees: Sequence[PyTree],
    shapes: Sequence[ShapeRule],
    result_shapes: Sequence[ShapeRule],
    settings: Callable[[PyTree], PyTree] | None = None,
    stack_equal: bool = False,
) -> tuple[PyTree, ...]:
    """Map a function over the leaves of several trees, of which each leaf is seen as a whole.

    Args:
      function: ``function(setting, *arrays)`` with one leaf of each tree; returns a tuple of arrays.
      names: the name of each tree, for messages.
      trees: the updates first; all have the same structure, packed or not.
      shapes: how the shapes of each tree's arrays follow from those of the updates.
      result_shapes: the same for the results.
      settings: maps the tree of updates, or of their shapes, to a tree with a hashable setting for each leaf.
      stack_equal: stack unpacked leaves of equal shape, run the function on them as one batch, and split the results.

    Raises:
      ValueError: if structures or shapes do not fit; the message names the first leaf where they do not.
    """
    run = _on_packed if is_packed(trees[0]) else _on_leaves
    return run(function, names, trees, shapes, result_shapes, settings, stack_equal)


def _settings_by_leaf(settings, tree: PyTree, treedef) -> list[Hashable]:
    if settings is None:
        return [None] * treedef.num_leaves
    return treedef.flatten_up_to(settings(tree))


def _expected(position: int, shape: Shape, rule: ShapeRule) -> Shape:
    if rule is None:
        return shape
    return tuple(rule(shape) if callable(rule) else rule[position])


def _placed(
    function: Callable[..., tuple], setting: Hashable, *arrays: jax.Array, each: bool = False
) -> tuple[jax.Array, ...]:
    """Run a function of arrays, or of each row of them. On Explicit axes, results like the first array lie like it."""

    def spec(result):
        return explicit_spec(arrays[0]) if result.shape == arrays[0].shape else (None,) * result.ndim

    def run(function, *arrays):
        on_leaf = functools.partial(function, setting)
        return each_leaf(on_leaf, *arrays) if each else on_leaf(*arrays)

    if not isinstance(function, jax.tree_util.Partial):
        function = jax.tree_util.Partial(function)
    return automatic(run, function, *arrays, spec=spec)


def numbers_of_leaves(tree: PyTree, values: Sequence[float]) -> PyTree:
    """A tree with a float32 scalar for each leaf, packed like ``tree`` if that is packed.

    >>> numbers_of_leaves({"a": jnp.ones(2), "b": jnp.ones(3)}, [0.0, 0.5])["b"]
    Array(0.5, dtype=float32)
    """
    if not is_packed(tree):
        return jax.tree.structure(tree).unflatten([jnp.asarray(value, jnp.float32) for value in values])
    layout = with_shapes(tree.layout, [()] * len(values))
    rows = [[values[position] for position in buffer.leaves] for buffer in layout.buffers]
    return Packed([jnp.asarray(row, jnp.float32) for row in rows], layout)


def _on_leaves(function, names, trees, shapes, result_shapes, settings, stack_equal):
    first = trees[0]
    with_paths, treedef = jax.tree.flatten_with_path(first)
    columns = [[leaf for _, leaf in with_paths]]
    for name, tree in zip(names[1:], trees[1:], strict=True):
        columns.append(jax.tree.leaves(matching(tree, first, (name, names[0]))))
    rows = [tuple(map(jnp.asarray, row)) for row in zip(*columns, strict=True)]
    for position, ((path, leaf), row) in enumerate(zip(with_paths, rows, strict=True)):
        expected = [_expected(position, np.shape(leaf), rule) for rule in shapes]
        if [array.shape for array in row] != expected:
            found = ", ".join(f"{name} {array.shape}" for name, array in zip(names, row, strict=True))
            raise ValueError(f"shapes differ at {path_name(path)!r}: {found}")
    groups: dict[Any, list[int]] = {}
    chosen = _settings_by_leaf(settings, first, treedef)
    for position, row in enumerate(rows):
        key = (*map(jax.typeof, row), chosen[position]) if stack_equal else position
        groups.setdefault(key, []).append(position)
    results: list = [None] * len(rows)
    for positions in groups.values():
        setting = chosen[positions[0]]
        if len(positions) == 1:
            results[positions[0]] = _placed(function, setting, *rows[positions[0]])
            continue
        stacks = [jnp.stack(parts) for parts in zip(*(rows[position] for position in positions), strict=True)]
        found = _placed(function, setting, *stacks, each=True)
        for index, position in enumerate(positions):
            results[position] = tuple(jax.lax.index_in_dim(part, index, keepdims=False) for part in found)
    return tuple(treedef.unflatten([result[index] for result in results]) for index in range(len(result_shapes)))


def _on_packed(function, names, trees, shapes, result_shapes, settings, stack_equal):
    del stack_equal  # they are stacked already
    layout = trees[0].layout
    for name, tree, rule in zip(names, trees, shapes, strict=True):
        expected = layout if rule is None else with_shapes(layout, rule)
        if not is_packed(tree) or tree.layout != expected:
            raise ValueError(
                f"{name} and {names[0]} must be packed alike: {names[0]} is {trees[0]!r}, {name} is {tree!r}"
            )
    chosen = _settings_by_leaf(settings, layout.tree(), layout.treedef)
    found: list[dict] = [{} for _ in result_shapes]
    for number, buffer in enumerate(layout.buffers):
        if isinstance(trees[0].buffers[number], MaskedNode):
            continue
        for equal in layout.runs(buffer):
            for setting, run in itertools.groupby(equal, key=chosen.__getitem__):
                run = tuple(run)
                stacks = [stack_of(tree, run) for tree in trees]
                results = _placed(function, setting, *stacks, each=True)
                for column, stack in zip(found, results, strict=True):
                    column[run] = stack
    layouts = [layout if rule is None else with_shapes(layout, rule) for rule in result_shapes]
    return tuple(map(from_stacks, layouts, found))


__all__ = ["ShapeRule", "map_whole_leaves", "numbers_of_leaves"]
