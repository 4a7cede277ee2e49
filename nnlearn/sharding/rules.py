"""Rules that say over which mesh axes the axes of each array are sharded."""

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nnlearn.tree import path_name
from nnlearn.types import PyTree

Axes = str | Sequence[str]
Spec = PartitionSpec | Sequence[Any] | str | None
Rule = Callable[[str, tuple[int, ...], Mesh], Spec]
Rules = Mapping[str, Spec] | Rule | None
"""From paths to partition specs: patterns, a function, or None to replicate all."""


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = None) -> PyTree:
    """The sharding of each leaf of a tree, as rules say.

    Args:
      tree: arrays, or ``jax.ShapeDtypeStruct``.
      mesh: the devices, see ``make_mesh``.
      rules: a dict from patterns to partition specs. A pattern is a path such as ``"blocks/0/mlp/up/kernel"``, where
        ``*`` stands for any characters; the first one that matches a leaf counts. A spec is a ``PartitionSpec`` or a
        tuple with the mesh axes of each array axis. Leaves without a match are replicated. Alternatively a function
        ``rules(path, shape, mesh) -> spec``, such as ``fsdp()`` and ``tensor_parallel()``. None replicates all leaves.

    Returns:
      A tree of ``NamedSharding``.

    Raises:
      ValueError: if a pattern matches no leaf, or a spec does not fit its leaf or the mesh. The message names the path,
        the shape, the axis and the cure.

    >>> import jax.numpy as jnp
    >>> from nnlearn.sharding import make_mesh
    >>> params = {"up": {"kernel": jnp.ones((2, 4))}, "scale": jnp.ones(4)}
    >>> shardings(params, make_mesh("model=1"), {"*/kernel": (None, "model")})["up"]["kernel"].spec
    P(None, 'model')
    >>> shardings(params, make_mesh("model=1"), {"up/kernl": (None, "model")})
    Traceback (most recent call last):
    ValueError: rule 'up/kernl' matches no leaf; did you mean 'up/kernel'?
    """
    leaves, treedef = jax.tree.flatten_with_path(tree)
    named = [(path_name(path), tuple(np.shape(leaf))) for path, leaf in leaves]
    rule = resolve(rules, [name for name, _ in named])
    return treedef.unflatten(
        [NamedSharding(mesh, checked_spec(rule(name, shape, mesh), name, shape, mesh)) for name, shape in named]
    )


def resolve(rules: Rules, paths: Sequence[str]) -> Rule:
    """Rules as a function from path, shape and mesh to a spec.

    Raises:
      TypeError: if ``rules`` is something else.
      ValueError: if a pattern matches none of the paths.
    """
    if rules is None:
        return lambda path, shape, mesh: None
    if isinstance(rules, FullySharded):
        return rules.after(resolve(rules.rules, paths))
    if callable(rules):
        return rules
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict from patterns to specs, a function or None, got {rules!r}")
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 1, 0)
            cure = f"did you mean {near[0]!r}?" if near else "the tree has no leaves"
            raise ValueError(f"rule {pattern!r} matches no leaf; {cure}")
    return lambda path, shape, mesh: next(
        (spec for pattern, spec in rules.items() if fnmatch.fnmatchcase(path, pattern)), None
    )


def checked_spec(spec: Spec, path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """A spec as a ``PartitionSpec``, if it fits an array and a mesh.

    Raises:
      ValueError: if it names an unknown axis or one axis twice, is longer than the shape, or does not divide it.
    """
    entries = () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)
    where = f"{path!r} of shape {shape}"
    if len(entries) > len(shape):
        raise ValueError(f"the spec {entries} of {where} has {len(entries)} entries: give at most {len(shape)}")
    used: set[str] = set()
    for axis, names in enumerate(entries):
        for name in names_of(names):
            if name not in mesh.shape:
                near = difflib.get_close_matches(str(name), mesh.axis_names, 1, 0)[0]
                raise ValueError(
                    f"the spec {entries} of {where} names the axis {name!r}, which the mesh {dict(mesh.shape)} does "
                    f"not have; did you mean {near!r}?"
                )
            if name in used:
                raise ValueError(f"the spec {entries} of {where} uses the axis {name!r} twice: use it once")
            used.add(name)
        parts = part_count(mesh, names)
        if shape[axis] % parts:
            raise ValueError(
                f"axis {axis} of {where} cannot be sharded over {names!r}: {shape[axis]} is no multiple of {parts}. "
                "Change the size, use a smaller mesh axis, or leave this axis out of the rule; packed parameters are "
                "padded"
            )
    return PartitionSpec(*map(_entry, entries))


