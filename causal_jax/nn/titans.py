"""Titans layers around a memory that learns while it reads: LMM, MAG and MAL (MAC: `nn/mac.py`).

    P [N_p, D] learned, M a memory (`causal_jax.memory`), SW: attention to P and the last w tokens
    LMM    o = M(x)
    MAG    o = norm(SW(x)) * silu(norm(M(x)))         memory as gate, both read the same input
    MAL    y = M(x),  o = y + SW(norm(x + y))         memory as layer below the attention

Persistent tokens stand before the sequence without counting as positions: attention always sees
them, unrotated, and the memory is written by them first. Nothing is cut into segments and nothing
looks ahead. The decode state is that of the memory and the last w - 1 keys and values.

Deviation: of writing P the memory keeps the weights, not momentum and convolution tail, so that a
document begins as a sequence does; MAL's inner residual runs over the layer's normalised input.
Titans, arXiv 2501.00663, section 4; what it leaves open is chosen as in the docstrings.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import dense_attention
from causal_jax.errors import InputError
from causal_jax.memory import Delta, MemorySpec, MemState
from causal_jax.nn.attention import Rotations
from causal_jax.nn.linear import Linear
from causal_jax.nn.mixer import (
    Mixer,
    MixerSpec,
    check_plain,
    layer_of,
    mixers,
    of_layers,
    with_layer,
)
from causal_jax.nn.norm import RMSNorm
from causal_jax.positions import Rotary, turn
from causal_jax.shapes import Array, Float, Int
from causal_jax.taps import OFF, Tap

Combination = Literal["silu_mul", "sigmoid_mul", "add"]
_MATRICES = ("q", "k", "v", "o", "gate")  # of a memory's parameters: sharded and decayed as such


class Group(nnx.Module):
    """A nested dict of arrays as parameters of the same names; `tree()` is the dict again."""

    def __init__(self, tree: dict[str, Any]):
        self.names = tuple(tree)
        for name, leaf in tree.items():
            setattr(self, name, Group(leaf) if isinstance(leaf, dict) else nnx.Param(leaf))

    def tree(self) -> dict[str, Any]:
        """{name: array or dict}."""
        parts = ((name, getattr(self, name)) for name in self.names)
        return {n: p.tree() if isinstance(p, Group) else p[...] for n, p in parts}


class Memory(nnx.Module):
    """The parameters of a `MemorySpec`.

    Args:
        spec: the memory.
        width, heads, head_dim: D, N, H.
        reads: only what `MemorySpec.read` needs, without M_0.
    """

    def __init__(
        self, spec: MemorySpec, *, width: int, heads: int, head_dim: int, rngs: nnx.Rngs,
        reads: bool = False,
    ):  # fmt: skip
        tree = spec.init(rngs.params(), width=width, heads=heads, head_dim=head_dim)
        if reads:
            taps = {n: {"q": w["q"]} for n, w in tree.items() if n == "conv"}
            tree = {n: tree[n] for n in ("q", "norm", "o", "gate") if n in tree} | taps
        self.spec = spec
        self.weights = Group({n: {"kernel": w} if n in _MATRICES else w for n, w in tree.items()})

    def params(self, persistent: Array | None = None) -> dict[str, Any]:
        """What the memory's functions take; M_0 after it was written by `persistent` [N_p, D]."""
        tree = self.weights.tree()
        tree = {n: w["kernel"] if n in _MATRICES else w for n, w in tree.items()}
        if persistent is None or not len(persistent):
            return tree
        written = self.spec.write(tree, self.spec.init_state(tree), persistent[None], aligned=True)
        fast = {n: w[0] for n, w in written.weights.items()}
        return {**tree, "memory": {**tree["memory"], **fast}}


