"""C kernels as operations of JAX, with shapes, ``vmap``, derivatives and a fallback by JAX's own operations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from nnlearn.native.library import CannotCompile, is_native, target_name

KERNEL = "native_kernel"  # name of the primitive in programs


class Kernel(Protocol):
    """A kernel for ``call_kernel``. It is hashable, and equal kernels compute the same.

    A kernel that is linear in all arguments may have an attribute ``transposed``, the kernel of its transpose.

    Attributes:
      source: C source, see ``library.target_name``.
      handler: the name of the C function that XLA calls.
      flags: compiler flags beside ``library.FLAGS``.
      in_place: pairs of the index of an argument and the index of the result that may take its memory.
    """

    @property
    def source(self) -> str: ...
    @property
    def handler(self) -> str: ...
    @property
    def flags(self) -> tuple[str, ...]: ...
    @property
    def in_place(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def results(self) -> Callable[..., Sequence[ShapedArray]]:
        """Function from the types of the arguments to the types of the results."""
        ...

    @property
    def reference(self) -> Callable[..., Sequence[jax.Array]]:
        """Compute the results by JAX's operations: on other devices, without a compiler, and for derivatives."""
        ...

    @property
    def vmapped(self) -> Callable[..., tuple[Sequence[jax.Array], Sequence[int]]]:
        """Function from ``(axes, *values)``, with mapped axes, to the results and their mapped axes."""
        ...


def is_for_one_cpu(*values: jax.Array) -> bool:
    """Whether the program traced now on these values is for one CPU, without manual or explicit mesh axes.

    In a program for several devices XLA can partition only its own operations. On a mesh with manual or explicit axes,
    results would need types that name the axes they vary over, even on one device.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(value).sharding.mesh for value in values)]
    automatic = all(axis_type == AxisType.Auto for mesh in meshes for axis_type in mesh.axis_types)
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and automatic


def runs_here(*values: jax.Array) -> bool:
    """Whether kernels run in the program traced now on these values."""
    return is_for_one_cpu(*values) and is_native()


def call_kernel(kernel: Kernel, *values: jax.Array) -> list[jax.Array]:
    """Call a kernel, or its ``reference`` where the kernel cannot run."""
    return _kernel_p.bind(*values, kernel=kernel)


def _evaluate(*values, kernel: Kernel):
    with jax.disable_jit(False):  # it would call this function again
        return _jitted(kernel)(*values)


@functools.lru_cache(maxsize=64)
def _jitted(kernel: Kernel):
    return jax.jit(functools.partial(call_kernel, kernel))


def _batch(values, axes, *, kernel: Kernel):
    return kernel.vmapped(axes, *values)


def _differentiate(primals, tangents, *, kernel: Kernel):
    if getattr(kernel, "transposed", None) is not None:
        return call_kernel(kernel, *primals), call_kernel(kernel, *map(ad.instantiate_zeros, tangents))
    return jax.jvp(kernel.reference, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangents, *arguments, kernel: Any):
    found = call_kernel(kernel.transposed, *map(ad.instantiate_zeros, cotangents))
    return [one if ad.is_undefined_primal(argument) else None for one, argument in zip(found, arguments, strict=True)]


def _lower(context, *operands, kernel: Kernel):
    return mlir.lower_fun(kernel.reference, multiple_results=True)(context, *operands)


def _lower_for_cpu(context, *operands, kernel: Kernel):
    if not is_native():  # the program is lowered inside native_kernels(False)
        return _lower(context, *operands, kernel=kernel)
    try:
        target = target_name(kernel.handler, kernel.source, kernel.flags)
    except CannotCompile:
        return _lower(context, *operands, kernel=kernel)
    return jax.ffi.ffi_lowering(target, operand_output_aliases=dict(kernel.in_place))(context, *operands)


_kernel_p = Primitive(KERNEL)
_kernel_p.multiple_results = True
_kernel_p.def_impl(_evaluate)
_kernel_p.def_abstract_eval(lambda *arguments, kernel: kernel.results(*arguments))
batching.primitive_batchers[_kernel_p] = _batch
ad.primitive_jvps[_kernel_p] = _differentiate
ad.primitive_transposes[_kernel_p] = _transpose
mlir.register_lowering(_kernel_p, _lower)
mlir.register_lowering(_kernel_p, _lower_for_cpu, platform="cpu")

__all__ = ["KERNEL", "Kernel", "call_kernel", "is_for_one_cpu", "runs_here"]
