"""A pytree as a description in JSON and a dict of NumPy arrays, and back.

A node of the description is a dict with ``kind``. ``dict``, ``list``, ``tuple`` and ``object`` (NamedTuples and
registered classes) have children; ``array``, ``key``, ``value`` and ``opaque`` are leaves; ``none`` is None. Classes
are recorded by name, for people: nothing is imported or called by name.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from nnlearn.checkpoints.packed_trees import leaf_tree
from nnlearn.checkpoints.pieces import divide, is_divided
from nnlearn.packing import is_packed
from nnlearn.tree import path_name
from nnlearn.types import PyTree

Node = dict[str, Any]
Arrays = dict[str, np.ndarray]

DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in [
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *("bool", "float16", "float32", "float64", "complex64", "complex128"),
        *(getattr(ml_dtypes, name) for name in dir(ml_dtypes) if name.startswith(("bfloat", "float", "int", "uint"))),
    ]
}
"""Every dtype that an array of a checkpoint may have, by name."""

ROOT = path_name(())  # the name of a tree that is one leaf

CONTAINERS = ("dict", "list", "tuple", "object")


def describe(tree: PyTree) -> tuple[Node, Arrays]:
    """The description of a tree and its arrays by name; arrays of the tree are viewed, not copied, where possible.

    Raises:
      TypeError: if a leaf cannot be saved; the message has its path and type.

    >>> node, arrays = describe({"w": jnp.ones(2), "step": 3})
    >>> arrays["w"]
    array([1., 1.], dtype=float32)
    >>> node["children"]["step"]
    {'kind': 'value', 'type': 'int', 'value': 3}
    """
    arrays: Arrays = {}
    return _describe(tree, (), arrays), arrays


def _describe(tree: Any, path: tuple, arrays: Arrays) -> Node:
    if tree is None:
        return {"kind": "none"}
    if is_packed(tree):
        return _describe(leaf_tree(tree), path, arrays)  # readable with another layout, or none
    parts = children_of(tree)
    if parts is None:
        return _describe_leaf(tree, path, arrays)
    nodes = [_describe(child, (*path, key), arrays) for key, child in parts]
    if type(tree) in (list, tuple):
        return {"kind": type(tree).__name__, "children": nodes}
    names = [jax.tree_util.keystr((key,), simple=True) for key, _ in parts]
    node: Node = {
        "kind": "dict" if isinstance(tree, dict) else "object",
        "children": dict(zip(names, nodes, strict=True)),
    }
    if len(node["children"]) < len(nodes):
        raise TypeError(f"{type(tree).__name__} at {path_name(path)!r} has two children of one name: {sorted(names)}")
    if type(tree) is not dict:
        node["type"] = type_name(type(tree))
    if isinstance(tree, dict) and any(type(key) is not str for key in tree):
        keys = [key.key for key, _ in parts if isinstance(key, jax.tree_util.DictKey)]
        if all(type(key) is int for key in keys):
            node["keys"] = "int"
    return node


def children_of(tree: Any) -> list[tuple[Any, Any]] | None:
    """The keys and children of a container; None for a leaf."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if len(flat) == 1 and not flat[0][0]:
        return None
    return [(path[0], child) for path, child in flat]


