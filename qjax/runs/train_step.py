"""One step of learning as pure functions: first weights, loss, optimizer; and perplexity on held-out text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qjax.evaluate.perplexity import perplexity
from qjax.models import ModelConfig, forward
from qjax.models.load import inverse_frequencies
from qjax.runs.config import OptimizerConfig, ShapeConfig
from qjax.runs.train_tokenizer import BOS_ID

Params = dict[str, jax.Array]


def init_params(shape: ShapeConfig, seed: int) -> Params:
    """Random weights under their GGUF names, float32 [out_features, in_features]."""
    sizes = tensor_shapes(shape)
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    params: Params = {}
    for key, (name, size) in zip(keys, sizes.items(), strict=True):
        if len(size) == 1:
            params[name] = jnp.ones(size, jnp.float32)
            continue
        # Variance is kept through each layer; what adds to the residual stream starts smaller (GPT-2).
        scale = 0.02 if name == "token_embd.weight" else size[1] ** -0.5
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            scale *= (2 * shape.n_layers) ** -0.5
        params[name] = scale * jax.random.normal(key, size, jnp.float32)
    return params


def tensor_shapes(shape: ShapeConfig) -> dict[str, tuple[int, ...]]:
    """GGUF names of all tensors and their shapes, in the file's order. Embeddings are tied."""
    hidden, q_rows, kv_rows = (
        shape.hidden_size,
        shape.n_heads * shape.head_dim,
        shape.n_kv_heads * shape.head_dim,
    )
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (q_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "ffn_gate": (shape.ffn_size, hidden),
        "ffn_up": (shape.ffn_size, hidden),
        "ffn_down": (hidden, shape.ffn_size),
    }
    sizes: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab_size, hidden)}
    for index in range(shape.n_layers):
        sizes |= {f"blk.{index}.{name}.weight": size for name, size in layer.items()}
    return sizes | {"output_norm.weight": (hidden,)}


def model_config(shape: ShapeConfig) -> ModelConfig:
    """The shape as the decoder wants it; arch llama of GGUF, whose rope turns neighbouring pairs."""
    return ModelConfig(
        arch="llama",
        layers=shape.n_layers,
        hidden=shape.hidden_size,
        heads=shape.n_heads,
        kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn_size,
        vocab=shape.vocab_size,
        context=shape.context_length,
        norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_dim=shape.head_dim,
    )


def model_params(params: Params, config: ModelConfig) -> dict[str, Any]:
    """The same arrays in the tree that `qjax.models.forward` reads."""
    layers: list[dict[str, jax.Array]] = [{} for _ in range(config.layers)]
    for name, leaf in params.items():
        if name.startswith("blk."):
            _, index, key, _ = name.split(".")
            layers[int(index)][key] = leaf
    return {
        "token_embd": params["token_embd.weight"],
        "output_norm": params["output_norm.weight"],
        "rope": jnp.asarray(inverse_frequencies(config, None)),
        "layers": layers,
    }


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW on a warm-up and cosine schedule; norms' weights do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def token_losses(params: Params, shape: ShapeConfig, windows: Int[Array, "b w"]) -> Float[Array, "b t"]:
    """-log p of each token of each window but the first, float32."""
    config = model_config(shape)
    logits, _ = forward(model_params(params, config), config, windows[:, :-1], None)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


@functools.partial(jax.jit, static_argnames=("shape", "optimizer"), donate_argnames=("params", "state"))
def train_step(
    params: Params,
    state: Any,
    windows: Int[Array, "b w"],
    *,
    shape: ShapeConfig,
    optimizer: OptimizerConfig,
) -> tuple[Params, Any, Float[Array, ""]]:
    """One step of learning: the new params and optimizer state (the old ones are donated), and the mean loss."""

    def mean_loss(params: Params) -> jax.Array:
        return token_losses(params, shape, windows).mean()

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    # optax raises floats to its int32 step count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = make_optimizer(optimizer).update(gradients, state, params)
    new: Any = optax.apply_updates(params, updates)
    return new, state, loss


def heldout_perplexity(params: Params, shape: ShapeConfig, ids: list[int]) -> float:
    """Perplexity over a text's ids (without BOS) at the model's whole context, as llama-perplexity measures it."""
    config = model_config(shape)
    tree = model_params(params, config)
    return perplexity(tree, config, [BOS_ID, *ids], n_ctx=config.context, bos_id=BOS_ID).perplexity
