"""Llama 2, 3 and 3.x (arXiv 2302.13971, 2307.09288, 2407.21783), and all that share its shape.

Files of llama.cpp store the rows of W_q and W_k interleaved, (0, H/2, 1, H/2 + 1, ...), because it
rotates neighbours; they are put back into halves here.
"""

from typing import Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config, Family, Rule, families, linear, norm
from causal_jax.models.pretrained._rope import read_rotary, write_rotary
from causal_jax.models.pretrained._views import View

LAYER, OURS = "model.layers.{l}", "layers/{l}"
ATTENTION = (
    *linear(f"{LAYER}.self_attn.q_proj", f"{OURS}/attention/q"),
    *linear(f"{LAYER}.self_attn.k_proj", f"{OURS}/attention/k"),
    *linear(f"{LAYER}.self_attn.v_proj", f"{OURS}/attention/v"),
    *linear(f"{LAYER}.self_attn.o_proj", f"{OURS}/attention/o"),
)
FEED_FORWARD = (
    *linear(f"{LAYER}.mlp.gate_proj", f"{OURS}/mlp/gate"),
    *linear(f"{LAYER}.mlp.up_proj", f"{OURS}/mlp/up"),
    *linear(f"{LAYER}.mlp.down_proj", f"{OURS}/mlp/down"),
)
ENDS = (
    Rule("model.embed_tokens.weight", ("embed/table",)),
    *linear("lm_head", "head"),
)
NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{OURS}/attention_norm"),
    *norm(f"{LAYER}.post_attention_layernorm", f"{OURS}/mlp_norm"),
    *norm("model.norm", "norm"),
)


def common(config: Config) -> dict[str, Any]:
    """The fields that all families of this shape read alike."""
    config.refuse("hidden_act", "silu")
    return {
        "vocab": config.need("vocab_size"),
        "layers": config.need("num_hidden_layers"),
        "width": config.need("hidden_size"),
        "hidden": config.need("intermediate_size"),
        "heads": config.need("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim") or 0,
        "norm_eps": config.get("rms_norm_eps") or 1e-6,
        "context": config.need("max_position_embeddings"),
        "rotary": read_rotary(config),
    }


def uncommon(spec: Decoder) -> dict[str, Any]:
    """`common` backwards."""
    return {
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden_width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_count,
        "head_dim": spec.head_width,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        **write_rotary(spec),
    }


def halves(stored: np.ndarray, heads: int) -> np.ndarray:
    """Rows of llama.cpp's W_q, W_k or biases, pairs (i, i + H/2) side by side -> halves."""
    pairs = stored.reshape(heads, -1, 2, *stored.shape[1:])
    return pairs.swapaxes(1, 2).reshape(stored.shape)


@families.register("llama")
class Llama(Family):
    """RMS norms, rotary positions, grouped keys, SwiGLU."""

    architecture = "LlamaForCausalLM"
    gguf = "llama"
    rules = (*ATTENTION, *FEED_FORWARD, *NORMS, *ENDS)
    ignore = (r".*rotary_emb\.inv_freq",)

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        bias = bool(config.get("attention_bias"))
        return Decoder(
            **common(config),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bool(config.get("mlp_bias")),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        if spec.qkv_bias != spec.out_bias:
            raise InputError("qkv_bias and out_bias: a llama has both or neither")
        return {
            **uncommon(spec),
            "hidden_act": "silu",
            "attention_bias": spec.qkv_bias,
            "mlp_bias": spec.mlp_bias,
        }

    @classmethod
    def from_gguf(cls, name: str, stored: View, config: Config) -> View:
        heads = config["num_attention_heads"]
        if ".k_proj." in name:
            heads = config.get("num_key_value_heads") or heads
        elif ".q_proj." not in name:
            return stored
        return stored.mapped(lambda w: halves(w, heads), stored.shape)
