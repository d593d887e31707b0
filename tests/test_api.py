"""The public face on files: what goes in comes out, quantized as gguf's own encoders do it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.arrays import QuantizedArray
from qjax.errors import FormatError, QjaxError, QjaxWarning
from qjax.evaluate.shapes import Shape, llama, metadata
from qjax.evaluate.synthetic import save_synthetic, synthetic_blocks
from qjax.formats.gguf import open_gguf, to_blocks
from qjax.formats.gguf.writer import TensorToWrite, write_gguf
from qjax.models.load import expected_shapes, read_array
from qjax.models.rewrite import PLAIN_TYPES

SHAPE = Shape("tiny", llama(layers=1, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=320, context=128))
K_SHAPE = Shape("tiny", llama(layers=2, hidden=256, heads=4, kv_heads=2, ffn=256, vocab=320, context=128))
Q8_0, NVFP4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.NVFP4
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up model of float16 matrices and float32 norms."""
    path = tmp_path_factory.mktemp("api") / "f16.gguf"
    save_synthetic(path, SHAPE, "f16")
    return path


def write(path: Path, shape: Shape, kind: Callable[[str], str], extra: tuple[TensorToWrite, ...] = ()) -> Path:
    """A made-up model whose tensors have the types that `kind(name)` gives."""
    shapes = {name: size for name, size in expected_shapes(shape.config).items() if name.endswith(".weight")}
    shapes.pop("rope_freqs.weight")
    tensors = [TensorToWrite(n, s, kind(n), synthetic_blocks(n, kind(n), s)) for n, s in shapes.items()]
    write_gguf(path, metadata(shape, "f16"), [*tensors, *extra])
    return path


