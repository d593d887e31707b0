"""y = x @ dequantize(w).T without the floats, and the small operations around it."""

from qjax.kernels.layout import lay_out as lay_out
from qjax.kernels.nn import Angles as Angles
from qjax.kernels.nn import attend as attend
from qjax.kernels.nn import attention as attention
from qjax.kernels.nn import attention_mask as attention_mask
from qjax.kernels.nn import rms_norm as rms_norm
from qjax.kernels.nn import rope as rope
from qjax.kernels.nn import rope_angles as rope_angles
from qjax.kernels.nn import swiglu as swiglu
from qjax.kernels.qmatmul import KERNELS as KERNELS
from qjax.kernels.qmatmul import Activations as Activations
from qjax.kernels.qmatmul import default_activations as default_activations
from qjax.kernels.qmatmul import describe as describe
from qjax.kernels.qmatmul import explain as explain
from qjax.kernels.qmatmul import qmatmul as qmatmul
from qjax.kernels.qmatmul import qmatmuls as qmatmuls
from qjax.kernels.qmatmul import qtake as qtake
from qjax.kernels.qmatmul import select as select
from qjax.kernels.slots import Int8Slots as Int8Slots
from qjax.kernels.slots import empty_slots as empty_slots
from qjax.kernels.slots import stored_as as stored_as
