"""Fit saved leaves into a tree of the same types, with a report of every leaf."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.checkpoints.nodes import Arrays, Node, children_of, expected, read_value, unique_name, wrap_key
from nnlearn.checkpoints.packed_trees import fill_buffers, leaf_shapes, leaf_tree
from nnlearn.packing import Packed, is_packed
from nnlearn.tree import path_name

Names = str | Sequence[str] | Callable[[str], bool]
Rename = Mapping[str, str] | Callable[[str], str | None]
SHOWN = 8  # leaves of each sort that a message lists


class Mismatch(NamedTuple):
    """A leaf that was saved and is wanted, but as another array.

    Attributes:
      name: the leaf's path.
      saved, wanted: dtype and shape in words.
    """

    name: str
    saved: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.name}: saved {self.saved}, wanted {self.wanted}"


class LoadReport(NamedTuple):
    """What ``load`` did with every leaf; ``print`` shows it.

    Attributes:
      taken: the leaves of ``like`` that were loaded.
      kept: the leaves of ``like`` that keep their values, because they were not saved or not selected.
      mismatched: the leaves that were saved with another dtype or shape; they keep their values.
      unexpected: the saved leaves that ``like`` does not have.
    """

    taken: tuple[str, ...]
    kept: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [("loaded", self.taken), ("kept", self.kept), ("does not fit", self.mismatched)]
        lines = [_line(what, leaves) for what, leaves in [*parts, ("not used", self.unexpected)] if leaves]
        return "\n".join(lines) or "the tree has no leaves"


def _line(what: str, leaves: Sequence[Any]) -> str:
    more = f", and {len(leaves) - SHOWN} more" if len(leaves) > SHOWN else ""
    return f"{what} ({len(leaves)}): {', '.join(map(str, leaves[:SHOWN]))}{more}"


class Kept(NamedTuple):
    """Stands for a leaf of ``like`` that keeps its value."""


class Fitting:
    """One restoration: the saved leaves by name, and which of them were used so far."""

    def __init__(self, saved: Mapping[str, Node], arrays: Arrays, only: Names | None, rename: Rename | None):
        self.arrays, self.selected = arrays, _selector(only)
        self.saved = _renamed(saved, rename)
        self.default = jax.device_put(np.zeros(())).sharding  # of what is on no particular device
        self.seen: set[str] = set()
        self.taken: list[str] = []
        self.kept: list[str] = []
        self.missing: list[str] = []
        self.mismatched: list[Mismatch] = []

    def report(self) -> LoadReport:
        unexpected = [name for name in self.saved if name not in self.seen and self.selected(name)]
        return LoadReport(tuple(self.taken), tuple(self.kept), tuple(self.mismatched), tuple(unexpected))

    def fit(self, like: Any, path: tuple = ()) -> Any:
        """Return ``like`` with the saved leaves in place of its own."""
        if like is None:
            return None
        if is_packed(like):
            return self._fit_packed(like, path)
        parts = children_of(like)
        if parts is None:
            value = self._leaf(like, path)
            return like if isinstance(value, Kept) else value
        children = [self.fit(child, (*path, key)) for key, child in parts]
        return jax.tree.structure(like, is_leaf=lambda node: node is not like).unflatten(children)

    def _fit_packed(self, like: Packed, path: tuple) -> Packed:
        values: list[Any] = []

        def take(inner, shape):
            values.append(self._leaf(shape, (*path, *inner)))
            return values[-1]

        tree = jax.tree.map_with_path(take, leaf_shapes(like))
        if any(isinstance(value, Kept) for value in values):
            kept = leaf_tree(like)
            is_leaf = lambda node: isinstance(node, Kept)  # noqa: E731
            tree = jax.tree.map(lambda new, old: old if isinstance(new, Kept) else new, tree, kept, is_leaf=is_leaf)
        buffers = [
            place_like(new, old, self.default) if hasattr(old, "shape") else old
            for new, old in zip(fill_buffers(like, tree), like.buffers, strict=True)
        ]
        return Packed(buffers, like.layout)

    def _leaf(self, like: Any, path: tuple) -> Any:
        name = unique_name(path_name(path), self.seen)
        self.seen.add(name)
        node = self.saved.get(name)
        if not self.selected(name):
            self.kept.append(name)
            return Kept()
        if callable(like) or isinstance(like, type | np.dtype):  # a function is not loaded
            self.kept.append(name)
            return Kept()
        if node is None:
            self.missing.append(name)
            self.kept.append(name)
            return Kept()
        saved, wanted = words_of_node(node), words_of_leaf(like)
        if saved != wanted:
            self.mismatched.append(Mismatch(name, saved, wanted))
            return Kept()
        self.taken.append(name)
        return self._value(node, like, name)

    def _value(self, node: Node, like: Any, name: str) -> Any:
        if node["kind"] == "value":
            return read_value(node)
        array = self.arrays[node["name"]]
        if node["kind"] == "key":
            if not getattr(like, "is_fully_addressable", True):
                data = place_like(array, jax.random.key_data(like), self.default)
                return jax.random.wrap_key_data(data, impl=node["impl"])
            return place_like(wrap_key(node, array), like, self.default)
        if isinstance(like, np.generic):
            return array[()]
        if isinstance(like, np.ndarray):
            return array.copy() if not array.flags.writeable else array
        if node.get("weak") and not array.shape:
            return jnp.asarray(array.item())  # weakly typed, as a Python number is
        return place_like(array, like, self.default)


def place_like(array: Any, like: Any, default: jax.sharding.Sharding) -> Any:
    """An array on the devices of ``like``: uncommitted where ``like`` is on the default device, else with its sharding.

    JAX on a CPU may take over the memory of ``array``.

    Raises:
      TypeError: if JAX would narrow the dtype, as float64 without x64.
    """
    if isinstance(like, np.ndarray):
        return np.asarray(array)
    sharding = getattr(like, "sharding", None)
    if sharding is None or sharding == default:
        placed = jax.device_put(array)
    elif sharding.is_fully_addressable:
        placed = jax.device_put(array, sharding)
    else:  # each process places the parts on its devices
        placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    if placed.dtype != array.dtype:
        raise TypeError(
            f"the saved array is {array.dtype}, which JAX narrows here: jax.config.update('jax_enable_x64', True)"
        )
    return placed


def words_of_node(node: Node) -> str:
    """What was saved, such as ``float32[3, 4]``; equal to ``words_of_leaf`` where it fits."""
    if node["kind"] == "value":
        return f"a Python {node['type']}"
    if node["kind"] == "opaque":
        return f"a function, {node['type']}"
    dtype, shape = expected(node)
    if node["kind"] == "key":
        return f"{node['type']}{_shape(shape[:-1])}"
    return f"{dtype.name}{_shape(shape)}"


def words_of_leaf(leaf: Any) -> str:
    """What is wanted, such as ``float32[3, 4]``."""
    if not hasattr(leaf, "dtype"):
        return f"a Python {type(leaf).__name__}"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"{leaf.dtype}{_shape(leaf.shape)}"
    return f"{np.dtype(leaf.dtype).name}{_shape(leaf.shape)}"


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _selector(only: Names | None) -> Callable[[str], bool]:
    if only is None:
        return lambda name: True
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)
    return lambda name: any(
        name == pattern or name.startswith(pattern.rstrip("/") + "/") or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def _renamed(saved: Mapping[str, Node], rename: Rename | None) -> dict[str, Node]:
    """The saved leaves by their new names.

    Raises:
      ValueError: if two leaves get one name.
    """
    if rename is None:
        return dict(saved)
    table: dict[str, Node] = {}
    for name, node in saved.items():
        new = rename(name) if callable(rename) else _with_new_prefix(name, rename)
        if new is None:
            continue
        if new in table:
            raise ValueError(f"rename gives two saved leaves the name {new!r}; one of them is {name!r}")
        table[new] = node
    return table


def _with_new_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with its longest known prefix replaced; an empty new prefix moves the leaf up to the root."""
    for old in sorted(prefixes, key=len, reverse=True):
        if name == old or name.startswith(old.rstrip("/") + "/") or not old:
            rest = name[len(old.rstrip("/")) :].lstrip("/")
            return "/".join(part for part in (prefixes[old].rstrip("/"), rest) if part)
    return name


def check(report: LoadReport, missing_leaves: Sequence[str], missing: str, unexpected: str) -> str:
    """What is wrong with a restoration, in words; empty if nothing is."""
    wrong: list[str] = []
    if missing == "error":
        if missing_leaves:
            wrong.append(_line("not saved", missing_leaves))
        if report.mismatched:
            wrong.append(_line("do not fit", report.mismatched))
    if unexpected == "error" and report.unexpected:
        wrong.append(_line("saved, and not in like", report.unexpected))
    return "; ".join(wrong)


Missing = Literal["error", "keep"]
Unexpected = Literal["error", "ignore"]

__all__ = ["Fitting", "LoadReport", "Mismatch", "Missing", "Names", "Rename", "Unexpected", "check"]
