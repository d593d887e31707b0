"""Files to params: what is in a file is loaded once, packed, and what is wrong with one is said in one line."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.api import quantizer
from qjax.arrays import LaneBlockedArray, QuantizedArray, memory, serves_lanes, to_lanes
from qjax.errors import FormatError, QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.gguf import open_gguf, to_blocks
from qjax.models import forward, load_gguf
from qjax.models.load import expected_shapes, gguf_tensors

SCALES = {"blk.0.ffn_up.scale": ((1,), "F32"), "blk.1.attn_q.scale": ((1,), "F32")}


@pytest.mark.parametrize(
    ("arch", "matrix"), [("llama", "Q4_0"), ("qwen2", "F16"), ("qwen3", "Q6_K"), ("llama", "NVFP4")]
)
def test_every_tensor_comes_back_byte_for_byte(write_model: Any, arch: str, matrix: str) -> None:
    extra = SCALES if matrix == "NVFP4" else {}
    file = open_gguf(write_model(arch, matrix, change={"rope_freqs.weight": ((16,), "F32"), **extra}))
    seen: list[str] = []
    params, config = load_gguf(file, progress=seen.append)
    assert sorted(seen) == sorted(set(file.tensors) - {"rope_freqs.weight", *extra})
    assert set(expected_shapes(config)) >= set(seen)
    back = dict(gguf_tensors(params, config))
    assert set(back) == set(file.tensors)
    for name, array in back.items():
        assert to_blocks(array).tobytes() == file.raw(name).tobytes(), name
    held = memory({key: value for key, value in params.items() if key != "rope"})
    # Each row of an NVFP4 weight holds the number that scales it.
    assert held.nbytes == pytest.approx(sum(info.nbytes for info in file.tensors.values()), rel=0.03)


def test_matrices_stay_packed_and_ties_are_not_copied(write_model: Any) -> None:
    params, config = load_gguf(open_gguf(write_model("llama", "Q8_0", change={"output.weight": None})))
    assert isinstance(params["token_embd"], QuantizedArray)
    assert isinstance(params["layers"][1]["ffn_down"], QuantizedArray)
    assert "output" not in params
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    logits, _ = forward(params, config, tokens)
    doubled, _ = forward(params | {"output": params["token_embd"]}, config, tokens)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(doubled))


def test_nvfp4_scale_multiplies_the_weight(write_model: Any) -> None:
    half = np.float32(0.5).reshape(1).view(np.uint8)
    one = np.float32(1).reshape(1).view(np.uint8)
    weights = []
    for factor in (half, one):
        path = write_model("llama", "NVFP4", change=SCALES, data=dict.fromkeys(SCALES, factor))
        params, _ = load_gguf(open_gguf(path))
        weights.append([np.asarray(jax.jit(lambda w: w.dequantize())(p["ffn_up"])) for p in params["layers"]])
    np.testing.assert_array_equal(weights[0][0], 0.5 * weights[1][0])
    np.testing.assert_array_equal(weights[0][1], weights[1][1])


def test_make_and_place_see_each_array(write_model: Any) -> None:
    made: list[str] = []
    placed: list[str] = []

    def make(name: str, w: Any) -> Any:
        assert w.dtype == jnp.float32
        made.append(name)
        return w.astype(jnp.bfloat16)

    def place(name: str, array: Any) -> Any:
        placed.append(name)
        return array

    file = open_gguf(write_model())
    params, _ = load_gguf(file, make=make, place=place)
    matrices = {name for name, info in file.tensors.items() if len(info.shape) == 2}
    assert set(made) == matrices
    assert len(made) == len(matrices)
    assert set(placed) == {*file.tensors, "rope"}
    assert params["layers"][0]["attn_q"].dtype == jnp.bfloat16
    assert params["layers"][0]["attn_norm"].dtype == jnp.float32
    with pytest.warns(QjaxWarning, match=".weight is Q4_0 already and stays so"):
        load_gguf(open_gguf(write_model("llama", "Q4_0")), make=make)


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_that_are_multiplied_with_are_laid_out(write_model: Any, tied: bool) -> None:
    change = {"output.weight": None, "blk.0.attn_q.weight": ((256, 256), "IQ2_XS")} if tied else {}
    file = open_gguf(write_model("llama", "Q4_K", change=change))
    asked: list[str] = []

    def lay_out(name: str, array: Any) -> Any:
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(array)), "on the host still"
        asked.append(name)
        return to_lanes(array) if serves_lanes(array) is None else array

    params, config = load_gguf(file, lay_out=lay_out)
    matrices = {name for name, info in file.tensors.items() if len(info.shape) == 2}
    assert sorted(asked) == sorted(matrices - (set() if tied else {"token_embd.weight"}))
    assert isinstance(params["layers"][1]["ffn_down"], LaneBlockedArray)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params["layers"]))
    for name, array in gguf_tensors(params, config):
        assert to_blocks(array).tobytes() == file.raw(name).tobytes(), name


def test_made_matrices_are_laid_out(write_model: Any) -> None:
    file = open_gguf(write_model("llama", "F32"))
    params, config = load_gguf(file, make=quantizer("q8_0"), lay_out=lambda name, array: to_lanes(array))
    plain, _ = load_gguf(file, make=quantizer("q8_0"))
    assert isinstance(params["output"], LaneBlockedArray)
    for (name, array), (_, same) in zip(gguf_tensors(params, config), gguf_tensors(plain, config), strict=True):
        np.testing.assert_array_equal(to_blocks(array), to_blocks(same), err_msg=name)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "token_embd.weight"),
        ("llama", "output_norm.weight"),
        ("llama", "blk.1.ffn_down.weight"),
        ("llama", "blk.0.attn_norm.weight"),
        ("qwen3", "blk.1.attn_q_norm.weight"),
        ("qwen3", "blk.0.attn_k_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(write_model: Any, arch: str, name: str) -> None:
    with pytest.raises(FormatError, match=f"model.gguf: tensor '{name}' is missing"):
        load_gguf(open_gguf(write_model(arch, change={name: None})))


BAD_TENSORS: list[tuple[str, str, tuple[tuple[int, ...], str], type[QjaxError], str]] = [
    ("llama", "blk.0.attn_k.weight", ((256, 256), "F16"), FormatError, r"is \(256, 256\), expected \(128, 256\)"),
    ("llama", "blk.1.ffn_down.weight", ((512, 256), "F16"), FormatError, r"is \(512, 256\), expected \(256, 512\)"),
    ("llama", "output.weight", ((95, 256), "F16"), FormatError, r"is \(95, 256\), expected \(96, 256\)"),
    ("llama", "token_embd.weight", ((256,), "F16"), FormatError, "tensor 'token_embd.weight' is"),
    ("llama", "token_embd.weight", ((), "F32"), FormatError, "tensor 'token_embd.weight' is"),
    ("llama", "output_norm.weight", ((1, 256), "F32"), FormatError, r"is \(1, 256\), expected \(256,\)"),
    ("llama", "blk.0.ffn_norm.weight", ((256,), "Q8_0"), FormatError, "is a vector of Q8_0, expected floats"),
    ("llama", "blk.0.ffn_norm.weight", ((256,), "I32"), UnsupportedError, "has type I32; known are BF16, F16"),
    ("llama", "rope_freqs.weight", ((32,), "F32"), FormatError, r"is \(32,\), expected \(16,\)"),
    ("llama", "blk.2.attn_q.weight", ((256, 256), "F16"), UnsupportedError, "is not part of a llama model"),
    ("llama", "blk.0.attn_q_norm.weight", ((32,), "F32"), UnsupportedError, "is not part of a llama model"),
    ("qwen2", "blk.0.ffn_gate_inp.weight", ((8, 256), "F32"), UnsupportedError, "is not part of a qwen2 model"),
    ("qwen2", "blk.0.attn_q.bias", ((255,), "F32"), FormatError, r"is \(255,\), expected \(256,\)"),
    ("qwen3", "blk.0.attn_q_norm.weight", ((256,), "F32"), FormatError, r"is \(256,\), expected \(32,\)"),
    ("llama", "blk.0.attn_q.scale", ((1,), "F32"), UnsupportedError, "scales no NVFP4 weight"),
]


@pytest.mark.parametrize(("arch", "name", "entry", "error", "words"), BAD_TENSORS)
def test_a_wrong_tensor_is_named(
    write_model: Any, arch: str, name: str, entry: Any, error: type[QjaxError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        load_gguf(open_gguf(write_model(arch, change={name: entry})))
    assert "model.gguf: " in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "error", "words"),
    [
        ({"general.architecture": "gemma3"}, UnsupportedError, "'gemma3' is not known; known are llama, qwen2, qwen3"),
        ({"general.architecture": None}, FormatError, "this is no model file"),
        ({".expert_count": 8}, UnsupportedError, "mixture of experts"),
        ({".attention.head_count_kv": 8}, FormatError, "'blk.0.attn_k.weight' is .* expected .* from the metadata"),
        ({".block_count": 1}, UnsupportedError, "'blk.1.attn_norm.weight' is not part of"),
    ],
)
def test_wrong_metadata_names_the_file(
    write_model: Any, meta: dict[str, Any], error: type[QjaxError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        load_gguf(open_gguf(write_model(meta=meta)))
    assert "model.gguf: " in str(caught.value)
    with pytest.raises(QjaxError, match=r"model\.gguf: "):
        load_gguf(open_gguf(write_model(meta=meta, change={"token_embd.weight": None})))


def test_a_header_that_claims_millions_of_layers_costs_nothing(write_model: Any) -> None:
    file = open_gguf(write_model(meta={".block_count": (1 << 24) - 1}))
    start = time.perf_counter()
    with pytest.raises(FormatError, match=r"'blk\.2\.attn_q\.weight' is missing"):
        load_gguf(file)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_rope_factors_must_be_positive(write_model: Any, bad: float) -> None:
    factors = np.ones(16, np.float32)
    factors[3] = bad
    change, data = {"rope_freqs.weight": ((16,), "F32")}, {"rope_freqs.weight": factors.view(np.uint8)}
    with pytest.raises(FormatError, match=r"'rope_freqs\.weight' has numbers that are not positive"):
        load_gguf(open_gguf(write_model(change=change, data=data)))


def test_rope_factors_divide_the_frequencies(write_model: Any) -> None:
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    change, data = {"rope_freqs.weight": ((16,), "F32")}, {"rope_freqs.weight": factors.view(np.uint8)}
    plain, _ = load_gguf(open_gguf(write_model()))
    divided, _ = load_gguf(open_gguf(write_model(change=change, data=data)))
    linear, _ = load_gguf(open_gguf(write_model(meta={".rope.scaling.factor": 4.0})))
    exact = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    for got, want in ((plain, exact), (divided, exact / factors), (linear, exact / 4)):
        np.testing.assert_allclose(np.asarray(got["rope"]), want, rtol=3e-7)