def type_name(kind: type) -> str:
    """``module.Name`` of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_leaf(leaf: Any, path: tuple) -> None:
    """Refuse what a checkpoint cannot hold.

    Raises:
      TypeError: if the leaf cannot be saved; the message has its path and type.
    """
    name = path_name(path)
    if isinstance(leaf, Tracer):
        raise TypeError(f"leaf {name!r} is traced: save outside of jit, grad and vmap")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise TypeError(f"leaf {name!r} was donated or deleted: save the state that the step returned")
    elif isinstance(leaf, np.ndarray | np.generic):
        if leaf.dtype.name not in DTYPES:
            raise TypeError(f"leaf {name!r} has dtype {leaf.dtype}, which a checkpoint cannot hold: save numbers")
    elif type(leaf) not in (bool, int, float, complex, str) and not _is_opaque(leaf):
        raise TypeError(
            f"leaf {name!r} is a {type(leaf).__name__}, which a checkpoint cannot hold: save arrays, keys, Python "
            "numbers and strings, or register the class as a pytree"
        )


def _is_opaque(leaf: Any) -> bool:
    """Whether it is recorded by name only: functions and types, which equinox modules have as leaves."""
    return callable(leaf) or isinstance(leaf, np.dtype)


def _describe_leaf(leaf: Any, path: tuple, arrays: Arrays) -> Node:
    check_leaf(leaf, path)
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return _describe_array(leaf, unique_name(path_name(path), arrays), arrays)
    if _is_opaque(leaf):
        return {"kind": "opaque", "type": getattr(leaf, "__qualname__", type(leaf).__qualname__)}
    value: Any = leaf
    if isinstance(leaf, float):
        value = leaf.hex()
    elif isinstance(leaf, complex):
        value = [leaf.real.hex(), leaf.imag.hex()]
    return {"kind": "value", "type": type(leaf).__name__, "value": value}


def _describe_array(leaf: Any, name: str, arrays: Arrays) -> Node:
    node: Node = {"kind": "array", "name": name}
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            node |= {"kind": "key", "impl": str(jax.random.key_impl(leaf)), "type": str(leaf.dtype)}
            leaf = jax.random.key_data(leaf)
        if leaf.weak_type:
            node["weak"] = True
        if is_divided(leaf):
            pieces, own = divide(leaf, name)
            arrays |= own
            return node | {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "pieces": pieces}
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    arrays[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(array.shape)
    return node | {"dtype": array.dtype.name, "shape": list(array.shape)}


def unique_name(name: str, taken: Any) -> str:
    """``name``, with an apostrophe more where another leaf has that name: a key of a dict may hold a slash."""
    while name in taken:
        name += "'"
    return name


def leaves_of(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Node]]:
    """The paths and descriptions of all leaves, in order.

    Raises:
      ValueError: if the description is not well formed.
    """
    kind = node.get("kind")
    if kind in CONTAINERS:
        children = node["children"]
        for name, child in enumerate(children) if isinstance(children, list) else children.items():
            yield from leaves_of(child, (*path, str(name)))
    elif kind in ("array", "key", "value", "opaque"):
        yield "/".join(path) or ROOT, node
    elif kind != "none":
        raise ValueError(f"unknown kind of node {kind!r}")


def named_leaves(node: Node) -> dict[str, Node]:
    """All leaves by a name of their own, see ``unique_name``."""
    named: dict[str, Node] = {}
    for path, leaf in leaves_of(node):
        named[unique_name(path, named)] = leaf
    return named


def expected(node: Node) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape that a description gives for an array.

    Raises:
      ValueError: if they are not those of an array.
    """
    dtype, shape = DTYPES.get(node["dtype"]), tuple(node["shape"])
    if dtype is None or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 64:
        raise ValueError(f"array {node['name']!r} has dtype {node['dtype']!r} and shape {shape!r}")
    return dtype, shape


def byte_count(node: Node) -> int:
    """The number of bytes of a described array."""
    dtype, shape = expected(node)
    return math.prod(shape) * dtype.itemsize


def total_bytes(arrays: Arrays) -> int:
    """The number of bytes of all arrays."""
    return sum(array.nbytes for array in arrays.values())


def build(node: Node, arrays: Arrays) -> PyTree:
    """The tree of a description as dicts, lists and arrays; classes become dicts, and functions None.

    >>> build(*describe((jnp.zeros(2), {"a": None})))
    [array([0., 0.], dtype=float32), {'a': None}]
    """
    kind = node["kind"]
    if kind in CONTAINERS:
        if isinstance(node["children"], list):
            return [build(child, arrays) for child in node["children"]]
        key: Callable = int if node.get("keys") == "int" else str
        return {key(name): build(child, arrays) for name, child in node["children"].items()}
    if kind == "value":
        return read_value(node)
    if kind == "key":
        return wrap_key(node, arrays[node["name"]])
    return arrays[node["name"]] if kind == "array" else None


def read_value(node: Node) -> Any:
    """The Python number or string of a description."""
    value = node["value"]
    readers: dict[str, Callable] = {
        "bool": bool,
        "int": int,
        "str": str,
        "float": float.fromhex,
        "complex": lambda parts: complex(*map(float.fromhex, parts)),
    }
    return readers[node["type"]](value)


def wrap_key(node: Node, data: np.ndarray) -> jax.Array:
    """A typed random key from its data.

    Raises:
      ValueError: if this JAX does not know the generator.
    """
    return jax.random.wrap_key_data(jnp.asarray(data), impl=node["impl"])


__all__ = [
    "Arrays",
    "Node",
    "build",
    "byte_count",
    "describe",
    "expected",
    "leaves_of",
    "named_leaves",
    "total_bytes",
]
