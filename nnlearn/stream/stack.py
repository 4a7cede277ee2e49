"""Batches of any library as NumPy arrays, checked against the first batch and stacked in one buffer per leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnlearn.data import MaskedBatch
from nnlearn.sharding.place import check_batch
from nnlearn.tree import path_name
from nnlearn.types import Batch, PyTree

RAGGED = ("error", "pad")
ALIGNMENT = 64  # bytes; a CPU device uses an array at a multiple of it without another copy
SMALL_BYTES = 1 << 20  # smaller stacks are passed to a CPU as NumPy arrays
ARRAYS = "arrays: NumPy's, JAX's, PyTorch tensors, or numbers"


class Stacker:
    """Copies batches into one buffer per leaf, so that several steps need one transfer and one call.

    A batch is copied when it is added: the caller may reuse its arrays for the next one. Leaves on an accelerator stay
    there.

    Args:
      size: number of batches in a stack, or a function from the bytes of a batch to it.
      ragged: ``"error"`` refuses batches of other shapes than the first; ``"pad"`` pads smaller ones.
      sharding: the sharding of a batch, or None for the default device.

    Attributes:
      size: number of batches in a stack; 0 before the first batch.
      count: number of batches in the present stack.

    >>> stacker = Stacker(2)
    >>> stacker.add([1.0, 2.0], 1)
    >>> stacker.add([3.0, 4.0], 2)
    >>> stacker.take()
    [array([1., 3.], dtype=float32), array([2., 4.], dtype=float32)]
    """

    def __init__(
        self,
        size: int | Callable[[int], int],
        ragged: str = "error",
        sharding: jax.sharding.Sharding | None = None,
    ):
        if ragged not in RAGGED:
            raise ValueError(f"ragged must be 'error' or 'pad', got {ragged!r}")
        self._choose_size = size if callable(size) else lambda _: size
        self.size = 0
        self.pad = ragged == "pad"
        self.sharding = _of_stacks(sharding)
        self.structure: Any = None  # of the first batch; all others must have the same
        self.count = 0

    def add(self, batch: Batch, step: int) -> None:
        """Copy the batch of a step into the stack.

        Raises:
          TypeError: if a leaf is not an array.
          ValueError: if the batch has another structure, shape or dtype than the first.
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
                if length < self.length:  # pad with its own examples: zeros might make the loss NaN
                    leaf = leaf[np.arange(self.length) % length]
            if self.on_device[at]:
                self.stack[at].append(leaf)
            else:
                self.stack[at][self.count] = leaf
        if self.pad:
            self.where[self.count] = np.arange(self.length) < length
        self.count += 1

    def take(self) -> PyTree:
        """The present stack, a batch whose leaves have a leading axis of ``size``; then begin a new stack.

        The rest of an incomplete stack is undefined.
        """
        missing = self.size - self.count
        leaves = [jnp.stack(leaf + leaf[-1:] * missing) if isinstance(leaf, list) else leaf for leaf in self.stack]
        stack = jax.tree.unflatten(self.structure, leaves)
        if self.pad:
            stack = MaskedBatch(stack, self.where)
        self.count = 0
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
        if self.sharding is None and size < SMALL_BYTES and jax.default_backend() == "cpu":
            return stack  # the call of the program transfers it faster than device_put does
        if self.sharding is not None and not self.sharding.is_fully_addressable:  # these are the rows of this process
            return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.sharding, leaf), stack)
        return jax.device_put(stack, self.sharding)

    def _begin(self, batch: Batch, step: int) -> None:
        """Store the structure, shapes and dtypes of the first batch."""
        if self.pad and isinstance(batch, MaskedBatch):
            raise ValueError(
                "ragged='pad' makes a MaskedBatch of every batch, but these are MaskedBatch already: leave ragged out"
            )
        with_paths, self.structure = jax.tree.flatten_with_path(batch)
        self.paths = [path_name(path) for path, _ in with_paths]
        named = zip(self.paths, with_paths, strict=True)
        first = [as_array(leaf, lambda name=name: f"{name!r} of the batch of step {step}") for name, (_, leaf) in named]
        self.shapes, self.dtypes = [leaf.shape for leaf in first], [leaf.dtype for leaf in first]
        self.on_device = [isinstance(leaf, jax.Array) for leaf in first]
        self.stored = [_canonical(leaf.dtype) for leaf in first]
        if isinstance(self.sharding, jax.sharding.NamedSharding) and len(self.sharding.spec) > 1:
            check_batch(batch, self.sharding.mesh, self.sharding.spec[1])
        self.length = 0
        if self.pad:
            self.length = _common_length(self.paths, self.shapes)
        self.size = self._choose_size(sum(leaf.nbytes for leaf in first))

    def _new_stack(self) -> None:
        leaves = zip(self.shapes, self.stored, self.on_device, strict=True)
        self.stack: list[Any] = [
            [] if on_device else _aligned((self.size, *shape), dtype) for shape, dtype, on_device in leaves
        ]
        if self.pad:
            self.where = np.empty((self.size, self.length), bool)

    def _fit_to_first(self, leaf: Any, at: int, step: int) -> Any:
        """The leaf, if it differs from the first batch's in harmless ways only; otherwise an error."""
        shape, name = self.shapes[at], f"leaf {self.paths[at]!r} of the batch of step {step}"
        if self.on_device[at] != isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name} is on the {'host' if self.on_device[at] else 'device'}, and the first batch was not: put all "
                "batches on the host, or all on the device"
            )
        if _canonical(leaf.dtype) != self.stored[at]:
            raise ValueError(
                f"{name} has dtype {leaf.dtype}, but the first batch had {self.dtypes[at]}: convert "
                "all batches to one dtype, because the program is compiled for it"
            )
        if leaf.shape == shape or (self.pad and leaf.shape[1:] == shape[1:] and 0 < len(leaf) < self.length):
            return leaf
        cure = "give all batches one shape, because the program is compiled for it"
        if leaf.ndim == len(shape) and leaf.shape[1:] == shape[1:]:
            cure = "drop the incomplete batch (drop_last, drop_remainder), or pad it with ragged='pad'"
            if self.pad:
                cure = "ragged='pad' pads batches to the size of the first: let the first be the largest, none empty"
        raise ValueError(f"{name} has shape {leaf.shape}, but the first batch had {shape}: {cure}")


