"""Quantized folders that are damaged: one line that names the file and the module, whatever is wrong."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packers import Tensors, grid

import qjax
from qjax.errors import FormatError, QjaxError, QjaxWarning
from qjax.formats.huggingface.checkpoint import as_numpy, open_checkpoint
from qjax.formats.huggingface.labels import Labels
from qjax.formats.huggingface.parts import Parts, by_module
from qjax.formats.huggingface.quantized import find_packed
from qjax.formats.huggingface.source import HuggingFaceFolder, open_folder

Made = Callable[..., Path]
SHAPE = (192, 128)
MODULE = "model.layers.0.mlp.up_proj"


def packed(kind: str) -> Tensors:
    """The module's tensors, a kind each."""
    rng = np.random.default_rng(3)
    g = grid(rng, SHAPE, 4, 32, False, np.float16, kind == "gptq")
    if kind == "gptq":
        return packers.gptq(g, 4, 1)
    if kind == "awq":
        return packers.awq_gemm(g)
    if kind == "pack":
        return packers.pack_quantized(g, 4, zeros="packed", with_g_idx=True)
    if kind == "int":
        wide = grid(rng, SHAPE, 8, 32, False, np.float16, False)
        return packers.int_quantized(wide, zeros=True)
    if kind == "fp8":
        return packers.fp8(rng, SHAPE, np.ones((3, 2), np.float32), "weight_scale_inv")[0]
    if kind == "nf4":
        return packers.nf4(rng, SHAPE, 64, nested=True)[0]
    if kind == "bnb-int8":
        return packers.bnb_int8(rng, SHAPE)[0]
    return packers.float4(rng, SHAPE, nv=kind == "nvfp4")[0]


KINDS = ("gptq", "awq", "pack", "int", "fp8", "nf4", "bnb-int8", "mxfp4", "nvfp4")


def folder_of(made: Made, tensors: Tensors) -> Path:
    """A folder with that module, all others being floats."""
    rng = np.random.default_rng(0)
    floats: Tensors = {
        f"model.layers.0.{name}.weight": ("F16", rng.normal(size=shape).astype(np.float16))
        for name, shape in packers.MATRICES.items()
        if not MODULE.endswith(name)
    }
    return made(floats | {f"{MODULE}.{suffix}": tensor for suffix, tensor in tensors.items()})


def read(path: Path) -> HuggingFaceFolder:
    folder = open_folder(path)
    folder.array("blk.0.ffn_up.weight")
    return folder


