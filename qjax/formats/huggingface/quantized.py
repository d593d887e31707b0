"""Which modules of a checkpoint are quantized, and how: by the tensors that are there, not by what the config says.

The config is heard where tensors do not tell (how activations are rounded), and contradicted with a warning.
"""

import warnings
from collections.abc import Mapping

from qjax.errors import QjaxWarning, UnsupportedError
from qjax.formats.gguf.cursor import shown
from qjax.formats.huggingface import bitsandbytes, compressed_tensors, fp8, qweights
from qjax.formats.huggingface.labels import Labels, Said
from qjax.formats.huggingface.parts import FLOATS, OUTPUT_SCALES, Packed, Parts

# Methods that write each kind; AutoRound writes most of them.
_WRITERS = {
    "gptq": ("gptq", "auto-round"),
    "gptq_v2": ("gptq", "auto-round"),
    "awq": ("awq", "auto-round"),
    "awq-gemv": ("awq",),
    "bitsandbytes-nf4": ("bitsandbytes",),
    "bitsandbytes-fp4": ("bitsandbytes",),
    "bitsandbytes-int8": ("bitsandbytes",),
    "fp8": ("fp8", "fbgemm_fp8", "compressed-tensors", "auto-round"),
}
_COMPRESSED = ("compressed-tensors", "auto-round")


def is_packed(parts: Parts) -> bool:
    """Whether a module is more than floats: leaving out what stands beside a weight would compute something else."""
    if not OUTPUT_SCALES.union(("weight", "bias")).issuperset(parts.stored):
        return True
    return "weight" in parts and parts.stored["weight"].dtype not in FLOATS


def find_packed(modules: Mapping[str, Parts], labels: Labels) -> dict[str, Packed]:
    """What each of the modules is, all of which have quantized weights; nothing but zero points and orders is read.

    Raises:
        FormatError: tensors that fit neither each other nor the model's shapes, or that are missing.
        UnsupportedError: a kind that is not known.
    """
    said = {name: labels.said(name) for name in modules}
    layouts = {name: qweights.layout_of(parts, said[name]) for name, parts in modules.items() if _is_qweight(parts)}
    of_gptq = [(modules[name], bits) for name, (layout, bits) in layouts.items() if layout == "gptq"]
    version = qweights.version_of(of_gptq, labels) if of_gptq else None
    if version is not None and version.mislabelled:
        warnings.warn(qweights.warn_text(labels, version), QjaxWarning, stacklevel=2)
    found = {}
    for name, parts in modules.items():
        layout, bits = layouts.get(name, (None, 0))
        if layout == "gptq" and version is not None:
            found[name] = qweights.find_gptq(parts, said[name], bits, version)
        elif layout == "gemm" or layout == "gemv":
            found[name] = qweights.find_awq(parts, said[name], layout)
        else:
            found[name] = _find(parts, said[name])
    _compare(found, said, labels)
    return found


def _is_qweight(parts: Parts) -> bool:
    return any(suffix in parts for suffix in ("qweight", "qzeros", "scales"))


def _find(parts: Parts, said: Said) -> Packed:
    """One of the kinds whose tensors do not need to be compared with other modules'."""
    if "weight.quant_map" in parts or "weight.absmax" in parts:
        return bitsandbytes.find_4bit(parts)
    if "weight_packed" in parts:
        return compressed_tensors.find_packed(parts, said)
    if "weight" not in parts:
        raise parts.wrong("weight", f"is missing beside {', '.join(parts.stored)}")
    dtype = parts.stored["weight"].dtype
    if "SCB" in parts:
        return bitsandbytes.find_int8(parts)
    if dtype in fp8.KINDS:
        return fp8.find(parts, said)
    if dtype == "I8":
        return compressed_tensors.find_int8(parts, said)
    raise UnsupportedError(
        f"{parts.where('weight')} has the dtype {dtype} beside {', '.join(parts.stored)}: no kind of quantized weight "
        "that qjax knows"
    )


def _compare(found: Mapping[str, Packed], said: Mapping[str, Said], labels: Labels) -> None:
    """Warn, once for each way, where the config says something else than the tensors."""
    differences: dict[str, list[str]] = {}
    for name, packed in found.items():
        for difference in _differences(packed, said[name], labels.exempts(name), labels):
            differences.setdefault(difference, []).append(name)
    for difference, names in differences.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"{labels.path}: {shown(names[0])}{more}: {difference}", QjaxWarning, stacklevel=3)


def _differences(packed: Packed, said: Said, exempt: bool, labels: Labels) -> list[str]:
    kind, bits, group = packed.found.kind, packed.found.bits, packed.found.group_size
    columns = packed.shape[1]
    if exempt:
        return [f"the config says that it stayed float; it is {packed.found.label}"]
    differences = []
    if labels.method and not labels.method.endswith(_WRITERS.get(kind, _COMPRESSED)):
        differences.append(f"the config says {labels.text}; the tensors are {packed.found.label}")
    elif said.bits is not None and said.bits != bits and kind not in ("int-quantized", "bitsandbytes-int8"):
        differences.append(f"the config says {said.bits} bits; the tensors have {bits}")
    elif said.group_size is not None and kind != "fp8":
        theirs, ours = ("a row" if size in (-1, columns) else str(size) for size in (said.group_size, group))
        if theirs != ours:
            differences.append(f"the config says groups of {theirs}; the tensors have groups of {ours}")
    return differences
