"""Arrays on the devices of several processes: each process saves the pieces that it has, and none is saved twice."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnlearn.packing import is_packed, unpack
from nnlearn.types import PyTree


def is_divided(leaf: Any) -> bool:
    """Whether no process has the whole array.

    >>> is_divided(jax.numpy.ones(2))
    False
    """
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated


def unpacked(tree: PyTree) -> PyTree:
    """The tree with packed parameters that several processes share as trees; every process must call it."""

    def open_up(node):
        divided = is_packed(node) and any(map(is_divided, node.buffers))
        return jax.jit(unpack)(node) if divided else node

    return jax.tree.map(open_up, tree, is_leaf=is_packed)


def divide(array: jax.Array, name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The pieces of a divided array, the same list in all processes, and the arrays of those that this process saves.

    A piece has the number of the process that saves it (``file``), and its place in the array (``start``, ``shape``).
    """
    pieces, numbers = [], {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        bounds = tuple(part.indices(length)[:2] for part, length in zip(index, array.shape, strict=True))
        if bounds not in numbers:  # the first device of several with equal parts
            numbers[bounds] = len(pieces)
            start, shape = [low for low, _ in bounds], [high - low for low, high in bounds]
            pieces.append({"file": device.process_index, "start": start, "shape": shape})
    own = {}
    for shard in array.addressable_shards:
        bounds = tuple(part.indices(length)[:2] for part, length in zip(shard.index, array.shape, strict=True))
        number = numbers[bounds]
        if pieces[number]["file"] == jax.process_index():
            own[piece_name(name, number)] = np.ascontiguousarray(shard.data).reshape(pieces[number]["shape"])
    return pieces, own


def piece_name(name: str, number: int) -> str:
    """The name of a piece in its file."""
    return f"{name}#{number}"


def pieces_of(nodes: Iterable[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that are pieces."""
    numbered = [(node["name"], len(node["pieces"])) for node in nodes if "pieces" in node]
    names = [piece_name(name, number) for name, count in numbered for number in range(count)]
    return {name: arrays[name] for name in names if name in arrays}


def in_files(nodes: Sequence[Mapping[str, Any]], files: int) -> list[list[dict[str, Any]]]:
    """For each file of a checkpoint, the descriptions of the arrays in it; whole arrays are in the first.

    Raises:
      ValueError: if pieces do not fit their array.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in range(files)]
    for node in nodes:
        if "pieces" not in node:
            found[0].append(dict(node))
            continue
        for number, piece in enumerate(node["pieces"]):
            _check(node, piece, files)
            own = {"kind": "array", "name": piece_name(node["name"], number), "shape": piece["shape"]}
            found[piece["file"]].append(own | {"dtype": node["dtype"]})
        if sum(math.prod(piece["shape"]) for piece in node["pieces"]) != math.prod(node["shape"]):
            raise ValueError(f"the pieces of array {node['name']!r} are not the whole array")
    return found


def _check(node: Mapping[str, Any], piece: Mapping[str, Any], files: int) -> None:
    numbers = [piece["file"], *piece["start"], *piece["shape"]]
    inside = all(
        low + length <= size for low, length, size in zip(piece["start"], piece["shape"], node["shape"], strict=True)
    )
    if not all(type(number) is int and number >= 0 for number in numbers) or piece["file"] >= files or not inside:
        raise ValueError(f"array {node['name']!r} has an impossible piece {dict(piece)!r}")


def assemble(nodes: Sequence[Mapping[str, Any]], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace pieces by whole arrays."""
    for node in nodes:
        if "pieces" not in node:
            continue
        parts = [arrays.pop(piece_name(node["name"], number)) for number in range(len(node["pieces"]))]
        whole = np.empty(node["shape"], parts[0].dtype)
        for piece, part in zip(node["pieces"], parts, strict=True):
            place = zip(piece["start"], piece["shape"], strict=True)
            whole[tuple(slice(low, low + length) for low, length in place)] = part
        arrays[node["name"]] = whole
    return arrays


__all__ = ["assemble", "divide", "in_files", "is_divided", "pieces_of", "unpacked"]
