"""Pytree arithmetic that ``jax.tree`` and ``optax.tree`` lack: paths in words, and maps that check and unzip.

The names of ``optax.tree``, such as ``nnlearn.tree.add`` and ``nnlearn.tree.get``, are optax's own functions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nnlearn.types import PyTree, Scalar

BRANCH_SIZE = 1 << 14  # number of elements above which a pass over them costs more than a conditional


def path_name(path: Sequence) -> str:
    """Return a leaf's path as a string, ``encoder/0/kernel``; the root is ``(root)``.

    >>> [path_name(path) for path, _ in jax.tree.leaves_with_path({"a": [1, 2]})]
    ['a/0', 'a/1']
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "(root)"


def is_readable(leaf: Any) -> bool:
    """Whether a leaf is an array whose values can be read here: no tracer, no bare shape, not donated, not elsewhere.

    >>> is_readable(np.ones(2)), is_readable(jax.ShapeDtypeStruct((2,), float))
    (True, False)
    """
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable and not leaf.is_deleted()
    return isinstance(leaf, np.ndarray | np.generic)


def sizes(tree: PyTree) -> str:
    """How many arrays and numbers a tree has, in words; its leaves may be shapes or tracers.

    >>> sizes({"w": jnp.ones((100, 20)), "b": jnp.ones(20)})
    '2 arrays of 2,020 numbers'
    """
    leaves = jax.tree.leaves(tree)
    total = sum(math.prod(np.shape(leaf)) for leaf in leaves)
    return f"{len(leaves)} array{'s' * (len(leaves) != 1)} of {total:,} number{'s' * (total != 1)}"


def is_function(value: Any) -> bool:
    """Whether a value is a function; a callable tree, such as a module of equinox, is a tree.

    >>> is_function(len), is_function({"a": len}), is_function(jax.tree_util.Partial(len))
    (True, False, True)
    """
    return callable(value) and (isinstance(value, functools.partial) or jax.tree_util.all_leaves([value]))


def matching(tree: PyTree, like: PyTree, names: Sequence[str] = ("params", "updates")) -> PyTree:
    """Replace nodes of ``tree`` by None where ``like`` has None, as gradients have for parameters that are not trained.

    Raises:
      ValueError: if the structures differ; the message names the trees by ``names`` and the first leaf that differs.

    >>> matching({"w": 1.0, "activation": jnp.tanh}, {"w": 2.0, "activation": None})
    {'activation': None, 'w': 1.0}
    """
    if jax.tree.structure(tree) == jax.tree.structure(like):
        return tree
    try:
        found = jax.tree.map(
            lambda node, part: None if node is None else part, like, tree, is_leaf=lambda node: node is None
        )
    except ValueError:
        found = None
    if found is None or jax.tree.structure(found) != jax.tree.structure(like):
        raise ValueError(
            f"{names[0]} and {names[1]} must have one structure: {_explain_mismatch(names[::-1], (like, tree))}"
        ) from None
    return found


def _explain_mismatch(names: Sequence[str], trees: Sequence[PyTree]) -> str:
    paths = [{path_name(path) for path, _ in jax.tree.leaves_with_path(tree)} for tree in trees]
    for name, other in zip(names[1:], paths[1:], strict=True):
        if extra := sorted(other - paths[0]):
            return f"{name} has a leaf at {extra[0]!r}, {names[0]} has none"
        if missing := sorted(paths[0] - other):
            return f"{names[0]} has a leaf at {missing[0]!r}, {name} has none"
    kinds = ", ".join(f"{name}: {jax.tree.structure(tree)}" for name, tree in zip(names, trees, strict=True))
    return f"their containers differ ({kinds})"


