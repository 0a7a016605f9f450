"""Rotary embeddings in config.json: rope_theta and rope_scaling (transformers 4), rope_parameters
(transformers 5)."""

from typing import Any

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pretrained._base import Config
from causal_jax.positions import Linear, Llama3, Rotary, YaRN


def read_rotary(config: Config, *, fraction: float = 1.0, base: float = 10000.0) -> Rotary:
    """The rotary embedding of a config.

    Args:
        config: of the model.
        fraction, base: the family's own, where the config says nothing.
    """
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(given.get("rope_theta") or config.get("rope_theta") or base)
    turned = given.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    fraction = float(turned or fraction)
    return Rotary(base, fraction, _scaling(given, config))


def _scaling(given: dict[str, Any], config: Config) -> Linear | Llama3 | YaRN | None:
    kind = given.get("rope_type") or given.get("type") or "default"
    original = given.get("original_max_position_embeddings") or config.get(
        "max_position_embeddings"
    )
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return Linear(float(given["factor"]))
        if kind == "llama3":
            return Llama3(
                float(given["factor"]),
                float(given["low_freq_factor"]),
                float(given["high_freq_factor"]),
                int(given["original_max_position_embeddings"]),
            )
        if kind == "yarn":
            return YaRN(
                float(given["factor"]),
                int(original or 0),
                float(given.get("beta_fast") or 32.0),
                float(given.get("beta_slow") or 1.0),
                given.get("attention_factor"),
                given.get("mscale"),
                given.get("mscale_all_dim"),
                given.get("truncate", True),
            )
    except KeyError as e:
        raise InputError(f"{config.where}: rope scaling {kind!r} lacks {e}") from None
    raise InputError(
        f"{config.where}: rope scaling {kind!r} is not supported,"
        " only default, linear, llama3 and yarn"
    )


def write_rotary(spec: Decoder) -> dict[str, Any]:
    """`read_rotary` backwards, as both generations of transformers read it."""
    rotary = spec.rotary
    if rotary is None or rotary.interleaved:
        raise InputError(f"rotary={rotary}: the file format knows only halves, not interleaved")
    scaling, out = rotary.scaling, {}
    if isinstance(scaling, Linear):
        out = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3):
        out = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    elif isinstance(scaling, YaRN):
        out = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(scaling, name) is not None:
                out[name] = getattr(scaling, name)
    parameters = {"rope_theta": rotary.base, "rope_type": "default", **out}
    if rotary.fraction != 1.0:
        parameters["partial_rotary_factor"] = rotary.fraction
    return {
        "rope_theta": rotary.base,
        "rope_scaling": out or None,
        "rope_parameters": parameters,
    }
