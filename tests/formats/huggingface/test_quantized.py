"""Quantized folders: each kind is found by its tensors, whatever the config says, and means what its format says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import packers
import pytest
from packers import MATRICES, Grid, Tensors, grid

import qjax
from qjax.arrays import TransformedArray
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.huggingface.checkpoint import as_numpy, open_checkpoint
from qjax.formats.huggingface.labels import Labels
from qjax.formats.huggingface.parts import Parts, by_module
from qjax.formats.huggingface.quantized import find_packed
from qjax.formats.huggingface.source import HuggingFaceFolder, open_folder
from qjax.runs.inspect import inspect, show

Made = Callable[..., Path]
Module = tuple[Tensors, np.ndarray]
Pack = Callable[[Any, tuple[int, int]], Module]


def of_grid(pack: Callable[[Grid], Tensors], bits: int, group: int, symmetric: bool, **options: Any) -> Pack:
    def packed(rng: Any, shape: tuple[int, int]) -> Module:
        dtype, shuffled = options.get("dtype", np.float16), options.get("shuffled", False)
        found = grid(rng, shape, bits, group, symmetric, dtype, shuffled)
        return pack(found), found.floats

    return packed


def gptq(bits: int, group: int, symmetric: bool, version: int, with_g_idx: bool = True, **options: Any) -> Pack:
    return of_grid(lambda g: packers.gptq(g, bits, version, with_g_idx), bits, group, symmetric, **options)


def packed(bits: int, group: int, symmetric: bool, zeros: str = "", **options: Any) -> Pack:
    of = {"zeros": zeros, "old": options.pop("old", False), "with_g_idx": options.get("shuffled", False)}
    return of_grid(lambda g: packers.pack_quantized(g, bits, **of), bits, group, symmetric, **options)


def blocks(rng: Any, shape: tuple[int, int], rows: int, columns: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.random((-(-shape[0] // rows), -(-shape[1] // columns))).astype(dtype)


KINDS: dict[str, tuple[str, str, Pack]] = {
    # name: (kind, label, packer)
    "gptq": ("gptq", "GPTQ 4-bit g64", gptq(4, 64, True, 1)),
    "gptq-asym": ("gptq", "GPTQ 4-bit g32 asym", gptq(4, 32, False, 1)),
    "gptq-2": ("gptq", "GPTQ 2-bit g32 asym", gptq(2, 32, False, 1)),
    "gptq-3": ("gptq", "GPTQ 3-bit g64", gptq(3, 64, True, 1, with_g_idx=False)),
    "gptq-8": ("gptq", "GPTQ 8-bit channel", gptq(8, -1, True, 1)),
    "gptq-act-order": ("gptq", "GPTQ 4-bit g32 asym act-order", gptq(4, 32, False, 1, shuffled=True)),
    "gptq-bf16": ("gptq", "GPTQ 4-bit g32", gptq(4, 32, True, 1, dtype=ml_dtypes.bfloat16)),
    "gptq-f32": ("gptq", "GPTQ 4-bit g32", gptq(4, 32, True, 1, dtype=np.float32)),
    "gptq_v2": ("gptq_v2", "GPTQ v2 4-bit g32", gptq(4, 32, True, 2)),
    "gptq_v2-3": ("gptq_v2", "GPTQ v2 3-bit g32 asym", gptq(3, 32, False, 2)),
    "gptq_v2-2": ("gptq_v2", "GPTQ v2 2-bit g32 asym act-order", gptq(2, 32, False, 2, shuffled=True)),
    "awq": ("awq", "AWQ 4-bit g32", of_grid(packers.awq_gemm, 4, 32, False)),
    "awq-channel": ("awq", "AWQ 4-bit channel", of_grid(packers.awq_gemm, 4, -1, False)),
    "awq-gemv": ("awq-gemv", "AWQ gemv 4-bit g32", of_grid(lambda g: packers.awq_gemv(g, 32), 4, 32, False)),
    "pack": ("pack-quantized", "pack-quantized 4-bit g32", packed(4, 32, True)),
    "pack-3": ("pack-quantized", "pack-quantized 3-bit channel asym", packed(3, -1, False, "packed")),
    "pack-3-old": ("pack-quantized", "pack-quantized 3-bit g32 asym", packed(3, 32, False, "packed", old=True)),
    "pack-5": ("pack-quantized", "pack-quantized 5-bit g32", packed(5, 32, True)),
    "pack-6": ("pack-quantized", "pack-quantized 6-bit g32 asym", packed(6, 32, False, "int8")),
    "pack-7": ("pack-quantized", "pack-quantized 7-bit g32 asym", packed(7, 32, False, "packed")),
    "pack-8": ("pack-quantized", "pack-quantized 8-bit channel", packed(8, -1, True)),
    "pack-order": (
        "pack-quantized",
        "pack-quantized 4-bit g32 asym act-order",
        packed(4, 32, False, "int8", shuffled=True),
    ),
    "int": (
        "int-quantized",
        "int-quantized int8 channel",
        of_grid(lambda g: packers.int_quantized(g, zeros=False), 8, -1, True),
    ),
    "int-asym": (
        "int-quantized",
        "int-quantized int8 g64 asym",
        of_grid(lambda g: packers.int_quantized(g, zeros=True), 8, 64, False),
    ),
    "fp8-tensor": (
        "fp8",
        "FP8 e4m3fn tensor",
        lambda r, s: packers.fp8(r, s, np.array([0.02], np.float32), "weight_scale"),
    ),
    "fp8-scalar": (
        "fp8",
        "FP8 e5m2 tensor",
        lambda r, s: packers.fp8(r, s, np.array(0.02, np.float32), "weight_scale", "F8_E5M2"),
    ),
    "fp8-channel": (
        "fp8",
        "FP8 e4m3fn channel",
        lambda r, s: packers.fp8(r, s, blocks(r, s, 1, s[1], np.float16), "weight_scale"),
    ),
    "fp8-block": (
        "fp8",
        "FP8 e4m3fn block 64x64",
        lambda r, s: packers.fp8(r, s, blocks(r, s, 64, 64), "weight_scale_inv"),
    ),
    "nf4": ("bitsandbytes-nf4", "NF4 g64", lambda r, s: packers.nf4(r, s, 64, nested=False)),
    "nf4-nested": ("bitsandbytes-nf4", "NF4 g64, double quantization", lambda r, s: packers.nf4(r, s, 64, nested=True)),
    "nf4-across": (
        "bitsandbytes-nf4",
        "NF4 g256, double quantization",
        lambda r, s: packers.nf4(r, s, 256, nested=True),
    ),
    "fp4": ("bitsandbytes-fp4", "FP4 g64", lambda r, s: packers.nf4(r, s, 64, nested=False, kind="fp4")),
    "bnb-int8": ("bitsandbytes-int8", "LLM.int8() channel", packers.bnb_int8),
    "mxfp4": ("mxfp4-pack-quantized", "MXFP4 g32", lambda r, s: packers.float4(r, s, nv=False)),
    "nvfp4": ("nvfp4-pack-quantized", "NVFP4 g16", lambda r, s: packers.float4(r, s, nv=True)),
}


def layer(pack: Pack, seed: int = 1) -> tuple[Tensors, dict[str, np.ndarray]]:
    """The tensors of all matrices of the layer, and their floats."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    floats = {}
    for module, shape in MATRICES.items():
        held, floats[module] = pack(rng, shape)
        tensors |= {f"model.layers.0.{module}.{suffix}": tensor for suffix, tensor in held.items()}
    return tensors, floats


