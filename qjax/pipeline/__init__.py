"""One model over several devices: where its layers lie, and what that costs."""

from qjax.pipeline.devices import Device as Device
from qjax.pipeline.plan import Plan as Plan
from qjax.pipeline.plan import StagePlan as StagePlan
