"""A stage: consecutive layers that one device, or one mesh of devices, computes as one program.

The first stage has the embedding, the last one the output matrix and the sampling: between stages only hidden states
travel, and from the last to the first only tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qjax.kernels import Activations, native
from qjax.models import KVCache, ModelConfig, init_cache
from qjax.models.forward import WHOLE, Params, run_part
from qjax.pipeline.tensor_parallel import MODEL, cache_shardings, local_config, parallel_programs

# sampler(logits [batch, vocab], seen [batch, vocab], keys [batch]) -> int32 [batch]; hashable.
Sampler = Any
# A jax.Device, a mesh of them, or None.
Where = Any


def platform_of(where: Where) -> str:
    """JAX's name of the kind of device: "cpu", "gpu", "tpu"."""
    if where is None:
        return jax.default_backend()
    return (where.devices.flat[0] if isinstance(where, Mesh) else where).platform


class Streamed(Sequence[Params]):
    """Packed layers in the host's memory that go to a device one by one, each while the one before computes."""

    def __init__(self, layers: Sequence[Params], device: Any) -> None:
        self.held, self.device = layers, device

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, i: Any) -> Any:
        return jax.device_put(self.held[i], self.device)

    def __iter__(self) -> Iterator[Params]:
        ahead = None
        for i in range(len(self)):
            now = self[i] if ahead is None else ahead
            # Under way before the program of this one is.
            ahead = self[i + 1] if i + 1 < len(self) else None
            yield now


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Params of consecutive layers where they live, and how they are run.

    Attributes:
      params: {"rope", "layers"}; of the first stage "token_embd"; of the last "output_norm", and "output" or
        "token_embd". Layers may be `Streamed`.
      config: of the whole model.
      where: a device, a mesh with the axis "model" that the layers are cut over, or None for wherever the params are.
      ends: whether this is the first stage, and whether it is the last.
    """

    params: Params = dataclasses.field(repr=False)
    config: ModelConfig
    where: Where = None
    ends: tuple[bool, bool] = (True, True)
    activations: Activations = "float"

    @property
    def layers(self) -> int:
        return len(self.params["layers"])

    @property
    def mesh(self) -> Mesh | None:
        return self.where if isinstance(self.where, Mesh) else None

    @property
    def platform(self) -> str:
        return platform_of(self.where)

    @property
    def nbytes(self) -> int:
        """Of the weights, on all devices of the stage together."""
        layers = self.params["layers"]
        held = layers.held if isinstance(layers, Streamed) else layers
        return sum(leaf.nbytes for leaf in jax.tree.leaves({**self.params, "layers": held}))

    def put(self, x: Any) -> Any:
        """x where the stage computes, on each device of a mesh."""
        if self.where is None:
            return x
        # Asked once a step: what lies there already is not worth a call of JAX.
        if isinstance(x, jax.Array) and not isinstance(self.where, Mesh) and x.devices() == {self.where}:
            return x
        return jax.device_put(x, NamedSharding(self.where, PartitionSpec()) if self.mesh else self.where)

    def init_cache(self, batch: int, slots: int, dtype: Any) -> KVCache:
        """An empty cache of this stage's layers."""
        mine = dataclasses.replace(self.config, layers=self.layers)
        if self.where is None:
            return init_cache(mine, batch, slots, dtype)
        if self.mesh is None:
            with jax.default_device(self.where):
                return jax.device_put(init_cache(mine, batch, slots, dtype), self.where)
        make = partial(init_cache, self._widened(mine), batch, slots, dtype)
        shardings = cache_shardings(jax.eval_shape(make), self.mesh)
        return jax.jit(make, out_shardings=shardings)()

    def _widened(self, config: ModelConfig) -> ModelConfig:
        """The config whose heads are those of all devices together: keys of a head may be held more than once."""
        assert self.mesh is not None
        parts = self.mesh.shape[MODEL]
        return dataclasses.replace(config, kv_heads=parts * local_config(config, parts).kv_heads)

    def run(
        self,
        x: Any,
        cache: KVCache | None,
        *,
        counts: Int[Array, " batch"] | None = None,
        logits_at: Int[Array, "batch n"] | None = None,
    ) -> tuple[Any, KVCache | None]:
        """`run_part` of this stage, one program a kind of layer; x may come from anywhere."""
        x, counts, logits_at = self.put((x, counts, logits_at))
        return _run(self.params, x, cache, counts, logits_at, **self._static())

    def step(self, x: Any, cache: KVCache) -> tuple[Any, KVCache]:
        """One token a row: the tokens [batch], or the hidden states of the stage before [batch, 1, hidden]."""
        run = _run_step if self._whole else _step
        return run(self.params, self.put(x), cache, **self._static())

    def last_step(
        self, x: Any, cache: KVCache, seen: Bool[Array, "batch vocab"], keys: Any, *, sampler: Sampler
    ) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any, KVCache]:
        """`step` of the last stage, down to the tokens that follow."""
        run = _run_last if self._whole else _last
        return run(self.params, self.put(x), cache, seen, keys, sampler=sampler, **self._static())

    @property
    def _whole(self) -> bool:
        """Whether a step is one program."""
        return compiles_fast(self.platform) and not isinstance(self.params["layers"], Streamed)

    def _static(self) -> dict[str, Any]:
        return {"config": self.config, "activations": self.activations, "ends": self.ends, "mesh": self.mesh}


