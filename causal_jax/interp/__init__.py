"""Look inside a model: a catalogue of edits, sweeps over them, scores of heads and tokens.

    from causal_jax.interp import knock_out, patch, sweep

Nothing is imported until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causal_jax.interp.allocation import context_dependency, steer_attention
    from causal_jax.interp.counterfactuals import counterfactual, counterfactual_attention
    from causal_jax.interp.edges import knock_out, peek, prefix
    from causal_jax.interp.edits import (
        ablate_heads,
        noise,
        patch,
        path_patch,
        steer,
        subspace,
    )
    from causal_jax.interp.html import token_page
    from causal_jax.interp.means import (
        MeanTable,
        cama,
        mean_table,
    )
    from causal_jax.interp.plots import heat_map
    from causal_jax.interp.scores import (
        attribution,
        logit_difference,
        logit_lens,
    )
    from causal_jax.interp.sweeps import sweep
    from causal_jax.interp.tokens import (
        Batch,
        Prompt,
        in_chunk,
        pad,
        tokenize,
    )

_HOME = {
    "Batch": "tokens",
    "MeanTable": "means",
    "Prompt": "tokens",
    "ablate_heads": "edits",
    "attribution": "scores",
    "cama": "means",
    "context_dependency": "allocation",
    "counterfactual": "counterfactuals",
    "counterfactual_attention": "counterfactuals",
    "heat_map": "plots",
    "in_chunk": "tokens",
    "knock_out": "edges",
    "logit_difference": "scores",
    "logit_lens": "scores",
    "mean_table": "means",
    "noise": "edits",
    "pad": "tokens",
    "patch": "edits",
    "path_patch": "edits",
    "peek": "edges",
    "prefix": "edges",
    "steer": "edits",
    "steer_attention": "allocation",
    "subspace": "edits",
    "sweep": "sweeps",
    "token_page": "html",
    "tokenize": "tokens",
}

__all__ = [
    "Batch",
    "MeanTable",
    "Prompt",
    "ablate_heads",
    "attribution",
    "cama",
    "context_dependency",
    "counterfactual",
    "counterfactual_attention",
    "heat_map",
    "in_chunk",
    "knock_out",
    "logit_difference",
    "logit_lens",
    "mean_table",
    "noise",
    "pad",
    "patch",
    "path_patch",
    "peek",
    "prefix",
    "steer",
    "steer_attention",
    "subspace",
    "sweep",
    "token_page",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
