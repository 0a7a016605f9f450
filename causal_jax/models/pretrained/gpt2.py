"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases, one matrix for q, k, v.

Its matrices are stored [in, out], unlike everybody else's; files of llama.cpp turn them round.
"""

from typing import Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import (
    Config,
    Family,
    Rule,
    Transform,
    families,
    linear,
    norm,
)
from causal_jax.models.pretrained._layers import FULL, write_layers
from causal_jax.models.pretrained._views import View
from causal_jax.nn.mlp import ActivationName

LAYER, OURS = "transformer.h.{l}", "layers/{l}"
ACTIVATIONS: dict[str, ActivationName] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def _thirds(view: View, spec: Decoder) -> tuple[View, ...]:
    third = view.shape[-1] // 3
    return tuple(view.columns(i * third, (i + 1) * third) for i in range(3))


# [D, 3 D] or [3 D]: the queries' columns, then the keys', then the values'.
THIRDS = Transform(_thirds, lambda arrays, _: np.concatenate(list(arrays), -1))


def conv(source: str, target: str) -> tuple[Rule, Rule]:
    """weight [in, out] and bias, as they are."""
    return Rule(f"{source}.weight", (f"{target}/kernel",)), Rule(
        f"{source}.bias", (f"{target}/bias",)
    )


def fused(source: str, transforms: tuple[Transform, Transform]) -> tuple[Rule, Rule]:
    """Weight and bias of one matrix for q, k, v."""
    return tuple(  # pyright: ignore[reportReturnType]
        Rule(f"{source}.{theirs}", tuple(f"{OURS}/attention/{p}/{ours}" for p in "qkv"), transform)
        for theirs, ours, transform in zip(("weight", "bias"), ("kernel", "bias"), transforms)
    )


GGUF_KEYS = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}


@families.register("gpt2")
class GPT2(Family):
    """Learned positions, layer norms, biases everywhere."""

    architecture = "GPT2LMHeadModel"
    gguf = "gpt2"
    prefix = "transformer."
    rules = (
        Rule("transformer.wte.weight", ("embed/table",)),
        Rule("transformer.wpe.weight", ("positions/table",)),
        *norm(f"{LAYER}.ln_1", f"{OURS}/attention_norm"),
        *fused(f"{LAYER}.attn.c_attn", (THIRDS, THIRDS)),
        *conv(f"{LAYER}.attn.c_proj", f"{OURS}/attention/o"),
        *norm(f"{LAYER}.ln_2", f"{OURS}/mlp_norm"),
        *conv(f"{LAYER}.mlp.c_fc", f"{OURS}/mlp/up"),
        *conv(f"{LAYER}.mlp.c_proj", f"{OURS}/mlp/down"),
        *norm("transformer.ln_f", "norm"),
        *linear("lm_head", "head"),
    )
    ignore = (r".*\.attn\.(bias|masked_bias)",)
    gguf_keys = GGUF_KEYS

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        config.refuse("activation_function", *ACTIVATIONS)
        config.refuse("scale_attn_weights", True)
        config.refuse("scale_attn_by_inverse_layer_idx", False)
        config.refuse("add_cross_attention", False)
        width = config.need("n_embd")
        return Decoder(
            vocab=config.need("vocab_size"),
            layers=config.need("n_layer"),
            width=width,
            heads=config.need("n_head"),
            hidden=config.get("n_inner") or 4 * width,
            activation=ACTIVATIONS[config.get("activation_function") or "gelu_new"],
            norm="layer",
            norm_eps=config.get("layer_norm_epsilon") or 1e-5,
            rotary=None,
            learned_positions=True,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tied=bool(config.get("tie_word_embeddings", True)),
            context=config.need("n_positions"),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        if set(write_layers(spec)[0]) != {FULL}:
            raise InputError("attention: a gpt2 has no windows")
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {
            "vocab_size": spec.vocab,
            "n_layer": spec.layers,
            "n_embd": spec.width,
            "n_head": spec.heads,
            "n_inner": spec.hidden_width,
            "activation_function": names[spec.activation],
            "layer_norm_epsilon": spec.norm_eps,
            "n_positions": spec.context,
            "tie_word_embeddings": spec.tied,
        }

    @classmethod
    def from_gguf(cls, name: str, stored: View, config: Config) -> View:
        is_matrix = ".c_" in name and name.endswith(".weight")
        return stored.transposed() if is_matrix else stored
