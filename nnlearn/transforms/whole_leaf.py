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

from nnlearn.packing import is_packed
from nnlearn.packing.parts import each_leaf, from_stacks, stack_of, with_shapes
from nnlearn.sharding.axes import automatic, explicit_spec
from nnlearn.tree import matching, path_name
from nnlearn.types import MaskedNode, PyTree

ShapeRule = Callable[[tuple[int, ...]], tuple[int, ...]] | None
"""From a leaf's shape to the shape of an array that belongs to it; None for the same shape."""


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


def _expected(shape: tuple[int, ...], rule: ShapeRule) -> tuple[int, ...]:
    return shape if rule is None else tuple(rule(shape))


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


def _on_leaves(function, names, trees, shapes, result_shapes, settings, stack_equal):
    first = trees[0]
    with_paths, treedef = jax.tree.flatten_with_path(first)
    columns = [[leaf for _, leaf in with_paths]]
    for name, tree in zip(names[1:], trees[1:], strict=True):
        columns.append(jax.tree.leaves(matching(tree, first, (name, names[0]))))
    rows = [tuple(map(jnp.asarray, row)) for row in zip(*columns, strict=True)]
    for (path, leaf), row in zip(with_paths, rows, strict=True):
        if any(array.shape != _expected(np.shape(leaf), rule) for array, rule in zip(row, shapes, strict=True)):
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


__all__ = ["ShapeRule", "map_whole_leaves"]
