"""Gemma 2 (arXiv 2408.00118): norms before and after each branch, soft caps, every other layer
windowed, the embedding scaled by sqrt(width).

Its norms multiply with 1 + w; files of llama.cpp store 1 + w, the family's own w.
"""

import math
from typing import Any

import numpy as np

from causal_jax.attention import Dense
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import PLUS_ONE, Config, Family, families, norm
from causal_jax.models.pretrained._layers import FULL, SLIDING, read_layers, windowed, write_layers
from causal_jax.models.pretrained._views import View
from causal_jax.models.pretrained.llama import (
    ATTENTION,
    ENDS,
    FEED_FORWARD,
    LAYER,
    OURS,
    common,
    uncommon,
)

NORMS = (
    *norm(f"{LAYER}.input_layernorm", f"{OURS}/attention_norm", PLUS_ONE),
    *norm(f"{LAYER}.post_attention_layernorm", f"{OURS}/attention_post", PLUS_ONE),
    *norm(f"{LAYER}.pre_feedforward_layernorm", f"{OURS}/mlp_norm", PLUS_ONE),
    *norm(f"{LAYER}.post_feedforward_layernorm", f"{OURS}/mlp_post", PLUS_ONE),
    *norm("model.norm", "norm", PLUS_ONE),
)


@families.register("gemma2")
class Gemma2(Family):
    """Post-norms, soft caps, alternating windows."""

    architecture = "Gemma2ForCausalLM"
    gguf = "gemma2"
    rules = (*ATTENTION, *FEED_FORWARD, *NORMS, *ENDS)

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        config.refuse("hidden_activation", "gelu_pytorch_tanh")
        config.refuse("use_bidirectional_attention", False)
        plain = Config({k: v for k, v in config.items() if k != "hidden_act"}, config.where)
        sizes = {**common(plain), "head_dim": config.get("head_dim") or 256}
        layers = sizes["layers"]
        # llama.cpp's files do not say it: the 27B model (46 layers) divides by width / heads.
        by_size = sizes["width"] / sizes["heads"] if layers == 46 else sizes["head_dim"]
        rest = {
            "scale": (config.get("query_pre_attn_scalar") or by_size) ** -0.5,
            "soft_cap": config.get("attn_logit_softcapping"),
        }
        types = [FULL if layer % 2 else SLIDING for layer in range(layers)]
        sliding = windowed(config.get("sliding_window") or 4096, **rest)
        bias = bool(config.get("attention_bias"))
        return Decoder(
            **sizes,
            attention=read_layers(config, types, Dense(**rest), sliding),
            activation="geglu_tanh",
            post_norm=True,
            qkv_bias=bias,
            out_bias=bias,
            embed_scale=math.sqrt(sizes["width"]),
            logits_soft_cap=config.get("final_logit_softcapping"),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        types, window = write_layers(spec)
        dense = [layer for layer in spec.layer_specs() if isinstance(layer, Dense)]
        settings = {(layer.scale or spec.head_width**-0.5, layer.soft_cap) for layer in dense}
        if len(settings) > 1:
            raise InputError("attention: a gemma2 has one scale and one soft cap in all layers")
        scale, soft_cap = settings.pop()
        if not math.isclose(spec.embed_scale, math.sqrt(spec.width), rel_tol=1e-6):
            raise InputError(
                f"embed_scale={spec.embed_scale}: a gemma2 has sqrt(width) ="
                f" {math.sqrt(spec.width):g}"
            )
        return {
            **uncommon(spec),
            "layer_types": types,
            "sliding_window": window or 4096,
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": soft_cap,
            "final_logit_softcapping": spec.logits_soft_cap,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": spec.qkv_bias,
        }

    @classmethod
    def from_gguf(cls, name: str, stored: View, config: Config) -> View:
        if not name.endswith("norm.weight"):
            return stored
        return stored.each(lambda w: np.asarray(w, np.float32) - 1)
