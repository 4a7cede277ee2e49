"""Trees to and from the files of other libraries: plain safetensors (PyTorch's too), flax's msgpack, orbax.

None of these formats notices damage; ``nnlearn.checkpoints.save`` does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checkpoints.blobs import read_header_file, write_arrays
from nnlearn.checkpoints.errors import CheckpointError
from nnlearn.checkpoints.folder import fit_tree
from nnlearn.checkpoints.nodes import Node, build, describe, total_bytes
from nnlearn.checkpoints.restore import LoadReport, Missing, Names, Rename, Unexpected
from nnlearn.extras import import_extra
from nnlearn.files import explaining_full_disk, replacing
from nnlearn.packing import Packed, pack_like, unpack
from nnlearn.packing.serialization import register_with_flax
from nnlearn.types import PyTree


class Fit(TypedDict, total=False):
    """Options for fitting the arrays that were read into ``like``; see ``nnlearn.checkpoints.load``."""

    only: Names | None
    rename: Rename | None
    missing: Missing
    unexpected: Unexpected
    report: Callable[[LoadReport], Any] | None


DEFAULTS = Fit(only=None, rename=None, missing="error", unexpected="error", report=None)


def export_safetensors(path: str | Path, tree: PyTree) -> None:
    """Write a tree's arrays to one safetensors file, by their paths: ``encoder/0/kernel``.

    Typed keys become their data, and dtypes that safetensors does not have become bytes. Python numbers are left out.

    Args:
      path: the file; one that is there is replaced when the new one is complete.
      tree: a pytree of arrays.

    Raises:
      TypeError: if a leaf cannot be saved.
      OSError: if the disk is full or refuses.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_safetensors(folder + "/w.safetensors", {"layer": {"w": jnp.ones(2)}})
    ...     import_safetensors(folder + "/w.safetensors")
    {'layer/w': array([1., 1.], dtype=float32)}
    """
    _, arrays = describe(tree)
    path = Path(path)
    safe = "The file that was there is unchanged" if path.exists() else "Nothing was left behind"
    with explaining_full_disk(path, safe, total_bytes(arrays)), replacing(path, "wb", buffering=0) as file:
        write_arrays(file, arrays)


def import_safetensors(
    path: str | Path,
    like: PyTree | None = None,
    *,
    convert: Callable[[str, np.ndarray], np.ndarray] | None = None,
    **fit: Unpack[Fit],
) -> PyTree:
    """Read a safetensors file, such as the ``state_dict`` of a PyTorch model.

    Args:
      path: the file.
      like: the tree to load into; None for a dict of NumPy arrays by name.
      convert: ``convert(name, array)`` gives the array to use; PyTorch keeps the kernel of a linear layer transposed.
      **fit: ``only``, ``rename``, ``missing``, ``unexpected``, ``report``, see ``nnlearn.checkpoints.load``.

    Returns:
      A tree like ``like``, or a dict of NumPy arrays by name.

    Raises:
      CheckpointError: if the file is damaged in a way that shows, or does not fit ``like``.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_safetensors(folder + "/torch.safetensors", {"fc.weight": jnp.ones((3, 2))})
    ...     params = {"dense": {"kernel": jnp.zeros((2, 3))}}
    ...     names = {"fc.weight": "dense/kernel"}
    ...     params = import_safetensors(folder + "/torch.safetensors", params, rename=names, convert=lambda _, a: a.T)
    >>> params["dense"]["kernel"].shape
    (2, 3)
    """
    path, arrays = Path(path), {}
    for name, array in read_header_file(path).items():
        arrays[name] = np.ascontiguousarray(convert(name, array)) if convert else array
    children = {name: _array_node(name, array) for name, array in arrays.items()}
    node: Node = {"kind": "dict", "children": children}
    return fit_tree(path, node, arrays, like, **(DEFAULTS | fit))


def _array_node(name: str, array: np.ndarray) -> Node:
    return {"kind": "array", "name": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def export_msgpack(path: str | Path, tree: PyTree) -> None:
    """Write a tree as ``flax.serialization.to_bytes`` does, for ``from_bytes``.

    Args:
      path: the file; one that is there is replaced when the new one is complete.
      tree: a pytree that flax can write.

    Raises:
      ImportError: if flax is not installed.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_msgpack(folder + "/w.msgpack", {"w": jnp.ones(2)})
    ...     import_msgpack(folder + "/w.msgpack", {"w": jnp.zeros(2)})
    {'w': Array([1., 1.], dtype=float32)}
    """
    flax = import_extra("flax.serialization", "export_msgpack", "flax")
    register_with_flax(Packed, unpack, pack_like)  # random keys as well
    with replacing(path, "wb") as file:
        file.write(flax.to_bytes(tree))


def import_msgpack(path: str | Path, like: PyTree | None = None, **fit: Unpack[Fit]) -> PyTree:
    """Read what ``flax.serialization.to_bytes`` wrote.

    Args:
      path: the file.
      like: the tree to load into; None for nested dicts of NumPy arrays.
      **fit: ``only``, ``rename``, ``missing``, ``unexpected``, ``report``, see ``nnlearn.checkpoints.load``.

    Returns:
      A tree like ``like``, or nested dicts of NumPy arrays.

    Raises:
      ImportError: if flax is not installed.
      CheckpointError: if the file cannot be read, or does not fit ``like``.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_msgpack(folder + "/w.msgpack", {"layer": {"w": jnp.ones(2)}})
    ...     import_msgpack(folder + "/w.msgpack")
    {'layer': {'w': array([1., 1.], dtype=float32)}}
    """
    flax = import_extra("flax.serialization", "import_msgpack", "flax")
    return _fit_foreign(path, lambda: flax.msgpack_restore(Path(path).read_bytes()), like, fit)


def export_orbax(path: str | Path, tree: PyTree) -> None:
    """Write a tree with orbax, as nested dicts and lists of arrays; typed keys become their data.

    Args:
      path: a folder that is not there.
      tree: any tree that ``nnlearn.checkpoints.save`` takes.

    Raises:
      ImportError: if orbax is not installed.

    >>> export_orbax("checkpoint", {"w": jnp.ones(2)})  # doctest: +SKIP
    """
    orbax = import_extra("orbax.checkpoint", "export_orbax", "orbax", "orbax-checkpoint")

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    tree = jax.tree.map(lambda leaf: plain(leaf) if isinstance(leaf, jax.Array) else leaf, build(*describe(tree)))
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), tree)


def import_orbax(path: str | Path, like: PyTree | None = None, **fit: Unpack[Fit]) -> PyTree:
    """Read what orbax wrote.

    Args:
      path: the folder of one step's item.
      like: the tree to load into; None for nested dicts and lists of arrays.
      **fit: ``only``, ``rename``, ``missing``, ``unexpected``, ``report``, see ``nnlearn.checkpoints.load``.

    Returns:
      A tree like ``like``, or nested dicts and lists of arrays.

    Raises:
      ImportError: if orbax is not installed.
      CheckpointError: if it cannot be read, or does not fit ``like``.

    >>> import_orbax("checkpoint", like={"w": jnp.zeros(2)})  # doctest: +SKIP
    {'w': Array([1., 1.], dtype=float32)}
    """
    orbax = import_extra("orbax.checkpoint", "import_orbax", "orbax", "orbax-checkpoint")

    def read():
        with orbax.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(Path(path).absolute())

    return _fit_foreign(path, read, like, fit)


def _fit_foreign(path: str | Path, read: Callable[[], PyTree], like: PyTree | None, fit: Fit) -> PyTree:
    try:
        tree = jax.tree.map(lambda leaf: np.asarray(leaf) if hasattr(leaf, "dtype") else leaf, read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each library has errors of its own for files that it cannot read
        raise CheckpointError(path, f"cannot be read: {type(error).__name__}: {error}") from error
    node, arrays = describe(tree)
    return fit_tree(Path(path), node, arrays, like, **(DEFAULTS | fit))


__all__ = [
    "export_msgpack",
    "export_orbax",
    "export_safetensors",
    "import_msgpack",
    "import_orbax",
    "import_safetensors",
]
