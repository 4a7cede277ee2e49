"""A kernel in C as an operation of JAX: with shapes, ``vmap``, derivatives, and JAX's own operations behind it."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from nnlearn.native.library import CannotCompile, is_native, target_name

KERNEL = "native_kernel"  # as programs name the operation


class Kernel(Protocol):
    """What ``call_kernel`` calls. Hashable; two that are equal do the same.

    Attributes:
      source: in C, see ``library.target_name``.
      handler: the name of the C function that XLA calls.
      flags: what the compiler is told beside what it always is.
      in_place: pairs of the number of an argument and that of the result that may take its place.
      transposed: only of a kernel that is linear in all arguments: the kernel of its transpose.
    """

    source: str
    handler: str
    flags: tuple[str, ...]
    in_place: tuple[tuple[int, int], ...]

    def results(self, *arguments: Any) -> Sequence[Any]:
        """Shape and dtype of each result, from those of the arguments."""

    def reference(self, *values: jax.Array) -> Sequence[jax.Array]:
        """The results by JAX's own operations: on other devices, without a compiler, and for derivatives."""

    def vmapped(self, axes: Sequence[int | None], *values: jax.Array) -> tuple[Sequence[jax.Array], Sequence[int]]:
        """The results for arguments with a mapped axis, and where theirs are."""


def is_for_one_cpu(*values: jax.Array) -> bool:
    """Whether a program on these values, traced now, is for one CPU, and nothing is known of where they lie.

    Of a program for several devices XLA can divide only its own operations. On a mesh whose axes are manual or explicit
    results would need types that say which axes they vary over, even on one device.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(value).sharding.mesh for value in values)]
    automatic = all(axis_type == AxisType.Auto for mesh in meshes for axis_type in mesh.axis_types)
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and automatic


def runs_here(*values: jax.Array) -> bool:
    """Whether kernels run in a program on these values that is traced now."""
    return is_for_one_cpu(*values) and is_native()


def call_kernel(kernel: Kernel, *values: jax.Array) -> list[jax.Array]:
    """The results of a kernel; of its ``reference``, wherever it cannot run."""
    return _kernel_p.bind(*values, kernel=kernel)


def _run(*values, kernel: Kernel):
    with jax.disable_jit(False):  # which would come back here
        return _jitted(kernel)(*values)


@functools.lru_cache(maxsize=64)
def _jitted(kernel: Kernel):
    return jax.jit(functools.partial(call_kernel, kernel))


def _batch(values, axes, *, kernel: Kernel):
    return kernel.vmapped(axes, *values)


def _differentiate(primals, tangents, *, kernel: Kernel):
    if hasattr(kernel, "transposed"):
        return call_kernel(kernel, *primals), call_kernel(kernel, *map(ad.instantiate_zeros, tangents))
    return jax.jvp(kernel.reference, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangents, *arguments, kernel: Kernel):
    found = call_kernel(kernel.transposed, *map(ad.instantiate_zeros, cotangents))
    return [one if ad.is_undefined_primal(argument) else None for one, argument in zip(found, arguments, strict=True)]


def _lower(context, *operands, kernel: Kernel):
    return mlir.lower_fun(kernel.reference, multiple_results=True)(context, *operands)


def _lower_for_cpu(context, *operands, kernel: Kernel):
    if not is_native():  # lowered inside native_kernels(False)
        return _lower(context, *operands, kernel=kernel)
    try:
        target = target_name(kernel.handler, kernel.source, kernel.flags)
    except CannotCompile:
        return _lower(context, *operands, kernel=kernel)
    return jax.ffi.ffi_lowering(target, operand_output_aliases=dict(kernel.in_place))(context, *operands)


_kernel_p = Primitive(KERNEL)
_kernel_p.multiple_results = True
_kernel_p.def_impl(_run)
_kernel_p.def_abstract_eval(lambda *arguments, kernel: kernel.results(*arguments))
batching.primitive_batchers[_kernel_p] = _batch
ad.primitive_jvps[_kernel_p] = _differentiate
ad.primitive_transposes[_kernel_p] = _transpose
mlir.register_lowering(_kernel_p, _lower)
mlir.register_lowering(_kernel_p, _lower_for_cpu, platform="cpu")

__all__ = ["KERNEL", "Kernel", "call_kernel", "is_for_one_cpu", "runs_here"]
