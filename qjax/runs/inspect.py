"""What is in a file: architecture, each tensor's type, bits and bytes, without loading any weight."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.formats.locate import locate
from qjax.formats.source import open_source
from qjax.runs.console import emit, megabytes, show_table

# Bytes of a weight once it is dequantized to 16-bit floats.
DEQUANTIZED_BYTES = 2


def inspect(model: str | Path) -> dict[str, Any]:
    """Facts of a file or folder: format, arch, parameters, bytes (packed, and as 16-bit floats), and its tensors.

    Of a matrix that is packed as no ggml type is, `found` says what it was found to be and by what.
    """
    file = open_source(locate(model))
    tensors = [
        {
            "name": info.name,
            "shape": list(info.shape),
            "type": info.type,
            "bytes": info.nbytes,
            "bits_per_weight": 8 * info.nbytes / max(math.prod(info.shape), 1),
            **({"found": file.found[info.name]._asdict()} if info.name in file.found else {}),
        }
        for info in file.tensors.values()
    ]
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors)
    nbytes = sum(tensor["bytes"] for tensor in tensors)
    arch, name = _text(file.metadata, "general.architecture"), _text(file.metadata, "general.name")
    return {
        "path": str(file.path),
        "format": file.format,
        "arch": arch,
        "name": name,
        "parameters": parameters,
        "bytes": nbytes,
        "dequantized_bytes": DEQUANTIZED_BYTES * parameters,
        "bits_per_weight": 8 * nbytes / parameters if parameters else 0.0,
        "shape": _sizes(file.metadata, arch),
        "tensors": tensors,
    }


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _sizes(metadata: Mapping[str, Any], arch: str | None) -> dict[str, int]:
    keys = {
        "layers": "block_count",
        "hidden": "embedding_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "ffn": "feed_forward_length",
        "context": "context_length",
    }
    found = {name: metadata.get(f"{arch}.{key}") for name, key in keys.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def show(facts: dict[str, Any]) -> None:
    """The facts as a table."""
    sizes = ", ".join(f"{name} {value}" for name, value in facts["shape"].items())
    ratio = facts["dequantized_bytes"] / facts["bytes"] if facts["bytes"] else 1.0
    emit(f"{facts['path']}\n{facts['format']}, arch {facts['arch']}" + (f" ({sizes})" if sizes else "") + "\n")
    emit(
        f"{facts['parameters']:,} parameters, {facts['bits_per_weight']:.2f} bits per weight: "
        f"{megabytes(facts['bytes'])} packed, {megabytes(facts['dequantized_bytes'])} as 16-bit floats "
        f"({ratio:.2f}x)\n"
    )
    rows = [
        (
            tensor["name"],
            " x ".join(map(str, tensor["shape"])),
            tensor["type"],
            f"{tensor['bits_per_weight']:.2f}",
            f"{tensor['bytes']:,}",
            f"{DEQUANTIZED_BYTES * math.prod(tensor['shape']):,}",
        )
        for tensor in facts["tensors"]
    ]
    show_table("", ["tensor", "shape", "type", "bits/weight", "bytes", "dequantized"], rows)
    decided = collections.Counter(
        (tensor["found"]["label"], tensor["found"]["how"]) for tensor in facts["tensors"] if "found" in tensor
    )
    for (label, how), count in decided.items():
        emit(f"{label} ({count}): {how}\n")
