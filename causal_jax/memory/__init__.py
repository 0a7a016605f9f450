"""Memories that learn while they read: one file per memory, found by name through `memories`.

    from causal_jax.memory import Delta

    memory = Delta()
    params = memory.init(jax.random.key(0), width=256, heads=4)
    state = memory.init_state(params, batch=1)
    state = memory.write(params, state, x)            # x [B, T, D]
    y = memory.read(params, state, x)                 # what it now says, [B, T, D]
    y, state = memory(params, x, state)               # every token reads, every token is written

Nothing is imported until it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causal_jax.memory._base import Case, MemorySpec, memories
    from causal_jax.memory._state import Gates, MemState
    from causal_jax.memory.deep import Deep
    from causal_jax.memory.delta import Delta
    from causal_jax.memory.last_layer import LastLayer

_HOME = {
    "Case": "_base",
    "Deep": "deep",
    "Delta": "delta",
    "Gates": "_state",
    "LastLayer": "last_layer",
    "MemState": "_state",
    "MemorySpec": "_base",
    "memories": "_base",
}

__all__ = [
    "Case",
    "Deep",
    "Delta",
    "Gates",
    "LastLayer",
    "MemState",
    "MemorySpec",
    "memories",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
