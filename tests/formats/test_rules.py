"""Rules: the first that fits decides, both names are looked at, and what a rule cannot do is said."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.arrays import Scheme, parse_scheme
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.huggingface.weights import places
from qjax.formats.rules import module_name, parse_rule, schemes_by

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SHAPES = {f"blk.{i}.{part}.weight": (64, 192 if part == "ffn_down" else 64) for i in range(12) for part in PARTS}
SHAPES |= {"token_embd.weight": (320, 64), "output.weight": (320, 64)}
W4 = parse_scheme("w4g32")


def by(*texts: str, scheme: Scheme | None = W4) -> dict[str, str]:
    return {name: str(of) for name, of in schemes_by(SHAPES, scheme, [parse_rule(text) for text in texts]).items()}


def test_without_rules_the_ends_are_kept() -> None:
    found = by()
    assert found.keys() == SHAPES.keys() - {"token_embd.weight", "output.weight"}
    assert set(found.values()) == {"w4g32"}


def test_the_first_that_fits_decides() -> None:
    found = by("blk.0.ffn_down=keep", "ffn_down=w8", "DOWN|attn_v=w3g64-asym", "output.weight=w8")
    assert "blk.0.ffn_down.weight" not in found
    assert found["blk.10.ffn_down.weight"] == "w8"
    assert found["blk.0.attn_v.weight"] == "w3g64-asym"
    # "output.weight" is found in attn_output.weight too.
    assert found["output.weight"] == found["blk.7.attn_output.weight"] == "w8"


@pytest.mark.filterwarnings("ignore:rule")
@settings(max_examples=30)
@given(st.lists(st.sampled_from(["attn=w2", "ffn=keep", "_q=w8", "down=w4g64", "blk.1=w3g32", ".=w5"]), max_size=4))
def test_order_is_the_only_law(texts: list[str]) -> None:
    found = by(*texts)
    for name in SHAPES:
        fitting = [text.split("=")[1] for text in texts if re.search(text.split("=")[0], name)]
        default = "keep" if name in ("token_embd.weight", "output.weight") else "w4g32"
        assert found.get(name, "keep") == [*fitting, default][0]


def test_hugging_face_names() -> None:
    for name in SHAPES:
        module = module_name(name)
        assert module is not None
        assert [f"{place.name}.weight" for place in places(module, {})] == [name]
    assert module_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj"
    assert module_name("rope_freqs.weight") is None
    found = by(r"layers\.3\..*q_proj$=w8", "embed_tokens=w8g32")
    assert [name for name, scheme in found.items() if scheme.startswith("w8")] == [
        "blk.3.attn_q.weight",
        "token_embd.weight",
    ]


def test_rules_without_effect() -> None:
    with pytest.warns(QjaxWarning, match=r"'q_norm=w8' is not used: found in the name of no matrix"):
        by("q_norm=w8")
    with pytest.warns(QjaxWarning, match=r"'attn_q=keep' is not used: rules before it"):
        by("attn=w8", "attn_q=keep")


def test_what_is_refused() -> None:
    for text, said in (
        ("w8", "expected REGEX=SCHEME"),
        ("=w8", "expected REGEX=SCHEME"),
        ("attn(=w8", "expected a regular expression"),
        ("attn=w9", "expected bits of"),
        ("attn=q4_k", "expected a scheme such as w4g128"),
        ("attn=", "expected a scheme"),
    ):
        with pytest.raises(QjaxError, match=re.escape(said)):
            parse_rule(text)
    with pytest.raises(
        QjaxError, match=r"^blk\.0\.ffn_down\.weight: rows of 192 are no whole groups of 128: .*ffn_down=w4"
    ):
        by("ffn_down=w4g128")
