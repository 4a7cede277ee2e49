"""GaLore: any transformation on gradients of low rank, whose state is as small."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import with_extra_args_support
from optax.contrib import GaLoreDimensionNumbers, GaLoreState, MuonDimensionNumbers

from nnlearn.checks import check_count, check_number
from nnlearn.linalg import one_by_one
from nnlearn.optimizers.muon import axes_of, spread_over
from nnlearn.packing import is_packed
from nnlearn.settings import comparable
from nnlearn.transforms.adam import scale_by_adam
from nnlearn.transforms.averages import increment, is_multiple
from nnlearn.transforms.decay import add_decayed_weights
from nnlearn.transforms.precision import assemble
from nnlearn.transforms.precondition import transpose
from nnlearn.transforms.ranges import check_hyperparams
from nnlearn.transforms.scaling import scale_by_learning_rate
from nnlearn.transforms.storage import start_of
from nnlearn.transforms.whole_leaf import map_whole_leaves
from nnlearn.tree import as_hyperparam, compute_dtype, rarely
from nnlearn.types import (
    DTypeLike,
    GradientTransformation,
    GradientTransformationExtraArgs,
    MaskOrFn,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

Shape = tuple[int, ...]
DimensionNumbers = Any  # GaLoreDimensionNumbers, a tree of them, or a function from parameters to one


_singular = one_by_one(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))


@jax.custom_jvp
def next_projector(refresh: jax.Array, g: jax.Array, projector: jax.Array) -> jax.Array:
    """The first singular vectors of the longer side of a matrix, as many as ``projector`` has; it, if not ``refresh``.

    The derivative is zero: that of a singular vector is infinite where two singular values meet.
    """

    if not projector.size:
        return projector

    def found(refresh, g, projector):
        left, _, right = _singular(g)
        vectors = left if g.shape[0] >= g.shape[1] else transpose(right)
        return jnp.where(refresh, vectors[:, : projector.shape[1]], projector)

    return rarely(refresh, found, projector, refresh, g, projector)


next_projector.defjvp(lambda primals, _: (next_projector(*primals), jnp.zeros_like(primals[2])))


def project_kernel(g: jax.Array, projector: jax.Array, refresh: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The gradient of a matrix in a low-rank space (GaLore, Zhao et al. 2024, arXiv:2403.03507, algorithm 2).

    .. math:: U S V^\top = g_t \text{ at every } T\text{-th step}, \quad P_t = U_{:, :r}, \quad R_t = P_t^\top g_t

    for a matrix that is not wider than high; for a wide one :math:`P_t = V_{:, :r}` and :math:`R_t = g_t P_t`.

    Returns:
      ``(R, P)``.
    """
    projector = next_projector(refresh, g, projector)
    low = transpose(projector) @ g if g.shape[0] >= g.shape[1] else g @ projector
    return low, projector


def _sides(shape: Shape, dims: MuonDimensionNumbers) -> tuple[int, int]:
    batch, *axes = axes_of(dims, len(shape))
    if batch:
        raise ValueError(
            f"weight_dimension_numbers must name all axes of a leaf of shape {shape}: reduction_axis is "
            f"{dims.reduction_axis}, output_axis is {dims.output_axis}"
        )
    rows, columns = (math.prod(shape[axis] for axis in some) for some in axes)
    return rows, columns


def _low_shapes(shape: Shape, dims: MuonDimensionNumbers | None, rank: int) -> tuple[Shape, Shape]:
    """The shapes of the gradient in the low-rank space and of the projector, as optax has them."""
    if dims is None:
        return shape, (0, 0)
    rows, columns = _sides(shape, dims)
    rank = min(rank, rows, columns)
    return ((rank, columns), (rows, rank)) if rows >= columns else ((rows, rank), (columns, rank))


