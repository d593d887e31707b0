"""Tokens through a model, layer by layer, and what a tap keeps of each product's input."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.kernels import Activations, rms_norm
from qjax.models import ModelConfig
from qjax.models.forward import Tap, begin, layer
from qjax.models.load import MATRICES


def walk(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Int[Array, "batch seq"],
    tap: Tap,
    *,
    output: bool = False,
    activations: Activations = "float",
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What `tap` keeps of the input of each product, in the order of the computation; logits are not computed.

    Args:
      tokens: full chunks, each from position 0 on.
      tap: `tap(names, x [batch, seq, in])`, pure; names are those of a layer's weights, such as ("attn_q", "attn_k",
        "attn_v"), or ("output",).
      output: go on to the input of the output matrix.

    Yields:
      The names in a GGUF file of the weights that share the input, and what was kept of it. Of a model with tied
      embeddings the output matrix is token_embd.weight.
    """
    x, angles, positions = begin(params, tokens, jnp.zeros(tokens.shape[0], jnp.int32))
    for i, p in enumerate(params["layers"]):
        x, _, tapped = layer(p, x, angles, positions, None, config=config, activations=activations, tap=tap)
        # What comes out of a compiled program is sorted by name.
        for names in sorted(tapped, key=lambda names: MATRICES.index(names[0])):
            yield tuple(f"blk.{i}.{name}.weight" for name in names), tapped[names]
    if output:
        name = "output.weight" if "output" in params else "token_embd.weight"
        yield (name,), _at_output(params["output_norm"], x, config=config, tap=tap)


@partial(jax.jit, static_argnames=("config", "tap"))
def _at_output(norm: Float[Array, " n"], x: Float[Array, "batch seq n"], *, config: ModelConfig, tap: Tap) -> Any:
    return tap(("output",), rms_norm(x, norm, config.norm_eps))