def as_floats(floats: dict[str, np.ndarray]) -> Tensors:
    return {f"model.layers.0.{module}.weight": ("F32", w) for module, w in floats.items()}


@jax.jit
def floats_of(arrays: list[Any]) -> list[jax.Array]:
    """Several in one program: most of its time is that of compiling it."""
    return [array.dequantize() for array in arrays]


def dequantized(*arrays: Any) -> list[np.ndarray]:
    return list(map(np.asarray, floats_of(list(arrays))))


def in_gguf_order(module: str, w: np.ndarray) -> np.ndarray:
    """Rows of queries and keys as llama.cpp's converter puts them."""
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
    if heads is None:
        return w
    return w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


# One of each shape, of queries and keys.
LOOKED_AT = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}


def check(folder: HuggingFaceFolder, floats: dict[str, np.ndarray], **tolerance: float) -> None:
    found = dequantized(*(folder.array(f"blk.0.{name}.weight") for name in LOOKED_AT))
    for (name, module), ours in zip(LOOKED_AT.items(), found, strict=True):
        theirs = in_gguf_order(module, floats[module])
        if tolerance:
            np.testing.assert_allclose(ours, theirs, **tolerance)
        else:
            np.testing.assert_array_equal(ours, theirs, name)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_found_and_means_what_its_format_says(made: Made, name: str) -> None:
    kind, label, pack = KINDS[name]
    tensors, floats = layer(pack)
    # Nothing is said at all but where tensors cannot tell.
    said = {"quantization_config": {"checkpoint_format": "gptq_v2"}} if kind == "gptq_v2" else {}
    said = {"quantization_config": {"group_size": 32}} if kind == "awq-gemv" else said
    folder = open_folder(made(tensors, **said))
    assert {found.kind for found in folder.found.values()} == {kind}
    assert len(folder.found) == 7
    assert folder.found["blk.0.attn_q.weight"].label == label
    assert folder.found["blk.0.attn_q.weight"].how
    # Of these the formula divides twice, or in another order.
    check(folder, floats, **({"rtol": 1e-6} if name in ("nvfp4", "bnb-int8") else {}))


