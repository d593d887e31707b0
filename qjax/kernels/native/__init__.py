"""C++ kernels for CPU, built when qjax is installed; see src/core.h."""

from qjax.kernels.native.attention import attention_native as attention_native
from qjax.kernels.native.attention import serves_attention as serves_attention
from qjax.kernels.native.elementwise import rms_norm_native as rms_norm_native
from qjax.kernels.native.elementwise import rope_native as rope_native
from qjax.kernels.native.elementwise import serves_elementwise as serves_elementwise
from qjax.kernels.native.elementwise import swiglu_native as swiglu_native
from qjax.kernels.native.library import available as available
from qjax.kernels.native.library import isa as isa
from qjax.kernels.native.matmul import knows as knows
from qjax.kernels.native.matmul import lanes_of as lanes_of
from qjax.kernels.native.matmul import matmul_native as matmul_native
from qjax.kernels.native.matmul import matmuls_native as matmuls_native
from qjax.kernels.native.matmul import serves as serves
from qjax.kernels.native.matmul import sums_tokens as sums_tokens
from qjax.kernels.native.memory import empty as empty
from qjax.kernels.native.memory import return_when_freed as return_when_freed
from qjax.kernels.native.repack import repack as repack