class Combine(nnx.Module):
    """o = norm(y) * silu(norm(m)) and the other ways to join attention y and memory m."""

    def __init__(self, kind: Combination, width: int):
        self.kind = kind
        self.first, self.second = RMSNorm(width), RMSNorm(width)

    def __call__(self, y: Float[Array, "B T D"], m: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y, m = self.first(y), self.second(m)
        if self.kind == "add":
            return y + m
        return y * (jax.nn.silu(m) if self.kind == "silu_mul" else jax.nn.sigmoid(m))


class PrefixAttention(nnx.Module):
    """Projections of causal attention to persistent tokens and to others; no norms.

    Args:
        sizes: width, heads, kv_heads, head_dim, rotary, out_scale of `Attention`.
    """

    def __init__(
        self, *, width: int, heads: int, kv_heads: int, head_dim: int, rotary: Rotary | None,
        out_scale: float, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.heads, self.kv_heads, self.head_dim, self.rotary = heads, kv_heads, head_dim, rotary
        self.q = Linear(width, heads * head_dim, rngs=rngs)
        self.k = Linear(width, kv_heads * head_dim, rngs=rngs)
        self.v = Linear(width, kv_heads * head_dim, rngs=rngs)
        self.o = Linear(heads * head_dim, width, scale=out_scale, rngs=rngs)

    def queries(self, x: Float[Array, "B T D"], rotations: Rotations) -> Float[Array, "B T N H"]:
        """Rotated queries."""
        q = self.q(x).reshape(*x.shape[:2], self.heads, self.head_dim)
        return q if self.rotary is None else turn(q, rotations.tables[self.rotary], self.rotary)

    def keys(
        self, x: Float[Array, "B T D"], rotations: Rotations | None = None
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Keys and values; `rotations` None: of what has no position."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        k, v = self.k(x).reshape(shape), self.v(x).reshape(shape)
        if rotations is not None and self.rotary is not None:
            k = turn(k, rotations.tables[self.rotary], self.rotary)
        return k, v

    def before(self, persistent: Float[Array, "P D"], like: Array) -> tuple[Array, Array]:
        """Keys and values of the persistent tokens for every row of `like`."""
        k, v = self.keys(persistent[None].astype(like.dtype))
        wide = (like.shape[0], *k.shape[1:])
        return jnp.broadcast_to(k, wide), jnp.broadcast_to(v, wide)

    def attend(self, q: Array, k: Array, v: Array, mask: Any, tap: Tap, offset: int = 0) -> Array:
        """Output [B, T, D]."""
        z: Any = dense_attention(q, k, v, mask=mask, q_offset=offset, tap=tap.scope("attn"))
        return self.o(z.reshape(*q.shape[:2], -1))


@dataclasses.dataclass(frozen=True)
class TitansSpec(MixerSpec):
    """What all Titans layers have.

    Attributes:
        memory: the memory.
        persistent: learned tokens before every sequence, N_p.
    """

    memory: MemorySpec = Delta()
    persistent: int = 4

    def __post_init__(self):
        if self.persistent < 0:
            raise InputError(f"persistent={self.persistent}: expected 0 or more")

    def memory_cost(self, T: int, N: int, H: int) -> float:
        """Of the memory with its projections (q, k, v, o and gate)."""
        projections = 4 + self.memory.output_gate
        return self.memory.cost(T, N, H) + 2.0 * T * projections * (N * H) ** 2

    def attention_cost(self, T: int, seen: float | int, N: int, H: int) -> float:
        """Of the attention with its projections, every token seeing so many keys on average."""
        return 8.0 * T * (N * H) ** 2 + 4.0 * T * seen * N * H


@mixers.register("lmm")
@dataclasses.dataclass(frozen=True)
class LMM(TitansSpec):
    """The memory alone."""

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Memory and its projections."""
        return self.memory_cost(T, N, H)

    def build(
        self, *, width: int, heads: int, head_dim: int, rotary: Rotary | None, rngs: nnx.Rngs,
        **sizes: Any,
    ) -> Mixer:  # fmt: skip
        """The module; grouped keys and rotations mean nothing to it."""
        return LMMMixer(self, width=width, heads=heads, head_dim=head_dim, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class _Windowed(TitansSpec):
    """Titans layers with attention to a window.

    Attributes:
        window: tokens that attention sees, the own one included, w.
    """

    window: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise InputError(f"window={self.window}: expected at least 1, the token itself")

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Memory and attention with their projections."""
        seen = self.persistent + min(self.window, (T + 1) / 2)
        return self.memory_cost(T, N, H) + self.attention_cost(T, seen, N, H)


@mixers.register("mag")
@dataclasses.dataclass(frozen=True)
class MAG(_Windowed):
    """Memory as gate of windowed attention.

    Attributes:
        gate: how the two are joined after a norm each.
    """

    gate: Combination = "silu_mul"

    def build(self, *, rngs: nnx.Rngs, **sizes: Any) -> Mixer:
        """The module."""
        return MAGMixer(self, rngs=rngs, **sizes)


@mixers.register("mal")
@dataclasses.dataclass(frozen=True)
class MAL(_Windowed):
    """Memory as a layer below windowed attention."""

    def build(self, *, rngs: nnx.Rngs, **sizes: Any) -> Mixer:
        """The module."""
        return MALMixer(self, rngs=rngs, **sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """What a windowed layer remembers.

    Attributes:
        memory: the memory's state.
        k, v: the last w - 1 keys (rotated) and values, [B, w - 1, K, H]; the newest last.
    """

    memory: Any
    k: Array
    v: Array


class LMMMixer(Mixer):
    """The memory with its persistent tokens. Sites: those of the memory, under `mem.`"""

    def __init__(self, spec: Any, *, width: int, heads: int, head_dim: int, rngs: nnx.Rngs):
        self.spec = spec
        self.memory = Memory(spec.memory, width=width, heads=heads, head_dim=head_dim, rngs=rngs)
        draw = 0.02 * jax.random.normal(rngs.params(), (spec.persistent, width), jnp.float32)
        self.persistent = nnx.Param(draw)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        check_plain(mask, type(self.spec).__name__)
        return self._mix(x, self._attend, None, rotations, tap)[0]

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> Any:
        """As before the first token; its size does not depend on `length`."""
        return of_layers(self, lambda mixer: mixer.fresh(batch, dtype))

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
        check_plain(mask, type(self.spec).__name__)
        old = layer_of(cache, layer)
        y, new = self._extended(x, old, length, rotations, tap)
        return y, with_layer(cache, layer, new)

    def fresh(self, batch: int, dtype: Any) -> Any:
        """The cache of one layer before the first token."""
        return self.spec.memory.init_state(self.memory.params(self.persistent[...]), batch)

    def _extended(self, x: Array, old: Any, length: Array, rotations: Rotations, tap: Tap):
        """Output and the layer's new cache."""
        return self._mix(x, self._attend, old, rotations, tap)

    def _recall(self, x: Array, state: MemState | None, rotations: Rotations, tap: Tap):
        """M(x) and the memory after it."""
        params = self.memory.params(self.persistent[...])
        segments = rotations.segments if state is None else None
        return self.spec.memory(params, x, state, segments=segments, tap=tap.scope("mem"))

    def _mix(self, x: Array, attend: Any, state: MemState | None, rotations: Rotations, tap: Tap):
        """Output and memory, `attend(x, rotations, tap)` being the attention."""
        return self._recall(x, state, rotations, tap)

    def _attend(self, x: Array, rotations: Rotations, tap: Tap) -> Array:
        """No attention here."""
        return x


class MAGMixer(LMMMixer):
    """The parameters of a `MAG`. Sites: those of the memory under `mem.`, of attention `attn.`"""

    def __init__(
        self, spec: Any, *, width: int, heads: int, kv_heads: int, head_dim: int,
        rotary: Rotary | None, out_scale: float, rngs: nnx.Rngs, **others: Any,
    ):  # fmt: skip
        check_sizes(spec, others)
        super().__init__(spec, width=width, heads=heads, head_dim=head_dim, rngs=rngs)
        self.rotary, self.head_dim = rotary, head_dim
        self.attention = PrefixAttention(
            width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=rotary,
            out_scale=out_scale, rngs=rngs,
        )  # fmt: skip
        self._joint(width)

    def _joint(self, width: int) -> None:
        self.combine = Combine(self.spec.gate, width)

    def fresh(self, batch: int, dtype: Any) -> Recent:
        a = self.attention
        nothing = jnp.zeros((batch, self.spec.window - 1, a.kv_heads, a.head_dim), dtype)
        return Recent(super().fresh(batch, dtype), nothing, nothing)

    def _extended(self, x: Array, old: Recent, length: Array, rotations: Rotations, tap: Tap):
        kept = {}

        def attend(x, rotations, tap):
            y, kept["k"], kept["v"] = self._attend_after(x, old, length, rotations, tap)
            return y

        y, memory = self._mix(x, attend, old.memory, rotations, tap)
        return y, Recent(memory, **kept)

    def _mix(self, x: Array, attend: Any, state: MemState | None, rotations: Rotations, tap: Tap):
        m, state = self._recall(x, state, rotations, tap)
        return self.combine(attend(x, rotations, tap), m), state

    def _attend(self, x: Array, rotations: Rotations, tap: Tap) -> Array:
        n, segments = self.spec.persistent, rotations.segments
        near = masks.Window(self.spec.window - 1, 0)
        if segments is not None:
            near = near & masks.Documents(jnp.pad(segments, ((0, 0), (n, 0))))
        q, (k, v) = self.attention.queries(x, rotations), self.attention.keys(x, rotations)
        return self._attended(x, q, k, v, near, n, tap)

    def _attend_after(self, x: Array, old: Recent, length: Array, rotations: Rotations, tap: Tap):
        """Attention of new tokens, and the last keys and values after them."""
        n, past = self.spec.persistent, self.spec.window - 1
        q, (k, v) = self.attention.queries(x, rotations), self.attention.keys(x, rotations)
        k = jnp.concatenate([old.k.astype(k.dtype), k], 1)
        v = jnp.concatenate([old.v.astype(v.dtype), v], 1)
        unwritten = jnp.broadcast_to(n + jnp.maximum(past - length, 0), x.shape[:1])
        near = masks.Window(past, 0) & ~masks.Prefix(unwritten)
        y = self._attended(x, q, k, v, near, n + past, tap)
        return y, k[:, k.shape[1] - past :], v[:, v.shape[1] - past :]

    def _attended(self, x: Array, q, k, v, near: masks.Mask, offset: int, tap: Tap) -> Array:
        """Attention to the persistent tokens, and of the others to those that are `near`."""
        if self.spec.persistent:
            first = self.attention.before(self.persistent[...], x)
            k, v = (jnp.concatenate([a, b], 1) for a, b in zip(first, (k, v)))
            near = masks.Causal() & (masks.Sinks(self.spec.persistent) | near)
        return self.attention.attend(q, k, v, near, tap, offset)


class MALMixer(MAGMixer):
    """The parameters of a `MAL`. Sites: as `MAGMixer`."""

    def _joint(self, width: int) -> None:
        self.norm = RMSNorm(width)

    def _mix(self, x: Array, attend: Any, state: MemState | None, rotations: Rotations, tap: Tap):
        m, state = self._recall(x, state, rotations, tap)
        return m + attend(self.norm(x + m), rotations, tap), state


def check_sizes(spec: TitansSpec, others: dict[str, Any]) -> None:
    """Refuse switches of `Attention` that these layers do not have.

    Raises:
        InputError: one is on.
    """
    gate = getattr(spec, "gate", "add")
    if gate not in get_args(Combination):
        raise InputError(f"gate={gate!r}: expected one of {get_args(Combination)}")
    for name in ("qkv_bias", "out_bias", "qk_norm"):
        if others.get(name):
            raise InputError(f"{name}=True: {type(spec).__name__} has none, expected False")
