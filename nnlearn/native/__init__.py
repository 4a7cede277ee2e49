"""C kernels for programs that XLA compiles slowly or to slow code on CPUs; XLA's programs without a C compiler."""

from nnlearn.native.library import is_native as is_native
from nnlearn.native.library import native_kernels as native_kernels
from nnlearn.native.library import native_status as native_status
