"""Titans models: decoders whose layers carry a memory that learns while it reads.

    spec = titans("mac", "170m")                       # a Decoder, like any other
    spec = Decoder(attention=(MAG(window=64),), ...)   # the same by hand, or mixed

Widths and heads of the sizes are those of the same authors' later paper (arXiv 2504.13173), as the
Titans paper (arXiv 2501.00663) gives none; as many layers as make the size, for layers differ in
what they hold: per D^2 a memory 5 (q, k, v, o, gate), attention 4, the feed-forward layer 8, the
reading of MAC 3.
"""

from typing import Any, Literal

from causal_jax.memory import Delta, MemorySpec
from causal_jax.models.decoder import Decoder
from causal_jax.nn.mac import MAC
from causal_jax.nn.mixer import MixerSpec
from causal_jax.nn.titans import LMM, MAG, MAL

Kind = Literal["lmm", "mac", "mag", "mal"]
Size = Literal["170m", "340m", "400m", "760m"]

_WIDTH = {"170m": 768, "340m": 1024, "400m": 1024, "760m": 1536}
_PER_LAYER = {"lmm": 13, "mac": 20, "mag": 17, "mal": 17}  # parameters over D^2
_VOCAB = 32_000


def layer(kind: Kind, memory: MemorySpec, *, window: int = 128, persistent: int = 4) -> MixerSpec:
    """One layer: MAC in segments of `window` tokens, MAG and MAL with attention to as many."""
    if kind == "mac":
        return MAC(memory=memory, persistent=persistent, segment=window)
    if kind == "lmm":
        return LMM(memory=memory, persistent=persistent)
    return (MAG if kind == "mag" else MAL)(memory=memory, persistent=persistent, window=window)


def titans(kind: Kind, size: Size, **changes: Any) -> Decoder:
    """The decoder of a kind and size, 32k tokens, 16 heads.

    Args:
        kind: "lmm" (memory alone), "mac" (as context), "mag" (as gate), "mal" (as layer).
        size: parameters, about.
        changes: other fields of `Decoder`.
    """
    width = _WIDTH[size]
    millions = int(size.removesuffix("m"))
    layers = round((millions * 1e6 - _VOCAB * width) / (_PER_LAYER[kind] * width**2))
    fields = {
        "vocab": 0, "layers": layers, "width": width, "heads": 16,
        "attention": (layer(kind, Delta()),), "context": 4096,
    }  # fmt: skip
    return Decoder(**(fields | changes))
