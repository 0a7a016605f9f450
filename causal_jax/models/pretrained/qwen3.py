"""Qwen 3 (arXiv 2505.09388): Llama with an RMS norm on every query and key head."""

from typing import Any

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config, Family, families, norm
from causal_jax.models.pretrained.llama import LAYER, OURS, Llama, common, uncommon
from causal_jax.models.pretrained.qwen2 import windows, write_windows


@families.register("qwen3")
class Qwen3(Family):
    """Llama's shape, norms on the heads of queries and keys."""

    architecture = "Qwen3ForCausalLM"
    gguf = "qwen3"
    rules = (
        *Llama.rules,
        *norm(f"{LAYER}.self_attn.q_norm", f"{OURS}/attention/q_norm"),
        *norm(f"{LAYER}.self_attn.k_norm", f"{OURS}/attention/k_norm"),
    )

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        bias = bool(config.get("attention_bias"))
        return Decoder(
            **{**common(config), "head_dim": config.get("head_dim") or 128},
            attention=windows(config),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        if spec.qkv_bias != spec.out_bias:
            raise InputError("qkv_bias and out_bias: a qwen3 has both or neither")
        return {
            **uncommon(spec),
            **write_windows(spec),
            "hidden_act": "silu",
            "attention_bias": spec.qkv_bias,
        }
