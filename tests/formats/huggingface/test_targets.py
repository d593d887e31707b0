"""What each format makes of a weight: tensors as the peers' packers write them, of the announced sizes, and configs."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.arrays import TransformedArray, affine
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.huggingface import compressed_tensors_write
from qjax.formats.huggingface.targets import TARGETS, holding, target_named
from qjax.formats.huggingface.words import unpack_words
from qjax.kernels.layout import lay_out

STORED = np.load(Path(__file__).with_name("packed.npz"))
CT = sorted({name.split("/")[0] for name in STORED if name.startswith("ct-pack")})


def matrix(bits: int = 4, groups: int = 2, *, zero: bool = False, shape: tuple[int, int] = (32, 64)) -> Any:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    scale = rng.uniform(0.001, 1, (shape[0], groups)).astype(np.float16)
    zeros = rng.integers(1, 1 << bits, scale.shape).astype(np.uint8) if zero else None
    return affine(codes, scale, zeros, bits)


def shuffled(columns: int, groups: int, *, whole: bool) -> np.ndarray:
    """An order of columns that keeps groups together, or not."""
    rng = np.random.default_rng(0)
    if not whole:
        return rng.permutation(columns).astype(np.int32)
    within = np.arange(columns).reshape(groups, -1)[rng.permutation(groups)]
    return rng.permuted(within, axis=1).ravel().astype(np.int32)


def _floats(array: Any) -> np.ndarray:
    return np.asarray(jax.tree.map(jnp.asarray, array).dequantize())


@pytest.mark.parametrize("kind", CT)
def test_compressed_tensors_as_a_peer_packs_it(kind: str) -> None:
    expected = {name.split("/")[1]: STORED[name] for name in STORED if name.split("/")[0] == kind}
    bits, (out, columns) = int(kind.split("-")[2]), expected["weight_shape"]
    codes = unpack_words(expected["weight_packed"], bits, int(columns))
    zero = None
    if "weight_zero_point" in expected:
        packed = np.ascontiguousarray(expected["weight_zero_point"].T)
        zero = np.ascontiguousarray(unpack_words(packed, bits, int(out)).T)
    array = affine(codes, expected["weight_scale"], zero, bits)
    np.testing.assert_array_equal(_floats(array), STORED[f"{kind.split('-', 2)[2]}/w"])
    made = compressed_tensors_write.write(array)
    assert made.keys() == expected.keys()
    for suffix, tensor in expected.items():
        assert made[suffix].dtype == tensor.dtype
        np.testing.assert_array_equal(made[suffix], tensor, suffix)


def test_int_quantized() -> None:
    array = matrix(8, 1, zero=True)
    made = compressed_tensors_write.write(
        TransformedArray(array, rounding="int8", x_scale=np.float32(0.1) * np.ones(()))
    )
    w = made["weight_scale"].astype(np.float32) * (made["weight"].astype(int) - made["weight_zero_point"].astype(int))
    np.testing.assert_array_equal(w.astype(np.float32), _floats(array))
    assert made["input_scale"].tolist() == [np.float32(0.1)]


@given(
    st.sampled_from(sorted(TARGETS)),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([None, "whole", "mixed"]),
    st.sampled_from([None, "int8"]),
    st.booleans(),
)
def test_tensors_are_as_they_were_announced(
    name: str, bits: int, groups: int, zero: bool, order: str | None, rounding: Any, lanes: bool
) -> None:
    target, array = TARGETS[name], matrix(bits, groups, zero=zero)
    if lanes:
        array = lay_out("w", array)
    if order or rounding:
        columns = shuffled(64, groups, whole=order == "whole") if order else None
        array = TransformedArray(array, columns=columns, rounding=rounding)
    try:
        specs, tensors = target.specs("m", array), target.tensors("m", array)
    except UnsupportedError:
        assert name != "qjax"
        return
    assert {s.name: (s.dtype, s.shape) for s in specs} == {n: (t.dtype, t.shape) for n, t in tensors.items()}


def test_columns_of_whole_groups_need_no_g_idx() -> None:
    array = matrix(zero=True)
    whole = TransformedArray(array, columns=shuffled(64, 2, whole=True))
    mixed = TransformedArray(array, columns=shuffled(64, 2, whole=False))
    made = compressed_tensors_write.write(whole)
    assert "weight_g_idx" not in made
    codes = unpack_words(made["weight_packed"], 4, 64)
    zero = np.ascontiguousarray(unpack_words(np.ascontiguousarray(made["weight_zero_point"].T), 4, 32).T)
    np.testing.assert_array_equal(_floats(affine(codes, made["weight_scale"], zero, 4)), _floats(whole))
    made = compressed_tensors_write.write(mixed)
    scale = made["weight_scale"][:, made["weight_g_idx"]].astype(np.float32)
    zeros = unpack_words(np.ascontiguousarray(made["weight_zero_point"].T), 4, 32).T[:, made["weight_g_idx"]]
    w = scale * (unpack_words(made["weight_packed"], 4, 64).astype(np.float32) - zeros)
    np.testing.assert_array_equal(w, _floats(mixed))
    with pytest.warns(QjaxWarning, match="act-order"):
        target_named("compressed-tensors").config({"m": mixed}, ())


def test_configs_of_one_scheme() -> None:
    packed = {"model.layers.0.mlp.up_proj": matrix(4), "model.layers.0.mlp.down_proj": matrix(4)}
    kept = ["model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"]
    config = target_named("gptq").config(packed, kept)
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert (config["checkpoint_format"], config["lm_head"], "meta" in config) == ("gptq", False, False)
    (skipped,) = config["dynamic"]
    assert re.match(skipped.removeprefix("-:"), "model.layers.1.mlp.up_proj")
    assert not re.match(skipped.removeprefix("-:"), "model.layers.11.mlp.up_proj")
    config = target_named("gptq_v2").config({"lm_head": matrix(8, 1)}, ())
    assert (config["checkpoint_format"], config["lm_head"], config["group_size"]) == ("gptq_v2", True, -1)
    config = target_named("awq").config(packed, kept)
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert (config["zero_point"], config["version"], config["group_size"]) == (True, "gemm", 32)
    config = target_named("compressed-tensors").config(packed, kept)
    assert config["ignore"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    (group,) = config["config_groups"].values()
    assert (group["targets"], group["weights"]["strategy"], config["format"]) == (["Linear"], "group", "pack-quantized")


def test_configs_of_several_schemes() -> None:
    w8a8 = TransformedArray(matrix(8, 1), rounding="int8")
    packed = {"a": matrix(4), "b": matrix(4), "c": matrix(8, zero=True)}
    config = target_named("gptq").config(packed, ())
    assert (config["bits"], config["dynamic"]) == (4, {"+:^c$": {"bits": 8, "group_size": 32, "sym": False}})
    config = target_named("compressed-tensors").config({**packed, "d": w8a8}, ())
    assert config["format"] == "mixed-precision"
    groups = {tuple(group["targets"]): group for group in config["config_groups"].values()}
    assert set(groups) == {("a", "b"), ("c",), ("d",)}
    assert groups["d",]["input_activations"]["strategy"] == "token"
    assert (groups["d",]["format"], groups["c",]["weights"]["symmetric"]) == ("int-quantized", False)
    with pytest.raises(UnsupportedError, match=r"^b: AWQ has one group size"):
        target_named("awq").config({"a": matrix(4), "c": matrix(4), "b": matrix(4, 1)}, ())
    with pytest.raises(UnsupportedError, match="rounded activations"):
        target_named("gptq").config({"d": w8a8}, ())


def test_which_formats_hold_a_weight() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert holding("m", matrix(5)) == ["compressed-tensors", "qjax"]
        assert holding("m", matrix(4)) == ["gptq", "gptq_v2", "awq", "compressed-tensors", "qjax"]
        assert holding("m", TransformedArray(matrix(8, 1), rounding="int8")) == ["compressed-tensors", "qjax"]
        assert holding("m", TransformedArray(matrix(), input_scale=np.ones(64, np.float32))) == ["qjax"]
        fp8 = TransformedArray(matrix(8, 1), rounding="float8_e4m3fn")
        assert holding("m", fp8) == ["qjax"]
    with pytest.raises(QjaxError, match="gptq, gptq_v2, awq, compressed-tensors, qjax or gguf"):
        target_named("exl2")