def test_a_model_runs_as_its_floats_do(made: Made) -> None:
    tokens = jnp.asarray([[1, 5, 300, 7, 42]], jnp.int32)
    tensors, floats = {}, {}
    # Each module in a way of its own: all that differs is found module by module.
    for i, (module, name) in enumerate(
        zip(MATRICES, ("gptq-act-order", "nf4-nested", "fp8-block", "pack-order"), strict=False)
    ):
        held, w = layer(KINDS[name][2], i)
        tensors |= {key: value for key, value in held.items() if f".{module}." in key}
        floats[module] = w[module]
    rest = {
        module: np.random.default_rng(9).normal(size=shape).astype(np.float32)
        for module, shape in MATRICES.items()
        if module not in floats
    }
    path = made(tensors | as_floats(rest))
    model = qjax.load(path)
    assert {found.kind for found in model.found.values()} == {"gptq", "bitsandbytes-nf4", "fp8", "pack-quantized"}
    logits = qjax.forward(model.params, model.config, tokens)[0]
    path.rename(path.with_name("quantized"))
    reference = qjax.load(made(as_floats(floats | rest)))
    expected = qjax.forward(reference.params, reference.config, tokens)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("stored", "label"), [(1, "gptq_v2"), (2, "gptq")])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), (2, False), (8, True)])
def test_gptq_versions_that_are_labelled_wrongly(
    made: Made, stored: int, label: str, bits: int, symmetric: bool
) -> None:
    tensors, floats = layer(gptq(bits, 32, symmetric, stored))
    config = {"quant_method": "gptq", "checkpoint_format": label, "bits": bits, "group_size": 32}
    with pytest.warns(
        QjaxWarning, match=f"checkpoint_format is '{label}', but the zero points are of version {stored}"
    ):
        folder = open_folder(made(tensors, quantization_config=config))
    check(folder, floats)


def test_codes_that_do_not_tell_a_version(made: Made) -> None:
    def pack(rng: Any, shape: tuple[int, int]) -> Module:
        g = grid(rng, shape, 4, 32, False, np.float16, False)
        # Codes half a step above what is stored.
        codes = np.where(rng.random(shape) < 0.5, 7, 8).astype(np.uint8)
        g = g._replace(
            codes=codes, zero=np.where(np.arange(g.zero.size).reshape(g.zero.shape) % 2, 7, 9).astype(np.uint8)
        )
        return packers.gptq(g, 4, 1), g.floats

    tensors, floats = layer(pack)
    folder = open_folder(made(tensors))
    assert "which tells nothing" in folder.found["blk.0.attn_q.weight"].how
    check(folder, floats)


