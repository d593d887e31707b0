"""Quantized modules as the formats' own descriptions have them, written apart from qjax: slow, and one way only.

Each packer gives a module's tensors, suffix -> (dtype in the file, array), and the float32 weight [out, in] that they
stand for, by the published formulas.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Tensors = dict[str, tuple[str, np.ndarray]]
# A Llama of one layer whose rows and columns all packers can pack; [out, in] of its matrices.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 32, "num_hidden_layers": 1, "tie_word_embeddings": False, "attention_bias": False}
MATRICES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# QLoRA's 16 values (Dettmers et al. 2023, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
NF4 += (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Grid(NamedTuple):
    """Codes [out, in], scales [out, groups] and zero points [out, groups] of a group for each column."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_of: np.ndarray

    @property
    def floats(self) -> np.ndarray:
        scale = self.scale.astype(np.float32)[:, self.group_of]
        return scale * (self.codes.astype(np.float32) - self.zero.astype(np.float32)[:, self.group_of])


def grid(rng: Any, shape: tuple[int, int], bits: int, group: int, symmetric: bool, dtype: Any, shuffled: bool) -> Grid:
    """Codes of random normal weights; with `shuffled`, groups of columns here and there."""
    out, columns = shape
    size = columns if group == -1 else group
    group_of = np.arange(columns) // size
    if shuffled:
        group_of = rng.permutation(group_of)
    groups, most = columns // size, (1 << bits) - 1
    zero = np.full((out, groups), 1 << (bits - 1)) if symmetric else rng.integers(1, most + 1, (out, groups))
    scale = (rng.random((out, groups)) * 0.01 + 0.001).astype(dtype)
    spread = most / 5
    codes = np.clip(np.rint(rng.normal(size=shape) * spread + zero[:, group_of]), 0, most)
    return Grid(codes.astype(np.uint8), scale, zero.astype(np.uint8), group_of)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words along the last axis: the codes' bits one after the other, lowest first, zeros at the end."""
    each = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = each.reshape(*codes.shape[:-1], -1)
    padded = np.pad(flat, [(0, 0)] * (codes.ndim - 1) + [(0, -flat.shape[-1] % 32)])
    return np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little")).view(np.int32)


def gptq(g: Grid, bits: int, version: int, with_g_idx: bool = True) -> Tensors:
    tensors: Tensors = {
        "qweight": ("I32", stream(g.codes, bits).T),
        "qzeros": ("I32", stream((g.zero - (version == 1)).astype(np.uint8).T, bits)),
        "scales": (DTYPES[g.scale.dtype.name], g.scale.T),
    }
    if with_g_idx:
        tensors["g_idx"] = ("I32", g.group_of.astype(np.int32))
    return tensors


def awq_gemm(g: Grid) -> Tensors:
    def words(rows: np.ndarray) -> np.ndarray:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        eights = rows.reshape(len(rows), -1, 8).astype(np.int64)
        return sum(eights[:, :, order[i]] << (4 * i) for i in range(8)).astype(np.uint32).view(np.int32)

    return {
        "qweight": ("I32", words(g.codes.T)),
        "qzeros": ("I32", words(g.zero.T)),
        "scales": ("F16", g.scale.T),
    }


def awq_gemv(g: Grid, padded: int) -> Tensors:
    """With `padded` groups, zeros after the last."""
    pad = ((0, 0), (0, padded - g.scale.shape[1]))
    return {
        "qweight": ("I32", stream(g.codes, 4)),
        "qzeros": ("I32", stream(np.pad(g.zero, pad), 4)),
        "scales": ("F16", np.pad(g.scale, pad)),
    }


def pack_quantized(g: Grid, bits: int, *, zeros: str = "", old: bool = False, with_g_idx: bool = False) -> Tensors:
    """`zeros`: "" for none, "packed" or "int8". `old`: whole codes alone in a word, as versions before 0.10 had it."""

    def words(codes: np.ndarray) -> np.ndarray:
        if not old:
            return stream(codes, bits)
        per = 32 // bits
        padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).reshape(len(codes), -1, per)
        return sum(padded[:, :, i].astype(np.int64) << (bits * i) for i in range(per)).astype(np.uint32).view(np.int32)

    tensors: Tensors = {
        "weight_packed": ("I32", words(g.codes)),
        "weight_scale": (DTYPES[g.scale.dtype.name], g.scale),
        "weight_shape": ("I64", np.array(g.codes.shape)),
    }
    if zeros == "packed":
        tensors["weight_zero_point"] = ("I32", words(g.zero.T).T)
    elif zeros == "int8":
        tensors["weight_zero_point"] = ("I8", (g.zero.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))
    if with_g_idx:
        tensors["weight_g_idx"] = ("I32", g.group_of.astype(np.int32))
    return tensors


