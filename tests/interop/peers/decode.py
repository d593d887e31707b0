"""The float weights of quantized folders: compressed-tensors, GPTQ or AWQ in, float32 Hugging Face folders out.

Written from the formats' descriptions with numpy alone, independent of qjax's readers and of the programs that made the
folder; safetensors is only asked for the bytes. Activations that a scheme rounds are not rounded in what comes out.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# Which column of eight the nibbles of a word of AWQ's gemm layout hold, lowest first.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [rows, 32 n / bits] of int32 words [rows, n]: one stream of bits a row, lowest first."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return stream.astype(np.int32) @ (1 << np.arange(bits))


def by_group(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[out, groups] -> [out, in], or as they are where one value serves all of a row."""
    return values if values.shape[1] == 1 else values[:, index]


def compressed_tensors(part: dict[str, np.ndarray], config: dict) -> np.ndarray:
    options = next(iter(config["config_groups"].values()))["weights"]
    bits = options["num_bits"]
    scale = part["weight_scale"].astype(np.float32)
    scale = scale.reshape(1, 1) if scale.size == 1 else scale
    if "weight_packed" in part:
        rows, columns = map(int, part["weight_shape"])
        codes = unpack(part["weight_packed"], bits)[:, :columns] - (1 << (bits - 1))
    else:
        codes, columns = part["weight"].astype(np.float32), part["weight"].shape[1]
        rows = len(codes)
    zero = part.get("weight_zero_point")
    if zero is None:
        zero = np.zeros_like(scale)
    elif zero.dtype == np.int32 and zero.shape != scale.shape:
        zero = unpack(zero.T, bits).T[:rows] - (1 << (bits - 1))
    size = options.get("group_size") or columns
    index = part.get("weight_g_idx", np.arange(columns) // size)
    return (codes - by_group(zero.astype(np.float32), index)) * by_group(scale, index)


def gptq(part: dict[str, np.ndarray], config: dict) -> np.ndarray:
    bits = config["bits"]
    codes = unpack(part["qweight"].T, bits)
    zero, first = part["qzeros"].view(np.uint32), config.get("checkpoint_format", "gptq") == "gptq"
    if first and 32 % bits == 0:
        # Version 1 stores one less, as a sum of shifted numbers: a -1 borrows from its neighbour. Here it is paid back.
        zero = zero + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    zero = unpack(zero.view(np.int32), bits).T + (first and 32 % bits != 0)
    size = codes.shape[1] if config["group_size"] == -1 else config["group_size"]
    index = part.get("g_idx", np.arange(codes.shape[1]) // size)
    scale = part["scales"].astype(np.float32).T
    return (codes - by_group(zero & ((1 << bits) - 1), index)).astype(np.float32) * by_group(scale, index)


def awq(part: dict[str, np.ndarray], config: dict) -> np.ndarray:
    def columns(words: np.ndarray) -> np.ndarray:
        nibbles = unpack(words, 4).reshape(len(words), -1, 8)
        return nibbles[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), -1)

    codes, zero = columns(part["qweight"]), columns(part["qzeros"])
    index = np.arange(len(codes)) // (len(codes) if config["group_size"] == -1 else config["group_size"])
    return ((codes - zero[index]).astype(np.float32) * part["scales"].astype(np.float32)[index]).T


READERS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq}
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "qweight", "qzeros")
SUFFIXES += ("scales", "g_idx")


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder in float32, quantized ones under the name of their weight."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    # Not as numpy: it has no bfloat16.
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            parts.setdefault(module, {})[suffix] = tensors.pop(name)
    for module, part in parts.items():
        if module + ".weight" in tensors:
            part["weight"] = tensors[module + ".weight"]
        tensors[module + ".weight"] = READERS[config["quant_method"]](part, config)
    return tensors


def write(folder: Path, output: Path) -> None:
    output.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, output)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in decoded(folder).items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the folders that are made")
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    for folder in args.folders:
        write(folder, args.output / folder.name)


if __name__ == "__main__":
    main()