def map_unzip(function: Callable[..., tuple], results: int, names: Sequence[str], *trees: PyTree) -> tuple[PyTree, ...]:
    """Map a function that returns a tuple over the leaves of several trees; return a tuple of trees.

    Args:
      function: function from one leaf of each tree to a tuple of ``results`` arrays.
      results: the number of trees to return.
      names: the name of each tree, for messages.
      *trees: pytrees of one structure; corresponding leaves have equal shapes. Where the first tree has None, the
        others may have anything.

    Raises:
      ValueError: if structures or shapes differ; the message names the first leaf that differs.

    >>> map_unzip(lambda x, y: (x + y, x * y), 2, ("x", "y"), {"a": 2}, {"a": 3})
    ({'a': 5}, {'a': 6})
    """
    flat, treedef = jax.tree.flatten(trees[0])
    columns = [flat]
    for name, tree in zip(names[1:], trees[1:], strict=False):  # callers may give more names than trees
        columns.append(jax.tree.leaves(matching(tree, trees[0], (name, names[0]))))
    for position, row in enumerate(zip(*columns, strict=True)):
        if any(jnp.shape(leaf) != jnp.shape(row[0]) for leaf in row[1:]):
            where = path_name(jax.tree.leaves_with_path(trees[0])[position][0])
            shapes = ", ".join(f"{name} {jnp.shape(leaf)}" for name, leaf in zip(names, row, strict=True))
            raise ValueError(f"shapes differ at {where!r}: {shapes}")
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return tuple(treedef.unflatten([row[index] for row in rows]) for index in range(results))


def real_dtype(dtype) -> jnp.dtype:
    """Return the real dtype of the same precision: float32 for complex64, else ``dtype`` itself."""
    return jnp.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.dtype(dtype)


def widest(*dtypes) -> jnp.dtype:
    """Return the dtype that ``dtypes`` promote to, also under ``jax_numpy_dtype_promotion=strict``.

    >>> widest(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(jnp.result_type(*dtypes))


def compute_dtype(*dtypes) -> jnp.dtype:
    """Return the dtype for computations: the widest of ``dtypes``, float32 at least.

    >>> compute_dtype(jnp.bfloat16), compute_dtype(jnp.float16, jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    return widest(*dtypes, jnp.float32)


def abs_sq(x: jax.Array) -> jax.Array:
    """Squared magnitude, real for complex ``x``; same shape."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else jnp.square(x)


def finite_part(x: jax.Array) -> jax.Array:
    """Replace infinite entries by the largest finite value of their sign; NaN stays."""
    return clip_parts(x, float(jnp.finfo(x.dtype).max))


def clip_parts(x: jax.Array, limit: float | jax.Array, scale: Scalar = 1) -> jax.Array:
    """Clip ``scale * x`` to [-limit, limit], by parts if complex, because ``inf * (1 + 0j)`` contains a NaN."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(clip_parts(jnp.real(x), limit, scale), clip_parts(jnp.imag(x), limit, scale))
    return jnp.clip(x if isinstance(scale, int) and scale == 1 else x * scale, -limit, limit)


def power_of_two(x: jax.Array) -> jax.Array:
    """Round ``x >= 0`` to a power of two, from the smallest to the largest one whose inverse is a normal number.

    Dividing by a power of two is exact, so such a scale leaves ordinary results unchanged to the bit.
    """
    info = jnp.finfo(x.dtype)
    most = 2.0 ** (info.maxexp - 2)
    return jax.lax.reduce_precision(jnp.clip(x, 1 / most, most), info.nexp, 0)


def batch_rows(size: int, batched: PyTree, tree: PyTree) -> PyTree:
    """A tree of which every array has a row for each of ``size`` members of a batch; ``batched`` says which have."""
    return jax.tree.map(lambda has, leaf: leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape)), batched, tree)


