"""Models saved as folders: what is in them, what reads them back, and what stays where something is wrong."""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qjax
from qjax.arrays import QuantizedArray, TransformedArray, affine, parse_scheme
from qjax.errors import QjaxError, QjaxWarning, UnsupportedError
from qjax.formats.affine_parts import affine_parts, plain_numpy
from qjax.formats.gguf import from_blocks, open_gguf
from qjax.formats.huggingface import awq, gptq
from qjax.formats.huggingface.card import Provenance
from qjax.formats.huggingface.checkpoint import INDEX, Checkpoint, open_checkpoint
from qjax.formats.huggingface.config_write import config_of
from qjax.formats.huggingface.native import descriptions, read_native
from qjax.formats.huggingface.safetensors_file import NUMPY
from qjax.formats.huggingface.source import open_folder
from qjax.formats.huggingface.targets import TARGETS
from qjax.formats.huggingface.tokenizer_write import tokenizer_files
from qjax.formats.huggingface.vocabulary import add_vocabulary
from qjax.formats.huggingface.weights import rotary_neighbours
from qjax.models.folder import checkpoint_weights
from qjax.models.load import gguf_tensors

WriteModel = Callable[..., Path]
GOLDENS = Path(__file__).parents[1] / "interop" / "goldens"


def tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    stored = checkpoint.tensors[name]
    return checkpoint.raw(name).view(NUMPY[stored.dtype]).reshape(stored.shape)


def quantized(path: Path | str, scheme: str = "w4g32", **others: str) -> qjax.Model:
    """A model with the layers' matrices by a scheme; others by that of the first part that is in their name."""

    def make(name: str, w: Any) -> Any:
        which = next(
            (kind for part, kind in others.items() if name.startswith(part) or f".{part}." in name),
            scheme if "blk" in name else "",
        )
        if not which:
            return np.asarray(w, np.float16)
        kind, rng = parse_scheme(which), np.random.default_rng(len(name))
        scale = rng.uniform(0.001, 0.01, (len(w), kind.groups(w.shape[1]))).astype(np.float16)
        return affine(rng.integers(0, kind.max_code, w.shape).astype(np.uint8), scale, None, kind.bits)

    return qjax.load(path, quantize=make)


def with_zero_points_of_zero(path: Path) -> qjax.Model:
    given = quantized(path)
    up = given.params["layers"][1]["ffn_up"]
    zero = np.zeros((up.shape[0], 8), np.uint8)
    given.params["layers"][1]["ffn_up"] = affine(
        np.zeros(up.shape, np.uint8), zero.astype(np.float16) + np.float16(1), zero, 4
    )
    return given


def with_minimums(path: Path) -> qjax.Model:
    given = quantized(path)
    q4_1 = from_blocks("Q4_1", np.zeros((256, 8 * 20), np.uint8), np.asarray)
    given.params["layers"][0]["attn_q"] = q4_1
    return given


