"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k, v and, rarely, windows."""

from typing import Any

from causal_jax.attention import Dense
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config, Family, families
from causal_jax.models.pretrained._layers import FULL, SLIDING, read_layers, windowed, write_layers
from causal_jax.models.pretrained.llama import Llama, common, uncommon


def windows(config: Config) -> tuple:
    """The layers' attention: windows from layer `max_window_layers` on, if they are used at all."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    types = [
        SLIDING if window is not None and layer >= first else FULL
        for layer in range(config.need("num_hidden_layers"))
    ]
    return read_layers(config, types, Dense(), windowed(window))


def write_windows(spec: Decoder) -> dict[str, Any]:
    """`windows` backwards."""
    types, window = write_layers(spec)
    last_full = max((i + 1 for i, t in enumerate(types) if t == FULL), default=0)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": last_full,
        "layer_types": types,
    }


@families.register("qwen2")
class Qwen2(Family):
    """Llama's shape, biases on the query, key and value projections."""

    architecture = "Qwen2ForCausalLM"
    gguf = "qwen2"
    rules = Llama.rules

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        return Decoder(
            **common(config),
            attention=windows(config),
            qkv_bias=True,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        return {**uncommon(spec), **write_windows(spec), "hidden_act": "silu"}
