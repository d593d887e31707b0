"""Plans as files: read, written, and refused with the entry named."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.errors import QjaxError
from qjax.pipeline import Device, Plan, StagePlan, read_plan, write_plan
from qjax.pipeline.devices import make_device

DEVICES = {"cuda:0": "8GiB", "cpu:0": "16GiB", "cpu:1": 1 << 30}
fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, place: Any, **more: Any) -> Path:
    path.write_text(
        yaml.safe_dump({"devices": DEVICES, "context": 128, "place": place, **more}, sort_keys=False), encoding="utf-8"
    )
    return path


def test_what_stands_in_the_documentation(tmp_path: Path) -> None:
    place = [{"layers 0-1": "cuda:0"}, {"layers 2-3": ["cpu:0", "cpu:1"]}, {"/output/": "cuda:0"}]
    plan = read_plan(written(tmp_path / "p.yaml", place, batch=4, cache="int8", type="q4_k_m"), 4)
    assert plan.stages == (
        StagePlan(range(2), ("cuda:0",)),
        StagePlan(range(2, 4), ("cpu:0", "cpu:1")),
        StagePlan(range(4, 4), ("cuda:0",)),
    )
    assert (plan.context, plan.batch, plan.microbatches, plan.cache, plan.type) == (128, 4, 1, "int8", "q4_k_m")
    assert [device.memory for device in plan.devices] == [8 << 30, 16 << 30, 1 << 30]


def test_the_first_that_fits_decides(tmp_path: Path) -> None:
    place = [{"/^blk.[02]$/": "cuda:0"}, {"layer 1": "cpu"}, {"/./": {"device": "cuda:0", "streamed": True}}]
    plan = read_plan(written(tmp_path / "p.yaml", place), 4)
    assert plan.stages == (
        StagePlan(range(0), ("cuda:0",), streamed=True),
        StagePlan(range(1), ("cuda:0",)),
        StagePlan(range(1, 2), ("cpu:0",)),
        StagePlan(range(2, 3), ("cuda:0",)),
        StagePlan(range(3, 4), ("cuda:0",), streamed=True),
    )


def test_a_device_in_full_and_what_replaces_the_file(tmp_path: Path) -> None:
    full = {"memory": "1KiB", "bandwidth": "900GB/s", "link": 5, "flops": 1e12, "latency": 0}
    path = written(tmp_path / "p.yaml", [{"/./": "tpu:1"}], devices={"tpu:1": full})
    plan = read_plan(path, 2, batch=3, context=64, cache=None)
    assert plan.devices == (Device("tpu:1", 1024, 900e9, 1e12, 5.0, 0.0),)
    assert (plan.batch, plan.context, plan.cache) == (3, 64, "float")
    other = make_device("tpu:1", 5)
    assert read_plan(path, 2, devices=(other,)).devices == (other,)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (None, ["place", "expected a list"]),
        ([], ["place", "expected a list"]),
        (["layers 0-3"], ["entry 1", "expected one pair"]),
        ([{"layers 0-3": "cuda:0", "layers 4-5": "cpu:0"}], ["entry 1", "expected one pair"]),
        ([{"layers 0-2": "cuda:0"}], ["layer 3", "add an entry"]),
        ([{"layers 0-2": "cuda:0"}, {"layers 2-3": "cpu:0"}], ["entry 2", "layer 2", "entry 1", "layers 0-2"]),
        ([{"layers 0-4": "cuda:0"}], ["entry 1", "layers 0 to 3 only"]),
        ([{"layers 3-0": "cuda:0"}], ["entry 1", "lower number first"]),
        ([{"layers -1": "cuda:0"}], ["entry 1", "expected layers"]),
        ([{"blocks 0-3": "cuda:0"}], ["entry 1", "expected layers"]),
        ([{"//": "cuda:0"}], ["entry 1", "expected layers"]),
        ([{7: "cuda:0"}], ["entry 1 (7)", "expected text"]),
        ([{"layers 0-3": "cuda:1"}], ["entry 1", "cuda:1 is not one of cuda:0, cpu:0, cpu:1"]),
        ([{"layers 0-3": "abacus"}], ["entry 1", "expected a device"]),
        ([{"layers 0-3": None}], ["entry 1", "expected text"]),
        ([{"layers 0-3": []}], ["entry 1", "got none"]),
        ([{"layers 0-3": ["cpu:0", "cpu:0"]}], ["entry 1", "each once"]),
        ([{"layers 0-3": ["cpu:0", "cuda:0"]}], ["entry 1", "several kinds"]),
        ([{"layers 0-3": {"device": "cpu:0", "streamed": True}}], ["entry 1", "streamed to one accelerator"]),
        ([{"layers 0-3": {"device": "cuda:0", "streamed": 1}}], ["entry 1", "true or false"]),
        ([{"layers 0-3": {"device": "cuda:0", "speed": 1}}], ["entry 1", "unknown key 'speed'"]),
        ([{"/(/": "cuda:0"}], ["entry 1", "regular expression"]),
        ([{"/" + "a" * 65 + "/": "cuda:0"}], ["entry 1", "at most 64"]),
        ([{"/nothing/": "cuda:0"}, {"/./": "cpu:0"}], ["entry 1", "fits no unit", "blk.0 to blk.3"]),
        ([{"/ffn_down/": "cuda:0"}, {"/./": "cpu:0"}], ["entry 1", "tensors lie together", "blk.0 to blk.3"]),
        ([{"/./": "cuda:0"}, {"/output/": "cpu:0"}], ["entry 2", "put it first"]),
    ],
)
def test_wrong_places(tmp_path: Path, place: Any, words: list[str]) -> None:
    path = written(tmp_path / "wrong.yaml", place)
    with pytest.raises(QjaxError) as refused:
        read_plan(path, 4)
    for word in (str(path), *words):
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"devices": None}, ["devices", "expected names with sizes"]),
        ({"devices": {}}, ["devices", "expected names with sizes"]),
        ({"devices": {"cuda:0": "-8GiB"}}, ["'cuda:0'", "expected a size"]),
        ({"devices": {"cuda:0": -8}}, ["'cuda:0'", "expected a memory"]),
        ({"devices": {"cuda:0": 10**400}}, ["'cuda:0'", "sane size"]),
        ({"devices": {"cuda:0": float("nan")}}, ["'cuda:0'", "whole number"]),
        ({"devices": {"cuda:0": True}}, ["'cuda:0'", "whole number"]),
        ({"devices": {"cuda:0": {"bandwidth": 1}}}, ["'cuda:0'", "memory is missing"]),
        ({"devices": {"cuda:0": {"memory": 1, "bandwidth": float("nan")}}}, ["'cuda:0'", "expected a bandwidth"]),
        ({"devices": {"cuda:0": {"memory": 1, "bandwidth": 10**400}}}, ["'cuda:0'", "too large"]),
        ({"devices": {"cuda:0": {"memory": 1, "link": "fast"}}}, ["'cuda:0'", "expected a rate"]),
        ({"devices": {"cuda:0": {"memory": 1, "flops": "1GB/s"}}}, ["'cuda:0'", "expected a number"]),
        ({"devices": {"cuda:0": {"memory": 1, "colour": 1}}}, ["'cuda:0'", "unknown key 'colour'"]),
        ({"devices": {"cpu": 1, "cpu:0": 1}}, ["'cpu:0'", "named twice"]),
        ({"devices": {1: 1}}, ["devices: 1", "expected text"]),
        ({"context": -1}, ["context"]),
        ({"context": "many"}, ["context", "whole number"]),
        ({"context": 1 << 40}, ["context"]),
        ({"batch": 0}, ["batch"]),
        ({"batch": 2.5}, ["batch", "whole number"]),
        ({"microbatches": 2}, ["microbatches"]),
        ({"cache": "int4"}, ["cache"]),
        ({"cache": 8}, ["cache", "expected text"]),
        ({"activations": "int2"}, ["activations"]),
        ({"colour": "blue"}, ["unknown key 'colour'", "devices, context"]),
    ],
)
def test_wrong_values(tmp_path: Path, changed: dict[str, Any], words: list[str]) -> None:
    path = written(tmp_path / "wrong.yaml", [{"/./": "cuda:0"}], **changed)
    with pytest.raises(QjaxError) as refused:
        read_plan(path, 4)
    for word in (str(path), *words):
        assert word in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_file_that_says_no_context(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text('devices: {"cpu:0": 1GiB}\nplace: [{"/./": cpu}]\n', encoding="utf-8")
    with pytest.raises(QjaxError, match="context is missing"):
        read_plan(path, 4)
    assert read_plan(path, 4, context=5).context == 5


def test_expressions_that_go_back_and_forth_are_short(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match="fits no unit"):
        read_plan(written(tmp_path / "p.yaml", [{"/^((b|l)+)+((k|.)+)+!$/": "cpu:0"}, {"/./": "cuda:0"}]), 100)


def test_circles_and_bombs_of_aliases(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *{'a' if i == 0 else f'b{i - 1}'}]\n" for i in range(40)
    )
    for text in (
        bomb + "place: *b39\n",
        "place: &p [*p]\n",
        "devices: &d {cuda: *d}\n",
        bomb.replace("a:", "devices:", 1),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(QjaxError) as refused:
            read_plan(path, 4)
        assert len(str(refused.value)) < 1000


names = st.sampled_from(["cuda:0", "cuda:1", "cpu:0", "tpu:3"])
devices = st.builds(
    Device,
    names,
    st.integers(1, 1 << 50),
    *[st.floats(1, 1e18)] * 3,
    st.floats(0, 3600),
)


@st.composite
def parts_of_plans(draw: Any) -> Any:
    """(stages, the rest) of plans of any stages over devices of any numbers."""
    given_devices = draw(st.lists(devices, min_size=1, max_size=4, unique_by=lambda device: device.name))
    layers = draw(st.integers(1, 9))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1))) if layers > 1 else [])
    borders = [*([0] if draw(st.booleans()) else []), 0, *cuts, layers, *([layers] if draw(st.booleans()) else [])]
    stages = []
    for first, last in itertools.pairwise(borders):
        device = draw(st.sampled_from(given_devices))
        mesh = [d.name for d in given_devices if d.kind == device.kind] if draw(st.booleans()) else [device.name]
        streamed = len(mesh) == 1 and device.kind != "cpu" and draw(st.booleans())
        stages.append((range(first, last), tuple(mesh), streamed))
    batch = draw(st.integers(1, 1 << 31))
    return stages, (
        tuple(given_devices),
        draw(st.integers(1, 1 << 31)),
        batch,
        draw(st.integers(1, batch)),
        draw(st.sampled_from(["float", "int8"])),
        draw(st.sampled_from([None, "float", "int8"])),
        draw(st.sampled_from([None, "q4_k_m"])),
    )


@settings(fuzz, max_examples=30)
@given(parts_of_plans())
def test_what_is_written_is_read_back(tmp_path: Path, parts: Any) -> None:
    stages, rest = parts
    plan = Plan(tuple(StagePlan(*stage) for stage in stages), *rest)
    write_plan(tmp_path / "plan.yaml", plan)
    assert read_plan(tmp_path / "plan.yaml", plan.layers) == plan


keys = st.sampled_from(["devices", "context", "batch", "microbatches", "cache", "activations", "type", "place", "x"])
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["8GiB", "-1", "nan", "cuda:0", "cpu", "int8", "layers 0-3", "/./", "/blk/", 10**400, ".inf"]),
)
values = st.recursive(
    odd,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)
places = st.one_of(
    st.from_regex(r"layers? [0-5](-[0-6])?", fullmatch=True),
    st.from_regex(r"/[a-z_.0-9*+?()\[\]|\\^$]{1,12}/", fullmatch=True),
    st.text(max_size=12),
)
targets = st.one_of(names, st.lists(names, max_size=3), st.fixed_dictionaries({"device": names, "streamed": odd}), odd)
nearly = st.fixed_dictionaries(
    {
        "devices": st.one_of(st.dictionaries(names, st.one_of(st.just("8GiB"), values), max_size=3), values),
        "context": st.one_of(st.integers(1, 99), odd),
        "place": st.one_of(st.lists(st.dictionaries(places, targets, min_size=1, max_size=1), max_size=5), values),
    },
    optional={"batch": odd, "microbatches": odd, "cache": odd, "activations": odd, "type": odd, "x": odd},
)


@fuzz
@given(st.one_of(nearly, st.dictionaries(keys, values, max_size=6), values))
def test_any_file_is_a_plan_or_an_error_of_ours(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(QjaxError):
        assert read_plan(path, 4).layers == 4


@fuzz
@given(st.binary(max_size=200) | st.text(alphabet="-:[]{}&*!|>'\"#%@,?/ \nabcd019.", max_size=200).map(str.encode))
def test_any_bytes_are_a_plan_or_an_error_of_ours(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(data)
    with pytest.raises(QjaxError):
        read_plan(path, 4)
