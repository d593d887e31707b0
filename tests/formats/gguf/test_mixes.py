"""The mixes against llama.cpp: files that llama-quantize made, and what its own function gives at real sizes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qjax.errors import QjaxError
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.mixes import ALIASES, FALLBACK, MIXES, file_type, mix_of, tensor_type
from qjax.formats.gguf.types import GGML_TYPES

# Of mixes.txt's models: layers, hidden, ffn, heads to a key/value head, tied embeddings.
MODELS = {
    "tinyllama-1.1b": (22, 2048, 5632, 8, False),
    "llama-7b": (32, 4096, 11008, 1, False),
    "llama-13b": (40, 5120, 13824, 1, False),
    "llama-70b": (80, 8192, 28672, 8, False),
    "smollm-135m": (30, 576, 1536, 3, True),
}


def golden(model: str, layers: int) -> Iterator[tuple[str, str, str]]:
    """(mix, tensor name, type) of each tensor that is quantized, from mixes.txt."""
    section = ""
    for line in Path(__file__).with_name("mixes.txt").read_text().splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line and not line.startswith("#") and section == model:
            left, right = line.split(" = ")
            mix, roles = left.split()
            for role in roles.split(","):
                top = role in ("output", "token_embd")
                runs = [run.partition("*") for run in right.split()]
                types = [kind for kind, _, n in runs for _ in range(int(n) if n else 1 if top else layers)]
                assert len(types) == (1 if top else layers)
                for i, kind in enumerate(types):
                    yield mix, f"{role}.weight" if top else f"blk.{i}.{role}.weight", kind


@pytest.mark.parametrize("model", MODELS)
def test_types_at_real_sizes_are_those_of_llama_cpp(model: str) -> None:
    layers, hidden, ffn, gqa, tied = MODELS[model]
    mixes = set()
    for mix, name, expected in golden(model, layers):
        shape = (256, ffn if "ffn_down" in name else hidden)
        assert tensor_type(mix, name, shape, layers=layers, gqa=gqa, tied=tied) == expected, (mix, name)
        mixes.add(mix)
    assert mixes == set(MIXES) - {"f32", "f16", "bf16"}


def test_types_are_those_of_files_that_llama_quantize_made(interop: Path) -> None:
    paths = sorted(interop.glob("tiny-*.gguf"))
    assert len(paths) >= 20
    for path in paths:
        mix = path.stem.removeprefix("tiny-").removeprefix("imat-")
        file = open_gguf(path)
        meta = file.metadata
        assert meta["general.file_type"] == file_type(mix), path.name
        gqa = meta["llama.attention.head_count"] // meta["llama.attention.head_count_kv"]
        for name, info in file.tensors.items():
            got = tensor_type(
                mix,
                name,
                info.shape,
                layers=meta["llama.block_count"],
                gqa=gqa,
                tied="output.weight" not in file.tensors,
                imatrix="imat" in path.stem,
            )
            assert got == info.type, (path.name, name)


def test_vectors_norms_and_gates_stay_float32() -> None:
    for mix in MIXES:
        for name, shape in {
            "blk.0.attn_norm.weight": (256,),
            "blk.0.attn_q.bias": (256,),
            "blk.0.attn_q_norm.weight": (4, 256),
            "blk.0.ffn_gate_inp.weight": (8, 256),
            "rope_freqs.weight": (32,),
            "output_norm.weight": (256,),
        }.items():
            assert tensor_type(mix, name, shape, layers=4, gqa=1, tied=False) == "F32"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("row", [7, 32, 96, 256])
def test_every_type_fits_its_rows(mix: str, row: int) -> None:
    for role in ("output", "token_embd", "blk.0.attn_v", "blk.1.ffn_down", "blk.3.attn_output", "blk.2.ffn_up"):
        for tied in (False, True):
            kind = tensor_type(mix, f"{role}.weight", (8, row), layers=4, gqa=4, tied=tied)
            assert row % GGML_TYPES[kind].block_size == 0, (role, tied)
            if row == 7:
                assert kind in ("F16", "F32", "BF16")


def test_an_importance_matrix_protects_the_first_ffn_down() -> None:
    """As llama_tensor_get_type_impl says; the files made with one have too few layers to show it."""
    cases = {"q4_0": ("Q4_1", "Q4_0"), "q5_0": ("Q5_1", "Q5_0"), "iq4_xs": ("IQ4_XS", "IQ4_XS")}
    for mix, (first, second) in cases.items():
        for layer, expected in ((0, first), (1, second)):
            name = f"blk.{layer}.ffn_down.weight"
            assert tensor_type(mix, name, (256, 256), layers=8, gqa=1, tied=False, imatrix=True) == expected


def test_names_of_mixes() -> None:
    assert mix_of("Q4_K_M") is mix_of("q4_k") is MIXES["q4_k_m"]
    assert set(ALIASES.values()) <= set(MIXES)
    assert len({mix.file_type for mix in MIXES.values()}) == len(MIXES)
    used = {name for mix in MIXES.values() for name in (mix.base, mix.output, *(rule.type for rule in mix.rules))}
    assert used | set(FALLBACK) | set(FALLBACK.values()) <= set(GGML_TYPES)
    with pytest.raises(QjaxError, match=r"'q9_0' is not known, expected one of f32, .*q4_k_m"):
        tensor_type("q9_0", "output.weight", (8, 256), layers=1, gqa=1, tied=False)