@pytest.fixture(scope="module")
def model(write_model: WriteModel) -> qjax.Model:
    return quantized(write_model(meta={"tokenizer.ggml.model": "none"}))


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
@pytest.mark.parametrize(("format_name", "reads"), [("gptq", gptq), ("gptq_v2", gptq), ("awq", awq), ("qjax", None)])
def test_weights_have_the_checkpoints_names_and_rows(
    model: qjax.Model, tmp_path: Path, format_name: str, reads: Any
) -> None:
    folder = qjax.save(model, tmp_path / "out", format_name)
    checkpoint = open_checkpoint(folder)
    found = descriptions([folder / "model.safetensors"])
    for weight in checkpoint_weights(model.params, model.config):
        array = plain_numpy(weight.array)
        if not isinstance(array, QuantizedArray):
            stored = tensor(checkpoint, weight.name)
            np.testing.assert_array_equal(stored.astype(np.float32), np.asarray(array, np.float32))
            continue
        if reads is None:
            back: Any = read_native(checkpoint, weight.name, found[weight.name])
        else:
            facts = awq.AWQFacts() if reads is awq else gptq.GPTQFacts(4, 2 if format_name == "gptq_v2" else 1)
            back = reads.read({s: tensor(checkpoint, f"{weight.module}.{s}") for s in reads.SUFFIXES}, facts)
        if weight.heads is not None:
            order = rotary_neighbours(array.shape[0], weight.heads)
            back = back.map_rows(lambda leaf, order=order: leaf[order])
        jax.tree.map(np.testing.assert_array_equal, back, array)


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_config_and_card(model: qjax.Model, tmp_path: Path) -> None:
    told = Provenance("ann/base", "GPTQ(percdamp=0.01)", ["attn -> w4g32"], "text | 128 x 256", {"perplexity": 5.25})
    folder = qjax.save(model, tmp_path / "out", "gptq", provenance=told)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == json.loads((folder / "quantize_config.json").read_text())
    card = (folder / "README.md").read_text()
    for words in (
        "base_model: ann/base",
        "| perplexity | 5.25 |",
        "text \\| 128 x 256",
        "4-bit symmetric, groups of 32",
    ):
        assert words in card
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_shards_and_an_index(model: qjax.Model, tmp_path: Path) -> None:
    told: list[str] = []
    whole = qjax.save(model, tmp_path / "whole", "gptq", progress=told.append)
    parts = qjax.save(model, tmp_path / "parts", "gptq", max_shard_bytes=200_000)
    one, many = open_checkpoint(whole), open_checkpoint(parts)
    index = json.loads((parts / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.tensors.values())
    assert one.tensors.keys() == many.tensors.keys() == index["weight_map"].keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.raw(name), many.raw(name))
    assert len(told) == len(list(checkpoint_weights(model.params, model.config)))


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_saving_twice_gives_the_same_bytes(model: qjax.Model, tmp_path: Path) -> None:
    folders = [
        qjax.save(model, tmp_path / name / "out", "qjax") for name in ("a", "b") if not (tmp_path / name).mkdir()
    ]
    first, second = ({e.name: e.read_bytes() for e in folder.iterdir()} for folder in folders)
    assert first == second


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_what_a_format_cannot_hold_is_named_and_nothing_stays(write_model: WriteModel, tmp_path: Path) -> None:
    path = write_model(meta={"tokenizer.ggml.model": "none"})
    for spoilt, format_name, words in (
        (
            quantized(path, ffn_down="w5g32"),
            "gptq",
            r"^model\.layers\.0\.mlp\.down_proj\.weight: .*saved as compressed",
        ),
        (
            quantized(path, attn_q="w8"),
            "awq",
            r"^model\.layers\.0\.self_attn\.q_proj\.weight: .*saved as gptq, gptq_v2",
        ),
        (with_zero_points_of_zero(path), "gptq", r"^model\.layers\.1\.mlp\.up_proj\.weight: .*save as gptq_v2"),
        (qjax.load(path), "gptq", "no weight is quantized"),
        (with_minimums(path), "awq", "minimum.*saved as qjax"),
    ):
        with pytest.raises(QjaxError, match=words):
            qjax.save(spoilt, tmp_path / "out", format_name)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=r"^blk\.0\.attn_q\.weight: no GGUF type"):
        qjax.save(quantized(path, attn_q="w4g16"), tmp_path / "out.gguf")


