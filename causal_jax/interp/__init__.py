"""Look inside a model: a catalogue of edits, sweeps over them, scores of heads and tokens.

    from causal_jax.interp import knock_out, patch, sweep

Nothing is imported until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causal_jax.interp.edits import (
        ablate_heads,
        counterfactual,
        counterfactual_attention,
        knock_out,
        noise,
        patch,
        path_patch,
        peek,
        prefix,
        steer,
        subspace,
    )
    from causal_jax.interp.sweeps import sweep

_HOME = {
    "ablate_heads": "edits",
    "counterfactual": "edits",
    "counterfactual_attention": "edits",
    "knock_out": "edits",
    "noise": "edits",
    "patch": "edits",
    "path_patch": "edits",
    "peek": "edits",
    "prefix": "edits",
    "steer": "edits",
    "subspace": "edits",
    "sweep": "sweeps",
}

__all__ = [
    "ablate_heads",
    "counterfactual",
    "counterfactual_attention",
    "knock_out",
    "noise",
    "patch",
    "path_patch",
    "peek",
    "prefix",
    "steer",
    "subspace",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
