"""A plan carried out: each tensor goes from the file to its device, packed, and the stages are put together."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from qjax.errors import QjaxError
from qjax.kernels import Activations, default_activations
from qjax.kernels.layout import lay_out
from qjax.models import ModelConfig
from qjax.models.forward import Params
from qjax.models.load import TOP
from qjax.pipeline.executor import Executor, Pipeline
from qjax.pipeline.local import named_devices
from qjax.pipeline.plan import Plan, StagePlan
from qjax.pipeline.processes import ProcessPipeline
from qjax.pipeline.stage import Stage, Streamed, Where, platform_of
from qjax.pipeline.tensor_parallel import cut, local_config, model_mesh


def local_device(name: str) -> Any:
    """JAX's device of a name such as "cuda:0".

    Raises:
      QjaxError: this process has none of that name; lists those that it has.
    """
    kind, _, index = name.partition(":")
    try:
        return jax.local_devices(backend=kind)[int(index or 0)]
    except (RuntimeError, IndexError):
        raise QjaxError(f"there is no device {name} here; there are {', '.join(named_devices())}") from None


@dataclasses.dataclass(eq=False)
class Placing:
    """`wanted`, `lay_out` and `place` for loading a model by a plan, and the executor of what was loaded.

    Of a matrix that both ends share and that do not lie together, the last stage gets a copy of its own. Where JAX runs
    in several processes each has the stage of its number, whose devices are named as this process sees them.
    """

    plan: Plan
    config: ModelConfig
    tied: bool

    def __post_init__(self) -> None:
        if self.plan.layers != self.config.layers:
            raise QjaxError(f"the plan places {self.plan.layers} layers, the model has {self.config.layers}")
        self._copy: Any = None
        self._processes = jax.process_count()
        if self._processes > 1 and len(self.plan.stages) != self._processes:
            raise QjaxError(
                f"the plan has {len(self.plan.stages)} stages for {self._processes} processes: give each one"
            )
        for where in self.where:
            if isinstance(where, Mesh):
                # Whether the heads can be shared out is said before anything is loaded.
                local_config(self.config, where.size)

    @functools.cached_property
    def where(self) -> tuple[Where, ...]:
        """Device or mesh of each stage."""
        return tuple(self._where(k, stage) for k, stage in enumerate(self.plan.stages))

    def _where(self, k: int, stage: StagePlan) -> Where:
        if not self._mine(k):
            return None
        devices = [local_device(name) for name in stage.devices]
        return devices[0] if len(devices) == 1 else model_mesh(devices)

    def _mine(self, k: int) -> bool:
        return self._processes == 1 or k == jax.process_index()

    def _stage(self, name: str) -> int:
        """The stage that a tensor of the file belongs to."""
        if name.startswith("blk."):
            i = int(name.split(".")[1])
            return next(k for k, stage in enumerate(self.plan.stages) if i in stage.layers)
        return len(self.where) - 1 if name.startswith("output") else 0

    def _ends(self, name: str) -> list[int]:
        """The stages that need a tensor."""
        shared = name == "token_embd.weight" and self.tied and len(self.where) > 1
        return [0, len(self.where) - 1] if shared else [self._stage(name)]

    def wanted(self, name: str) -> bool:
        """Whether this process needs a tensor of the file."""
        return any(map(self._mine, self._ends(name)))

    def lay_out(self, name: str, array: Any) -> Any:
        """The layout for the kernels of the device that multiplies with the array; of a mesh, its parts get theirs."""
        where = self.where[self._ends(name)[-1]]
        return array if isinstance(where, Mesh) else lay_out(name, array, platform_of(where))

    def place(self, name: str, array: Any) -> Any:
        """The array on its device, or cut over its mesh."""
        if name == "rope":
            return array
        if name.startswith("blk.") and self.plan.stages[self._stage(name)].streamed:
            return jax.device_put(array, local_device("cpu"))
        first, *last = self._ends(name)
        if last and self.where[last[0]] is not self.where[first] and self._mine(last[0]):
            self._copy = self._on(self.where[last[0]], name, array)
        return self._on(self.where[first], name, array) if self._mine(first) else None

    def _on(self, where: Where, name: str, array: Any) -> Any:
        if not isinstance(where, Mesh):
            return jax.device_put(array, where)
        key = TOP.get(name) or _key(name)
        part_layout = lambda name, part: lay_out(name, part, platform_of(where))
        return cut(key, array, where, self.config, part_layout)

    def executor(self, params: Params, activations: Activations | None = None) -> Executor:
        """The executor of params that were loaded by this, for no more context than the plan has room for.

        `activations` None for the plan's, or each device's default.
        """
        stages, last = [], len(self.where) - 1
        config = dataclasses.replace(self.config, context=min(self.config.context, self.plan.context))
        groups = self.plan.microbatches if self.plan.microbatches > 1 else None
        for k, (planned, where) in enumerate(zip(self.plan.stages, self.where, strict=True)):
            if not self._mine(k):
                continue
            layers = [params["layers"][i] for i in planned.layers]
            mine: Params = {"layers": Streamed(layers, where) if planned.streamed else layers}
            mine["rope"] = self._on(where, "rope", params["rope"])
            if k == 0:
                mine["token_embd"] = params["token_embd"]
            if k == last:
                mine["output_norm"] = params["output_norm"]
                if "output" in params:
                    mine["output"] = params["output"]
                else:
                    mine["token_embd"] = params["token_embd"] if self._copy is None else self._copy
            chosen = activations or self.plan.activations or default_activations(platform_of(where))
            stages.append(Stage(mine, config, where, (k == 0, k == last), chosen))
        if self._processes > 1:
            return ProcessPipeline(stages[0], jax.process_index(), self._processes, groups)
        return Pipeline(tuple(stages), groups)


def _key(name: str) -> str:
    """What `params` calls a tensor of a layer: "attn_q", "attn_q_bias"."""
    parts = name.split(".")
    if len(parts) != 4:
        return name
    return parts[2] + ("_bias" if parts[3] == "bias" else "")
