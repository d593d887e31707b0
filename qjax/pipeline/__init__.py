"""One model over several devices: where its layers lie, and what that costs."""

from qjax.pipeline.devices import Device as Device
from qjax.pipeline.make import make_plan as make_plan
from qjax.pipeline.plan import Plan as Plan
from qjax.pipeline.plan import StagePlan as StagePlan
from qjax.pipeline.plan_file import read_plan as read_plan
from qjax.pipeline.plan_file import write_plan as write_plan
