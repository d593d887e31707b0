"""One model over several devices: where its layers lie, what that costs, and the executors that run it there."""

from qjax.pipeline.devices import Device as Device
from qjax.pipeline.executor import Executor as Executor
from qjax.pipeline.executor import Pipeline as Pipeline
from qjax.pipeline.executor import one_stage as one_stage
from qjax.pipeline.make import check_plan as check_plan
from qjax.pipeline.make import make_plan as make_plan
from qjax.pipeline.placing import Placing as Placing
from qjax.pipeline.plan import Plan as Plan
from qjax.pipeline.plan import StagePlan as StagePlan
from qjax.pipeline.plan_file import read_plan as read_plan
from qjax.pipeline.plan_file import write_plan as write_plan
from qjax.pipeline.stage import Stage as Stage
from qjax.pipeline.stage import choose as choose
