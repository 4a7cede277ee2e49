"""Batches of any library as NumPy arrays, checked against the first one and copied side by side into one buffer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.data import MaskedBatch
from nnlearn.tree import path_name
from nnlearn.types import Batch, PyTree

RAGGED = ("error", "pad")
ALIGNMENT = 64  # bytes; an array that begins at a multiple of it is handed to a CPU device without being copied again
SMALL_BYTES = 1 << 20
ARRAYS = "arrays: NumPy's, JAX's, PyTorch tensors, or numbers"


class Stacker:
    """Copies batches into one buffer for each leaf, so that so many steps are one transfer and one call.

    A batch is copied when it is added: the caller may fill the same arrays again for the next one. Leaves that already
    lie on an accelerator stay there.

    Args:
      size: batches in a stack, or a function from the bytes of a batch to it.
      ragged: ``"error"`` refuses batches of other shapes than the first; ``"pad"`` fills smaller ones up.
      sharding: where a batch goes, or None for the default device.

    >>> stacker = Stacker(2)
    >>> stacker.add([1.0, 2.0], 1)
    >>> stacker.add([3.0, 4.0], 2)
    >>> stacker.take()
    [array([1., 3.], dtype=float32), array([2., 4.], dtype=float32)]
    """

    def __init__(self, size: Any, ragged: str = "error", sharding: jax.sharding.Sharding | None = None):
        if ragged not in RAGGED:
            raise ValueError(f"ragged must be 'error' or 'pad', got {ragged!r}")
        self.size = size
        self.pad = ragged == "pad"
        self.sharding = _of_stacks(sharding)
        self.structure: Any = None  # of the first batch, which all others must be like
        self.count = 0  # batches in the present stack

    def add(self, batch: Batch, step: int) -> None:
        """Copy the batch of a step into the stack.

        Raises:
          TypeError: a leaf is no array.
          ValueError: the batch is not like the first one.
        """
        leaves, structure = jax.tree.flatten(batch)
        if self.structure is None:
            self._begin(batch, step)
        elif structure != self.structure:
            raise ValueError(
                f"the batch of step {step} is {structure}, but the first one was {self.structure}: all batches of a "
                "stream must have one structure"
            )
        if not self.count:
            self._new_stack()
        length = self.length
        for at, leaf in enumerate(leaves):
            if type(leaf) is not np.ndarray:
                leaf = as_array(leaf, lambda at=at: f"{self.paths[at]!r} of the batch of step {step}")
            if leaf.shape != self.shapes[at] or leaf.dtype != self.dtypes[at]:
                leaf = self._fit_to_first(leaf, at, step)
            if self.pad:
                if at and len(leaf) != length:
                    raise ValueError(
                        f"leaf {self.paths[at]!r} of the batch of step {step} has {len(leaf)} examples, and "
                        f"{self.paths[0]!r} has {length}"
                    )
                length = len(leaf)
                if length < self.length:  # filled up with its own examples: for zeros a loss might be NaN
                    leaf = leaf[np.arange(self.length) % length]
            if self.on_device[at]:
                self.stack[at].append(leaf)
            else:
                self.stack[at][self.count] = leaf
        if self.pad:
            self.where[self.count] = np.arange(self.length) < length
        self.count += 1

    def take(self) -> PyTree:
        """The stack for the device, a batch whose leaves have a leading axis of ``size``; the next one begins.

        Of an incomplete stack the rest of the buffer is undefined.
        """
        missing = self.size - self.count
        leaves = [jnp.stack(leaf + leaf[-1:] * missing) if isinstance(leaf, list) else leaf for leaf in self.stack]
        stack = jax.tree.unflatten(self.structure, leaves)
        if self.pad:
            stack = MaskedBatch(stack, self.where)
        self.count = 0
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
        if self.sharding is None and size < SMALL_BYTES and jax.default_backend() == "cpu":
            return stack  # handed to the device by the call itself, which takes less time than a call for it
        return jax.device_put(stack, self.sharding)

    def _begin(self, batch: Batch, step: int) -> None:
        """Take the measure of the first batch."""
        if self.pad and isinstance(batch, MaskedBatch):
            raise ValueError("ragged='pad' makes a MaskedBatch of every batch; these are such already: leave it out")
        with_paths, self.structure = jax.tree.flatten_with_path(batch)
        self.paths = [path_name(path) for path, _ in with_paths]
        named = zip(self.paths, with_paths, strict=True)
        first = [as_array(leaf, lambda name=name: f"{name!r} of the batch of step {step}") for name, (_, leaf) in named]
        self.shapes, self.dtypes = [leaf.shape for leaf in first], [leaf.dtype for leaf in first]
        self.on_device = [isinstance(leaf, jax.Array) for leaf in first]
        self.stored = [_canonical(leaf.dtype) for leaf in first]
        self.length = 0
        if self.pad:
            self.length = _common_length(self.paths, self.shapes)
        if callable(self.size):
            self.size = self.size(sum(leaf.nbytes for leaf in first))

    def _new_stack(self) -> None:
        leaves = zip(self.shapes, self.stored, self.on_device, strict=True)
        self.stack = [[] if on_device else _aligned((self.size, *shape), dtype) for shape, dtype, on_device in leaves]
        if self.pad:
            self.where = np.empty((self.size, self.length), bool)

    def _fit_to_first(self, leaf: Any, at: int, step: int) -> Any:
        """A leaf that is unlike the first batch's in ways that do not matter, or an error."""
        shape, name = self.shapes[at], f"leaf {self.paths[at]!r} of the batch of step {step}"
        if self.on_device[at] != isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name} does not lie where the first batch's did: give all on the host, or all on the device"
            )
        if _canonical(leaf.dtype) != self.stored[at]:
            raise ValueError(
                f"{name} has dtype {leaf.dtype}, but the first batch had {self.dtypes[at]}: a program is compiled for "
                "one dtype; convert the batches to it"
            )
        if leaf.shape == shape or (self.pad and leaf.shape[1:] == shape[1:] and 0 < len(leaf) < self.length):
            return leaf
        cure = "a program is compiled for one shape"
        if leaf.ndim == len(shape) and leaf.shape[1:] == shape[1:]:
            cure = "drop the incomplete batch (drop_last, drop_remainder), or fill it up with ragged='pad'"
            if self.pad:
                cure = "ragged='pad' fills batches up to the first one's size: let the first be the largest, none empty"
        raise ValueError(f"{name} has shape {leaf.shape}, but the first batch had {shape}: {cure}")


