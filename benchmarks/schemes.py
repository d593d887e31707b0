"""Made-up weights in the kinds of other ecosystems' checkpoints: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.arrays import AffineArray, FloatCodebookArray, ScaledFloatArray, TransformedArray
from qjax.arrays.planes import Plane
from qjax.arrays.scheme import layout_for, parse_scheme
from qjax.evaluate.synthetic import synthetic_params
from qjax.kernels import lay_out
from qjax.models import ModelConfig
from qjax.models.load import MATRICES

Shape = tuple[int, int]
# NF4's values (Dettmers et al. 2023, appendix E), to the digits that matter for speed.
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0)


def _scales(rng: np.random.Generator, shape: Shape, groups: int, dtype: Any = np.float16) -> np.ndarray:
    """So that products neither grow nor vanish from layer to layer."""
    return (rng.uniform(0.5, 1, (shape[0], groups)) / (4 * np.sqrt(shape[1]))).astype(dtype)


def integers(text: str) -> Callable[[np.random.Generator, Shape], Any]:
    """Weights of a scheme such as "w4g128-asym"."""
    scheme = parse_scheme(text)

    def make(rng: np.random.Generator, shape: Shape) -> Any:
        layout, groups = layout_for(scheme.bits, shape[1]), scheme.groups(shape[1])
        planes = tuple(rng.integers(0, 256, (shape[0], shape[1] * p.width // 8), np.uint8) for p in layout)
        zero = None if scheme.symmetric else rng.integers(0, 1 << scheme.bits, (shape[0], groups), np.uint8)
        scale = _scales(rng, shape, groups) / np.float16(scheme.middle)
        array = AffineArray(planes, scale, None, layout, scheme.middle if scheme.symmetric else 0, zero)
        return TransformedArray(array, rounding="int8") if scheme.activations == "int8" else array

    return make


def act_order(rng: np.random.Generator, shape: Shape) -> Any:
    """Those of one input share their order, as GPTQ's do."""
    order = np.random.default_rng(shape[1]).permutation(shape[1]).astype(np.int32)
    return TransformedArray(integers("w4g128")(rng, shape), columns=order)


def fp8(rng: np.random.Generator, shape: Shape) -> Any:
    values = rng.integers(0, 0x40, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << np.uint8(7))
    return ScaledFloatArray(values, _scales(rng, shape, 1, np.float32))


def fp8_dynamic(rng: np.random.Generator, shape: Shape) -> Any:
    return TransformedArray(fp8(rng, shape), rounding="float8_e4m3fn")


def nf4(rng: np.random.Generator, shape: Shape) -> Any:
    """With packed scales (double quantization)."""
    groups = shape[1] // 64
    return FloatCodebookArray(
        (rng.integers(0, 256, (shape[0], shape[1] // 2), np.uint8),),
        rng.integers(0, 256, (shape[0], groups), np.uint8),
        _scales(rng, shape, -(-groups // 256) + 1, np.float32),
        rng.integers(0, 256, (shape[0], 1), np.uint8),
        layout=(Plane(4, 16),),
        table=NF4,
        scale_table=np.linspace(-0.5, 1, 256, dtype=np.float32).tobytes(),
        scale_offset=0.01,
    )


KINDS: dict[str, Callable[[np.random.Generator, Shape], Any]] = {
    **{text: integers(text) for text in ("w2g64", "w3g128", "w4g128", "w4g128-asym", "w8g128", "w8", "w8a8")},
    "w4g128 act-order": act_order,
    "fp8": fp8,
    "fp8 dynamic": fp8_dynamic,
    "nf4": nf4,
}


def scheme_params(config: ModelConfig, kind: str) -> dict[str, Any]:
    """A model of one of `KINDS`; its embedding and output matrix are those of Q4_0, so that layers are compared."""
    params = synthetic_params(config, "q4_0")
    rng = np.random.default_rng(0)
    for layer in params["layers"]:
        for name in MATRICES:
            shape = layer.pop(name).shape
            layer[name] = jax.tree.map(jnp.asarray, lay_out(name, KINDS[kind](rng, shape)))
    return params
