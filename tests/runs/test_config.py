"""Each mistake in a config file is one line that names the file and the key; shipped configs are right."""

from pathlib import Path

import pytest
import yaml

from qjax.errors import QjaxError
from qjax.runs import run
from qjax.runs.config import config_hash, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path: Path) -> None:
    assert load_config(path).kind


def changed(path: Path, **changes: object) -> Path:
    """The file with keys ("model__ffn_size") set to other values; a value of ... removes the key."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = data
        for name in outer:
            place = place[name]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "sed: unknown key; known ones are kind, name, seed"),
        ({"model__layers": 1}, "model.layers: unknown key"),
        ({"seed": ...}, "seed: missing; expected int"),
        ({"seed": True}, "seed: expected int, got True"),
        ({"seed": 1.5}, "seed: expected int, got 1.5"),
        ({"optimizer__learning_rate": "2e-3"}, "learning_rate: expected float, got '2e-3' .*2.0e-3"),
        ({"model": 3}, "model: expected keys and values, got 3"),
        ({"corpus__held_out": "b.py"}, "corpus.held_out: expected a list of str, got 'b.py'"),
        ({"corpus__held_out": [1]}, r"corpus.held_out\[0\]: expected str, got 1"),
        ({"corpus__folder": 1}, "corpus.folder: expected str, got 1"),
        ({"kind": "bake"}, r"kind: expected one of \['quantize', 'train'\], got 'bake'"),
        ({"kind": ...}, "kind: expected one of"),
        ({"model__n_kv_heads": 4}, "n_heads: expected a multiple"),
        ({"model__context_length": 31}, "context_length: expected an even number"),
        ({"model__head_dim": 15}, "head_dim: expected an even number"),
        ({"model__vocab_size": 100}, "vocab_size: expected 258"),
        ({"optimizer__steps": 0}, "optimizer.steps: expected at least 1, got 0"),
        ({"optimizer__warmup_steps": 3}, "warmup_steps: expected fewer than steps 3, got 3"),
    ],
)
def test_a_mistake_is_named(config_file: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(QjaxError, match=message) as caught:
        run(changed(config_file, **changes))
    assert str(caught.value).startswith(f"{config_file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_what_is_no_config_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QjaxError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QjaxError, match="expected a readable YAML file"):
        load_config(tmp_path / "none.yaml")


def test_an_int_serves_as_a_float_and_the_hash_sees_values_only(config_file: Path) -> None:
    before = config_hash(load_config(config_file))
    config_file.write_text("# a comment\n" + config_file.read_text(encoding="utf-8"), encoding="utf-8")
    assert config_hash(load_config(config_file)) == before
    config = load_config(changed(config_file, checkpoint_minutes=2))
    assert config.checkpoint_minutes == 2.0
    assert config_hash(config) != before
