"""GGUF files of tiny models, made as llama.cpp's converter makes them."""

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
}


def words(vocab: int) -> list[str]:
    """A byte-level vocabulary of so many tokens: letters, pairs of them, one mark at the end."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ"]
    pairs = [a + b for a in "aeiou" for b in "nrst"] + ["Ġ" + a for a in "abcdefghijklmnopqrs"]
    return [*letters, *pairs][: vocab - 1] + ["<|end|>"]


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, **changes):
    """Convert a model of transformers; `changes` replace metadata, None leaves a key out."""
    config = model.config
    name = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]]
    writer = gguf.GGUFWriter(path, changes.pop("architecture", architecture))
    tensors = dict(_converted(model))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], config.num_hidden_layers)
    for key, value in (_metadata(config) | _vocabulary(config.vocab_size) | changes).items():
        key = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for ours, array in tensors.items():
        stored = table.get_name(ours, (".weight", ".bias")) or ours
        exact = array.ndim < 2
        data = array if exact else gguf.quantize(array, kind)
        writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType.F32 if exact else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config) -> dict:
    heads = config.num_attention_heads
    out = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
        "context_length": config.max_position_embeddings,
    }
    if config.model_type == "gpt2":
        inner = config.n_inner or 4 * config.n_embd
        eps = config.layer_norm_epsilon
        return out | {"feed_forward_length": inner, "attention.layer_norm_epsilon": eps}
    rope = config.rope_parameters
    out |= {"feed_forward_length": config.intermediate_size, "rope.freq_base": rope["rope_theta"]}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.model_type == "gpt_neox":
        return out | {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
            "use_parallel_residual": config.use_parallel_residual,
        }
    out |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.model_type == "gemma2":
        out |= {
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    return out


def _vocabulary(vocab: int) -> dict:
    tokens = words(vocab)
    merges = [f"{w[0]} {w[1:]}" for w in tokens if len(w) == 2]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (vocab - 1) + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocab - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def _converted(model):
    """(name in transformers, array as llama.cpp stores it)."""
    config = model.config
    kind, heads = config.model_type, config.num_attention_heads
    for name, value in model.state_dict().items():
        w = value.float().numpy()
        if name.startswith("lm_head") and config.tie_word_embeddings:
            continue
        if kind in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
            n = heads if ".q_proj." in name else config.num_key_value_heads
            w = w.reshape(n, 2, w.shape[0] // n // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if kind == "gemma2" and name.endswith("norm.weight"):
            w = w + 1
        if kind == "gpt2" and ".c_" in name and name.endswith(".weight"):
            w = w.T
        if kind == "gpt_neox" and "query_key_value" in name:
            per_head = w.reshape(heads, 3, -1, *w.shape[1:])
            w = np.concatenate([per_head[:, i].reshape(-1, *w.shape[1:]) for i in range(3)])
        yield name, np.ascontiguousarray(w)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        plain = rope["rope_theta"] ** (np.arange(0, 8, 2) / -8)
        slowed = model.model.rotary_emb.inv_freq.numpy()
        yield "rope_freqs.weight", (plain / slowed).astype(np.float32)