def rarely(when: jax.Array, slow: Callable[..., Any], fast: PyTree, *operands: PyTree) -> Any:
    """Return ``slow(*operands)`` if ``when`` is true, and otherwise ``fast``, which must then be equal.

    Under ``jax.vmap`` it remains a conditional, where ``jax.lax.cond`` computes both branches and selects: if ``when``
    is true for one member of the batch, ``slow`` runs for all. It has no derivative in reverse mode, so use it in
    functions with a custom derivative.

    Args:
      when: a boolean scalar.
      slow: a function that returns what is like ``fast``. All arrays that it uses must be among its operands.

    >>> double = lambda x: jnp.where(x < 1, x, 2 * x)
    >>> x = jnp.array(3.0)
    >>> rarely(x >= 1, double, x, x)
    Array(6., dtype=float32, weak_type=True)
    """

    @jax.custom_batching.custom_vmap
    def choose(when, fast, *operands):
        return jax.lax.cond(when, lambda fast, *operands: slow(*operands), lambda fast, *_: fast, fast, *operands)

    @choose.def_vmap
    def choose_in_batch(size, batched, when, fast, *operands):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched[2:]))
        all_fast = batch_rows(size, batched[1], fast)
        result = rarely(jnp.any(when), jax.vmap(slow, axes, axis_size=size), all_fast, *operands)
        return result, jax.tree.map(lambda _: True, result)

    return choose(when, fast, *operands)


def squares_fit(norm: jax.Array) -> jax.Array:
    """Whether a norm computed from plain squares is accurate: no square overflowed or underflowed."""
    return (norm > float(jnp.finfo(norm.dtype).tiny) ** 0.5 * 2.0**31) & (norm < jnp.inf)


