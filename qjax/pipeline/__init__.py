"""Where a model's layers live: stages on devices, and the executors that run them."""

from qjax.pipeline.executor import Executor as Executor
from qjax.pipeline.executor import Pipeline as Pipeline
from qjax.pipeline.executor import one_stage as one_stage
from qjax.pipeline.stage import Stage as Stage
from qjax.pipeline.stage import choose as choose
from qjax.pipeline.tensor_parallel import cut as cut
from qjax.pipeline.tensor_parallel import model_mesh as model_mesh
