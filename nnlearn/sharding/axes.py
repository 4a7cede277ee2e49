"""Arrays sharded over Explicit mesh axes: their types say which array axis is sharded over which mesh axis.

JAX rejects an operation whose result has several possible shardings, such as a gather or a reshape of a sharded axis.
The functions here name the sharding of the result, and XLA chooses how to compute it. Without such arrays they add
nothing to a program.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nnlearn.types import PyTree

P = ParamSpec("P")
R = TypeVar("R")


def explicit_mesh(*values: PyTree) -> Any:
    """Return the mesh over whose Explicit axes an array of these trees is sharded; None if there is none.

    >>> explicit_mesh(jnp.ones(2)) is None
    True
    """
    for leaf in jax.tree.leaves(values):
        if isinstance(leaf, jax.Array) and any(explicit_spec(leaf)):
            return jax.typeof(leaf).sharding.mesh
    return None


def explicit_spec(array: Any) -> tuple:
    """For each axis of an array: the Explicit mesh axes that it is sharded over, or None.

    >>> explicit_spec(jnp.ones((2, 3)))
    (None, None)
    """
    if not isinstance(array, jax.Array):
        return (None,) * jnp.ndim(array)
    sharding = jax.typeof(array).sharding
    spec = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return (None,) * array.ndim
    return tuple(names or None for names in spec)


def automatic(function: Callable, *arguments: PyTree, spec: Callable[[jax.Array], Sequence] | None = None) -> PyTree:
    """Call ``function(*arguments)``; if an argument is sharded over Explicit axes, XLA chooses the shardings inside.

    Args:
      function: function from trees of arrays to a tree of arrays.
      arguments: its arguments.
      spec: from an array in the result to its sharding, one entry for each leading axis; None replicates the results.

    >>> automatic(jnp.add, 1, 2)
    Array(3, dtype=int32, weak_type=True)
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    leaves, structure = jax.tree.flatten(arguments)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    kinds = [AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types]
    inside = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=tuple(kinds))

    def region(arrays):
        # jit, because a mesh of another type can be entered only inside a program
        given, rest = iter(arrays), iter([leaf for leaf, flag in zip(leaves, is_array, strict=True) if not flag])
        with jax.sharding.use_abstract_mesh(inside):
            arrays = iter([jax.sharding.reshard(array, PartitionSpec()) for array in given])
            values = [next(arrays if flag else rest) for flag in is_array]
            results = function(*structure.unflatten(values))
        return jax.tree.map(lambda one: jax.sharding.reshard(one, _sharding(mesh, one, spec)), results)

    return jax.jit(region)([leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag])


