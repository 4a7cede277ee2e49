"""Kernels in C for what XLA's compiler for CPUs leaves lying, where there is a C compiler; XLA's own otherwise."""

from nnlearn.native.library import is_native as is_native
from nnlearn.native.library import native_status as native_status