def scaled_norm(
    arrays: Sequence[jax.Array], axis: int | tuple[int, ...] | None = None, bounded: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return ``(r, s)`` with the Euclidean norm ``r / s`` of all arrays; neither squares nor ``r`` overflow.

    ``s`` is 1 in the ordinary case, which takes one pass over the arrays, and otherwise a power of two. Derivatives
    treat it as a constant, and ``r`` has derivative 0 where it is 0 or infinite.

    Args:
      arrays: real or complex arrays. They are summed in the widest of their dtypes, float32 at least.
      axis: the axes to sum over, which keep length 1; None sums all axes of any number of arrays to scalars.
      bounded: count infinite entries as the largest finite value.

    >>> r, s = scaled_norm((jnp.array([3e20, 4e20]),))
    >>> float(r) < 1e4, f"{float(r / s):.4g}"
    (True, '5e+20')
    """
    norm, scale = _scaled_norm(tuple(arrays), axis, bounded)
    return norm, jax.lax.stop_gradient(scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _scaled_norm(arrays, axis, bounded):
    wide = compute_dtype(*(array.dtype for array in arrays))
    info = jnp.finfo(wide)
    exponent = 5 * info.maxexp // 8

    def root(arrays, square=abs_sq):
        total = jnp.zeros([], info.dtype)
        for array in arrays:
            array = array.astype(wide if jnp.iscomplexobj(array) else info.dtype)
            total = total + jnp.sum(square(array), axis=axis, keepdims=axis is not None)
        return jnp.sqrt(total)

    def root_at(scale, arrays):
        limit = 2.0 ** (info.maxexp - (exponent if bounded else 8))  # unbounded, its square is inf

        def square(array):
            if jnp.iscomplexobj(array):
                return square(jnp.real(array)) + square(jnp.imag(array))
            return jnp.square(jnp.minimum(jnp.abs(array) * scale, limit))

        return root(arrays, square)

    norm = root(arrays)
    fits = squares_fit(norm)
    # next to entries that need one scale, entries that would need the other are negligible
    low, high = (jnp.asarray(2.0**power, info.dtype) for power in (-exponent, exponent))
    scale = jnp.where(fits, jnp.ones_like(low), jnp.where(norm > 1, low, high))
    if _reads_once(arrays):
        return jnp.where(fits, norm, jnp.where(norm > 1, root_at(low, arrays), root_at(high, arrays))), scale

    def rescaled(norm, scale, arrays):
        return jnp.where(scale == 1, norm, root_at(scale, arrays))

    return rarely(~jnp.all(fits), rescaled, norm, norm, scale, arrays), scale


def _reads_once(arrays: Sequence[jax.Array]) -> bool:
    """Whether three sums over the arrays cost about as much as one, and less than a conditional.

    Accelerators compute all three in one pass and wait for the host at a conditional. A CPU makes a pass for each.
    """
    return jax.default_backend() != "cpu" or sum(array.size for array in arrays) < BRANCH_SIZE


@_scaled_norm.defjvp
def _scaled_norm_jvp(axis, bounded, primals, tangents):
    (arrays,), (changes,) = primals, tangents
    norm, scale = _scaled_norm(arrays, axis, bounded)
    usable = (norm > 0) & (norm < jnp.inf)
    inverse, total = jnp.where(usable, 1 / jnp.where(usable, norm, 1), 0), jnp.zeros_like(norm)
    for array, change in zip(arrays, changes, strict=True):
        wide = compute_dtype(array.dtype)
        limit = float(jnp.finfo(wide).max)
        unit = clip_parts(array.astype(wide), limit, scale.astype(real_dtype(wide))) * inverse.astype(real_dtype(wide))
        product = jnp.real(jnp.conj(unit) * change.astype(wide))
        total = total + jnp.sum(product, axis=axis, keepdims=axis is not None).astype(total.dtype)
    return (norm, scale), (scale * total, jnp.zeros_like(scale))


def array_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean norm of an array, or over some axes, which keep length 1; see ``global_norm``."""
    norm, scale = scaled_norm((x,), axis)
    return norm / scale


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all elements of a tree, summed in float32 or better; 0 for an empty tree, gradient 0 at 0.

    It is accurate whenever the norm itself is representable, even if its square is not.

    Returns:
      A real scalar, float32 unless a leaf is wider.

    >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    >>> f"{float(global_norm(jnp.array([3e-30, 4e-30]))):.4g}"
    '5e-30'
    """
    leaves = tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(tree))
    norm, scale = scaled_norm(leaves)
    return norm / scale


@jax.custom_jvp
def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root with derivative 0 at 0 instead of infinity, so that ``0 * inf`` never gives a NaN.

    Meta-gradients through Adam need this at every parameter whose gradient is exactly zero.

    >>> float(jax.grad(safe_sqrt)(0.0)), float(jax.grad(jnp.sqrt)(0.0))
    (0.0, inf)
    """
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root = safe_sqrt(x)
    zero = x == 0
    return root, jnp.where(zero, 0, 0.5 / jnp.where(zero, 1, root)) * tangent


def safe_rsqrt(x: jax.Array) -> jax.Array:
    """``1 / sqrt(x)``, and 0 with derivative 0 where ``x`` is 0."""
    zero = x == 0
    return jnp.where(zero, 0, jax.lax.rsqrt(jnp.where(zero, 1, x)))


def safe_divide(numerator: Scalar, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, and 0 with derivative 0 where the denominator is 0.

    With ``eps = 0`` a parameter that never had a gradient is unchanged, where ``0 / 0`` would make it NaN.
    """
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def scale_tree(tree: PyTree, factor: Scalar) -> PyTree:
    """Multiply every leaf by ``factor`` in float32 or better; the result has the leaf's dtype."""

    def scale_leaf(leaf):
        leaf = jnp.asarray(leaf)
        wide = compute_dtype(leaf.dtype)
        return (as_hyperparam(factor, wide) * leaf.astype(wide)).astype(leaf.dtype)

    return jax.tree.map(scale_leaf, tree)


def as_hyperparam(value: Scalar, dtype):
    """Prepare a hyper-parameter for arithmetic in ``dtype``: cast an array to its real precision, keep Python numbers.

    With a Python number ``1 - b2`` is computed in double precision, and the array determines the dtype.
    """
    if isinstance(value, bool | int | float):  # np.float64 is a float, and would widen float32 arrays
        return float(value) if isinstance(value, float) else value
    return jnp.asarray(value).astype(real_dtype(dtype))


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every element of the tree is finite: a boolean scalar, True for an empty tree."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _of_optax(name: str) -> Any:
    """The function of ``optax.tree`` with this name."""
    import optax.tree

    if name.startswith("_") or not hasattr(optax.tree, name):
        raise AttributeError(f"module 'nnlearn.tree' has no attribute {name!r}, nor has optax.tree")
    return getattr(optax.tree, name)


if not TYPE_CHECKING:  # with a __getattr__, type checkers would accept any name
    __getattr__ = _of_optax
