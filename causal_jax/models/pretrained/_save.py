"""From a model and its tokenizer to a folder that `transformers` opens."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.data.tokenizers.pretrained import PretrainedTokenizer
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.models.pretrained._base import Config, Family, Rule, families
from causal_jax.models.pretrained._checkpoint import stacked_names
from causal_jax.models.pretrained._safetensors import INDEX, WHOLE
from causal_jax.paths import named_leaves

# How a model is run, not what it is.
_RUN = {"dtype": "float32", "remat": "none", "scan": True, "dropout": 0.0}


def save(
    folder: str | Path,
    model: DecoderModel,
    tokenizer: PretrainedTokenizer | None = None,
    *,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = 4 << 30,
) -> Path:
    """Write safetensors, config.json and the tokenizer into a new folder.

    Args:
        folder: must not exist yet, or be empty.
        model: whose spec one of the families can describe.
        tokenizer: written beside it.
        family: name of the family; None: the first that describes the spec.
        dtype: of the stored weights.
        shard_bytes: larger models are cut into files of about this size.

    Returns:
        the folder.

    Raises:
        InputError: the folder is in use, or no family describes this model without loss (an
            exchanged attention, say); the message names the fields.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"save to {folder}: it exists and is not an empty folder")
    kind = families[_kind(model.spec) if family is None else family]
    if lost := _lost(kind, model.spec):
        raise InputError(f"{families.name_of(kind)} cannot describe {'; '.join(lost)}")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_weights(part, kind, model, jnp.dtype(dtype), shard_bytes)
    config = {
        "architectures": [kind.architecture],
        "model_type": families.name_of(kind),
        "dtype": dtype,
        "torch_dtype": dtype,
        **kind.config(model.spec),
    }
    if tokenizer is not None:
        stops = list(tokenizer.stop_tokens)
        config |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        _write_json(part / "generation_config.json", {"eos_token_id": stops})
        tokenizer.export(part)
    _write_json(part / "config.json", config)
    if folder.exists():
        folder.rmdir()
    part.replace(folder)
    return folder


def _kind(spec: Decoder) -> str:
    reasons = []
    for name in families.names():
        lost = _lost(families[name], spec)
        if not lost:
            return name
        reasons.append(f"{name}: {'; '.join(lost)}")
    raise InputError("no family describes this model.\n  " + "\n  ".join(reasons))


def _lost(family: type[Family], spec: Decoder) -> list[str]:
    """What of the spec does not survive being written as this family's config and read back."""
    try:
        again = family.decoder(Config(family.config(spec), "the config written"))
    except (InputError, KeyError, TypeError) as e:
        return [str(e)]
    before, after = _plain(spec), _plain(again)
    return [
        f"{f.name}={getattr(before, f.name)!r} (it would become {getattr(after, f.name)!r})"
        for f in dataclasses.fields(Decoder)
        if getattr(before, f.name) != getattr(after, f.name)
    ]


def _plain(spec: Decoder) -> Decoder:
    """Every default spelled out, and how it is run left out."""
    attention = tuple(
        dataclasses.replace(s, implementation=None, scale=s.scale or spec.head_width**-0.5)
        if isinstance(s, Dense)
        else s
        for s in spec.layer_specs()
    )
    sizes = {
        "kv_heads": spec.kv_count,
        "head_dim": spec.head_width,
        "hidden": spec.hidden_width,
        "attention": attention,
    }
    return dataclasses.replace(spec, **sizes, **_RUN)


def _write_weights(
    folder: Path, family: type[Family], model: DecoderModel, dtype: Any, shard_bytes: int
) -> None:
    from safetensors.numpy import save_file

    leaves, layers = named_leaves(nnx.state(model, nnx.Param)), _layers(model)
    plan = list(_plan(family, model.spec, leaves, layers))
    shards: list[list] = [[]]
    filled = 0
    for rule, name, targets in plan:
        size = sum(_size(t, leaves, layers) for t in targets) * dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((rule, name, targets))
        filled += size
    where = {}
    for number, shard in enumerate(shards, 1):
        many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = WHOLE if len(shards) == 1 else many
        tensors = {}
        for rule, name, targets in shard:
            joined = rule.transform.join([_value(t, leaves, layers) for t in targets], model.spec)
            tensors[name] = np.ascontiguousarray(joined.astype(dtype))
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {}, "weight_map": where})


def _layers(model: DecoderModel) -> dict[str, tuple[str, int]]:
    """A layer's own parameter -> (the stacked one, place in it)."""
    out = {}
    for name in named_leaves(nnx.state(model, nnx.Param)):
        for place, own in enumerate(stacked_names(name, model.spec) or ()):
            out[own] = (name, place)
    return out


def _plan(
    family: type[Family], spec: Decoder, leaves: dict[str, Any], layers: dict[str, tuple[str, int]]
) -> Iterator[tuple[Rule, str, tuple[str, ...]]]:
    """(rule, stored name, parameters) for every parameter exactly once."""
    left = {n for n in leaves if stacked_names(n, spec) is None} | set(layers)
    for rule in family.rules:
        for layer in range(spec.layers) if "{l}" in rule.source else (0,):
            targets = tuple(t.replace("{l}", str(layer)) for t in rule.targets)
            if left.issuperset(targets):
                left.difference_update(targets)
                yield rule, rule.source.replace("{l}", str(layer)), targets
    if left:
        raise InputError(f"parameters that {family.__name__} has no place for: {sorted(left)[:8]}")


def _value(name: str, leaves: dict[str, Any], layers: dict[str, tuple[str, int]]) -> np.ndarray:
    if name not in layers:
        return np.asarray(leaves[name])
    whole, place = layers[name]
    return np.asarray(leaves[whole][place])


def _size(name: str, leaves: dict[str, Any], layers: dict[str, tuple[str, int]]) -> int:
    if name not in layers:
        return leaves[name].size
    leaf = leaves[layers[name][0]]
    return leaf.size // leaf.shape[0]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