def as_array(leaf: Any, name: Callable[[], str]) -> np.ndarray | jax.Array:
    """A leaf as an array on the host, without a copy if possible; a leaf on an accelerator stays there.

    Args:
      leaf: an array of any library, or a number.
      name: returns the name of the leaf for the message.

    Raises:
      TypeError: if the leaf is not an array of numbers.

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
        raise TypeError(f"{name()} is {type(leaf).__name__}, not an array: give {ARRAYS}") from error
    if array.dtype.kind in "OUSMm":
        raise TypeError(f"{name()} holds {type(leaf).__name__} of dtype {array.dtype}: give {ARRAYS}")
    return array


def _from_torch(tensor: Any) -> Any:
    """A PyTorch tensor as a NumPy or JAX array, on the same device if this JAX has it."""
    if tensor.device.type == "cpu":
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16, which NumPy does not have
            return np.asarray(jnp.from_dlpack(tensor))
    try:
        return jnp.from_dlpack(tensor)
    except Exception:  # an accelerator that this JAX does not see
        return _from_torch(tensor.cpu())


def _canonical(dtype: Any) -> Any:
    """The dtype on the device: float32 for float64, unless x64 is on."""
    return dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array at a multiple of ``ALIGNMENT`` bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _of_stacks(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """The sharding of stacked batches, whose leading axis of steps is not sharded."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(None, *sharding.spec)
        return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _common_length(paths: list[str], shapes: list[tuple[int, ...]]) -> int:
    """The number of examples of a batch, from the leading axes of its leaves."""
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        found = ", ".join(f"{path!r}: {shape}" for path, shape in zip(paths, shapes, strict=True))
        raise ValueError(f"ragged='pad' needs batches whose leaves share a leading axis of examples, got {found}")
    return lengths.pop()


__all__ = ["RAGGED", "Stacker", "as_array"]
