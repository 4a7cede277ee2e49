"""Put trees on a mesh, and describe where their arrays are."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nnlearn.sharding.rules import Axes, Rules, checked_spec, names_of, part_count, shardings
from nnlearn.tree import path_name
from nnlearn.types import Batch, PyTree


def place(tree: PyTree, mesh: Mesh, rules: Rules = None) -> PyTree:
    """Put the arrays of a tree on the devices of a mesh, as rules say.

    Args:
      tree: arrays. With several processes, each gives the same arrays.
      mesh, rules: see ``shardings``.

    Returns:
      The tree with arrays on the mesh.

    Raises:
      ValueError: see ``shardings``.

    >>> import jax.numpy as jnp
    >>> from nnlearn.sharding import make_mesh
    >>> place({"w": jnp.ones(4)}, make_mesh("data=1"), {"w": "data"})["w"].sharding.spec
    P('data',)
    """
    return jax.device_put(tree, shardings(tree, mesh, rules))


def shard_batch(batch: Batch, mesh: Mesh, axis: Axes = "data") -> Batch:
    """Put a batch on a mesh, sharded along its first axis.

    Args:
      batch: arrays with one number of examples. With several processes, each gives its own part of the batch, in the
        order of the processes.
      mesh: the devices.
      axis: the mesh axis or axes of the batch.

    Returns:
      The batch as arrays on the mesh; with several processes, the whole batch.

    Raises:
      ValueError: if the number of examples is no multiple of the number of parts.

    >>> import jax.numpy as jnp
    >>> from nnlearn.sharding import make_mesh
    >>> shard_batch(jnp.ones((4, 2)), make_mesh("data=1")).sharding.spec
    P('data',)
    """
    check_batch(batch, mesh, axis)
    sharding = NamedSharding(mesh, checked_spec((names_of(axis),), "the batch", (mesh.size,), mesh))
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def check_batch(batch: Batch, mesh: Any, axis: Axes | None) -> None:
    """Check that the examples of a batch can be divided among the parts of a mesh axis.

    Raises:
      ValueError: if their number is no multiple of the number of parts; the message names the leaf.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    parts = part_count(mesh, axis) // math.gcd(part_count(mesh, axis), processes)
    for path, leaf in jax.tree.leaves_with_path(batch):
        shape = np.shape(leaf)
        if not shape or shape[0] % parts:
            raise ValueError(
                f"batch leaf {path_name(path)!r} of shape {shape} cannot be sharded over {axis!r}: its first axis must "
                f"be a multiple of {parts}. Give a larger batch, or drop or pad the rest"
            )


def describe(tree: PyTree) -> str:
    """Describe where the arrays of a tree are: path, shape, dtype, partition spec and bytes on each device.

    ``jax.debug.visualize_array_sharding(array)`` draws a single array of one or two axes.

    Args:
      tree: arrays on devices, or ``jax.ShapeDtypeStruct`` with a sharding.

    Returns:
      A table, with the largest sum of bytes on one device in its last line.

    >>> import jax.numpy as jnp
    >>> from nnlearn.sharding import make_mesh
    >>> print(describe(place({"w": jnp.ones((4, 2)), "b": jnp.ones(2)}, make_mesh("data=1"), {"w": "data"})))
    path  shape   dtype    spec       bytes per device
    b     (2,)    float32  P()                       8
    w     (4, 2)  float32  P('data',)               32
    total                                           40
    """
    rows = [("path", "shape", "dtype", "spec", "bytes per device")]
    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        size = _bytes_on_one(leaf)
        total += size
        sharding = getattr(leaf, "sharding", None)
        spec = str(sharding.spec) if isinstance(sharding, NamedSharding) else "one device"
        rows.append((path_name(path), str(tuple(np.shape(leaf))), str(leaf.dtype), spec, f"{size:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]) for row in rows]
    return "\n".join(lines)


def _bytes_on_one(leaf: Any) -> int:
    shape = tuple(np.shape(leaf))
    if getattr(leaf, "sharding", None) is not None:
        shape = leaf.sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize


def bytes_per_device(tree: PyTree) -> dict[Any, int]:
    """The bytes of a tree's arrays on each device of this process, measured from their shards.

    >>> import jax.numpy as jnp
    >>> list(bytes_per_device(jnp.ones((4, 2))).values())
    [32]
    """
    total: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] = total.get(shard.device, 0) + shard.data.nbytes
    return total


__all__ = ["bytes_per_device", "check_batch", "describe", "place", "shard_batch"]
