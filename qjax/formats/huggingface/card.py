"""README.md of a saved folder: what was made, from what, how, and what was measured of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qjax.version import __version__


class Provenance(NamedTuple):
    """How a model was quantized, in words; what is not known is left out.

    base: the model that it was made from. method: "GPTQ(percdamp=0.01)". rules: in their order. calibration: the text,
    its samples and their length. measured: a figure by its name ("perplexity", "KL divergence").
    """

    base: str = ""
    method: str = ""
    rules: Sequence[str] = ()
    calibration: str = ""
    measured: Mapping[str, float | int | str] = {}


def model_card(
    name: str, format_name: str, kinds: Mapping[str, str], provenance: Provenance, metadata: Mapping[str, Any]
) -> str:
    """The text of a model card.

    Args:
      kinds: what each weight is ("4-bit symmetric, groups of 128"), by its name in the checkpoint.
      metadata: GGUF's, of which the license is taken.
    """
    tags = ["qjax", "quantized", *([] if format_name == "qjax" else [format_name.removesuffix("_v2")])]
    lines = ["---", "library_name: transformers" if format_name != "qjax" else "library_name: qjax"]
    license_name = metadata.get("general.license")
    if isinstance(license_name, str) and re.fullmatch(r"[\w.-]{1,64}", license_name):
        lines.append(f"license: {license_name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", provenance.base):
        lines.append(f"base_model: {provenance.base}")
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    of = f" of {provenance.base}" if provenance.base else ""
    lines += [f"A quantized copy{of} in the format {format_name}, saved by qjax {__version__}.", ""]
    told = {
        "Method": provenance.method,
        "Rules": ", ".join(f"`{rule}`" for rule in provenance.rules),
        "Calibration": provenance.calibration,
        **{
            title: f"{value:.6g}" if isinstance(value, float) else str(value)
            for title, value in provenance.measured.items()
        },
    }
    rows = [f"| {title} | {_cell(value)} |" for title, value in told.items() if value]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    lines += ["| weights | stored as |", "|---|---|"]
    lines += [f"| {_cell(which)} | {_cell(kind)} |" for kind, which in _grouped(kinds).items()]
    return "\n".join([*lines, "", "```python", "import qjax", "", f'model = qjax.load("{name}")', "```", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _grouped(kinds: Mapping[str, str]) -> dict[str, str]:
    """Weights by what they are: "self_attn.q_proj, mlp.up_proj (8 of 44)"."""
    layers = len({match[1] for name in kinds if (match := re.match(r"model\.layers\.(\d+)\.", name))})
    found: dict[str, dict[str, int]] = {}
    for name, kind in kinds.items():
        part = re.sub(r"^model\.layers\.\d+\.", "", name).removesuffix(".weight")
        parts = found.setdefault(kind, {})
        parts[part] = parts.get(part, 0) + 1

    def words(part: str, count: int) -> str:
        return (
            part if count == layers or "." not in part or part.startswith("model.") else f"{part} ({count} of {layers})"
        )

    return {kind: ", ".join(words(*entry) for entry in parts.items()) for kind, parts in found.items()}