def read(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor, by the gguf package."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def same_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@jax.jit
def dequantized(w: Any) -> Any:
    return w.dequantize(jnp.float32)


def data_section(path: Path) -> bytes:
    return path.read_bytes()[min(info.offset for info in open_gguf(path).tensors.values()) :]


@pytest.mark.parametrize("mix", ["f16", "bf16", "q4_0", "q5_1", "q8_0", "q4_k_m", "q2_k", "iq2_xs"])
def test_what_is_loaded_is_saved_to_the_same_bytes(mix: str, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    save_synthetic(source, K_SHAPE, mix)
    model = qjax.load(source)
    assert model.source == source
    assert qjax.save(model, tmp_path / "saved.gguf") == tmp_path / "saved.gguf"
    assert read(tmp_path / "saved.gguf") == read(source)
    qjax.convert(source, tmp_path / "converted.gguf")
    assert (tmp_path / "converted.gguf").read_bytes() == source.read_bytes()
    before, after = open_gguf(source), open_gguf(tmp_path / "saved.gguf")
    assert list(before.metadata) == list(after.metadata)
    assert dict(before.metadata_types) == dict(after.metadata_types)


def test_files_of_llama_cpp_come_back_whole(interop: Path, tmp_path: Path) -> None:
    files = sorted(interop.glob("*.gguf"))
    assert files
    for path in files:
        target = tmp_path / "converted.gguf"
        qjax.convert(path, target)
        assert data_section(target) == data_section(path), path.name
        before, after = open_gguf(path), open_gguf(target)
        assert {n: (i.type, i.shape) for n, i in before.tensors.items()} == {
            n: (i.type, i.shape) for n, i in after.tensors.items()
        }
        assert dict(before.metadata_types) == dict(after.metadata_types)
        for name in before.tensors:
            # By way of packed arrays, which `save` goes.
            packed = read_array(before, name, apply_scale=False)
            assert to_blocks(packed).tobytes() == before.raw(name).tobytes(), f"{path.name}: {name}"


# The encoders of all types have their own tests.
@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "bf16", "f32"])
def test_conversion_encodes_as_gguf_does(f16: Path, name: str, tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    told: list[str] = []
    qjax.convert(f16, target, quantize=name, progress=told.append)
    assert told == list(open_gguf(f16).tensors)
    kind = gguf.GGMLQuantizationType[name.upper()]
    got, reader = read(target), gguf.GGUFReader(f16)
    assert set(got) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.data.ndim == 2:
            want = kind.name, gguf.quants.quantize(tensor.data.astype(np.float32), kind).tobytes()
        else:
            want = tensor.tensor_type.name, tensor.data.tobytes()
        assert got[tensor.name] == want, tensor.name
    made = open_gguf(target).metadata
    assert made["general.file_type"] == PLAIN_TYPES[name] == gguf.LlamaFileType[_file_type(name)].value
    assert made["general.architecture"] == "llama"


def _file_type(name: str) -> str:
    return "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"


@pytest.mark.parametrize("name", ["q4_0", "Q8_0", "q5_1", "f32"])
def test_quantized_while_loading_is_the_converted_file(f16: Path, name: str, tmp_path: Path) -> None:
    loaded = qjax.load(f16, quantize=name)
    qjax.convert(f16, tmp_path / "x.gguf", quantize=name)
    same_trees(loaded.params, qjax.load(tmp_path / "x.gguf").params)
    qjax.save(loaded, tmp_path / "saved.gguf")
    assert read(tmp_path / "saved.gguf") == read(tmp_path / "x.gguf")
    assert open_gguf(tmp_path / "saved.gguf").metadata["general.file_type"] == PLAIN_TYPES[name.lower()]


def test_a_function_quantizes_too(f16: Path) -> None:
    asked: list[str] = []

    def make(name: str, w: Any) -> Any:
        asked.append(name)
        return qjax.quantizer("q8_0" if "ffn" in name else "q4_0")(name, w)

    params = qjax.load(f16, quantize=make).params
    assert len(asked) == 2 + 7
    layer = params["layers"][0]
    assert layer["ffn_up"].bits_per_weight == 8.5
    assert layer["attn_q"].bits_per_weight == 4.5


def test_a_model_may_be_written_over_itself(f16: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(f16.read_bytes())
    before = read(path)
    qjax.convert(path, path)
    assert read(path) == before
    model = qjax.load(path)
    qjax.save(model, path)
    assert read(path) == before
    qjax.convert(path, path, quantize="q8_0")
    assert read(path)["output.weight"][0] == "Q8_0"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_shards_become_one_file(f16: Path, tmp_path: Path) -> None:
    """Shards by the gguf package."""
    reader = gguf.GGUFReader(f16)
    writer = gguf.GGUFWriter(tmp_path / "many.gguf", "llama", split_max_tensors=5)
    for key, value in open_gguf(f16).metadata.items():
        if key.startswith("llama."):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3
    qjax.convert(shards[0], tmp_path / "one.gguf")
    assert read(tmp_path / "one.gguf") == read(f16)
    same_trees(qjax.load(shards[1]).params, qjax.load(f16).params)


def test_types_that_qjax_does_not_compute_with_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    extra = [
        TensorToWrite("ids", (7,), "I32", rng.integers(0, 256, 28, dtype=np.uint8)),
        TensorToWrite("wide", (3, 2), "F64", np.arange(6, dtype=np.float64).view(np.uint8) + np.uint8(1)),
        TensorToWrite("three", (2, 3, 4), "F16", rng.integers(0, 60, 48, dtype=np.uint8)),
    ]
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "none"}, extra)
    qjax.convert(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert read(tmp_path / "b.gguf") == read(tmp_path / "a.gguf")
    # A float64 matrix is a float one: it may be quantized.
    qjax.convert(tmp_path / "a.gguf", tmp_path / "c.gguf", quantize="f32")
    made = read(tmp_path / "c.gguf")
    wide = np.frombuffer(read(tmp_path / "a.gguf")["wide"][1]).astype(np.float32)
    assert made["wide"] == ("F32", wide.tobytes())
    assert made["ids"][0] == "I32"


def test_rows_that_do_not_fit_stay_float16(tmp_path: Path) -> None:
    """FFN rows of 80 are no whole blocks of 32."""
    shape = dataclasses.replace(SHAPE, config=dataclasses.replace(SHAPE.config, ffn=80))
    path = write(tmp_path / "odd.gguf", shape, lambda name: "F32" if "norm" in name else "BF16")
    words = r"blk.0.ffn_down.weight: rows of 80 are not whole Q4_0 blocks of 32; kept as F16"
    with pytest.warns(QjaxWarning, match=words) as told:
        model = qjax.load(path, quantize="q4_0")
    assert len(told) == 1
    down, up = model.params["layers"][0]["ffn_down"], model.params["layers"][0]["ffn_up"]
    assert down.dtype == jnp.float16
    assert isinstance(up, QuantizedArray)
    with pytest.warns(QjaxWarning, match=words):
        qjax.convert(path, tmp_path / "x.gguf", quantize="q4_0")
    same_trees(qjax.load(tmp_path / "x.gguf").params, model.params)
    assert "".join(model.generate("a b", max_tokens=3, temperature=0)) is not None


def test_packed_tensors_are_not_quantized_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", SHAPE, lambda n: "F32" if "norm" in n else "Q8_0" if "ffn" in n else "F16")
    with pytest.warns(QjaxWarning, match="is Q8_0 already and stays so: quantize from a float file") as told:
        qjax.convert(path, tmp_path / "x.gguf", quantize="q4_0")
    assert sorted(str(w.message).split()[0] for w in told) == [f"blk.0.ffn_{x}.weight" for x in ("down", "gate", "up")]
    before, after = read(path), read(tmp_path / "x.gguf")
    assert after["blk.0.ffn_up.weight"] == before["blk.0.ffn_up.weight"]
    assert after["blk.0.attn_q.weight"][0] == "Q4_0"


def test_every_array_goes_where_place_puts_it(f16: Path) -> None:
    device = jax.devices()[3]
    placed: list[str] = []
    told: list[str] = []

    def place(name: str, array: Any) -> Any:
        placed.append(name)
        return jax.device_put(array, device)

    model = qjax.load(f16, quantize="q8_0", place=place, progress=told.append)
    names = [tensor.name for tensor in gguf.GGUFReader(f16).tensors]
    assert sorted(placed) == sorted([*names, "rope"])
    assert sorted(told) == sorted(names)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(model.params))


