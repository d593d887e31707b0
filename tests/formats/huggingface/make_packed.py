"""Make packed.npz: small matrices as the peers' own packers store them, with the floats they stand for.

Run with a Python that has torch, auto-round and compressed-tensors: python make_packed.py
Names: KIND-BITS-GROUP-SYMMETRY/TENSOR, and BITS-GROUP-SYMMETRY/w for the floats, [out, in], of all kinds.
"""

from pathlib import Path

import numpy as np
import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

OUT, COLUMNS = 32, 64
made: dict[str, np.ndarray] = {}


def grid(bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], float16 scales and zero points [out, groups]; zero points are at least 1."""
    generator = torch.Generator().manual_seed(bits * 1000 + group + symmetric)
    groups = COLUMNS // (group if group > 0 else COLUMNS)
    codes = torch.randint(0, 2**bits, (OUT, COLUMNS), generator=generator)
    scales = (torch.rand(OUT, groups, generator=generator) * 0.01 + 0.001).half()
    zeros = torch.randint(1, 2**bits, (OUT, groups), generator=generator)
    return codes, scales, torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros


def floats(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    repeat = lambda t: t.repeat_interleave(COLUMNS // t.shape[1], 1)
    return repeat(scales.float()) * (codes - repeat(zeros))


def linear(w: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(COLUMNS, OUT, bias=False)
    layer.weight.data = w
    return layer


def keep(kind: str, tensors: dict[str, torch.Tensor], w: torch.Tensor) -> None:
    for suffix, tensor in tensors.items():
        made[f"{kind}/{suffix}"] = tensor.detach().numpy()
    made[f"{kind.split('/')[0].split('-', 2)[2]}/w"] = w.float().numpy()


for bits in (2, 3, 4, 8):
    for group in (32, -1):
        for symmetric in (True, False):
            codes, scales, zeros = grid(bits, group, symmetric)
            w = floats(codes, scales, zeros)
            for version, module in ((1, qlinear_torch_zp), (2, qlinear_torch)):
                layer = module.QuantLinear(bits, group, COLUMNS, OUT, False, g_idx=True)
                layer.device = "cpu"
                layer.pack(linear(w), scales.clone(), zeros.clone().float(), None, "cpu")
                tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
                kind = f"gptq-v{version}-{bits}-g{group}-{'sym' if symmetric else 'asym'}"
                # What their own forward pass makes of it.
                dense = layer(torch.eye(COLUMNS)).T
                assert torch.equal(dense, w.half().float()) or torch.allclose(dense, w, atol=1e-3), kind
                keep(kind, tensors, w)

for group in (32, -1):
    for symmetric in (True, False):
        codes, scales, zeros = grid(4, group, symmetric)
        w = floats(codes, scales, zeros)
        layer = WQLinear_GEMM.from_linear(
            linear(w), 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous(), device="cpu"
        )
        tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        size = group if group > 0 else COLUMNS
        dense = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, size).T
        assert torch.allclose(dense.float(), w, atol=1e-3)
        keep(f"awq-gemm-4-g{group}-{'sym' if symmetric else 'asym'}", tensors, w)

compressor = BaseCompressor.get_value_from_registry("pack-quantized")
for bits in (2, 3, 4, 5, 6, 8):
    for group in (32, -1):
        for symmetric in (True, False):
            codes, scales, zeros = grid(bits, group, symmetric)
            w = floats(codes, scales, zeros)
            strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
            args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            state = {
                "weight": w,
                "weight_scale": scales.float(),
                "weight_zero_point": (zeros - 2 ** (bits - 1)).to(torch.int8),
            }
            tensors = compressor.compress(state, scheme)
            dense = compressor.decompress(tensors, scheme)["weight"]
            assert torch.allclose(dense, w), (bits, group, symmetric)
            tensors["weight_scale"] = scales
            keep(f"ct-pack-{bits}-g{group}-{'sym' if symmetric else 'asym'}", tensors, w)

np.savez_compressed(Path(__file__).with_name("packed.npz"), **made)
