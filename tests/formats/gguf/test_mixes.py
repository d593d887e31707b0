"""Mixes against llama-quantize: at real sizes (mixes.txt), in files that it made, live; and mixes of a user's own."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest

from qjax.errors import QjaxError
from qjax.formats.gguf import open_gguf
from qjax.formats.gguf.mixes import aliases, file_type, is_mix, mix_of, mixes
from qjax.formats.gguf.places import in_order, is_quantizable
from qjax.formats.gguf.plan import FALLBACK, Wish, override, plan
from qjax.formats.gguf.types import GGML_TYPES

tool = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("make_mix_goldens.py"))))


def sections() -> dict[tuple[str, str], dict[str, str]]:
    """Of each model and options: mix to the line of its types."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in tool.GOLDENS.read_text().splitlines():
        if line.startswith("["):
            name, _, options = line[1:-1].partition(" ")
            section = found[name, options] = {}
        elif line and not line.startswith("#"):
            mix, _, types = line.partition(": ")
            section[mix] = types
    # With importance, only what differs is listed.
    return {key: found[key[0], ""] | lines if key[1] == "--imatrix" else lines for key, lines in found.items()}


GOLDENS = sections()


def wish(mix: str, options: str) -> Wish:
    """The wish that llama-quantize's options stand for."""
    words = iter(options.split())
    made = Wish(mix)
    for word in words:
        if word == "--tensor-type":
            made = made._replace(overrides=[*made.overrides, override(next(words))])
        elif word == "--output-tensor-type":
            made = made._replace(output_type=next(words))
        elif word == "--token-embedding-type":
            made = made._replace(embedding_type=next(words))
        else:
            made = made._replace(**{word.removeprefix("--"): True})
    return made


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without checks of signatures, which take most of the time of a thousand plans; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", tool.MODELS)
def test_types_are_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    file = open_gguf(tool.write_model(tmp_path / "model.gguf", name))
    names = tool.quantized({name: info.shape for name, info in file.tensors.items()})
    seen = set()
    for (model, options), lines in GOLDENS.items():
        if model == name:
            for mix, line in lines.items():
                if line != "fails":
                    types = plan(file, wish(mix, options))
                    assert {name: types[name] for name in names} == tool.expand(line, names), (mix, options)
                    assert all(types[name] == file.tensors[name].type for name in types.keys() - set(names))
                seen.add(mix)
    assert seen == set(mixes()) == set(tool.MIXES)


@pytest.mark.interop
@pytest.mark.parametrize(("name", "options"), [("mixtral-8x7b", "--imatrix"), ("qwen2-0.5b", "--pure")])
def test_types_are_those_of_llama_quantize_now(name: str, options: str, tmp_path: Path, llama_quantize: str) -> None:
    path = tool.write_model(tmp_path / "model.gguf", name)
    imatrix = tool.write_imatrix(tmp_path / "imatrix.gguf")
    for mix in mixes():
        if mix != "q1_0":
            theirs = tool.types_by_llama_quantize(llama_quantize, path, mix, options, imatrix)
            assert plan(open_gguf(path), wish(mix, options)) == theirs, mix


def test_types_are_those_of_files_that_llama_quantize_made(interop: Path) -> None:
    paths = sorted(interop.glob("tiny-*.gguf"))
    assert len(paths) >= 20
    for path in paths:
        mix = path.stem.removeprefix("tiny-").removeprefix("imat-")
        file = open_gguf(path)
        assert file.metadata["general.file_type"] == file_type(mix), path.name
        got = plan(file, Wish(mix, imatrix="imat" in path.stem))
        assert got == {name: info.type for name, info in file.tensors.items()}, path.name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q.bias", (256,)),
        ("blk.0.attn_q_norm.weight", (4, 256)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256)),
        ("blk.0.ssm_conv1d.weight", (8, 4)),
        ("rope_freqs.weight", (32,)),
        ("output_norm.weight", (256,)),
    ],
)
def test_no_mix_decides_over_vectors_norms_and_gates(name: str, shape: tuple[int, ...]) -> None:
    assert not is_quantizable(name, shape)


def test_the_order_of_tensors() -> None:
    """By the number of the layer, as llama.cpp reads it; what is no number is of no layer."""
    names = ["blk.10.a", "blk.9.b", "output.weight", f"blk.{'9' * 5000}.a", "blk.x.a", "blk.9.a"]
    assert in_order(names) == [names[3], names[4], names[2], "blk.9.a", "blk.9.b", "blk.10.a"]