def automatic_axes(like: str, when: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it runs through ``automatic``.

    Args:
      like: the argument whose sharding the results have, along their leading axes of equal length.
      when: the argument that must be sharded over Explicit axes; None for any argument.

    >>> double = automatic_axes(like="x")(lambda x, factor=2: factor * x)
    >>> double(3)
    6
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        call: Callable[..., R] = function

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            if explicit_mesh(args, kwargs) is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            if when is not None and explicit_mesh(given[when]) is None:
                return function(*args, **kwargs)
            spec = functools.partial(along_first_axes, given[like])
            return automatic(lambda args, kwargs: call(*args, **kwargs), args, kwargs, spec=spec)

        return wrapped

    return decorate


def along_first_axes(tree: PyTree, result: jax.Array) -> tuple:
    """Return the sharding of a result that shares the leading axes of a tree's first array, where lengths are equal.

    >>> along_first_axes(jnp.ones((2, 3)), jnp.ones((2, 4)))
    (None,)
    """
    array = jnp.asarray(jax.tree.leaves(tree)[0])
    lengths = [a == b for a, b in zip(array.shape, result.shape, strict=False)]
    same = (*lengths, False).index(False)
    return explicit_spec(array)[:same]


def take_rows(table: jax.Array, indices: jax.Array, spread: bool = False, **options: Any) -> jax.Array:
    """``jnp.take(table, indices, axis=0, **options)``; the result has the sharding of the indices, then of the rows.

    Args:
      spread: if the rows are sharded and the indices are not, shard the result along the last axis of the indices,
        where its length allows it.

    >>> take_rows(jnp.array([5, 6, 7]), jnp.array([[2, 0]]))
    Array([[7, 5]], dtype=int32)
    """
    first, *rest = explicit_spec(table)
    front = explicit_spec(indices)
    if spread and front and not any(front) and indices.shape[-1] % _parts(table, first) == 0:
        front = (*front[:-1], first)
    spec = disjoint((*front, *rest))
    return automatic(lambda *arrays: jnp.take(*arrays, axis=0, **options), table, indices, spec=lambda _: spec)


def deal_rows(array: jax.Array, parts: int, more: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """Divide the rows of an array, shape (parts, rows / parts, ...); row ``i`` is in part ``i % parts``.

    If the rows are sharded, so are the rows of each part, and no row moves.

    Args:
      more: from the array to rows that are appended to it first.

    >>> deal_rows(jnp.arange(6), 2)
    Array([[0, 2, 4],
           [1, 3, 5]], dtype=int32)
    """

    def deal(array):
        array = array if more is None else jnp.concatenate([array, more(array)])
        return jnp.swapaxes(array.reshape(len(array) // parts, parts, *array.shape[1:]), 0, 1)

    first, *rest = explicit_spec(array)
    spec = lambda dealt: (None, first if dealt.shape[1] % _parts(array, first) == 0 else None, *rest)  # noqa: E731
    return automatic(deal, array, spec=spec)


def lie_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Shard an array over the Explicit axes that ``like``, of the same shape, is sharded over.

    >>> lie_like(jnp.ones(1), jnp.zeros(1))
    Array([1.], dtype=float32)
    """
    mesh = explicit_mesh(like)
    if mesh is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*explicit_spec(like))))


def filled(shape: jax.ShapeDtypeStruct, value: Any, *lengths: int) -> jax.Array:
    """Return a constant array like a result of ``jax.eval_shape``, with leading axes of these lengths.

    >>> filled(jax.ShapeDtypeStruct((2,), jnp.float32), 0, 1)
    Array([[0., 0.]], dtype=float32)
    """
    array, sharding = jnp.full((*lengths, *shape.shape), value, shape.dtype), shape.sharding
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    spec = PartitionSpec(*(None,) * len(lengths), *sharding.spec)
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def beside(arrays: PyTree, tree: PyTree) -> PyTree:
    """Replicate the arrays of ``tree`` on the mesh over whose Explicit axes ``arrays`` are sharded.

    JAX cannot determine the sharding of the gradient of an array that is on no mesh. Arrays on a mesh are unchanged.

    >>> beside(jnp.ones(1), {"w": 1.0})
    {'w': 1.0}
    """
    mesh = explicit_mesh(arrays)
    if mesh is None:
        return tree

    def lay(leaf):
        leaf = jnp.asarray(leaf)
        on_none = jax.typeof(leaf).sharding.mesh.empty
        return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec())) if on_none else leaf

    return jax.tree.map(lay, tree)


def _parts(array: jax.Array, names: Any) -> int:
    """Return the number of parts of an axis that is sharded over these mesh axes."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(jax.typeof(array).sharding.mesh.shape[name] for name in names)


def matmul(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """``jnp.matmul(x, kernel, **options)`` of (..., inputs) and (inputs, outputs), with any axes sharded.

    >>> matmul(jnp.ones((1, 2)), jnp.ones((2, 1)))
    Array([[2.]], dtype=float32)
    """
    return linear(x, kernel, None, **options)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any) -> jax.Array:
    """``x @ kernel + bias``; the result is sharded as ``x``, and its last axis as that of the kernel.

    >>> linear(jnp.ones((1, 2)), jnp.ones((2, 1)), jnp.ones(1))
    Array([[3.]], dtype=float32)
    """

    def compute(x, kernel, bias):
        y = jnp.matmul(x, kernel, **options)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    if explicit_mesh(kernel, bias) is None and explicit_spec(x)[-1] is None:
        return compute(x, kernel, bias)
    spec = disjoint((*explicit_spec(x)[:-1], explicit_spec(kernel)[-1]))
    return automatic(compute, x, kernel, bias, spec=lambda _: spec)


def disjoint(spec: Sequence) -> tuple:
    """Remove repeated mesh axes from a sharding: the first array axis keeps each of them.

    >>> disjoint(("data", None, ("model", "data")))
    ('data', None, None)
    """
    used, kept = set(), []
    for names in spec:
        found = set() if names is None else {names} if isinstance(names, str) else set(names)
        kept.append(None if used & found else names)
        used |= found
    return tuple(kept)


def _sharding(mesh: Any, array: jax.Array, spec: Callable | None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(() if spec is None else spec(array))))


__all__ = [
    "along_first_axes",
    "automatic",
    "automatic_axes",
    "beside",
    "deal_rows",
    "disjoint",
    "explicit_mesh",
    "explicit_spec",
    "filled",
    "lie_like",
    "linear",
    "matmul",
    "take_rows",
]