def as_array(leaf: Any, name: Any) -> np.ndarray | jax.Array:
    """A leaf as an array on the host, not copied where that is possible; on an accelerator it stays where it is.

    Args:
      leaf: an array of any library, or a number.
      name: a function to what it is called, for the message.

    Raises:
      TypeError: it is no array of numbers.

    >>> as_array(2, lambda: "x")
    array(2)
    """
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        return np.asarray(leaf) if on_host else leaf
    if hasattr(leaf, "detach"):  # a PyTorch tensor
        leaf = _from_torch(leaf.detach())
        if isinstance(leaf, jax.Array):
            return leaf
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name()} is {type(leaf).__name__}, which is no array: give {ARRAYS}") from error
    if array.dtype.kind in "OUSMm":
        raise TypeError(f"{name()} holds {type(leaf).__name__} of dtype {array.dtype}: give {ARRAYS}")
    return array


def _from_torch(tensor: Any) -> Any:
    if tensor.device.type == "cpu":
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16, which torch knows and NumPy does not
            return np.asarray(jnp.from_dlpack(tensor))
    try:
        return jnp.from_dlpack(tensor)
    except Exception:  # an accelerator that this JAX cannot see
        return _from_torch(tensor.cpu())


def _canonical(dtype: Any) -> Any:
    """The dtype on the device: float64 is float32 unless x64 is on."""
    return dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _of_stacks(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """The sharding of stacked batches, whose axis of steps is not cut."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(None, *sharding.spec)
        return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _common_length(paths: list[str], shapes: list[tuple[int, ...]]) -> int:
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or lengths & {None, 0}:
        found = ", ".join(f"{path!r}: {shape}" for path, shape in zip(paths, shapes, strict=True))
        raise ValueError(f"ragged='pad' needs batches whose leaves share a leading axis of examples, got {found}")
    return lengths.pop()


__all__ = ["RAGGED", "Stacker", "as_array"]