def test_what_cannot_be_quantized_is_named(f16: Path, tmp_path: Path) -> None:
    known = "known are f32, f16, q4_0, q4_1, q8_0, q5_0, q5_1, bf16"
    for call in (lambda: qjax.load(f16, quantize="q9_9"), lambda: qjax.convert(f16, tmp_path / "x", quantize="q9_9")):
        with pytest.raises(QjaxError, match=f"cannot quantize to 'q9_9'; {known}"):
            call()
    data = bytearray(f16.read_bytes())
    offset = open_gguf(f16).tensors["blk.0.attn_k.weight"].offset
    data[offset : offset + 2] = np.float16(np.nan).tobytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(QjaxError, match=r"blk\.0\.attn_k\.weight"):
        qjax.load(bad, quantize="q8_0")
    with pytest.raises(QjaxError, match=r"blk\.0\.attn_k\.weight"):
        qjax.convert(bad, tmp_path / "x.gguf", quantize="q8_0")
    # Nothing is left of the attempt.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.gguf"]


def test_nvfp4_scales_are_applied_and_kept(f16: Path, tmp_path: Path) -> None:
    """As llama.cpp's converter writes them: packed blocks, and one number a matrix that multiplies it."""
    source, rng = tmp_path / "nvfp4.gguf", np.random.default_rng(5)
    writer = gguf.GGUFWriter(source, "llama")
    for key, value in open_gguf(f16).metadata.items():
        if key.startswith("llama."):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    want: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(f16).tensors:
        name = tensor.name
        if not name.startswith("blk.") or tensor.data.ndim < 2:
            writer.add_tensor(name, np.asarray(tensor.data))
            continue
        packed = synthetic_blocks(name, "NVFP4", tuple(tensor.data.shape))
        writer.add_tensor(name, packed, raw_dtype=NVFP4)
        want[name] = gguf.quants.dequantize(packed, NVFP4)
        if "ffn" in name:
            scale = rng.uniform(0.1, 3, 1).astype(np.float32)
            writer.add_tensor(name.replace(".weight", ".scale"), scale)
            want[name] = want[name] * scale
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = qjax.load(source)
    for name, values in want.items():
        w = model.params["layers"][0][name.split(".")[2]]
        assert isinstance(w, QuantizedArray)
        np.testing.assert_array_equal(np.asarray(dequantized(w)), values, err_msg=name)
    assert sum(name.endswith(".scale") for name in read(source)) == 3
    qjax.convert(source, tmp_path / "converted.gguf")
    assert read(tmp_path / "converted.gguf") == read(source)
    qjax.save(model, tmp_path / "saved.gguf")
    assert read(tmp_path / "saved.gguf") == read(source)


