"""Layers cut over the devices of a mesh: each computes some of the heads and some of the ffn's units.

    x --> attn_q, attn_k, attn_v (rows) --> heads --> attn_output (columns) --> sum over devices --> + x
      --> ffn_gate, ffn_up (rows)       --> units --> ffn_down (columns)    --> sum over devices --> + x

as Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053). What is cut is said by the names of axes, not weight by
weight: see AXES and RULES. Each device holds packed arrays of its own, in the layout that its kernels want; columns can
be cut on the borders of groups only, and a weight that they do not allow that for is cut by rows, with its input and
its output gathered.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.arrays import QuantizedArray, TransformedArray
from qjax.arrays.partition import why_whole
from qjax.errors import QjaxError
from qjax.kernels import Activations, qmatmul, qmatmuls, qtake
from qjax.models import ModelConfig
from qjax.models.forward import Params, Programs, before_head, layer_body, with_biases

MODEL = "model"
# The logical axes of each weight: of its rows, and of its columns.
AXES = {
    "attn_q": ("heads", "hidden"),
    "attn_k": ("kv_heads", "hidden"),
    "attn_v": ("kv_heads", "hidden"),
    "attn_output": ("hidden", "heads"),
    "ffn_gate": ("ffn", "hidden"),
    "ffn_up": ("ffn", "hidden"),
    "ffn_down": ("hidden", "ffn"),
    "output": ("vocab", "hidden"),
    "token_embd": ("vocab", "hidden"),
}
# Logical axis -> axis of the mesh.
RULES: dict[str, str | None] = {"heads": MODEL, "kv_heads": MODEL, "ffn": MODEL, "vocab": MODEL, "hidden": None}

# rows: each device makes some of the outputs; columns: a summand of all outputs, of its inputs; gathered: some of the
# outputs, of all inputs, and all get them.
Kind = Literal["rows", "columns", "gathered"]
ALL, EACH = PartitionSpec(), PartitionSpec(MODEL)
CACHE = PartitionSpec(None, MODEL)


@struct.dataclass
class Parts:
    """A weight (or bias) in parts: leaves [parts, ...] of which each device has its own. Static: kind."""

    weight: Any
    kind: Kind = struct.field(pytree_node=False)


def local_config(config: ModelConfig, parts: int) -> ModelConfig:
    """The config of what one of `parts` devices computes.

    Raises:
      QjaxError: heads or ffn units that cannot be shared out evenly.
    """
    if config.heads % parts or config.ffn % parts or (config.kv_heads % parts and parts % config.kv_heads):
        raise QjaxError(
            f"{config.heads} heads, {config.kv_heads} key heads and {config.ffn} ffn units cannot be shared out among "
            f"{parts} devices: use a mesh of another number"
        )
    return dataclasses.replace(
        config, heads=config.heads // parts, kv_heads=max(config.kv_heads // parts, 1), ffn=config.ffn // parts
    )


def _share(name: str, size: int, config: ModelConfig, part: int, parts: int) -> slice:
    """The rows or columns that a device has; rows of keys and values of one head may be with several."""
    if name in ("attn_k", "attn_v"):
        each = local_config(config, parts).kv_heads * config.head_dim
        first = part * config.kv_heads // parts * config.head_dim
        return slice(first, first + each)
    return slice(part * size // parts, (part + 1) * size // parts)


def _kind(name: str, array: Any, config: ModelConfig, parts: int) -> Kind | None:
    """How a weight is cut, None for not at all."""
    rows, columns = (RULES[axis] for axis in AXES[name])
    if rows is not None:
        return "rows" if AXES[name][0] != "vocab" or array.shape[0] % parts == 0 else None
    if columns is None:
        return None
    # What changes x (an order, a scale, a rounding of whole tokens) sees all of it.
    if not isinstance(array, TransformedArray) and why_whole(array, parts, MODEL) is None:
        return "columns"
    return "gathered" if array.shape[0] % parts == 0 else None


def _part(array: Any, kind: Kind, which: slice) -> Any:
    if isinstance(array, TransformedArray):
        return array.replace(inner=_part(array.inner, kind, which))  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "columns":
        columns = array.shape[1]
        cut = lambda leaf: leaf[:, which.start * leaf.shape[1] // columns : which.stop * leaf.shape[1] // columns]
    else:
        cut = lambda leaf: leaf[which]
    return jax.tree.map(cut, array)


def cut(
    name: str, array: Any, mesh: Mesh, config: ModelConfig, lay_out: Callable[[str, Any], Any] = lambda _, a: a
) -> Any:
    """A weight, bias or norm of a layer (or of an end) on a mesh: `Parts`, or whole on each device.

    Args:
      name: what `params` calls it: "attn_q", "attn_q_bias", "output".
      array: with its rows side by side, on the host.
      lay_out: `lay_out(name, part)` gives a part of a matrix the layout that kernels want.

    Raises:
      QjaxError: see `local_config`.
    """
    devices, parts = list(mesh.devices.flat), mesh.shape[MODEL]
    local_config(config, parts)
    plain = array.plain() if isinstance(array, QuantizedArray) else array
    weight = name.removesuffix("_bias")
    kind = _kind(weight, plain, config, parts) if weight in AXES and plain.ndim == 2 else None
    if weight in AXES and plain.ndim == 1 and RULES[AXES[weight][0]] is not None:
        kind = "rows"
    if kind is None:
        whole = lay_out(name, plain) if weight in AXES and plain.ndim == 2 else plain
        return jax.device_put(whole, NamedSharding(mesh, ALL))
    made, size = [], plain.shape[1] if kind == "columns" else plain.shape[0]
    for i, device in enumerate(devices):
        mine = _part(plain, kind, _share(weight, size, config, i, parts))
        mine = lay_out(name, mine) if plain.ndim == 2 else mine
        made.append(jax.device_put(jax.tree.map(lambda leaf: leaf[None], mine), device))
    join = lambda *leaves: jax.make_array_from_single_device_arrays(
        (parts, *leaves[0].shape[1:]), NamedSharding(mesh, EACH), list(leaves)
    )
    return Parts(jax.tree.map(join, *made), kind)


def _specs(tree: Any) -> Any:
    """In-specs of params: parts are each device's, all else is everyone's."""
    is_parts = lambda node: isinstance(node, Parts)
    return jax.tree.map(lambda node: EACH if is_parts(node) else ALL, tree, is_leaf=is_parts)


def _mine(weight: Any) -> tuple[Any, Kind | None]:
    """Within shard_map: this device's part, and how it was cut."""
    return (
        (jax.tree.map(lambda leaf: leaf[0], weight.weight), weight.kind)
        if isinstance(weight, Parts)
        else (weight, None)
    )


