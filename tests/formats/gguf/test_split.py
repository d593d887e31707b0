"""Split models: shards written by gguf-py, then damaged in every way that has its own message."""

import hashlib
import shutil

import gguf
import numpy as np
import pytest

from qjax.errors import FormatError, QjaxError, QjaxWarning
from qjax.formats.gguf.container import open_gguf
from qjax.formats.gguf.writer import TensorToWrite, write_gguf


@pytest.fixture
def shards(tmp_path):
    """A model of 5 tensors in 3 shards."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    writer.add_string("general.name", "in three")
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((2, 3), index, np.float32))
    writer.write_header_to_file(tmp_path / "big.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [p.name for p in paths] == [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return paths


def rewrite(path, *, tensors=None, **changes):
    """The shard again, with `split.*` keys (dots as underscores) or tensors changed."""
    file = open_one(path)
    metadata = dict(file.metadata) | {key.replace("_", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    types = {k: t for k, t in file.metadata_types.items() if k not in metadata or k.replace(".", "_") not in changes}
    if tensors is None:
        tensors = [TensorToWrite(t.name, t.shape, t.type, file.raw(t.name)) for t in file.tensors.values()]
    # The writer drops the keys of a split, which is what is tested elsewhere: keep them under another name.
    hidden = {key.replace("split.", "spl1t."): value for key, value in metadata.items()}
    write_gguf(path, hidden, tensors, metadata_types={k.replace("split.", "spl1t."): t for k, t in types.items()})
    path.write_bytes(path.read_bytes().replace(b"spl1t.", b"split."))


def open_one(path):
    """Open one shard as if it were a model of its own."""
    hidden = path.with_name("single")
    hidden.write_bytes(path.read_bytes().replace(b"split.", b"spl1t."))
    file = open_gguf(hidden)
    file.metadata = {key.replace("spl1t.", "split."): value for key, value in file.metadata.items()}
    file.metadata_types = {key.replace("spl1t.", "split."): value for key, value in file.metadata_types.items()}
    hidden.unlink()
    return file


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_any_shard_opens_all(shards, asked):
    file = open_gguf(shards[asked])
    assert file.path == shards[0]
    assert file.shards == tuple(shards)
    assert file.metadata["general.name"] == "in three"
    assert list(file.tensors) == [f"t{n}" for n in range(5)]
    for index in range(5):
        assert file.tensors[f"t{index}"].path == shards[index // 2]
        assert file.raw(f"t{index}").view(np.float32).tolist() == [[index] * 3] * 2
        file.release(f"t{index}")


def test_relative_path(shards, monkeypatch):
    monkeypatch.chdir(shards[0].parent)
    assert len(open_gguf(shards[1].name).tensors) == 5


def test_written_as_one_file(shards, tmp_path):
    file = open_gguf(shards[0])
    tensors = [TensorToWrite(t.name, t.shape, t.type, file.raw(t.name)) for t in file.tensors.values()]
    write_gguf(tmp_path / "one.gguf", file.metadata, tensors, metadata_types=file.metadata_types)
    one = open_gguf(tmp_path / "one.gguf")
    assert not [key for key in one.metadata if key.startswith("split.")]
    assert all(one.raw(name).tobytes() == file.raw(name).tobytes() for name in file.tensors)
    assert len(gguf.GGUFReader(tmp_path / "one.gguf").tensors) == 5


def test_one_missing_shard_is_named(shards):
    shards[1].unlink()
    with pytest.raises(FormatError, match=r"shard \S*/big-00002-of-00003\.gguf is missing, expected 3 files in all"):
        open_gguf(shards[0])


def test_several_missing_shards(shards):
    shards[0].unlink()
    shards[1].unlink()
    with pytest.raises(FormatError, match=r"shard \S*/big-00001-of-00003\.gguf and 1 more is missing"):
        open_gguf(shards[2])


def test_shard_without_its_name(shards, tmp_path):
    shutil.copy(shards[0], tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"one of 3 shards, but its name does not end like -00001-of-00003\.gguf"):
        open_gguf(tmp_path / "model.gguf")


def test_name_and_count_disagree(shards):
    other = shards[0].with_name("big-00001-of-00004.gguf")
    shards[0].rename(other)
    with pytest.raises(FormatError, match=r"the name says 4 shards, split\.count in the file says 3"):
        open_gguf(other)


def test_whole_model_under_a_shard_name(tmp_path):
    path = tmp_path / "big-00001-of-00002.gguf"
    write_gguf(path, {"general.architecture": "llama"}, [])
    with pytest.raises(FormatError, match=r"the name says 2 shards, split\.count in the file says 1"):
        open_gguf(path)


def test_single_shard_and_merged_file_are_whole(tmp_path):
    for name, metadata in (("a-00001-of-00001.gguf", {}), ("merged.gguf", {"split.count": 0})):
        write_gguf(tmp_path / name, metadata, [])
        assert open_gguf(tmp_path / name).shards == (tmp_path / name,)


def test_number_beyond_the_count(shards):
    other = shards[0].with_name("big-00009-of-00003.gguf")
    shards[0].rename(other)
    with pytest.raises(FormatError, match="the name says shard 00009 of 3: the file is misnamed"):
        open_gguf(other)


def test_shards_in_the_wrong_order(shards, tmp_path):
    shards[1].rename(tmp_path / "x")
    shards[2].rename(shards[1])
    (tmp_path / "x").rename(shards[2])
    with pytest.raises(FormatError, match=r"big-00002-of-00003\.gguf: split\.no is 2, expected 1"):
        open_gguf(shards[0])


def test_second_shard_of_another_model(shards):
    rewrite(shards[1], split_count=7)
    with pytest.raises(FormatError, match=r"big-00002-of-00003\.gguf: split\.count is 7, expected 3"):
        open_gguf(shards[0])


def test_shard_without_number(shards):
    rewrite(shards[1], split_no=None)
    with pytest.raises(FormatError, match=r"big-00002-of-00003\.gguf: split\.no is -1, expected 1"):
        open_gguf(shards[0])


@pytest.mark.parametrize("value", ["3", 3.0, True, [3]])
def test_count_of_a_strange_type(shards, value):
    rewrite(shards[0], split_count=value)
    with pytest.raises(
        FormatError, match=r"big-00001-of-00003\.gguf: split\.count is of type \S+, expected an integer"
    ):
        open_gguf(shards[0])


def test_a_tensor_in_two_shards(shards):
    rewrite(shards[2], tensors=[TensorToWrite("t1", (1,), "F32", np.zeros(4, np.uint8))])
    with pytest.raises(FormatError, match=r"big-00003-of-00003\.gguf: tensor 't1' stands in big-00001-of-00003\.gguf"):
        open_gguf(shards[0])


def test_tensor_count(shards):
    rewrite(shards[2], tensors=[])
    with pytest.raises(FormatError, match=r"the 3 shards hold 4 tensors, expected 5"):
        open_gguf(shards[0])


def test_truncated_shard(shards):
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(QjaxError, match=r"big-00002-of-00003\.gguf: "):
        open_gguf(shards[0])


# SHA-256 of what `llama-gguf-split --split --split-max-size` of llama.cpp makes of files of the interop folder.
GGUF_SPLIT = {
    ("tiny-f16.gguf", 2_000_000): """
        938d5dbff5e54e55fb2f9d2e072a98a6ebbe1171d63d4ee98180fcea775cfaa7
        69ae8208c6b65e9c29cfc127520addd213ee167cc0231efc2b0defe4502cc7f2
        346dc4c601e0a9810302ad2174da57d94d3103c7b057e1d9db8b8870c438c09a
        b0ce53b937b8b7dcff32d59ebd95979fb8880218b9eeff4c3d3a16949bb71952
        396dbb1d6ef54601b53a4ce10368659e1ef7ef6d59d63c2cc76c3184f64f5940""",
    ("tiny-q4_K_M.gguf", 1_000_000): """
        126d47014469c1109ddc0be0a8fc31a8d48b02300af15605e53d1c546e7a3493
        c289d01f375992103b727f3faa49732b8da7d3e8a76f3d1a2e790b34be52701b
        d058b7cf7551fd25389f6b082b9eabc34209326dacc06910bd215dae59734481""",
}


def written(path, source, limit):
    file = open_gguf(source)
    tensors = [TensorToWrite(t.name, t.shape, t.type, file.raw(t.name)) for t in file.tensors.values()]
    return write_gguf(path, file.metadata, tensors, metadata_types=file.metadata_types, split_max_bytes=limit)


@pytest.mark.parametrize(("name", "limit"), GGUF_SPLIT)
def test_the_shards_of_gguf_split(interop, tmp_path, name, limit):
    theirs = GGUF_SPLIT[name, limit].split()
    paths = written(tmp_path / "model.gguf", interop / name, limit)
    assert [p.name for p in paths] == [f"model-{n + 1:05d}-of-{len(theirs):05d}.gguf" for n in range(len(theirs))]
    assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] == theirs


def test_shards_are_split_anew_and_joined(shards, tmp_path):
    """From three shards to five, and back to one file, with the same metadata."""
    whole = tmp_path / "whole.gguf"
    assert written(whole, shards[0], None) == written(whole, shards[0], 10**9) == [whole]
    five = written(tmp_path / "five.gguf", shards[0], 32)
    assert [list(gguf.GGUFReader(p).fields)[3:] for p in five[1:]] == [
        ["split.no", "split.tensors.count", "split.count"]
    ] * 4
    file = open_gguf(five[2])
    assert file.shards == tuple(five)
    assert [info.path for info in file.tensors.values()] == five
    written(tmp_path / "again.gguf", five[4], None)
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()


def test_a_tensor_larger_than_a_shard_is_named(tmp_path):
    sizes = {"a": 8, "large": 64, "b": 8, "c": 8}
    tensors = [TensorToWrite(name, (n,), "F32", np.zeros(4 * n, np.uint8)) for name, n in sizes.items()]
    with pytest.warns(QjaxWarning, match=r"m\.gguf: tensor 'large' has 256 bytes, more than the 64 of a shard"):
        paths = write_gguf(tmp_path / "m.gguf", {}, tensors, split_max_bytes=64)
    file = open_gguf(paths[0])
    assert [paths.index(info.path) for info in file.tensors.values()] == [0, 1, 2, 2]


def test_every_shard_has_the_alignment(tmp_path):
    tensors = [TensorToWrite(name, (8,), "F32", np.full(32, 7, np.uint8)) for name in "abc"]
    paths = write_gguf(tmp_path / "m.gguf", {"general.alignment": 256, "x": 1}, tensors, split_max_bytes=512)
    assert [gguf.GGUFReader(p).alignment for p in paths] == [256, 256]
    assert all(open_gguf(paths[0]).raw(name).tobytes() == b"\7" * 32 for name in "abc")


def test_more_shards_than_can_be_counted(tmp_path):
    tensors = [TensorToWrite(str(n), (8,), "F32", np.zeros(32, np.uint8)) for n in range(2**16)]
    with pytest.raises(FormatError, match=r"65536 shards of 32 bytes, expected up to 65535: allow more"):
        write_gguf(tmp_path / "m.gguf", {}, tensors, split_max_bytes=32)
    assert not list(tmp_path.iterdir())