def test_memory_is_the_file_s(f16: Path) -> None:
    model = qjax.load(f16)
    tensors = gguf.GGUFReader(f16).tensors
    assert model.memory.nbytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert model.memory.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    packed = qjax.load(f16, quantize="q4_0")
    assert packed.memory.parameters == model.memory.parameters
    assert packed.memory.bits_per_weight < 4.6


def test_generated_text_is_what_the_ids_say(f16: Path) -> None:
    model = qjax.load(f16)
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    pieces = list(model.stream("the cat", **options))
    ids = [piece.id for piece in pieces if piece.id is not None]
    text = "".join(piece.text for piece in pieces)
    assert text == model.tokenizer.decode(ids, continuing=True)
    assert "".join(model.generate("the cat", **options)) == text
    prompt = model.encode("the cat")
    assert prompt[0] == model.tokenizer.bos_id
    assert "".join(model.generate(prompt, **options)) == text
    cut = text[4:6]
    assert "".join(model.generate(prompt, stop=[cut], **options)) == text[: text.index(cut)]


def test_a_seed_decides_what_is_sampled(f16: Path) -> None:
    model = qjax.load(f16)
    texts = ["".join(model.generate("a", max_tokens=20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_wrong_number_is_told_before_anything_runs(f16: Path) -> None:
    model = qjax.load(f16)
    with pytest.raises(QjaxError, match=r"expected top-p in \(0, 1\], got 2"):
        model.stream("a", top_p=2)
    with pytest.raises(QjaxError, match="exceed the context of 128"):
        list(model.generate("a", max_tokens=128))


def test_a_conversation_goes_through_the_template(f16: Path) -> None:
    plain = qjax.load(f16)
    model = dataclasses.replace(plain, metadata=dict(plain.metadata) | {"tokenizer.chat_template": TEMPLATE})
    messages = [{"role": "user", "content": "hi"}]
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    answer = "".join(model.chat(messages, **options))
    assert answer == "".join(plain.generate("<user> hi\n", **options))
    with pytest.warns(QjaxWarning, match="no chat template"):
        list(plain.chat(messages, **options))


def test_a_model_without_tokenizer_runs_on_ids(f16: Path, tmp_path: Path) -> None:
    file = open_gguf(f16)
    kept = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
    tensors = [TensorToWrite(n, i.shape, i.type, np.array(file.raw(n))) for n, i in file.tensors.items()]
    write_gguf(tmp_path / "ids.gguf", kept, tensors)
    model = qjax.load(tmp_path / "ids.gguf")
    logits, cache = qjax.forward(model.params, model.config, jnp.asarray([[1, 2, 3]], jnp.int32))
    assert logits.shape == (1, 3, 320)
    assert cache is None
    with pytest.raises(FormatError, match="tokenizer"):
        model.encode("a")


def test_an_array_that_gguf_cannot_hold_is_not_saved(f16: Path, tmp_path: Path) -> None:
    model = qjax.load(f16)
    params = model.params | {"output": model.params["output"].astype(jnp.float8_e4m3fn)}
    with pytest.raises(QjaxError, match="GGUF cannot hold an array of float8_e4m3fn"):
        qjax.save(dataclasses.replace(model, params=params), tmp_path / "x.gguf")
