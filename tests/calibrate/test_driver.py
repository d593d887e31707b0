"""The loop over blocks: equal to doing each by hand, and to itself after a stop at any block."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looking import CONFIG, TOKENS, W4, Looking, save_tiny

import qjax
from qjax.arrays import AffineArray, QuantizedArray, Scheme, parse_scheme
from qjax.calibrate.blocks import Block, Made
from qjax.calibrate.checkpoints import open_checkpoints
from qjax.calibrate.driver import FloatModel, Quantized, model_in, model_of, quantize_blocks
from qjax.calibrate.methods.rtn import RTN
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.gguf import open_gguf
from qjax.formats.rules import parse_rule, schemes_by
from qjax.models.forward import begin
from qjax.models.load import MATRICES, NORMS, expected_shapes
from qjax.quantizers.rtn import rtn


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("driver") / "tiny.gguf")


@pytest.fixture(scope="module")
def floats(path: Path) -> FloatModel:
    return model_in(open_gguf(path))


def schemes(*rules: str) -> dict[str, Scheme]:
    shapes = {name: shape for name, shape in expected_shapes(CONFIG).items() if len(shape) == 2}
    return schemes_by(shapes, W4, [parse_rule(rule) for rule in rules])


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def by_hand(params: dict[str, Any], config: Any, of: dict[str, Scheme], tokens: np.ndarray, batch: int) -> list[Any]:
    """The blocks of `Looking`, without the driver."""
    method, layers = Looking(), []
    hidden = []
    for i in range(0, len(tokens), batch):
        x = begin(params, jnp.asarray(tokens[i : i + batch]), jnp.zeros(batch, jnp.int32))[0]
        hidden.append(np.asarray(x))
    exact = list(hidden)
    for i, p in enumerate(params["layers"]):
        mine = {name: of[f"blk.{i}.{name}.weight"] for name in MATRICES if f"blk.{i}.{name}.weight" in of}
        block = Block(i, p, mine, config, params["rope"], np.concatenate(hidden), np.concatenate(exact), batch)
        made = method(block)[0] if mine else p
        layers.append(made)
        hidden = [block.outputs(made, x) for x in hidden]
        exact = [block.outputs(p, x) for x in exact]
    return layers


def test_the_loop_is_each_block_by_hand(floats: FloatModel) -> None:
    """Of a file, and of the same params in memory; matrices by rules are left alone."""
    of = schemes("blk.1.*=keep", "layers.3.mlp=w8")
    params = jax.tree.map(jnp.asarray, {**floats.ends, "layers": [floats.read(i) for i in range(4)]})
    told: list[tuple[int, int]] = []
    tell = lambda done, total, note: told.append((done, total))
    made = quantize_blocks(floats, Looking(), of, TOKENS, batch=2, progress=tell)
    hand = by_hand(params, CONFIG, of, TOKENS, 2)
    assert same(made.params["layers"], hand)
    again = quantize_blocks(model_of(params, CONFIG), Looking(), of, TOKENS, batch=2)
    assert same(again.params["layers"], hand)
    assert told == [(i, 4) for i in range(5)]
    assert [line.name for line in made.lines] == [name for name in in_order() if name in of]
    assert {line.scheme for line in made.lines} == {"w4g32", "w8"}
    assert made.params["layers"][1]["attn_q"].dtype == np.float16
    assert isinstance(made.params["token_embd"], jax.Array)


def in_order() -> list[str]:
    return [f"blk.{i}.{name}.weight" for i in range(4) for name in MATRICES]


class Stopped(Exception):
    pass


def stopping(after: int) -> Any:
    def stop(done: int, total: int, note: str) -> None:
        if done == after:
            raise Stopped

    return stop


@pytest.fixture(scope="module")
def undisturbed(floats: FloatModel) -> Quantized:
    return quantize_blocks(floats, Looking(), schemes(), TOKENS)


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_stopped_run_goes_on(after: int, floats: FloatModel, undisturbed: Quantized, tmp_path: Path) -> None:
    """At any block; what was done is not done again, and the rest is what it would have been."""
    read: list[int] = []
    model = dataclasses.replace(floats, read=lambda i: [read.append(i), floats.read(i)][1])
    folder = tmp_path / "out.partial"
    with open_checkpoints(folder, {"model": 1}) as kept, pytest.raises(Stopped):
        quantize_blocks(model, Looking(), schemes(), TOKENS, checkpoints=kept, progress=stopping(after))
    with open_checkpoints(folder, {"model": 1}) as kept:
        assert kept.count(4) == after
        read.clear()
        made = quantize_blocks(model, Looking(), schemes(), TOKENS, checkpoints=kept)
        assert made.resumed == after
        # Float hidden states go through the float blocks, where one is still to do.
        assert read == (list(range(4)) if after < 4 else [])
        assert same(made.params, undisturbed.params)
        assert made.lines == undisturbed.lines
        kept.remove()
    assert not list(tmp_path.iterdir())


def test_a_method_without_inputs(floats: FloatModel, tmp_path: Path) -> None:
    """Needs no data; what is laid out and placed is not what the checkpoints hold."""
    shift = lambda name, array: array.replace(scale=array.scale * 2) if isinstance(array, AffineArray) else array
    placed: list[str] = []
    place = lambda name, array: [placed.append(name), array][1]
    with open_checkpoints(tmp_path / "p", {"model": 1}) as kept:
        made = quantize_blocks(floats, RTN(), schemes("output.weight=w8"), checkpoints=kept, lay_out=shift, place=place)
        found, _ = kept.read(2)
    for i in range(4):
        want = rtn(jnp.asarray(floats.read(i)["ffn_up"]), W4)
        assert same(made.params["layers"][i]["ffn_up"], shift("", want))
        if i == 2:
            assert same(found["ffn_up"], want)
    want = rtn(jnp.asarray(floats.ends["output"]), parse_scheme("w8"))
    assert same(made.params["output"], shift("", want))
    assert isinstance(made.params["token_embd"], jax.Array)
    assert set(placed) == {"rope", "token_embd.weight", "output.weight", "output_norm.weight"} | {
        f"blk.{i}.{name}.weight" for i in range(4) for name in (*MATRICES, *NORMS)
    }
    assert [line.name for line in made.lines] == ["output.weight", *in_order()]


def test_a_rounded_embedding_is_what_blocks_are_shown(floats: FloatModel) -> None:
    seen: list[Block] = []

    @dataclasses.dataclass(frozen=True)
    class Seeing(Looking):
        def __call__(self, block: Block) -> Made:
            seen.append(dataclasses.replace(block, inputs=block.inputs.copy(), float_inputs=block.float_inputs.copy()))
            return Made(dict(block.weights), [])

    made = quantize_blocks(floats, Seeing(), schemes("embed=w2g32"), TOKENS[:1])
    rows = np.asarray(made.params["token_embd"].dequantize())[TOKENS[:1]]
    np.testing.assert_array_equal(seen[0].inputs, rows)
    np.testing.assert_array_equal(seen[0].float_inputs, np.float32(floats.ends["token_embd"])[TOKENS[:1]])


@pytest.mark.filterwarnings("ignore:.*stays so")
def test_what_is_packed_already_stays(path: Path, tmp_path: Path) -> None:
    quantize = qjax.quantizer("q8_0")
    some = qjax.load(path, quantize=lambda name, w: quantize(name, w) if "ffn" in name else jnp.float16(w))
    qjax.save(some, tmp_path / "some.gguf")
    with pytest.warns(QjaxWarning, match=r"blk\.0\.ffn_up\.weight is 8\.5-bit already and stays so"):
        made = quantize_blocks(model_in(open_gguf(tmp_path / "some.gguf")), RTN(), schemes())
    assert made.params["layers"][0]["ffn_up"].bits_per_weight == 8.5
    assert str(made.lines[0].name) == "blk.0.attn_q.weight"
    assert not any("ffn" in line.name for line in made.lines)


def test_what_is_refused(floats: FloatModel) -> None:
    with pytest.raises(QjaxError, match="give calibration data"):
        quantize_blocks(floats, Looking(), schemes())

    def damaged(key: str) -> FloatModel:
        spoil = lambda w: np.full(w.shape, np.nan, w.dtype)
        read = lambda i: {k: spoil(w) if (i, k) == (1, key) else w for k, w in floats.read(i).items()}
        return dataclasses.replace(floats, read=read)

    with pytest.raises(QjaxError, match=r"blk\.1\.ffn_up\.weight: holds numbers that are not finite"):
        quantize_blocks(damaged("ffn_up"), RTN(), schemes())
    with pytest.raises(QjaxError, match="hidden states behind block 1 are not finite"):
        quantize_blocks(damaged("ffn_norm"), Looking(), schemes(), TOKENS[:1])


@pytest.fixture
def begun_run(floats: FloatModel, tmp_path: Path) -> Path:
    folder = tmp_path / "out.partial"
    with open_checkpoints(folder, {"model": 1, "data": 2}) as kept, pytest.raises(Stopped):
        quantize_blocks(floats, RTN(), schemes(), checkpoints=kept, progress=stopping(2))
    return folder


def test_another_run_is_not_gone_on_with(begun_run: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(QjaxError, match="unfinished run of another data: --fresh"),
        open_checkpoints(begun_run, {"model": 1, "data": 3}),
    ):
        pass
    with open_checkpoints(begun_run, {"model": 1, "data": 2}) as kept:
        assert kept.count(4) == 2
        with pytest.raises(QjaxError, match="another process"), open_checkpoints(begun_run, {"model": 1, "data": 2}):
            pass
    with open_checkpoints(begun_run, {"model": 1, "data": 3}, fresh=True) as kept:
        assert kept.count(4) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("hello", encoding="utf-8")
    for fresh in (False, True):
        with pytest.raises(QjaxError, match="no unfinished run"), open_checkpoints(tmp_path / "mine", {}, fresh=fresh):
            pass
    with pytest.raises(QjaxError, match="cannot be written"), open_checkpoints(tmp_path / "no" / "such", {}):
        pass


def test_damaged_checkpoints(begun_run: Path, floats: FloatModel) -> None:
    block = begun_run / "block-00001.safetensors"
    whole = block.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\xff" * 64, whole[:8] + b"{}" + whole[10:]):
        block.write_bytes(data)
        with (
            open_checkpoints(begun_run, {"model": 1, "data": 2}) as kept,
            pytest.raises(QjaxError, match=r"block-00001\.safetensors.*remove this file"),
        ):
            quantize_blocks(floats, RTN(), schemes(), checkpoints=kept)
    (begun_run / "run.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(QjaxError, match="is damaged"), open_checkpoints(begun_run, {"model": 1}):
        pass


def test_loading_with_a_recipe(path: Path, tmp_path: Path) -> None:
    """As it is run: quantized while it is loaded."""
    recipe = qjax.RTN(bits=4, group_size=32, rules=["ffn_down=w8", "blk.0.attn=keep"])
    told: list[str] = []
    model = qjax.load(path, quantize=recipe, progress=told.append)
    assert told == [f"block {i} of 4" for i in range(5)]
    layers = model.params["layers"]
    assert not isinstance(layers[0]["attn_q"], QuantizedArray)
    assert (layers[1]["attn_q"].bits_per_weight, layers[0]["ffn_down"].bits_per_weight) == (4.5, 8.25)
    logits, _ = qjax.forward(model.params, model.config, jnp.asarray(TOKENS))
    assert bool(jnp.isfinite(logits).all())
    with pytest.raises(QjaxError, match="is for a recipe"):
        qjax.load(path, quantize="q4_0", calibration="wikitext-2")
    with pytest.raises(QjaxError, match="RTN has no option 'act_order'"):
        qjax.RTN(act_order=True)
    qjax.convert(path, tmp_path / "q.gguf", quantize="q8_0")
    with pytest.raises(QjaxError, match="quantize from a float file"):
        qjax.load(tmp_path / "q.gguf", quantize=recipe)