def _dims_of(spec: DimensionNumbers | None, tree: PyTree) -> PyTree:
    """The dimension numbers of each leaf; None for those that are not projected."""
    if spec is None or isinstance(spec, GaLoreDimensionNumbers):
        taken, dims = (lambda ndim: ndim == 2), GaLoreDimensionNumbers()
        if spec is not None:
            taken, dims = (lambda ndim: ndim >= 2), spec
        found = jax.tree.map(lambda leaf: dims if taken(jnp.ndim(leaf)) else None, tree)
        return spread_over(found, tree)
    return spread_over(spec, tree)


class _Plan(NamedTuple):
    """What the shapes of a tree's leaves decide: their dimension numbers, and the shapes of projected arrays."""

    dims: PyTree
    low: list[Shape]
    projectors: list[Shape]

    def map(self, function: Callable[..., tuple], names, trees, shapes, results) -> tuple[PyTree, ...]:
        """Map over whole leaves, equal ones as one batch."""
        return map_whole_leaves(function, names, trees, shapes, results, lambda _: self.dims, stack_equal=True)


def _plan(spec: DimensionNumbers | None, rank: int, tree: PyTree) -> _Plan:
    shapes = tree.layout.tree() if is_packed(tree) else tree
    leaves, treedef = jax.tree.flatten(shapes)
    dims = _dims_of(spec, shapes)
    pairs = [
        _low_shapes(jnp.shape(leaf), one, rank) for leaf, one in zip(leaves, treedef.flatten_up_to(dims), strict=True)
    ]
    return _Plan(dims, [low for low, _ in pairs], [projector for _, projector in pairs])


@comparable
def scale_by_galore(
    rank: int = 128,
    update_proj_gap: Scalar = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
) -> GradientTransformationExtraArgs:
    """Let a transformation see gradients of matrices in a low-rank space, see ``project_kernel``; others pass.

    Its state is that small too. Packed or not, all equal matrices are projected as one batch.

    Args:
      rank: largest rank, a Python int >= 1.
      update_proj_gap: steps from one projector to the next, >= 1.
      scale: factor of the updates of projected matrices.
      base_optimizer: a transformation that needs no parameters; None for ``scale_by_adam()``.
      weight_dimension_numbers: ``optax.contrib.GaLoreDimensionNumbers`` for every leaf of two axes or more, a tree of
        them, with None for leaves that are not projected, or a function from parameters to one; None for all leaves of
        two axes.

    Returns:
      A transformation with ``GaLoreState(count, base_optimizer_state, projector)``.

    Raises:
      TypeError: if ``rank`` is not an int.
      ValueError: if a number is out of its range; in ``init``, if dimension numbers do not name all axes of a leaf.

    >>> tx, g = scale_by_galore(rank=1), jnp.array([[3.0, 0.0], [0.0, 2.0]])
    >>> state = tx.init(g)
    >>> state.base_optimizer_state.mu.shape, jnp.abs(tx.update(g, state)[0]).round(3)
    ((1, 2), Array([[1., 0.],
           [0., 0.]], dtype=float32))
    """
    rank = check_count("rank", rank)
    check_number("update_proj_gap", update_proj_gap, low=1)
    check_number("scale", scale)
    base = with_extra_args_support(scale_by_adam() if base_optimizer is None else base_optimizer)
    spec = weight_dimension_numbers

    def init(params):
        plan = _plan(spec, rank, params)

        def starts(params):
            def on_leaf(dims, param):
                low, projector = _low_shapes(param.shape, dims, rank)
                return jnp.zeros(low, param.dtype), jnp.zeros(projector, compute_dtype(param.dtype))

            return plan.map(on_leaf, ["params"], [params], [None], [plan.low, plan.projectors])

        low, projectors = start_of(starts, params)
        return GaLoreState(jnp.zeros([], jnp.int32), base.init(low), projectors)

    def update(updates, state, params=None, **extra_args):
        del params  # they have other shapes than what the base sees
        plan = _plan(spec, rank, updates)
        refresh = is_multiple(state.count, update_proj_gap)

        def down(refresh, dims, g, projector):
            if dims is None:
                return g, projector
            wide = compute_dtype(g.dtype)
            matrix = _as_matrix(g, dims).astype(wide)
            low, new = project_kernel(matrix, projector.astype(wide), refresh)
            return low.astype(g.dtype), new.astype(projector.dtype)

        def back(factor, dims, g, low, projector):
            if dims is None:
                return (low,)
            wide = compute_dtype(low.dtype)
            rows, columns = _sides(g.shape, dims)
            low, projector = low.astype(wide), projector.astype(wide)
            matrix = projector @ low if rows >= columns else low @ transpose(projector)
            return ((as_hyperparam(factor, wide) * _from_matrix(matrix, g.shape, dims)).astype(g.dtype),)

        names = ("updates", "state.projector")
        shapes, results = [None, plan.projectors], [plan.low, plan.projectors]
        down = jax.tree_util.Partial(down, refresh)
        low, projectors = plan.map(down, names, (updates, state.projector), shapes, results)
        change, base_state = base.update(low, state.base_optimizer_state, None, **extra_args)
        names, trees = ("updates", "low-rank updates", "state.projector"), (updates, change, projectors)
        back = jax.tree_util.Partial(back, scale)
        (full,) = plan.map(back, names, trees, [None, plan.low, plan.projectors], [None])
        return full, GaLoreState(increment(state.count), base_state, projectors)

    return GradientTransformationExtraArgs(init, update)