def scaled(dtype: Any, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = "scales" if "scales" in tensors else "weight_scale"
        tensors[name] = (tensors[name][0], np.full_like(tensors[name][1], value, dtype))

    return change


def of(suffix: str, f: Callable[[np.ndarray], np.ndarray], dtype: str | None = None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[suffix] = (dtype or tensors[suffix][0], f(tensors[suffix][1]))

    return change


def without(suffix: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(suffix) and None


def state(**changes: Any) -> Callable[[Tensors], None]:
    name = "weight.quant_state.bitsandbytes__nf4"

    def change(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(json.dumps(json.loads(array.tobytes()) | changes).encode(), np.uint8)

    return of(name, change)


SPOILT: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("gptq", without("scales"), r"'model.layers.0.mlp.up_proj.scales' is missing beside g_idx, qweight, qzeros"),
    ("gptq", without("qzeros"), r"up_proj.qzeros' is missing"),
    ("gptq", without("qweight"), r"up_proj.qweight' is missing"),
    ("gptq", of("g_idx", lambda a: a + 100), r"up_proj.*g_idx has groups from 100 to 103, expected 0 to 3"),
    ("gptq", of("g_idx", lambda a: a[:-1]), r"up_proj.g_idx' has the shape \(127,\), expected \(128,\)"),
    ("gptq", of("g_idx", lambda a: a * 0), r"up_proj.*g_idx has 128 columns in group 0, expected 32"),
    ("gptq", of("qweight", lambda a: a[:-1]), r"up_proj.qweight' is no GPTQ or AWQ .* for a weight \(192, 128\)"),
    ("gptq", of("qweight", lambda a: a.astype(np.int64), "I64"), r"up_proj.qweight' is I64, expected I32"),
    ("gptq", of("qweight", lambda a: a.astype(np.int16), "I16"), r"up_proj.qweight' is I16, AWQ's gemv_fast"),
    ("gptq", of("qzeros", lambda a: a[:, :-1]), r"up_proj.qzeros' has the shape \(4, 23\), expected \(4, 24\)"),
    ("gptq", of("scales", lambda a: a[:0]), r"up_proj.*(scales|qzeros)"),
    ("gptq", of("scales", lambda a: a[:3]), r"up_proj.*(scales|qzeros)"),
    ("gptq", scaled(np.float16, np.nan), r"up_proj.scales' has numbers that are not finite"),
    ("gptq", scaled(np.float16, np.inf), r"up_proj.scales' has numbers that are not finite"),
    ("awq", scaled(np.float16, -np.inf), r"up_proj.scales' has numbers that are not finite"),
    ("awq", of("qzeros", lambda a: a[:-1]), r"up_proj.qzeros' has the shape \(3, 24\), expected \(4, 24\)"),
    ("awq", of("scales", lambda a: np.repeat(a, 32, 0)[:127]), r"up_proj.scales' has 127 groups"),
    ("pack", without("weight_scale"), r"up_proj.weight_scale' is missing"),
    ("pack", scaled(np.float16, np.nan), r"up_proj.weight_scale' has numbers that are not finite"),
    (
        "pack",
        of("weight_scale", lambda a: a[:, :3]),
        r"up_proj.weight_scale' has the shape \(192, 3\), which are no groups",
    ),
    ("pack", of("weight_packed", lambda a: a[:, :-1]), r"up_proj.weight_packed' has 15 words a row"),
    (
        "pack",
        of("weight_packed", lambda a: a[:-1]),
        r"up_proj.weight_packed' has the shape \(191, 16\), expected 192 rows",
    ),
    ("pack", of("weight_shape", lambda a: a * 2), r"up_proj.weight_shape' is \(384, 256\), expected \(192, 128\)"),
    ("pack", of("weight_g_idx", lambda a: a - 3), r"up_proj.weight_g_idx' has groups from -3 to 0, expected 0 to 3"),
    ("pack", of("weight_zero_point", lambda a: a[:-1]), r"up_proj.weight_zero_point' has the shape \(23, 4\)"),
    ("int", of("weight", lambda a: a[:-1]), r"up_proj.weight' has the shape \(191, 128\), expected \(192, 128\)"),
    ("int", of("weight_scale", lambda a: a.astype(np.int32), "I32"), r"up_proj.weight_scale' is I32, expected F32"),
    ("fp8", without("weight_scale_inv"), r"up_proj.weight_scale' is missing beside weight"),
    (
        "fp8",
        of("weight_scale_inv", lambda a: np.ones((193, 1), np.float32)),
        r"weight_scale_inv' has the shape \(193, 1\)",
    ),
    ("fp8", of("weight_scale_inv", lambda a: a * np.nan), r"up_proj.weight_scale_inv' has numbers that are not finite"),
    ("fp8", of("weight", lambda a: a | np.uint8(127)), r"up_proj.weight' has numbers that are not finite"),
    ("nf4", without("weight.absmax"), r"up_proj.weight.absmax' is missing"),
    ("nf4", without("weight.quant_map"), r"up_proj.weight.quant_map' is missing"),
    ("nf4", without("weight.nested_absmax"), r"up_proj.weight.nested_absmax' is missing, other than quant_state says"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), r"quant_state.bitsandbytes__nf4' is missing"),
    ("nf4", of("weight.quant_state.bitsandbytes__nf4", lambda a: a[:-9]), r"bitsandbytes__nf4' is not JSON"),
    ("nf4", state(blocksize=0), r"says blocksize 0, expected"),
    ("nf4", state(blocksize=1 << 40), r"says blocksize 1099511627776, expected"),
    ("nf4", state(shape=[128, 192]), r"says the shape \(128, 192\), expected \(192, 128\) by config.json"),
    ("nf4", state(nested_offset="x"), r"says nested_offset 'x'"),
    ("nf4", state(nested_blocksize=1000), r"says nested_blocksize 1000, known are 1 to 256"),
    ("nf4", of("weight.nested_absmax", lambda a: a * np.nan), r"nested_absmax' has numbers that are not finite"),
    ("bnb-int8", without("SCB"), r"up_proj.weight_scale' is missing beside weight, weight_format"),
    (
        "mxfp4",
        of("weight_scale", lambda a: a[:, :-1]),
        r"up_proj.weight_scale' has the shape \(192, 3\), expected \(192, 4\)",
    ),
]


@pytest.mark.parametrize(("kind", "spoil", "words"), SPOILT)
def test_what_is_wrong_is_named(made: Made, kind: str, spoil: Callable[[Tensors], None], words: str) -> None:
    tensors = packed(kind)
    spoil(tensors)
    path = folder_of(made, tensors)
    with pytest.raises(QjaxError, match=words) as caught:
        read(path)
    assert str(path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_not_loaded_either(made: Made) -> None:
    tensors = packed("pack")
    scaled(np.float16, np.nan)(tensors)
    with pytest.raises(FormatError, match="up_proj"):
        qjax.load(folder_of(made, tensors))


def found(folder: Path, tensors: Tensors) -> tuple[Any, str]:
    """The module's array, of a folder with nothing else; or None and what is said of it."""
    packers.write_safetensors(folder / "model.safetensors", {f"{MODULE}.{s}": t for s, t in tensors.items()})
    checkpoint = open_checkpoint(folder)
    parts = {name: Parts(name, held, checkpoint.raw, SHAPE) for name, held in by_module(checkpoint.tensors).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QjaxWarning)
            (packed,) = find_packed(parts, Labels(folder / "config.json", {})).values()
            held = {s: as_numpy(stored, checkpoint.raw(stored.name)) for s, stored in packed.parts.items()}
            return packed.read(held), ""
    except QjaxError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_else_is_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Tensors taken out, cut, turned, of another dtype or with other bytes: an array of that shape, or one line."""
    tensors = packed(kind)
    for suffix in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        spoil(tensors, suffix, data)
    if tensors:
        array, message = found(tmp_path, tensors)
        assert array is None or array.shape == SHAPE
        assert array is not None or ("up_proj" in message and "\n" not in message)


def spoil(tensors: Tensors, suffix: str, data: st.DataObject) -> None:
    """Change one of the tensors, somehow."""
    dtype, array = tensors[suffix]
    way = data.draw(st.sampled_from(["out", "cut", "turn", "dtype", "bytes", "flat", "empty"]))
    if way == "out":
        del tensors[suffix]
    elif way == "cut" and array.ndim:
        axis = data.draw(st.integers(0, array.ndim - 1))
        tensors[suffix] = (dtype, np.take(array, range(data.draw(st.integers(0, array.shape[axis]))), axis=axis))
    elif way == "turn":
        tensors[suffix] = (dtype, array.T)
    elif way == "dtype":
        # The same shape, where the bytes are enough for it.
        other, width = data.draw(
            st.sampled_from([("F16", 2), ("BF16", 2), ("I8", 1), ("U8", 1), ("I32", 4), ("F32", 4)])
        )
        raw = np.resize(np.frombuffer(array.tobytes(), np.uint8), array.size * width)
        tensors[suffix] = (other, raw.view(f"V{width}").reshape(array.shape))
    elif way == "bytes":
        seed = data.draw(st.integers(0, 1 << 16))
        raw = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
        tensors[suffix] = (dtype, raw.view(array.dtype).reshape(array.shape))
    elif way == "flat":
        tensors[suffix] = (dtype, array.reshape(-1))
    else:
        tensors[suffix] = (dtype, array.reshape(-1)[:0])
