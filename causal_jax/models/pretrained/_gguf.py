"""A GGUF file seen as the checkpoint it was converted from: the family's own keys and names."""

from typing import Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.gguf_file import GGUFFile, GGUFTensor
from causal_jax.models.pretrained._base import Config, Family, families
from causal_jax.models.pretrained._checkpoint import Checkpoint
from causal_jax.models.pretrained._views import Index, View
from causal_jax.positions import Llama3, Rotary, frequencies


def gguf_checkpoint(file: GGUFFile) -> Checkpoint:
    """Config and tensors under the names and in the layout of the family's own checkpoints.

    Raises:
        InputError: an architecture without a family here, or no such table of tensors.
    """
    architecture = str(file.metadata.get("general.architecture"))
    known = {families[name].gguf: families[name] for name in families.names()}
    if architecture not in known:
        raise InputError(
            f"{file.where}: unknown architecture {architecture!r}"
            f" (known: {', '.join(sorted(known))})"
        )
    family = known[architecture]
    config = _config(file, architecture, family)
    views = {}
    for name, tensor in _renamed(file, architecture, family).items():
        views[name] = family.from_gguf(name, _view(tensor), config)
    return Checkpoint(file.where, config, views)


def _config(file: GGUFFile, architecture: str, family: type[Family]) -> Config:
    def own(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{key}", default)

    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.where}: token_embd.weight, the embedding, is missing")
    out: dict[str, Any] = {
        "model_type": families.name_of(family),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": not {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}.isdisjoint(file.tensors),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    for key, ours in family.gguf_keys.items():
        if own(key) is not None:
            out[ours] = own(key)
    heads, width, turned = map(
        own, ("attention.head_count", "embedding_length", "rope.dimension_count")
    )
    if heads and width and turned:
        head_dim = own("attention.key_length") or width // heads
        out["partial_rotary_factor"] = turned / head_dim
    if own("rope.scaling.type", "none") != "none":
        out["rope_scaling"] = {
            "rope_type": own("rope.scaling.type"),
            "factor": own("rope.scaling.factor"),
            "original_max_position_embeddings": own("rope.scaling.original_context_length"),
        }
    if "rope_freqs.weight" in file.tensors:
        out["rope_scaling"] = _llama3(file, out)
    return Config(out, file.where)


def _llama3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling from the table of divisors that stands for it in the file."""
    table = file.tensors["rope_freqs.weight"]
    divisors = table.rows(0, table.shape[0])
    plain = Rotary(float(config.get("rope_theta", 10000.0)))
    scaling = Llama3(float(divisors.max()))
    f = frequencies(plain, 2 * len(divisors))
    if not np.allclose(f / scaling.apply(f, plain.base), divisors, rtol=1e-3):
        raise InputError(
            f"{file.where}: rope_freqs.weight is not the scaling of Llama 3.1 (factor"
            f" {divisors.max():g}, 1, 4, 8192), the only table of this kind that is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _renamed(file: GGUFFile, architecture: str, family: type[Family]) -> dict[str, GGUFTensor]:
    """Tensors under the family's names; what has none keeps its own and is complained of later."""
    import gguf

    number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    layers = file.metadata.get(f"{architecture}.block_count", 0)
    table = gguf.get_tensor_name_map(number, layers)
    names: dict[str, str] = {}
    for rule in family.rules:
        for layer in range(layers) if "{l}" in rule.source else (0,):
            ours = rule.source.replace("{l}", str(layer))
            theirs = table.get_name(ours, try_suffixes=(".weight", ".bias"))
            if theirs is not None:
                names.setdefault(theirs, ours)
    skipped = {"rope_freqs.weight"}
    return {names.get(n, n): t for n, t in file.tensors.items() if n not in skipped}


def _view(tensor: GGUFTensor) -> View:
    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(tensor.shape[0])
        return tensor.rows(start, stop)[(slice(None), *index[1:])]

    return View(tensor.shape, read)