def _products(p: Params, activations: Activations, x: Any, *names: str) -> list[Any]:
    """Products of one device's x, or of its part of x, with its parts of the weights of these names."""
    split = RULES[AXES[names[0]][1]] is not None
    kind = _mine(p[names[0]])[1]
    if split and kind != "columns":
        x = lax.all_gather(x, MODEL, axis=-1, tiled=True)
    mine = {name: _mine(p[name])[0] for name in (*names, *(f"{name}_bias" for name in names)) if name in p}
    found = qmatmuls(x, [mine[name] for name in names], activations=activations)
    # Of a sum or a gathered whole each output has its bias once.
    if kind == "columns":
        found = [lax.psum(y, MODEL) for y in found]
    elif kind == "gathered":
        found = [lax.all_gather(y, MODEL, axis=-1, tiled=True) for y in found]
    return with_biases(found, mine, names)


@partial(jax.jit, static_argnames=("config", "activations", "mesh"), donate_argnames=("cache",))
def _layer(
    p: Params,
    x: Any,
    angles: Any,
    positions: Any,
    cache: Any,
    *,
    config: ModelConfig,
    activations: Activations,
    mesh: Mesh,
) -> tuple[Any, Any]:
    mine = local_config(config, mesh.shape[MODEL])

    def local(p: Params, x: Any, angles: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
        norms = {name: _mine(array)[0] for name, array in p.items() if name.endswith("_norm")}
        return layer_body(norms, x, angles, positions, cache, config=mine, products=partial(_products, p, activations))

    specs = (_specs(p), ALL, ALL, ALL, CACHE)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(ALL, CACHE), check_vma=False)
    return run(p, x, angles, positions, cache)


@partial(jax.jit, static_argnames="mesh")
def _embed(params: Params, tokens: Any, *, mesh: Mesh) -> Any:
    def local(params: Params, tokens: Any) -> Any:
        table, kind = _mine(params["token_embd"])
        if kind is None:
            return qtake(table, tokens)
        ids = tokens - lax.axis_index(MODEL) * table.shape[0]
        held = (ids >= 0) & (ids < table.shape[0])
        return lax.psum(jnp.where(held[..., None], qtake(table, jnp.where(held, ids, 0)), 0), MODEL)

    run = jax.shard_map(local, mesh=mesh, in_specs=(_specs(params), ALL), out_specs=ALL, check_vma=False)
    return run(params, tokens)


@partial(jax.jit, static_argnames=("config", "activations", "mesh"))
def _head(params: Params, x: Any, at: Any, *, config: ModelConfig, activations: Activations, mesh: Mesh) -> Any:
    def local(params: Params, x: Any, at: Any) -> Any:
        x = before_head(params, x, at, config=config)
        weight, kind = _mine(params["output"] if "output" in params else params["token_embd"])
        y = qmatmul(x, weight, activations=activations)
        return y if kind is None else lax.all_gather(y, MODEL, axis=-1, tiled=True)

    run = jax.shard_map(local, mesh=mesh, in_specs=(_specs(params), ALL, ALL), out_specs=ALL, check_vma=False)
    return run(params, x, at)


@functools.cache
def parallel_programs(mesh: Mesh) -> Programs:
    """The programs of layers whose weights were `cut` over a mesh."""
    return Programs(partial(_embed, mesh=mesh), partial(_layer, mesh=mesh), partial(_head, mesh=mesh))


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Shardings of a KV cache by its heads; its lengths are everyone's."""
    by_heads = lambda leaf: NamedSharding(mesh, CACHE if np.ndim(leaf) > 1 else ALL)
    return jax.tree.map(by_heads, cache)


def model_mesh(devices: list[Any]) -> Mesh:
    """A mesh that one stage's layers are cut over."""
    return Mesh(np.array(devices), (MODEL,))
