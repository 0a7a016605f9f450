"""Who may attend to whom: one file per mechanism, found by name through the `attention` registry.

    from causal_jax.attention import Dense, attention, dense_attention

Nothing is imported until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causal_jax.attention._base import AttentionSpec, Case, attention
    from causal_jax.attention._implementations import Choice, choose
    from causal_jax.attention.dense import Dense, dense_attention
    from causal_jax.attention.merge import merge_attention

_HOME = {
    "AttentionSpec": "_base",
    "Case": "_base",
    "attention": "_base",
    "Choice": "_implementations",
    "Dense": "dense",
    "choose": "_implementations",
    "dense_attention": "dense",
    "merge_attention": "merge",
}

__all__ = [
    "AttentionSpec",
    "Case",
    "Choice",
    "Dense",
    "attention",
    "choose",
    "dense_attention",
    "merge_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
