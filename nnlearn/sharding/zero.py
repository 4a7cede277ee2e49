"""The optimizer's state sharded over the data axis, while the parameters are replicated (ZeRO-1)."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax import GradientTransformation, GradientTransformationExtraArgs, with_extra_args_support

from nnlearn.sharding.rules import Axes, Rules, checked_spec, names_of, shardings, spread
from nnlearn.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZeroState:
    """The state of ``zero``.

    Attributes:
      inner: the state of the transformation inside.
      axes: the mesh axes over which it is sharded; static.
    """

    inner: Any
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def zero(
    tx: GradientTransformation, mesh: Mesh, *, axis: Axes = "data", rules: Rules = None
) -> GradientTransformationExtraArgs:
    """Shard an optimizer's state and its arithmetic over the data axis (ZeRO-1).

    Each device updates its part of every parameter, and one gather distributes the updates. The trajectory is the same.

    Args:
      tx: an nnlearn or optax optimizer, or a part of one. Transformations that need the norm of the whole gradient
        work, too.
      mesh: the devices.
      axis: the mesh axis or axes of the batch.
      rules: the rules of the parameters, as given to ``init_state``; None if they are replicated.

    Returns:
      A transformation for ``init_state(..., mesh=mesh, rules=rules)`` and ``make_step``.

    Raises:
      ValueError: if the mesh has no such axis.

    Source: Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054.

    >>> import jax.numpy as jnp, nnlearn
    >>> from nnlearn.sharding import make_mesh
    >>> mesh = make_mesh("data=1")
    >>> tx = zero(nnlearn.adamw(0.1), mesh)
    >>> nnlearn.init_state({"w": jnp.ones(8)}, tx, mesh=mesh).opt_state.inner[0].mu["w"].sharding.spec
    P('data',)
    """
    axes, tx = names_of(axis), with_extra_args_support(tx)
    checked_spec((axes,), "the state", (mesh.size,), mesh)
    is_explicit = AxisType.Explicit in mesh.axis_types

    def lay(tree: PyTree, places: PyTree) -> PyTree:
        put = jax.sharding.reshard if is_explicit else jax.lax.with_sharding_constraint
        return jax.tree.map(put, tree, places)

    def places_of(params: PyTree) -> tuple[PyTree, PyTree]:
        whole = of_buffers(params, mesh)
        whole = shardings(params, mesh, rules) if whole is None else whole
        cut = jax.tree.map(
            lambda leaf, place: NamedSharding(mesh, spread(place.spec, np.shape(leaf), axes, mesh)), params, whole
        )
        return whole, cut

    def init(params: PyTree) -> Any:
        return ZeroState(tx.init(params), axes)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
        whole, cut = places_of(updates)
        params = params if params is None else lay(params, cut)
        updates, inner = tx.update(lay(updates, cut), state.inner, params, **extra)
        return lay(updates, whole), ZeroState(inner, axes)

    return GradientTransformationExtraArgs(init, update)


def of_buffers(tree: PyTree, mesh: Mesh) -> PyTree | None:
    """The shardings of the buffers of packed parameters; None for other trees."""
    layout = getattr(tree, "layout", None)
    if layout is None or not hasattr(layout, "buffers"):
        return None
    none = NamedSharding(mesh, PartitionSpec())
    found = [none if buffer.sharding is None else buffer.sharding for buffer in layout.buffers]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


__all__ = ["ZeroState", "of_buffers", "zero"]