def _entry(names: Any) -> Any:
    """An entry of a spec in its shortest form."""
    names = names_of(names)
    return names[0] if len(names) == 1 else names or None


def names_of(names: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition spec.

    >>> names_of(None), names_of("data"), names_of(("data", "model"))
    ((), ('data',), ('data', 'model'))
    """
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def part_count(mesh: Any, names: Any) -> int:
    """The number of parts of an array axis that is sharded over these mesh axes."""
    return math.prod(mesh.shape[name] for name in names_of(names))


def fsdp(axes: Axes = "data", rules: Rules = None) -> "FullySharded":
    """Rules that shard each parameter over the data axis too (FSDP, ZeRO-3).

    The longest array axis that ``rules`` leave alone and the number of devices divides is sharded; leaves without one
    are replicated. Packed parameters are sharded evenly whatever their shapes are.

    Args:
      axes: the mesh axis or axes of the batch.
      rules: rules that apply first, such as ``tensor_parallel()`` for a mesh of two axes.

    Returns:
      Rules for ``shardings``, ``place`` and ``init_state``.

    Source: Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054.

    >>> from nnlearn.sharding import make_mesh
    >>> fsdp()("w", (2, 8), make_mesh("data=1"))
    P(None, 'data')
    """
    return FullySharded(names_of(axes), rules)


class FullySharded:
    """The rules that ``fsdp`` returns.

    Attributes:
      axes: the mesh axes over which every parameter is sharded.
      rules: the rules that apply first.
    """

    def __init__(self, axes: tuple[str, ...], rules: Rules):
        self.axes, self.rules = axes, rules

    def __call__(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        return self.after(resolve(self.rules, [path]))(path, shape, mesh)

    def after(self, first: Rule) -> Callable[[str, tuple[int, ...], Mesh], PartitionSpec]:
        """The rule that shards what another rule leaves."""
        return lambda path, shape, mesh: spread(
            checked_spec(first(path, shape, mesh), path, shape, mesh), shape, self.axes, mesh
        )


def spread(spec: PartitionSpec, shape: tuple[int, ...], axes: Iterable[str], mesh: Any) -> PartitionSpec:
    """Shard one more axis of an array over mesh axes: the longest part that they divide; else leave the spec as it is.

    >>> from nnlearn.sharding import make_mesh
    >>> spread(PartitionSpec("model"), (4,), ("data",), make_mesh("data=1,model=1"))
    P(('model', 'data'),)
    """
    entries = [names_of(names) for names in (*spec, *(None,) * (len(shape) - len(spec)))]
    used = {name for names in entries for name in names}
    axes = tuple(name for name in axes if name not in used)
    if not axes:
        return spec
    parts = part_count(mesh, axes)
    lengths = [length // part_count(mesh, names) for length, names in zip(shape, entries, strict=True)]
    fitting = [axis for axis, length in enumerate(lengths) if length and length % parts == 0]
    if not fitting:
        return spec
    # an axis that no rule has taken comes first, so that no axis is cut twice
    best = max(fitting, key=lambda axis: (not entries[axis], lengths[axis]))
    entries[best] = (*entries[best], *axes)
    return PartitionSpec(*map(_entry, entries))


COLUMNS = ("query/kernel", "key/kernel", "value/kernel", "up/kernel", "gate/kernel", "head/kernel")
ROWS = ("output/kernel", "down/kernel")


def tensor_parallel(axis: str = "model") -> Rule:
    """Rules that shard the matrices of nnlearn's transformers over the features (tensor parallelism).

    Queries, keys, values and the first matrices of the perceptron are sharded over their outputs, and the matrices that
    follow them over their inputs, so that each half of a block needs one sum over the devices. The embedding is sharded
    over the vocabulary. All other leaves are replicated.

    Args:
      axis: the mesh axis.

    Returns:
      Rules for ``shardings``, ``place`` and ``init_state``.

    Source: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.

    >>> from nnlearn.sharding import make_mesh
    >>> tensor_parallel()("blocks/0/mlp/up/kernel", (2, 8), make_mesh("model=1"))
    (None, 'model')
    """

    def rule(path: str, shape: tuple[int, ...], mesh: Mesh) -> Spec:
        front = (None,) * (len(shape) - 2)  # the axis of layers that a scan stacks
        if path.endswith(COLUMNS):
            return (*front, None, axis)
        if path.endswith(ROWS) and "/" in path.removesuffix("output/kernel"):
            return (*front, axis, None)
        return (axis, None) if path == "embedding/kernel" else None

    return rule


__all__ = ["Rules", "Spec", "fsdp", "shardings", "tensor_parallel"]
