"""The gradient of a step on a mesh: each device differentiates its part of the batch, then one sum over the devices."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nnlearn.gradients.batch import Outcome
from nnlearn.gradients.devices import AxisName
from nnlearn.packing import Packed, is_packed, pack_like, unpack
from nnlearn.packing.layout import Buffer, Layout, layout_of_parts
from nnlearn.packing.packed import whole
from nnlearn.types import Params, PyTree


def over_mesh(gradient: Callable[..., Outcome], mesh: Mesh, axis_name: AxisName) -> Callable[..., Outcome]:
    """Run a gradient that uses ``axis_name`` on whole arrays, in ``jax.shard_map`` over these axes of the mesh.

    Parameters are gathered before, once; their gradient is summed after the last microbatch, once for each buffer or
    leaf. Other axes of the mesh stay automatic.
    """
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    is_explicit = AxisType.Explicit in mesh.axis_types

    def spread(function, batch, *others):
        if is_explicit:
            others = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, NamedSharding(mesh, P())), others)
            batch = jax.sharding.reshard(batch, NamedSharding(mesh, P(axis_name)))
        specs = (P(axis_name), *(P() for _ in others))
        run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), axis_names=names, check_vma=False)
        return run(batch, *others)

    def run(stored, batch, key, model_state, scale, hparams) -> Outcome:
        def whole_outcome(batch, stored, *rest):
            # the norms of the parts and value_fn differ from device to device
            return gradient(stored, batch, *rest)._replace(part_squares=None, part_counts=None, value_fn=None)

        def value_on_part(batch, stored, *rest):
            return gradient(stored, batch, *rest).value_fn(stored)

        def value_fn(params):
            return spread(value_on_part, batch, _gathered(params), key, model_state, scale, hparams)

        outcome = spread(whole_outcome, batch, _gathered(stored), key, model_state, scale, hparams)
        return outcome._replace(grads=_returned(outcome.grads, stored), value_fn=value_fn)

    return run


def _gathered(stored: Params) -> Params:
    """Parameters without a placement of their own: whole buffers, or a tree if devices have parts of leaves."""
    if not is_packed(stored):
        return stored
    if any(leaf.splits for leaf in stored.layout.leaves):
        return unpack(stored)
    pairs = zip(stored.buffers, stored.layout.buffers, strict=True)
    return Packed([whole(array, buffer) for array, buffer in pairs], _unplaced(stored.layout))


def _unplaced(layout: Layout) -> Layout:
    buffers = tuple(Buffer(one.name, one.dtype, one.label, one.leaves, one.shape) for one in layout.buffers)
    return layout_of_parts(layout.treedef, layout.leaves, buffers)


def _returned(grads: PyTree, stored: Params) -> PyTree:
    """The gradient in the form of the parameters."""
    if not is_packed(stored):
        return grads
    return Packed(grads.buffers, stored.layout) if is_packed(grads) else pack_like(stored.layout, grads)


__all__ = ["over_mesh"]
