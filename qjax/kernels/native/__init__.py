"""C++ kernels for CPU, compiled on first use; see qmatmul.cc."""

from qjax.kernels.native.build import available as available
from qjax.kernels.native.matmul import matmul_native as matmul_native
from qjax.kernels.native.matmul import serves as serves
