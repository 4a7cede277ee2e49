"""A batch of runs divided among devices: each device executes the same compiled program for its own part."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from nnlearn.types import PyTree


class DividedBatch:
    """A program of one device, compiled once and executed on several.

    A program for several devices rounds differently than that for one, because XLA fuses other operations. Here every
    device executes the program of one device, so its runs are equal to the bit.

    Args:
      program: a function from ``jax.jit`` of (values, keys).
      arguments: the shapes of one device's part.
      axis: 0 to divide the values, 1 to divide the keys; the parts of the results are joined along the same axis.
      devices: the devices.
    """

    def __init__(self, program: Any, arguments: PyTree, axis: int, devices: Sequence[Any]):
        self._axis, self._devices = axis, devices
        self._compiled = [_compile(program, arguments, devices[0])]
        if len(devices) > 1:
            self._compiled += _copies(self._compiled[0], lambda to: _compile(program, arguments, to), devices[1:])

    def memory_analysis(self) -> Any:
        """The memory of the program on one device."""
        return self._compiled[0].memory_analysis()

    def __call__(self, values: PyTree, keys: jax.Array) -> PyTree:
        count, divided = len(self._devices), (values, keys)[self._axis]

        def part(index: int) -> PyTree:
            own = jax.tree.map(lambda leaf: leaf.reshape(count, -1)[index], divided)
            arguments = (values, own) if self._axis else (own, keys)
            return self._compiled[index](*jax.device_put(arguments, self._devices[index]))

        if count == 1:
            return part(0)
        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(lambda index: jax.device_get(part(index)), range(count)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, self._axis), *parts)


def _compile(program: Any, arguments: PyTree, device: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    return program.lower(*placed).compile()


def _copies(compiled: Any, compile_on: Callable[[Any], Any], devices: Sequence[Any]) -> list[Any]:
    """The compiled program on other devices; compiled again where it cannot be copied."""
    try:
        return [_copy(compiled, device) for device in devices]
    except Exception:  # JAX has no public function for it: private ones may change, and not every backend can
        with ThreadPoolExecutor(len(devices)) as pool:
            return list(pool.map(compile_on, devices))


def _copy(compiled: Any, device: Any) -> Any:
    from jax._src import compiler
    from jax.experimental import serialize_executable

    assignment = np.array([[device.id]])
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1, device_assignment=assignment)

    class Reader(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid: Any) -> Any:
            if pid[0] == "device":
                return device
            if pid[0] == "exec":
                return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
            return super().persistent_load(pid)

    content, inputs, outputs = serialize_executable.serialize(compiled)
    executable, arguments, no_kwargs = Reader(io.BytesIO(content), device.client, [device]).load()
    return jax.stages.Compiled(executable.load(), [], inputs.unflatten(arguments), outputs, no_kwargs=no_kwargs)


__all__ = ["DividedBatch"]
