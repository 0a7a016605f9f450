"""The contract of every attention mechanism: a frozen spec that is its own config.

A mechanism is one file in this folder, in this order: a docstring that teaches (formula, cost, when
it equals dense attention, `Deviation:` from the paper); a pure function; a frozen dataclass
registered by name; its cases.

    q [B, T, N, H]   k [B, S, K, H]   v [B, S, K, H']   ->   o [B, T, N, H']
    query head h reads key/value head h // (N / K)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from causal_jax.masks import Mask
from causal_jax.registry import Registry
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap

attention = Registry("attention", "causal_jax.attention")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Base of all mechanisms: hyperparameters only, hashable, comparable, never a pytree leaf.

    Class attributes:
        patterns: uses that make sense, of "self-causal", "self-full", "cross-causal", "cross-full":
            queries and keys of the same sequence or not, under a causal mask or a full one.
        streams: has `init_state` and `step` whose cost does not grow with the past.
        needs_key: draws random numbers, so `key` must be given.
        places: decides itself at which positions keys stand. Given a layout (`causal_jax.segments`)
            it is called with un-rotated q and k and the keywords `layout` and `rotary`; else as all
            others.

    Mechanisms with parameters also define `init(width, heads, kv_heads, head_dim, rngs)`; those
    with a decode state `init_state` and `step`.
    """

    patterns: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False
    places: ClassVar[bool] = False

    def exact_when(self, length: int) -> bool:
        """Does it equal dense attention under the same mask, for sequences of this length?"""
        raise NotImplementedError(type(self).__name__)

    @property
    def by_distance(self) -> bool:
        """Does it depend on places only through their differences, so that padding in front of a
        sequence changes nothing once it is masked? (Sinks, blocks and buckets go by place.)"""
        return False

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Floating-point operations of the products of one causal forward pass, one sequence."""
        raise NotImplementedError(type(self).__name__)

    def init_state(self, batch: int, kv_heads: int, head_dim: int) -> Any:
        """What is remembered before the first position, [B, ...]; where it `streams`."""
        raise NotImplementedError(type(self).__name__)

    def step(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        state: Any,
        *,
        mask: Mask | None = None,
        length: int | Int[Array, ""] = 0,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T N V"], Any]:
        """T further positions, at a cost that does not grow with the past; where it `streams`.

        Args:
            mask: in absolute positions; None: causal.
            length: positions already read.
        """
        raise NotImplementedError(type(self).__name__)

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
        implementation: str | None = None,
        q_offset: int | Int[Array, "B"] = 0,
        kv_length: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attend. `mask` restricts further what the mechanism itself allows ("and")."""
        raise NotImplementedError(type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, for the contract tests ("test"), the benchmark ("bench") or a paper ("paper").

    Attributes:
        shape: (B, T, N, H) of the queries.
        kv_heads: K; None: N.
        S: number of keys; None: T.
        spec: fields of the mechanism's dataclass.
        tags: who uses it.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int | None = None
    S: int | None = None
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ("test",)