def _as_matrix(x: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    _, rows, columns = axes_of(dims, x.ndim)
    return jnp.transpose(x, rows + columns).reshape(_sides(x.shape, dims))


def _from_matrix(x: jax.Array, shape: Shape, dims: MuonDimensionNumbers) -> jax.Array:
    _, rows, columns = axes_of(dims, len(shape))
    order = rows + columns
    moved = x.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, sorted(range(len(shape)), key=order.__getitem__))


@comparable
def galore(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: Scalar = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    weight_dimension_numbers: DimensionNumbers | None = None,
    *,
    master_dtype: DTypeLike | None = None,
) -> GradientTransformationExtraArgs:
    r"""GaLore, Adam in a low-rank space of each matrix (Zhao et al. 2024, arXiv:2403.03507).

    .. math:: w_t = w_{t-1} - \alpha (s P_t \operatorname{Adam}(R_t) + \lambda w_{t-1})

    with the :math:`P` and :math:`R` of ``project_kernel``. Leaves that are not projected are Adam's.

    Args:
      learning_rate: :math:`\alpha`, a number >= 0 or a schedule.
      rank: largest rank, a Python int >= 1.
      update_proj_gap: :math:`T`, steps from one projector to the next, >= 1.
      scale: :math:`s`.
      base_optimizer: in place of Adam, see ``scale_by_galore``.
      weight_decay: :math:`\lambda`, a number >= 0 or a schedule.
      mask: True where weights decay, see ``adamw``.
      weight_dimension_numbers: see ``scale_by_galore``.
      master_dtype: keep a copy of low-precision parameters in this dtype, see ``assemble``.

    Raises:
      TypeError: if ``rank`` is not an int.
      ValueError: if a hyper-parameter is out of its range.

    >>> tx, w = galore(0.1, rank=1), jnp.zeros((2, 3))
    >>> updates, state = tx.update(jnp.eye(2, 3), tx.init(w), w)
    >>> state[0].projector.shape, updates.shape
    ((3, 1), (2, 3))
    """
    check_hyperparams(weight_decay=weight_decay, schedules=("weight_decay",))
    return assemble(
        scale_by_galore(rank, update_proj_gap, scale, base_optimizer, weight_dimension_numbers),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        master_dtype=master_dtype,
    )


__all__ = ["galore", "next_projector", "project_kernel", "scale_by_galore"]