def test_symmetric_gptq_with_zero_points_of_nothing(made: Made) -> None:
    tensors, floats = layer(gptq(4, 32, True, 1))
    wrong = {name: ("I32", np.zeros_like(t[1])) if name.endswith("qzeros") else t for name, t in tensors.items()}
    folder = open_folder(
        made(wrong, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True})
    )
    assert "taken as the middle, by sym: true" in folder.found["blk.0.attn_q.weight"].how
    check(folder, floats)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"quant_method": "gptq", "bits": 3, "group_size": 64}, "the config says 3 bits; the tensors have 4"),
    (
        "gptq",
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        "the config says groups of a row; the tensors have groups of 64",
    ),
    ("gptq", {"quant_method": "awq", "version": "gemm"}, "the config says awq gemm; the tensors are GPTQ"),
    ("awq", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "the config says gptq; the tensors are AWQ"),
    (
        "awq",
        {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["mlp"]},
        "says that it stayed float; it is AWQ",
    ),
    (
        "pack",
        {"quant_method": "compressed-tensors", "ignore": [r"re:.*self_attn\.qkv_proj$"]},
        "says that it stayed float",
    ),
    ("gptq", {"quant_method": "gptq", "dynamic": {r"-:.*\.up_proj": {}}}, "says that it stayed float; it is GPTQ"),
]


@pytest.mark.parametrize(("name", "config", "words"), CONFIGS)
def test_a_config_that_is_wrong_is_contradicted(made: Made, name: str, config: dict[str, Any], words: str) -> None:
    tensors, floats = layer(KINDS[name][2])
    with pytest.warns(QjaxWarning, match=words) as caught:
        folder = open_folder(made(tensors, quantization_config=config))
    assert len(caught) == 1
    check(folder, floats)


def test_exceptions_by_module(made: Made) -> None:
    rng = np.random.default_rng(1)
    tensors, floats = layer(gptq(4, 64, True, 1))
    down, floats["mlp.down_proj"] = gptq(8, 32, True, 1)(rng, MATRICES["mlp.down_proj"])
    up = rng.normal(size=MATRICES["mlp.up_proj"]).astype(np.float16)
    tensors = {name: t for name, t in tensors.items() if "up_proj" not in name and "down_proj" not in name}
    tensors |= {f"model.layers.0.mlp.down_proj.{suffix}": t for suffix, t in down.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = ("F16", up)
    dynamic = {r"+:.*down_proj": {"bits": 8, "group_size": 32}, r"-:.*up_proj": {}}
    folder = open_folder(
        made(tensors, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic})
    )
    assert folder.found["blk.0.ffn_down.weight"].label == "GPTQ 8-bit g32"
    assert "blk.0.ffn_up.weight" not in folder.found
    np.testing.assert_array_equal(folder.array("blk.0.ffn_up.weight"), up)
    check(folder, floats)


@pytest.mark.parametrize("name", ["gptq-asym", "awq", "pack", "fp8-block", "nf4-nested"])
def test_fused_modules_are_cut_by_rows(made: Made, name: str) -> None:
    rng = np.random.default_rng(1)
    qkv, attention = KINDS[name][2](rng, (256, 128))
    both, feed = KINDS[name][2](rng, (384, 128))
    tensors, floats = layer(KINDS[name][2])
    kept = {key: t for key, t in tensors.items() if "o_proj" in key or "down_proj" in key}
    kept |= {f"model.layers.0.self_attn.qkv_proj.{suffix}": t for suffix, t in qkv.items()}
    kept |= {f"model.layers.0.mlp.gate_up_proj.{suffix}": t for suffix, t in both.items()}
    folder = open_folder(made(kept))
    check(folder, floats | {"self_attn.q_proj": attention[:128], "self_attn.k_proj": attention[128:192]})
    v, up = dequantized(*(folder.array(f"blk.0.{part}.weight") for part in ("attn_v", "ffn_up")))
    np.testing.assert_array_equal(v, attention[192:])
    np.testing.assert_array_equal(up, feed[192:])
    total = sum(t[1].nbytes for t in (*qkv.values(), *both.values()))
    seen = [
        folder.tensors[f"blk.0.{part}.weight"].nbytes for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    ]
    # Shapes and the like are no weights.
    assert total - 400 <= sum(seen) <= total


def config_groups(inputs: dict[str, Any] | None, target: str = "Linear") -> dict[str, Any]:
    group = {"targets": [target], "weights": {"num_bits": 8, "type": "int"}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


ACTIVATIONS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("int", {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}, "int8", ""),
    ("fp8-channel", {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}, "float8_e4m3fn", ""),
    ("int", {"num_bits": 8, "type": "int", "dynamic": True, "symmetric": False}, None, "with zero points is not known"),
    ("fp8-block", {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "group"}, None, "each group of x"),
    ("int", {"num_bits": 4, "type": "int", "dynamic": True}, None, "int4 is not known"),
    ("fp8-tensor", {"num_bits": 8, "type": "float", "dynamic": False}, "float8_e4m3fn", "input_scale"),
]


