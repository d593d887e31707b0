"""Types by mix and by wish, in llama-quantize's order of precedence."""

from pathlib import Path

import numpy as np
import pytest

from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.gguf import GGUFFile, open_gguf
from qjax.formats.gguf.plan import Wish, override, overrides, plan
from qjax.formats.gguf.types import type_named
from qjax.formats.gguf.writer import TensorToWrite, write_gguf


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
    }
    shapes = {
        "token_embd.weight": (8, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_v.weight": (8, 256),
        "blk.0.ffn_down.weight": (8, 96),
        "blk.0.ffn_up.weight": (8, 256),
        "output.weight": (8, 256),
    }
    tensors = [TensorToWrite(name, s, "F32", np.zeros(4 * int(np.prod(s)), np.uint8)) for name, s in shapes.items()]
    write_gguf(tmp_path / "f.gguf", metadata, tensors)
    return open_gguf(tmp_path / "f.gguf")


def types(file: GGUFFile, wish: Wish) -> list[str]:
    """Of embedding, norm, attn_v, ffn_down, ffn_up, output."""
    return list(plan(file, wish).values())


def test_the_mix(file: GGUFFile) -> None:
    # Rows of 96 hold no super-block: Q4_K's stand-in is Q5_0. The norm keeps what it has.
    assert types(file, Wish("q2_k")) == ["Q2_K", "F32", "Q4_K", "Q4_0", "Q2_K", "Q6_K"]
    assert types(file, Wish("Q4_K_M")) == ["Q4_K", "F32", "Q6_K", "Q8_0", "Q4_K", "Q6_K"]
    assert types(file, Wish("f16")) == ["F16", "F32", "F16", "F16", "F16", "F16"]
    halves = [TensorToWrite("output.weight", (8, 256), "F16", np.zeros(4096, np.uint8))]
    write_gguf(file.path.with_name("h.gguf"), file.metadata, halves)
    assert types(open_gguf(file.path.with_name("h.gguf")), Wish("f32")) == ["F32"]


def test_pure(file: GGUFFile) -> None:
    assert types(file, Wish("q4_k_m", pure=True)) == ["Q4_K", "F32", "Q4_K", "Q5_0", "Q4_K", "Q4_K"]


def test_wishes_by_precedence(file: GGUFFile) -> None:
    wishes = [override("ffn_.*=q5_k"), override("ffn_up=q8_0"), override("^output=Q4_K"), override("embd=q3_k")]
    wish = Wish("q4_k_m", overrides=wishes)
    assert types(file, wish) == ["Q3_K", "F32", "Q6_K", "Q5_1", "Q5_K", "Q4_K"]
    wish = wish._replace(output_type="f16", embedding_type="q8_0", pure=True)
    assert types(file, wish) == ["Q8_0", "F32", "Q4_K", "Q5_1", "Q5_K", "F16"]


@pytest.mark.parametrize("text", ["ffn_up", "=q4_k", "ffn_up=", "ffn_up=q9", "(=q4_k"])
def test_refuses_what_is_no_override(text: str) -> None:
    with pytest.raises(QjaxError):
        override(text)


def test_a_pattern_may_hold_the_sign() -> None:
    assert override("a=b=q4_k") == ("a=b", "Q4_K")
    assert type_named("bf16") == "BF16"


def test_overrides_of_a_file(tmp_path: Path) -> None:
    expected = [("ffn_up", "Q8_0"), (r"blk\.[01]\.attn_v", "F16")]
    (tmp_path / "types.txt").write_text("ffn_up=q8_0 \n" + r"blk\.[01]\.attn_v=f16")
    (tmp_path / "types.yaml").write_text("tensor_types:\n- ffn_up=q8_0\n" + r"- blk\.[01]\.attn_v=f16")
    assert overrides([tmp_path / "types.txt"]) == overrides([tmp_path / "types.yaml"]) == expected
    assert overrides(["a=q4_0", tmp_path / "types.txt", "b=q4_1"]) == [("a", "Q4_0"), *expected, ("b", "Q4_1")]
    (tmp_path / "list.yaml").write_text("- ffn_up=q8_0")
    (tmp_path / "number.yaml").write_text("tensor_types: [3]")
    (tmp_path / "bad.txt").write_text("ffn_up")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name in ("list.yaml", "number.yaml", "bad.txt", "bytes.txt", "nowhere.txt"):
        with pytest.raises(QjaxError, match=name):
            overrides([tmp_path / name])


def test_floats_with_wishes(file: GGUFFile) -> None:
    assert types(file, Wish("f16", overrides=[("ffn_down", "Q8_0")])) == ["F16", "F32", "F16", "Q8_0", "F16", "F16"]


def test_warns_of_what_has_no_effect(file: GGUFFile) -> None:
    with pytest.warns(QjaxWarning, match="ffn_dwon=Q8_0: found in the name of no matrix"):
        plan(file, Wish("q4_k_m", overrides=[("ffn_dwon", "Q8_0"), ("FFN_UP", "Q8_0")]))


def test_refuses_rows_that_the_wanted_type_does_not_allow(tmp_path: Path) -> None:
    narrow = [TensorToWrite("output.weight", (8, 96), "F16", np.zeros(8 * 96 * 2, np.uint8))]
    write_gguf(tmp_path / "f.gguf", {"general.architecture": "llama"}, narrow)
    with pytest.raises(QjaxError, match=r"output.weight: its rows of 96 are no whole Q4_K blocks of 256"):
        plan(open_gguf(tmp_path / "f.gguf"), Wish("q8_0", output_type="q4_k"))


def test_warns_of_architectures_with_exceptions(tmp_path: Path) -> None:
    tensors = [TensorToWrite("output.weight", (8, 256), "F16", np.zeros(4096, np.uint8))]
    write_gguf(tmp_path / "f.gguf", {"general.architecture": "falcon"}, tensors)
    with pytest.warns(QjaxWarning, match="exceptions for models of falcon"):
        plan(open_gguf(tmp_path / "f.gguf"), Wish("q8_0"))


@pytest.mark.parametrize("value", ["many", [], True, 2**40, 0, np.array([8, 4], np.int32), ["8"], 0.5])
def test_heads_of_any_kind_do_not_stop_it(value: object, tmp_path: Path) -> None:
    """What a model of another architecture or a damaged file says of itself."""
    metadata = {"general.architecture": "llama", "llama.block_count": value, "llama.attention.head_count": value}
    tensors = [TensorToWrite("blk.0.attn_v.weight", (8, 256), "F16", np.zeros(4096, np.uint8))]
    write_gguf(tmp_path / "f.gguf", {**metadata, "llama.attention.head_count_kv": value}, tensors)
    assert plan(open_gguf(tmp_path / "f.gguf"), Wish("q4_k_m")).keys() == {"blk.0.attn_v.weight"}
