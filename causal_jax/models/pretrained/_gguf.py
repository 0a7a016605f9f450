"""A GGUF file seen as the checkpoint it was converted from: the family's own keys and names."""

import functools
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
        InputError: an architecture without a family here.
    """
    architecture = file.metadata.get("general.architecture")
    known = {families[name].gguf: families[name] for name in families.names()}
    if architecture not in known:
        raise InputError(
            f"{file.where}: unknown architecture {architecture!r} (known: {', '.join(sorted(known))})"
        )
    family = known[architecture]
    config = _config(file, architecture, family)
    tensors = {}
    for name, tensor in _renamed(file, architecture, family, config).items():
        tensors[name] = (
            _view(tensor).mapped(
                functools.partial(family.from_gguf, name, config=config), tensor.shape
            )
            if family.moved_in_gguf(name)
            else _view(tensor)
        )
    return Checkpoint(file.where, config, tensors)


def _config(file: GGUFFile, architecture: str, family: type[Family]) -> Config:
    data = file.metadata
    out: dict[str, Any] = {"model_type": families.name_of(family)}
    for key, ours in family.gguf_keys.items():
        if (value := data.get(f"{architecture}.{key}")) is not None:
            out[ours] = value
    out["vocab_size"] = (
        file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    )
    out["tie_word_embeddings"] = "output.weight" not in file.tensors
    out["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    out["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    heads, width = (
        data.get(f"{architecture}.{k}") for k in ("attention.head_count", "embedding_length")
    )
    turned = data.get(f"{architecture}.rope.dimension_count")
    if turned and heads and width:
        out["partial_rotary_factor"] = turned / (out.get("head_dim") or width // heads)
    kind = data.get(f"{architecture}.rope.scaling.type", "none")
    if kind != "none":
        out["rope_scaling"] = {
            "rope_type": kind,
            "factor": data.get(f"{architecture}.rope.scaling.factor"),
            "original_max_position_embeddings": data.get(
                f"{architecture}.rope.scaling.original_context_length"
            ),
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


def _renamed(
    file: GGUFFile, architecture: str, family: type[Family], config: Config
) -> dict[str, GGUFTensor]:
    """Tensors under the family's names; what has none keeps its own and is complained of later."""
    import gguf

    number = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    layers = int(next(v for k, v in file.metadata.items() if k == f"{architecture}.block_count"))
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
