"""Safetensors as `transformers` lays them out: config.json beside one file or indexed shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16, which the package asks for
import numpy as np

from causal_jax.errors import InputError
from causal_jax.models.pretrained._base import Config
from causal_jax.models.pretrained._checkpoint import Checkpoint
from causal_jax.models.pretrained._views import Index, View

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def safetensors_checkpoint(path: Path) -> Checkpoint:
    """The weights in a folder, or in one file with its config.json beside it.

    Raises:
        InputError: no config.json, no weights, missing shards, damaged files.
    """
    folder = path if path.is_dir() else path.parent
    config = Config(read_json(folder / "config.json"), str(path))
    if path.is_dir() and (folder / INDEX).is_file():
        return Checkpoint(str(path), config, _shards(folder))
    return Checkpoint(str(path), config, _tensors(_single(folder) if path.is_dir() else path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an InputError that names the file."""
    if not path.is_file():
        raise InputError(f"{path}: missing; a folder with a model holds {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path} is no JSON: {e}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _single(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if (folder / WHOLE) in found:
        return folder / WHOLE
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{folder}: {len(found)} safetensors files but no {INDEX} that says what lies where"
        )
    old = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    hint = f" ({', '.join(old)} must be saved as safetensors first)" if old else ""
    raise InputError(f"{folder}: no {WHOLE}, no {INDEX}{hint}")


def _shards(folder: Path) -> dict[str, View]:
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{folder / INDEX}: weight_map is missing")
    files = sorted(set(where.values()))
    if lost := [f for f in files if not (folder / f).is_file()]:
        raise InputError(
            f"{folder}: missing shards {', '.join(lost)} ({len(lost)} of {len(files)})"
        )
    views: dict[str, View] = {}
    for file in files:
        held = _tensors(folder / file)
        wanted = [name for name, f in where.items() if f == file]
        if absent := [name for name in wanted if name not in held]:
            raise InputError(
                f"{folder / file}: lacks {', '.join(absent[:8])}, which {INDEX} says it has"
            )
        views |= {name: held[name] for name in wanted}
    return views


def _tensors(path: Path) -> Mapping[str, View]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(
            'safetensors files need the package safetensors: pip install "causal_jax[models]"'
        ) from None
    try:
        file: Any = safe_open(str(path), framework="numpy").__enter__()  # mapped while views live
        names = list(file.keys())
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: truncated or damaged safetensors file ({e})") from None
    return {name: _view(file, name) for name in names}


def _view(file: Any, name: str) -> View:
    def read(index: Index) -> np.ndarray:
        return file.get_slice(name)[index] if index else file.get_tensor(name)

    return View(tuple(file.get_slice(name).get_shape()), read)