@pytest.mark.filterwarnings("ignore:tokenizer.json and", "ignore:.*only token ids go")
def test_gguf_leaves_the_rounding_of_activations_out_and_says_so_once(write_model: WriteModel, tmp_path: Path) -> None:
    given = quantized(write_model(meta={"tokenizer.ggml.model": "none"}), "w8")
    for layer in given.params["layers"]:
        for name in ("ffn_up", "ffn_down"):
            layer[name] = TransformedArray(layer[name], rounding="int8")
    folder = qjax.save(given, tmp_path / "w8a8", "qjax")
    for path, write in (
        (folder, lambda: qjax.convert(folder, tmp_path / "converted.gguf")),
        (folder, lambda: qjax.convert(folder, tmp_path / "floats.gguf", quantize="f16")),
        (tmp_path / "saved.gguf", lambda: qjax.save(qjax.load(folder), tmp_path / "saved.gguf")),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            write()
        (said,) = (str(w.message) for w in caught if "activations are rounded" in str(w.message))
        assert said.startswith(f"{path}: blk.0.ffn_")
        assert f".weight and {2 * given.config.layers - 1} more: " in said
    saved, converted = (open_gguf(tmp_path / f"{name}.gguf") for name in ("saved", "converted"))
    assert saved.tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert all(np.array_equal(saved.raw(name), converted.raw(name)) for name in converted.tensors)


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_a_folder_that_is_there_stays(model: qjax.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    qjax.save(model, tmp_path / "out", "awq")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(QjaxError, match="there is a folder with files already"):
        qjax.save(model, tmp_path / "out", "gptq")
    assert (tmp_path / "out" / "mine.txt").exists()

    def fail(*_: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qjax.formats.huggingface.writer.data_of", fail)
        with pytest.raises(KeyboardInterrupt):
            qjax.save(model, tmp_path / "out", "gptq", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").exists()
    qjax.save(model, tmp_path / "out", "gptq", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file", "it is a file"), (tmp_path / "no" / "out", "make it first")):
        with pytest.raises(QjaxError, match=words):
            qjax.save(model, path, "gptq")


@pytest.mark.filterwarnings("ignore:tokenizer.json and")
def test_embeddings_that_a_format_has_no_place_for_become_floats(write_model: WriteModel, tmp_path: Path) -> None:
    path = write_model(meta={"tokenizer.ggml.model": "none"})
    packed = quantized(path, token_embd="w8", output="w8")
    with pytest.warns(QjaxWarning, match=r"embed_tokens\.weight is 8-bit .* becomes float16"):
        folder = qjax.save(packed, tmp_path / "out", "gptq")
    tensors = open_checkpoint(folder).tensors
    assert tensors["model.embed_tokens.weight"].dtype == "F16"
    assert "lm_head.qweight" in tensors
    with pytest.warns(QjaxWarning) as seen:
        qjax.save(packed, tmp_path / "awq", "awq")
    assert any("lm_head.weight is 8-bit" in str(warning.message) for warning in seen)
    qjax.save(packed, tmp_path / "qjax", "qjax")
    assert "model.embed_tokens.weight/planes.0" in open_checkpoint(tmp_path / "qjax").tensors


@pytest.mark.parametrize("format_name", [*sorted(TARGETS), "gguf"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:tokenizer.json and", "ignore:.*only token ids go")
def test_what_was_saved_is_loaded_again(write_model: WriteModel, tmp_path: Path, arch: str, format_name: str) -> None:
    given = quantized(write_model(arch, meta={"tokenizer.ggml.model": "none"}), "w4g32", attn_v="w4g64")
    if format_name == "awq":
        given = quantized(given.source)
    path = qjax.save(given, tmp_path / ("out.gguf" if format_name == "gguf" else "out"), format_name)
    again = qjax.load(path)
    assert again.config == given.config
    for (key, a), (_, b) in zip(*(gguf_tensors(m.params, m.config) for m in (given, again)), strict=True):
        a, b = plain_numpy(a), plain_numpy(b)
        if jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b):
            same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
            assert all(jax.tree.leaves(same)), key
        else:
            assert format_name == "gguf"
            np.testing.assert_array_equal(*(jax.tree.map(jnp.asarray, x).dequantize() for x in (a, b)))


@pytest.mark.filterwarnings("ignore:tokenizer.json and", "ignore:.*only token ids go")
@pytest.mark.parametrize(
    "name", ["llama", "llama-3", "llama-tied", "llama-linear", "llama-head-dim", "mistral", "qwen2"]
)
def test_a_config_made_of_a_gguf_file_says_what_the_file_does(name: str, tmp_path: Path) -> None:
    given = quantized(GOLDENS / f"{name}.gguf", "w4")
    again = qjax.load(qjax.save(given, tmp_path / "out", "qjax"))
    assert again.config == given.config
    np.testing.assert_allclose(again.params["rope"], given.params["rope"], rtol=1e-6)
    assert again.params.keys() == given.params.keys()


@pytest.mark.parametrize("name", ["llama-3", "llama-spm", "qwen2", "qwen3"])
def test_a_tokenizer_made_of_metadata_has_the_same_metadata(name: str, tmp_path: Path) -> None:
    metadata = open_folder(GOLDENS / "hf" / name).metadata
    # Where ids of special tokens are looked for that tokenizer.model alone does not name.
    config = config_of({**open_gguf(GOLDENS / "llama.gguf").metadata, **metadata}, (), 1, "float16", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file, data in tokenizer_files(metadata).items():
        (tmp_path / file).write_bytes(data)
    writer = gguf.GGUFWriter(None, metadata["general.architecture"])
    add_vocabulary(writer, tmp_path, metadata["general.architecture"], len(metadata["tokenizer.ggml.tokens"]))
    made = {key: entry.value for key, entry in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            assert np.array_equal(made.get(key, False), value), key


def test_a_folders_files_are_taken_over(tmp_path: Path) -> None:
    source = GOLDENS / "hf" / "qwen3"
    folder = qjax.save(quantized(source, "w4"), tmp_path / "out", "compressed-tensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    given, made = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert made == given


class Grid(NamedTuple):
    """How one matrix is packed."""

    bits: int
    group_size: int
    asymmetric: bool
    order: Literal["plain", "whole groups", "mixed"]

    def array(self, w: np.ndarray, seed: int) -> Any:
        """Codes around their zero points, as those of weights are."""
        rng, (out, columns) = np.random.default_rng(seed), w.shape
        size = columns if self.group_size == -1 else self.group_size
        middle, most = 1 << (self.bits - 1), (1 << self.bits) - 1
        zero = rng.integers(max(middle - 2, 1), min(middle + 2, most), (out, columns // size), endpoint=True)
        zero = zero if self.asymmetric else np.full_like(zero, middle)
        codes = np.rint(rng.normal(np.repeat(zero, size, axis=1), middle / 2.5)).clip(0, most).astype(np.uint8)
        scale = rng.uniform(0.001, 0.01, zero.shape).astype(np.float16)
        inner = affine(codes, scale, zero.astype(np.uint8) if self.asymmetric else None, self.bits)
        if self.order == "plain":
            return inner
        order = np.arange(columns).reshape(-1, size)[rng.permutation(columns // size)]
        order = rng.permuted(order, axis=1).ravel() if self.order == "whole groups" else rng.permutation(columns)
        return TransformedArray(inner, columns=order.astype(np.int32))


def grids(bits: Sequence[int]) -> st.SearchStrategy[Grid]:
    orders = st.sampled_from(["plain", "whole groups", "mixed"])
    return st.builds(Grid, st.sampled_from(bits), st.sampled_from([32, 64, 128, -1]), st.booleans(), orders)


ANY_BITS = {"gptq": gptq.BITS, "gptq_v2": gptq.BITS, "awq": (4,)}


@pytest.mark.filterwarnings("ignore:tokenizer.json and", "ignore:.*only token ids go", "ignore:.*by act-order")
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("format_name", sorted(TARGETS))
@given(st.data())
def test_every_grid_is_loaded_as_it_was_packed(write_model: WriteModel, format_name: str, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(grids(ANY_BITS.get(format_name, (2, 3, 4, 5, 6, 8))), min_size=7, max_size=7))
    if format_name == "awq":
        drawn = [grid._replace(group_size=drawn[0].group_size, order="plain") for grid in drawn]
    path = write_model(layers=1, meta={"tokenizer.ggml.model": "none"})
    arrays: dict[str, Any] = {}

    def make(name: str, w: np.ndarray) -> Any:
        if not name.startswith("blk."):
            return np.asarray(w, np.float16)
        arrays[name] = drawn[len(arrays)].array(w, len(arrays))
        return arrays[name]

    given_model = qjax.load(path, quantize=make)
    with tempfile.TemporaryDirectory() as folder:
        again = qjax.load(qjax.save(given_model, Path(folder) / "out", format_name))
        for name, array in gguf_tensors(again.params, again.config):
            if name not in arrays:
                continue
            a, b = affine_parts(arrays[name], "?"), affine_parts(plain_numpy(array), "?")
            np.testing.assert_array_equal(a.codes(), b.codes())
            for x, y in ((a.array.scale, b.array.scale), (a.zeros, b.zeros)):
                np.testing.assert_array_equal(x[:, a.group_of_columns()], y[:, b.group_of_columns()])