@pytest.mark.parametrize(("name", "inputs", "rounding", "words"), ACTIVATIONS)
def test_activations_are_rounded_as_the_config_says(
    made: Made, name: str, inputs: Any, rounding: Any, words: str
) -> None:
    tensors, _ = layer(KINDS[name][2])
    if inputs["dynamic"] is False:
        tensors |= {f"model.layers.0.{module}.input_scale": ("F32", np.array([0.5], np.float32)) for module in MATRICES}
    folder = open_folder(made(tensors, quantization_config=config_groups(inputs)))
    array = folder.array("blk.0.attn_q.weight")
    assert words in folder.found["blk.0.attn_q.weight"].how
    if rounding is None:
        assert not isinstance(array, TransformedArray)
    else:
        assert array.rounding == rounding
        assert (array.x_scale is not None) == (words == "input_scale")


def test_groups_of_a_config_have_targets(made: Made) -> None:
    tensors, _ = layer(KINDS["int"][2])
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    folder = open_folder(made(tensors, quantization_config=config_groups(inputs, r"re:.*mlp\..*")))
    assert "int8 activations" in folder.found["blk.0.ffn_up.weight"].label
    assert "int8 activations" not in folder.found["blk.0.attn_q.weight"].label


def test_older_files_beside_the_config(made: Made) -> None:
    tensors, floats = layer(KINDS["gptq"][2])
    path = made(tensors)
    (path / "quantize_config.json").write_text('{"bits": 3, "group_size": 64, "checkpoint_format": "gptq"}')
    (path / "model.safetensors").rename(path / "gptq_model-4bit-64g.safetensors")
    with pytest.warns(QjaxWarning, match=r"quantize_config\.json: .*the config says 3 bits"):
        check(open_folder(path), floats)


def test_expressions_without_end_are_refused(made: Made) -> None:
    tensors, _ = layer(KINDS["pack"][2])
    with pytest.raises(UnsupportedError, match="endless time"):
        open_folder(made(tensors, quantization_config={"ignore": ["re:(.+)+x"]}))
    assert issubclass(UnsupportedError, QjaxError)


PEERS = np.load(Path(__file__).with_name("packed.npz"))
COMPRESSED = sorted({name.split("/")[0] for name in PEERS if name.startswith("ct-pack")})


@pytest.mark.parametrize("kind", COMPRESSED)
def test_what_compressed_tensors_packed(tmp_path: Path, kind: str) -> None:
    held = {name.split("/")[1]: PEERS[name] for name in PEERS if name.split("/")[0] == kind}
    dtypes = {"int32": "I32", "int64": "I64", "float16": "F16"}
    tensors: Tensors = {f"up.{suffix}": (dtypes[array.dtype.name], array) for suffix, array in held.items()}
    packers.write_safetensors(tmp_path / "model.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path)
    shape = (int(held["weight_shape"][0]), int(held["weight_shape"][1]))
    parts = Parts("up", by_module(checkpoint.tensors)["up"], checkpoint.raw, shape)
    packed = find_packed({"up": parts}, Labels(tmp_path / "config.json", {}))["up"]
    array = packed.read({s: as_numpy(stored, checkpoint.raw(stored.name)) for s, stored in packed.parts.items()})
    np.testing.assert_array_equal(dequantized(array)[0], PEERS[f"{kind.split('-', 2)[2]}/w"])


def test_inspect_says_what_was_found_and_how(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, _ = layer(KINDS["gptq-act-order"][2])
    facts = inspect(made(tensors))
    (q,) = (tensor for tensor in facts["tensors"] if tensor["name"] == "blk.0.attn_q.weight")
    assert q["type"] == "GPTQ 4-bit g32 asym act-order"
    assert q["found"]["module"] == "model.layers.0.self_attn.q_proj"
    assert q["found"]["kind"] == "gptq"
    assert "version 1, the mean code lies" in q["found"]["how"]
    assert all("found" not in tensor for tensor in facts["tensors"] if tensor["type"] in ("F16", "F32"))
    assert facts["format"] == "Hugging Face safetensors, gptq"
    show(facts)
    assert "GPTQ 4-bit g32 asym act-order (7): bits by the shape" in capsys.readouterr().out
