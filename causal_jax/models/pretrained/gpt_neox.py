"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): both branches read the block's input, a
quarter of every head is rotated, q, k and v of a head lie together in one matrix.

Files of llama.cpp have all queries first, then all keys, then all values.
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
from causal_jax.models.pretrained._rope import read_rotary, write_rotary
from causal_jax.models.pretrained._views import View
from causal_jax.models.pretrained.gpt2 import ACTIVATIONS, fused

LAYER, OURS = "gpt_neox.layers.{l}", "layers/{l}"


def _split(view: View, spec: Decoder) -> tuple[View, ...]:
    """[N 3 H, ...] -> three of [N H, ...], matrices turned to [D, N H]."""
    rest = view.shape[1:]

    def part(i: int) -> View:
        def take(w: np.ndarray) -> np.ndarray:
            return w.reshape(spec.heads, 3, -1, *rest)[:, i].reshape(-1, *rest)

        return view.mapped(take, (view.shape[0] // 3, *rest)).transposed()

    return tuple(part(i) for i in range(3))


def _join(arrays, spec: Decoder) -> np.ndarray:
    heads = [a.T.reshape(spec.heads, 1, -1, *a.T.shape[1:]) for a in arrays]
    joined = np.concatenate(heads, 1)
    return joined.reshape(-1, *joined.shape[3:])


HEADS = Transform(_split, _join)


GGUF_KEYS = {
    **Family.gguf_keys,
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}


@families.register("gpt_neox")
class GPTNeoX(Family):
    """Parallel branches, partial rotation, layer norms, biases."""

    architecture = "GPTNeoXForCausalLM"
    gguf = "gptneox"
    prefix = "gpt_neox."
    head = r"(embed_out|lm_head)\."
    rules = (
        Rule("gpt_neox.embed_in.weight", ("embed/table",)),
        *norm(f"{LAYER}.input_layernorm", f"{OURS}/attention_norm"),
        *norm(f"{LAYER}.post_attention_layernorm", f"{OURS}/mlp_norm"),
        *fused(f"{LAYER}.attention.query_key_value", (HEADS, HEADS)),
        *linear(f"{LAYER}.attention.dense", f"{OURS}/attention/o"),
        *linear(f"{LAYER}.mlp.dense_h_to_4h", f"{OURS}/mlp/up"),
        *linear(f"{LAYER}.mlp.dense_4h_to_h", f"{OURS}/mlp/down"),
        *norm("gpt_neox.final_layer_norm", "norm"),
        *linear("embed_out", "head"),
        *linear("lm_head", "head"),
    )
    ignore = (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
    gguf_keys = GGUF_KEYS

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        config.refuse("hidden_act", *ACTIVATIONS)
        config.refuse("attention_bias", True)
        turned = config.get("rotary_pct", 0.25)
        return Decoder(
            vocab=config.need("vocab_size"),
            layers=config.need("num_hidden_layers"),
            width=config.need("hidden_size"),
            heads=config.need("num_attention_heads"),
            hidden=config.need("intermediate_size"),
            activation=ACTIVATIONS[config.get("hidden_act") or "gelu"],
            norm="layer",
            norm_eps=config.get("layer_norm_eps") or 1e-5,
            rotary=read_rotary(
                config, fraction=turned, base=config.get("rotary_emb_base") or 10000.0
            ),
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            parallel=bool(config.get("use_parallel_residual", True)),
            tied=bool(config.get("tie_word_embeddings", False)),
            context=config.need("max_position_embeddings"),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        if set(write_layers(spec)[0]) != {FULL}:
            raise InputError("attention: a gpt_neox has no windows")
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        rotary = write_rotary(spec)
        return {
            "vocab_size": spec.vocab,
            "num_hidden_layers": spec.layers,
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "intermediate_size": spec.hidden_width,
            "hidden_act": names[spec.activation],
            "layer_norm_eps": spec.norm_eps,
            "use_parallel_residual": spec.parallel,
            "tie_word_embeddings": spec.tied,
            "max_position_embeddings": spec.context,
            "rotary_pct": spec.rotary.fraction if spec.rotary else 1.0,
            "rotary_emb_base": spec.rotary.base if spec.rotary else 10000.0,
            **rotary,
        }

    @classmethod
    def from_gguf(cls, name: str, stored: View, config: Config) -> View:
        if ".query_key_value." not in name:
            return stored
        heads = config["num_attention_heads"]

        def back(w: np.ndarray) -> np.ndarray:
            return w.reshape(3, heads, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)

        return stored.mapped(back, stored.shape)
