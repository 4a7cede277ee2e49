"""Kernels in C where XLA's compiler for CPUs is slow and there is a C compiler; XLA's own programs otherwise."""

from nnlearn.native.library import is_native as is_native
from nnlearn.native.library import native_kernels as native_kernels
from nnlearn.native.library import native_status as native_status
