"""Steps under ``jax.pmap``, for programs that use it. ``make_step`` on a mesh does the same with less memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.tree import path_name
from nnlearn.types import Batch, PyTree


def pmap_step(step: Callable[..., Any], axis_name: str = "data", *, devices: Sequence[Any] | None = None) -> Any:
    """Compile a step with ``jax.pmap`` and donate its state; the trajectory is that of one device.

    Args:
      step: from ``make_step(..., axis_name=axis_name)``.
      axis_name: the name of the mapped axis.
      devices: the devices; None for those of this process.

    Returns:
      ``step(state, batch) -> (state, info)`` for a state from ``replicate`` and a batch from ``split_over_devices``.
      All arrays have a leading axis of devices; the entries of ``info`` are equal.

    >>> import nnlearn
    >>> tx = nnlearn.sgd(0.5)
    >>> loss_fn = lambda params, batch, key: jnp.mean((params - batch) ** 2)
    >>> step = pmap_step(nnlearn.make_step(loss_fn, tx, axis_name="data"))
    >>> state = replicate(nnlearn.init_state(jnp.zeros(()), tx))
    >>> state, info = step(state, split_over_devices(jnp.ones(4)))
    >>> unreplicate(state).params
    Array(1., dtype=float32)
    """
    return jax.pmap(step, axis_name, donate_argnums=0, devices=devices)


def replicate(tree: PyTree, devices: int | None = None) -> PyTree:
    """Copy a tree for each device: each array gets a leading axis.

    Args:
      tree: arrays.
      devices: the number of devices; None for those of this process.

    Returns:
      The tree with arrays of shape (devices, ...).

    >>> replicate(jnp.ones(2), 3).shape
    (3, 2)
    """
    count = jax.local_device_count() if devices is None else devices
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy of a replicated tree.

    >>> unreplicate(replicate(jnp.ones(2), 3)).shape
    (2,)
    """
    return jax.tree.map(lambda leaf: leaf[0], tree)


def split_over_devices(batch: Batch, devices: int | None = None) -> Batch:
    """Split a batch into equal parts, one for each device.

    Args:
      batch: arrays of shape (examples, ...).
      devices: the number of devices; None for those of this process.

    Returns:
      Arrays of shape (devices, examples / devices, ...).

    Raises:
      ValueError: if the number of examples is no multiple of the number of devices.

    >>> split_over_devices(np.arange(6), 3).shape
    (3, 2)
    """
    count = jax.local_device_count() if devices is None else devices

    def cut(path, leaf):
        shape = np.shape(leaf)
        if not shape or shape[0] % count:
            raise ValueError(
                f"batch leaf {path_name(path)!r} of shape {shape} cannot be split over {count} devices: make its first "
                "axis a multiple of that"
            )
        return leaf.reshape(count, shape[0] // count, *shape[1:])

    return jax.tree.map_with_path(cut, batch)


__all__ = ["pmap_step", "replicate", "split_over_devices", "unreplicate"]