def test_names_of_mixes() -> None:
    assert mix_of("Q4_K_M") is mix_of("q4_k") is mixes()["q4_k_m"]
    assert set(aliases().values()) <= set(mixes())
    assert len({mix.file_type for mix in mixes().values()}) == len(mixes())
    assert set(FALLBACK) | set(FALLBACK.values()) <= set(GGML_TYPES)
    assert [is_mix(name) for name in ("Q3_K", "nowhere.YAML", "q9_0")] == [True, True, False]
    with pytest.raises(QjaxError, match=r"'q9_0' is not known, expected one of f32, .*q4_k_m"):
        mix_of("q9_0")


OWN = r"""
extends: q4_k_m
output: q8_0
rules:
  - {name: 'blk\.(0|5)\.ffn_(up|gate)', type: q5_k}
  - {role: ffn_down, when: [first 1/4, not imatrix], type: Q8_0}
  - {role: attn_output, when: last 2, type: f16}
  - {role: [attn_k, attn_v], when: experts == 8, type: Q5_0}
"""


def test_a_mix_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    own = str(tmp_path / "own.yaml")
    assert file_type(own) == file_type("q4_k_m")
    for model in ("tinyllama-1.1b", "mixtral-8x7b"):
        file = open_gguf(tool.write_model(tmp_path / "model.gguf", model))
        layers = file.metadata["llama.block_count"]
        plain, got = plan(file, Wish("q4_k_m")), plan(file, Wish(own))
        changed = {name: kind for name, kind in got.items() if plain[name] != kind}
        end = "_exps" if model.startswith("mix") else ""
        expected = {f"blk.{i}.ffn_{role}{end}.weight": "Q5_K" for i in (0, 5) for role in ("up", "gate")}
        expected |= {f"blk.{i}.ffn_down{end}.weight": "Q8_0" for i in range(layers // 4)}
        expected |= {f"blk.{layers - i}.attn_output.weight": "F16" for i in (1, 2)}
        if end:
            expected |= {f"blk.{i}.attn_{role}.weight": "Q5_0" for i in range(layers) for role in ("k", "v")}
        assert changed == expected | {"output.weight": "Q8_0"}
        assert (
            plan(file, Wish(own, imatrix=True))[f"blk.4.ffn_down{end}.weight"] == plain[f"blk.4.ffn_down{end}.weight"]
        )


def test_a_mix_of_few_words(tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text("base: iq4_xs")
    mix = mix_of(str(tmp_path / "own.yml"))
    assert (mix.base, mix.output, mix.rules, mix.file_type) == ("IQ4_XS", "Q6_K", (), 30)


RULES = "base: q4_k\nrules:\n- {type: q4_k}\n- "
BAD_MIXES = [
    ("[", "not YAML"),
    ("q4_k", "expected keys and values, got str"),
    ("rules: []", "expected a key 'base'"),
    ("base: q9", "base: expected a ggml type such as Q4_K or F16, got 'q9'"),
    ("base: 4", "base: expected text, got 4"),
    ("base: q4_k\nfile_type: true", "file_type: expected a number such as 15, got True"),
    ("base: q4_k\nbaze: q4_k", "unknown key 'baze'; known are extends, file_type, base, output, rules"),
    ("extends: q4_z", "extends: unknown mix 'q4_z', expected one of f32"),
    ("base: q4_k\noutput: [q4_k]", "output: expected text"),
    ("base: q4_k\nrules: {type: q4_k}", "rules: expected a list"),
    (RULES + "q4_k", "rule 2: expected keys and values, got 'q4_k'"),
    (RULES + "{role: ffn_up}", "rule 2: expected a key 'type'"),
    (RULES + "{type: q4_z}", "rule 2: type: expected a ggml type"),
    (RULES + "{type: q4_k, layer: 3}", "rule 2: unknown key 'layer'; known are role, name, when, type"),
    (RULES + "{type: q4_k, role: [ffn_up, up]}", "rule 2: role: unknown role 'up'; known are output, token_embd"),
    (RULES + "{type: q4_k, name: '('}", "rule 2: name: expected a regular expression"),
    (RULES + "{type: q4_k, when: first 0}", "rule 2: when: unknown condition 'first 0'; known are first N, last N"),
    (RULES + "{type: q4_k, when: [imatrix, [imatrix]]}", "rule 2: when: expected text"),
]


@pytest.mark.parametrize(("text", "words"), BAD_MIXES)
def test_a_wrong_mix_is_told_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(QjaxError) as error:
        mix_of(str(path))
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_mix() -> None:
    with pytest.raises(QjaxError, match=r"nowhere\.yaml: expected a readable YAML file"):
        mix_of("nowhere.yaml")
