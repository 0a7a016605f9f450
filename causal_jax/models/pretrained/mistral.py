"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer."""

from typing import Any

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config, families
from causal_jax.models.pretrained._layers import FULL, windowed, write_layers
from causal_jax.models.pretrained.llama import Llama, common, uncommon


@families.register("mistral")
class Mistral(Llama):
    """Llama's shape, a window, no biases."""

    architecture = "MistralForCausalLM"
    gguf = "mistral"  # converted files mostly say "llama"

    @classmethod
    def decoder(cls, config: Config) -> Decoder:
        return Decoder(
            **common(config),
            attention=(windowed(config.get("sliding_window")),),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def config(cls, spec: Decoder) -> dict[str, Any]:
        types, window = write_layers(spec)
        if len(set(types)) > 1:
            raise InputError("attention: a mistral has the same window in every layer")
        return {
            **uncommon(spec),
            "hidden_act": "silu",
            "sliding_window": None if types[0] == FULL else window,
        }
