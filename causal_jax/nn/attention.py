"""Projections and heads around any attention spec, with the key/value cache as a plain value.

    q = rope(norm(x W_q)), k = rope(norm(x W_k)), v = x W_v, y = spec(q, k, v, mask) W_o

A mechanism that streams has its own state for a cache, as large after a million positions as after
one.

Sites: `q` [B,T,N,H], `k`, `v` [B,T,K,H] (after norm and rotation: what is multiplied; not rotated
where the mechanism places keys itself), and inside the mechanism `attn.mask`, `attn.bias`,
`attn.scores`, `attn.pattern`, `attn.z`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import AttentionSpec
from causal_jax.nn.linear import Linear
from causal_jax.nn.norm import RMSNorm
from causal_jax.positions import Rotary, turn
from causal_jax.segments import DocLayout
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap


@dataclasses.dataclass(frozen=True)
class Rotations:
    """What a pass's positions mean for queries and keys, made once per model.

    Attributes:
        tables: cos and sin of every kind of rotary embedding.
        layout: of a prompt with unordered documents, for mechanisms that place keys themselves.
        segments: document ids [B, T], for mechanisms that mix without a mask; None: one document.
    """

    tables: Mapping[Rotary, tuple[Array, Array]]
    layout: DocLayout | None = None
    segments: Int[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values of G stacked layers, [G, B, S, K, H]; later slots are not yet written."""

    k: Array
    v: Array


class Attention(nnx.Module):
    """Multi-head attention with grouped keys around one `AttentionSpec`.

    Args:
        spec: the mechanism; static, hashable.
        width, heads, kv_heads, head_dim: D, N, K, H.
        rotary: rotary embedding of queries and keys, or None.
        qkv_bias, out_bias: biases of the projections.
        qk_norm: RMS-normalise every query and key head (arXiv 2302.05442).
        out_scale: multiplies the output projection's standard deviation at the start.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: Rotary | None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.spec, self.rotary = spec, rotary
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q = Linear(width, heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.k = Linear(width, kv_heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.v = Linear(width, kv_heads * head_dim, bias=qkv_bias, rngs=rngs)
        self.o = Linear(heads * head_dim, width, bias=out_bias, scale=out_scale, rngs=rngs)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        q, k, v = self._project(x, rotations, tap)
        z = self.spec(q, k, v, mask=mask, tap=tap.scope("attn"), **self._placed(rotations))
        return self.o(z.reshape(*x.shape[:2], -1))

    def init_cache(self, layers: int, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """For `layers` stacked layers and `length` positions: zeros, or states not yet written."""
        if self.spec.streams:
            state = self.spec.init_state(batch, self.kv_heads, self.head_dim)
            return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (layers, *x.shape)), state)
        shape = (layers, batch, length, self.kv_heads, self.head_dim)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: Any,
        layer: int | Int[Array, ""],
        *,
        length: Int[Array, ""],
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Write T new positions into the cache of `layer` at `length`; attend to all written.

        Only the new positions are written: the stacked arrays travel as a loop's carry and are
        updated in place.
        """
        q, k, v = self._project(x, rotations, tap)
        if self.spec.streams:
            state = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, layer, 0, False), cache)
            z, state = self.spec.step(
                q, k, v, state, mask=mask, length=length, tap=tap.scope("attn")
            )
            cache = jax.tree.map(
                lambda c, s: jax.lax.dynamic_update_index_in_dim(c, s, layer, 0), cache, state
            )
            return self.o(z.reshape(*x.shape[:2], -1)), cache
        at = (layer, 0, length, 0, 0)
        cache = KV(
            jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
            jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at),
        )
        keys, values = (
            jax.lax.dynamic_index_in_dim(c, layer, 0, keepdims=False) for c in (cache.k, cache.v)
        )
        offset = jnp.broadcast_to(length, x.shape[:1])
        placed = self._placed(rotations)
        z = self.spec(q, keys, values, mask=mask, q_offset=offset, tap=tap.scope("attn"), **placed)
        return self.o(z.reshape(*x.shape[:2], -1)), cache

    def _placed(self, rotations: Rotations) -> dict[str, Any]:
        """What a mechanism needs that places keys itself."""
        if rotations.layout is None or not self.spec.places:
            return {}
        return {"layout": rotations.layout, "rotary": self.rotary}

    def _heads_of(self, x: Array) -> tuple[Array, Array, Array]:
        """q, k, v before any rotation."""
        q = self.q(x).reshape(*x.shape[:2], self.heads, self.head_dim)
        k = self.k(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        v = self.v(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _project(self, x: Array, rotations: Rotations, tap: Tap) -> tuple[Array, Array, Array]:
        q, k, v = self._heads_of(x)
        if self.rotary is not None and not self._placed(rotations):
            tables = rotations.tables[self.rotary]
            q, k = turn(q, tables, self.rotary), turn(k, tables, self.rotary)
        return tap("q", q), tap("k", k), tap("v", v)