def int_quantized(g: Grid, *, zeros: bool) -> Tensors:
    tensors: Tensors = {
        "weight": ("I8", (g.codes.astype(np.int16) - 128).astype(np.int8)),
        "weight_scale": (DTYPES[g.scale.dtype.name], g.scale),
    }
    if zeros:
        tensors["weight_zero_point"] = ("I8", (g.zero.astype(np.int16) - 128).astype(np.int8))
    return tensors


def fp8(rng: Any, shape: tuple[int, int], scale: np.ndarray, name: str, dtype: str = "F8_E4M3") -> tuple[Tensors, Any]:
    """`scale` of any shape that broadcasts by blocks: () or (1,), (out, 1), (blocks of rows, blocks of columns)."""
    kind = ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else ml_dtypes.float8_e5m2
    values = (rng.normal(size=shape) * 20).astype(kind)
    spread = scale.astype(np.float32).reshape(scale.shape if scale.ndim == 2 else (1, 1))
    for axis in (0, 1):
        block = -(-shape[axis] // spread.shape[axis])
        spread = np.repeat(spread, block, axis=axis)
        spread = spread[: shape[0]] if axis == 0 else spread[:, : shape[1]]
    tensors: Tensors = {"weight": (dtype, values.view(np.uint8)), name: (DTYPES[scale.dtype.name], scale)}
    return tensors, values.astype(np.float32) * spread


def nf4(rng: Any, shape: tuple[int, int], block: int, *, nested: bool, kind: str = "nf4") -> tuple[Tensors, np.ndarray]:
    count = shape[0] * shape[1]
    codes = rng.integers(0, 16, count).astype(np.uint8)
    table = np.array(NF4 if kind == "nf4" else E2M1, np.float32)
    blocks = -(-count // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(shape)}
    tensors: Tensors = {
        "weight": ("U8", ((codes[0::2] << 4) | codes[1::2])[:, None]),
        "weight.quant_map": ("F32", table),
    }
    if nested:
        index = rng.integers(0, 256, blocks).astype(np.uint8)
        nested_map = np.sort(rng.normal(size=256)).astype(np.float32)
        nested_absmax = rng.random(-(-blocks // 256)).astype(np.float32)
        offset = 0.05
        absmax = nested_map[index] * nested_absmax[np.arange(blocks) // 256] + np.float32(offset)
        tensors["weight.absmax"] = ("U8", index)
        tensors["weight.nested_absmax"] = ("F32", nested_absmax)
        tensors["weight.nested_quant_map"] = ("F32", nested_map)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = rng.random(blocks).astype(np.float32)
        tensors["weight.absmax"] = ("F32", absmax)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = ("U8", text)
    return tensors, (table[codes] * absmax[np.arange(count) // block]).reshape(shape)


def bnb_int8(rng: Any, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    scb = (rng.random(shape[0]) * 3).astype(np.float32)
    tensors: Tensors = {"weight": ("I8", codes), "SCB": ("F32", scb), "weight_format": ("U8", np.array(0, np.uint8))}
    return tensors, (codes * scb[:, None].astype(np.float64) / 127).astype(np.float32)


def float4(rng: Any, shape: tuple[int, int], *, nv: bool) -> tuple[Tensors, np.ndarray]:
    """MXFP4 or NVFP4: pairs of codes, the first in the low bits."""
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    values = np.array(E2M1, np.float32)[codes]
    tensors: Tensors = {"weight_packed": ("U8", codes[:, 0::2] | (codes[:, 1::2] << 4))}
    if not nv:
        scale = rng.integers(110, 125, (shape[0], shape[1] // 32)).astype(np.uint8)
        tensors["weight_scale"] = ("U8", scale)
        return tensors, values * np.repeat(np.ldexp(np.float32(1), scale.astype(np.int32) - 127), 32, axis=1)
    scale = (rng.random((shape[0], shape[1] // 16)) * 100 + 1).astype(ml_dtypes.float8_e4m3fn)
    tensors["weight_scale"] = ("F8_E4M3", scale.view(np.uint8))
    tensors["weight_global_scale"] = ("F32", np.array([1024.0], np.float32))
    return tensors, values * np.repeat(scale.astype(np.float32) / np.float32(1024), 16, axis=1)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A file by the format's description: the length of the header, the header in JSON, the data."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_model(folder: Path, tensors: Tensors) -> None:
    """The weights of that Llama: `tensors` in its layer, and floats around it."""
    rng = np.random.default_rng(0)
    floats: Tensors = {
        "model.embed_tokens.weight": ("F16", rng.normal(size=(320, 128)).astype(np.float16)),
        "lm_head.weight": ("F16", rng.normal(size=(320, 128)).astype(np.float16)),
        "model.norm.weight": ("F16", np.ones(128, np.float16)),
        "model.layers.0.input_layernorm.weight": ("F16", np.ones(128, np.float16)),
        "model.layers.0.post_attention_layernorm.weight": ("F16", np.ones(128, np.float16)),
    }
    write_safetensors(folder / "model.safetensors", dict(sorted((floats | tensors).items())))