@partial(jax.jit, donate_argnames="state")
def replace_row(state: Any, row: Any, other: Any) -> Any:
    """Arrays [rows, ...] with what another of one row has in place of one of theirs."""
    return jax.tree.map(lambda a, b: a.at[row].set(b[0]), state, other)


def compiles_fast(platform: str) -> bool:
    """Whether a step compiles fast as a whole: XLA:CPU's own loops over tiles, seven a layer, do not."""
    return platform != "cpu" or native.available()


def _run(
    params: Params,
    x: Any,
    cache: Any,
    counts: Any,
    logits_at: Any,
    *,
    config: ModelConfig,
    activations: Activations,
    ends: tuple[bool, bool],
    mesh: Mesh | None,
) -> Any:
    return run_part(
        params,
        config,
        x,
        cache,
        ends=ends,
        counts=counts,
        logits_at=logits_at,
        activations=activations,
        programs=WHOLE if mesh is None else parallel_programs(mesh),
    )


def _step(params: Params, x: Any, cache: KVCache, *, ends: tuple[bool, bool], **static: Any) -> Any:
    return _run(params, x[:, None] if ends[0] else x, cache, None, None, ends=ends, **static)


@partial(jax.jit, static_argnames="sampler")
def choose(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], keys: Any, *, sampler: Sampler
) -> tuple[Int[Array, " batch"], Bool[Array, "batch vocab"], Any]:
    """The next token of each row, the tokens seen with it, and the next keys [batch], one a row."""
    pairs = jax.vmap(jax.random.split)(keys)
    token = sampler(logits, seen, pairs[:, 0])
    rows = jnp.arange(token.shape[0], dtype=token.dtype)
    return token, seen.at[rows, token].set(True), pairs[:, 1]


def _last(params: Params, x: Any, cache: KVCache, seen: Any, keys: Any, *, sampler: Sampler, **static: Any) -> Any:
    logits, held = _step(params, x, cache, **static)
    return *choose(logits[:, 0], seen, keys, sampler=sampler), held


_STATIC = ("config", "activations", "ends", "mesh")
# All of a step as one program: nothing of Python runs between its layers, on a machine whose cores are all busy.
_run_step = jax.jit(_step, static_argnames=_STATIC, donate_argnames=("cache",))
_run_last = jax.jit(_last, static_argnames=(*_STATIC, "sampler"), donate_argnames=("cache", "seen"))
