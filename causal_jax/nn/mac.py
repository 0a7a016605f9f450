"""Memory as context (MAC): attention in segments that see what the memory says, and then write it.

Segment s of C tokens x, M_{s-1} the memory after the segments before, P persistent tokens:

    h = M_{s-1}(x)                              read only, C vectors beside the C tokens
    y = Attn([P | h | x])                       rows of x only
    m = M(y)                                    written by y, token after token
    o = norm(y) * silu(norm(m))

Who sees what inside a segment ("strict"): all of P; h_i and token i up to the own place. h_i is a
function of x_i, so the paper's mask, read literally (all of h), shows a token the future of its
segment, as reading the memory at the segment's end does (`read="segment"`); both are here for tasks
that are not autoregressive, and refuse to decode.

    cost     linear in T: C x (N_p + 2 C) scores per segment; segments follow one another
    decode   state: memory, its weights at the segment's start, keys and values of one segment

Deviation: reading h has its own query projection, convolution and output; positions by rotation of
tokens only, none on P and h; W_k begins as W_q and h small. Documents that begin inside a segment
start the memory anew there and do not see h of the one before. Titans, arXiv 2501.00663, section
4.1.
"""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax import masks
from causal_jax.errors import InputError
from causal_jax.linear_maps import matmul
from causal_jax.memory import MemState
from causal_jax.nn.attention import Rotations
from causal_jax.nn.mixer import Mixer, check_plain, layer_of, mixers, of_layers, with_layer
from causal_jax.nn.titans import (
    Combination,
    Combine,
    Memory,
    PrefixAttention,
    TitansSpec,
    check_sizes,
)
from causal_jax.positions import Rotary
from causal_jax.shapes import Array, Bool, Float, Int
from causal_jax.taps import OFF, Tap


def mac_mask(
    tokens: int, persistent: int, mode: Literal["strict", "paper"] = "strict"
) -> Bool[np.ndarray, "1 1 T S"]:
    """Who sees whom in a segment: rows x, columns [P | h | x].

    Args:
        tokens: of the segment, C.
        persistent: N_p.
        mode: "strict" or "paper".
    """
    causal = np.tril(np.ones((tokens, tokens), bool))
    h = causal if mode == "strict" else np.ones_like(causal)
    return np.concatenate([np.ones((tokens, persistent), bool), h, causal], 1)[None, None]


@mixers.register("mac")
@dataclasses.dataclass(frozen=True)
class MAC(TitansSpec):
    """Memory as context.

    Attributes:
        segment: tokens of a segment, C; with an anchored memory a multiple of its anchor.
        gate: how attention and memory are joined after a norm each.
        mask: "strict", or "paper": all of h, which shows the future of a segment.
        read: the memory after the own "token", or after the whole "segment" (shows the future).
    """

    segment: int = 128
    gate: Combination = "silu_mul"
    mask: Literal["strict", "paper"] = "strict"
    read: Literal["token", "segment"] = "token"

    def __post_init__(self):
        super().__post_init__()
        if self.segment < 1:
            raise InputError(f"segment={self.segment}: expected at least 1")
        if self.segment % (self.memory.anchor or self.segment):
            raise InputError(
                f"segment={self.segment}: expected a multiple of memory.anchor={self.memory.anchor}"
            )

    @property
    def causal(self) -> bool:
        """Nothing looks ahead."""
        return self.mask == "strict" and self.read == "token"

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Memory, attention and the reading of h, with their projections."""
        attention = self.attention_cost(T, self.persistent + 2 * self.segment, N, H)
        h = 2.0 * T * (5 + self.memory.output_gate) * (N * H) ** 2
        return self.memory_cost(T, N, H) + attention + h

    def build(self, *, rngs: nnx.Rngs, **sizes: Any) -> Mixer:
        """The module."""
        return MACMixer(self, rngs=rngs, **sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from segment to segment.

    Attributes:
        memory: its state; `conv` is that of the attention's outputs, which it reads.
        past: last inputs of h's convolution [B, W - 1, N H]; None without one.
    """

    memory: MemState
    past: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Open:
    """A layer in the middle of a segment.

    Attributes:
        carry: as after the last token.
        begun: the memory's weights when the segment began.
        k, v: keys and values of h and of the tokens, [B, 2 C, K, H].
    """

    carry: Carry
    begun: Any
    k: Array
    v: Array


class MACMixer(Mixer):
    """The parameters of a `MAC`.

    Sites, in a loop over `segment`: `mac.h`, `mac.y` [B,C,D], the memory's under `mac.read.` and
    `mac.mem.`, attention's under `attn.`.
    """

    def __init__(
        self, spec: MAC, *, width: int, heads: int, kv_heads: int, head_dim: int,
        rotary: Rotary | None, out_scale: float, rngs: nnx.Rngs, **others: Any,
    ):  # fmt: skip
        check_sizes(spec, others)
        self.spec, self.rotary, self.head_dim = spec, rotary, head_dim
        sizes: dict[str, Any] = {"width": width, "heads": heads, "head_dim": head_dim, "rngs": rngs}
        self.memory = Memory(spec.memory, **sizes)
        self.reader = Memory(spec.memory, **sizes, reads=True)
        self.attention = PrefixAttention(
            **sizes, kv_heads=kv_heads, rotary=rotary, out_scale=out_scale
        )
        self._tell_tokens_apart(kv_heads)
        self.combine = Combine(spec.gate, width)
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
        check_plain(mask, "MAC")
        return self._segments(x, self._start(len(x)), rotations, tap)[0]

    def init_cache(self, layers: int, batch: int, length: int, dtype: Any) -> Open:
        """As before the first token; its size does not depend on `length`."""
        if not self.spec.causal:
            raise InputError(
                f"mask={self.spec.mask!r}, read={self.spec.read!r}: tokens see ahead, which cannot "
                "be decoded; expected mask='strict' and read='token'"
            )
        a = self.attention
        nothing = jnp.zeros((batch, 2 * self.spec.segment, a.kv_heads, a.head_dim), dtype)

        def one(mixer):
            carry = mixer._start(batch)
            return Open(carry, carry.memory.weights, nothing, nothing)

        return of_layers(self, one)

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
        check_plain(mask, "MAC")
        old = layer_of(cache, layer)
        if x.shape[1] == 1:
            y, new = self._token(x, old, length, rotations, tap)
        elif not tap.off:  # what a branch of a cond visits could not be shown
            y, new = self._tokens(x, old, length, rotations, tap)
        else:
            y, new = jax.lax.cond(
                length % self.spec.segment == 0,
                lambda o: self._prefill(x, o, rotations),
                lambda o: self._tokens(x, o, length, rotations, tap),
                old,
            )
        return y, with_layer(cache, layer, new)

    def _tell_tokens_apart(self, kv_heads: int) -> None:
        """Begin with W_k = W_q, so that a token sees itself first, and with little of h: a mean of
        all tokens and noise that grows with the memory is nothing to write (MAC learned nothing).
        """
        q, reader = self.attention.q.kernel[...], cast(Any, self.reader.weights)
        groups = q.reshape(len(q), kv_heads, -1, self.head_dim)
        self.attention.k.kernel[...] = groups[:, :, 0].reshape(len(q), -1)
        reader.o.kernel[...] = 0.1 * reader.o.kernel[...]

    # ------------------------------------------------------------ whole segments

    def _start(self, batch: int) -> Carry:
        state = self.spec.memory.init_state(self.memory.params(), batch)
        return Carry(state, None if state.conv is None else state.conv["q"])

    def _segments(self, x: Array, carry: Carry, rotations: Rotations, tap: Tap):
        """Output, and the carries after all and at the beginning of the last, partial segment."""
        size, (T, segments) = self.spec.segment, (x.shape[1], rotations.segments)
        q, (k, v) = self.attention.queries(x, rotations), self.attention.keys(x, rotations)
        parts = (x, q, k, v) if segments is None else (x, q, k, v, segments)
        fresh, count = self._start(len(x)), T // size

        def body(carry, part, tap):
            y, carry, keys = self._segment(part, carry, fresh, tap)
            return carry, (y, keys if count * size == T else None)

        def cut(a, start, stop, count):
            a = a[:, start:stop].reshape(a.shape[0], count, -1, *a.shape[2:])
            return jnp.moveaxis(a, 1, 0)

        out, begun, keys = [], carry, None
        if count:
            xs = jax.tree.map(lambda a: cut(a, 0, count * size, count), parts)
            carry, (y, _) = tap.loop(body, carry, xs, axis="segment")
            out.append(jnp.moveaxis(y, 0, 1).reshape(len(x), count * size, -1))
            begun = carry
        if count * size < T:
            last = jax.tree.map(lambda a: cut(a, count * size, T, 1)[0], parts)

            def rest(carry, _, tap):
                y, carry, keys = self._segment(last, carry, fresh, tap)
                return carry, (y, keys)

            carry, (y, keys) = tap.loop(
                rest, carry, jnp.zeros(1), axis="segment", start=count, scan=False
            )
            out.append(y[0])
            keys = jax.tree.map(lambda a: a[0], keys)
        return jnp.concatenate(out, 1), carry, begun, keys

    def _segment(self, part: tuple, carry: Carry, fresh: Carry, tap: Tap):
        """Output of up to C tokens that begin a segment, the carry, and their keys and values."""
        x, q, k, v, *rest = part
        segments = rest[0] if rest else None
        seen = jnp.asarray(mac_mask(x.shape[1], self.spec.persistent, self.spec.mask))
        if segments is not None:
            other = segments[:, 0] != carry.memory.segment
            carry = _where(other & (carry.memory.segment >= 0), fresh, carry)
            seen = seen & _same_document(segments, carry, self.spec.persistent)
        h, past = self._read(x, carry.memory.weights, carry, tap.scope("mac"))
        if segments is not None and past is not None:
            past = _of_last_document(past, segments, carry.memory.segment)
        (hk, hv), before = self.attention.keys(h), self.attention.before(self.persistent[...], x)
        keys = jnp.concatenate([before[0], hk, k], 1), jnp.concatenate([before[1], hv, v], 1)
        y = tap("mac.y", self.attention.attend(q, *keys, seen, tap))
        memory, params, inside = self.spec.memory, self.memory.params(), tap.scope("mac.mem")
        m, state = memory(
            params, y, carry.memory, segments=segments, aligned=memory.anchor is not None,
            tap=inside,
        )  # fmt: skip
        if self.spec.read == "segment":
            m = memory.read(params, dataclasses.replace(state, conv=carry.memory.conv), y)
        return self.combine(y, m), Carry(state, past), (hk, hv, k, v)

    def _read(self, x: Array, weights: Any, carry: Carry, tap: Tap):
        """h = M(x) at given weights, and the inputs of its convolution that come before the next
        token."""
        params = {**self.reader.params(), "memory": self.memory.params()["memory"]}
        state, past = dataclasses.replace(carry.memory, weights=weights), carry.past
        if past is not None:
            state = dataclasses.replace(state, conv={**carry.memory.conv, "q": past})
            new = matmul(x, params["q"].astype(x.dtype)).astype(past.dtype)
            past = jnp.concatenate([past, new], 1)[:, x.shape[1] :]
        return tap("h", self.spec.memory.read(params, state, x, tap=tap.scope("read"))), past

    # ------------------------------------------------------------ decoding

    def _prefill(self, x: Array, old: Open, rotations: Rotations):
        """Tokens that begin a segment."""
        y, carry, begun, keys = self._segments(x, old.carry, rotations, OFF)
        k, v = old.k, old.v
        if keys is not None:
            hk, hv, tk, tv = keys
            size = self.spec.segment
            k = k.at[:, : hk.shape[1]].set(hk.astype(k.dtype))
            v = v.at[:, : hv.shape[1]].set(hv.astype(v.dtype))
            k = k.at[:, size : size + tk.shape[1]].set(tk.astype(k.dtype))
            v = v.at[:, size : size + tv.shape[1]].set(tv.astype(v.dtype))
        return y, Open(carry, begun.memory.weights, k, v)

    def _tokens(self, x: Array, old: Open, length: Array, rotations: Rotations, tap: Tap):
        """One token after the other, wherever the segment is; a loop over `token`."""

        def body(carry, xs, tap):
            old, length = carry
            x, tables = jax.tree.map(lambda a: a[:, None], xs)
            here = Rotations({} if self.rotary is None else {self.rotary: tables})
            y, new = self._token(x, old, length, here, tap)
            return (new, length + 1), y[:, 0]

        tables = () if self.rotary is None else rotations.tables[self.rotary]
        xs = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, tables))
        (new, _), y = tap.loop(body, (old, length), xs, axis="token")
        return jnp.moveaxis(y, 0, 1), new  # pyright: ignore[reportArgumentType]

    def _token(self, x: Array, old: Open, length: Array, rotations: Rotations, tap: Tap):
        """One token: `_segment` with the segment so far from the cache."""
        size, n = self.spec.segment, self.spec.persistent
        at = length % size
        begun = jax.tree.map(
            lambda now, then: jnp.where(at == 0, now, then), old.carry.memory.weights, old.begun
        )
        h, past = self._read(x, begun, old.carry, tap.scope("mac"))
        k, v = old.k, old.v
        for place, what in ((at, self.attention.keys(h)), (size + at, None)):
            new = self.attention.keys(x, rotations) if what is None else what
            k = jax.lax.dynamic_update_slice_in_dim(k, new[0].astype(k.dtype), place, 1)
            v = jax.lax.dynamic_update_slice_in_dim(v, new[1].astype(v.dtype), place, 1)
        seen = jnp.concatenate([jnp.ones(n, bool), jnp.tile(jnp.arange(size) <= at, 2)])
        before = self.attention.before(self.persistent[...], x)
        past_k, past_v = before
        q = self.attention.queries(x, rotations)
        all_k = jnp.concatenate([past_k, k.astype(past_k.dtype)], 1)
        all_v = jnp.concatenate([past_v, v.astype(past_v.dtype)], 1)
        y = self.attention.attend(q, all_k, all_v, seen[None, None, None], tap)
        y = tap("mac.y", y)
        m, state = self.spec.memory(
            self.memory.params(), y, old.carry.memory, tap=tap.scope("mac.mem")
        )
        return self.combine(y, m), Open(Carry(state, past), begun, k, v)


def _where(rows: Array, new: Carry, old: Carry) -> Carry:
    """`new` in some rows of the batch."""
    pick = lambda n, o: jnp.where(jnp.expand_dims(rows, range(1, o.ndim)), n, o)  # noqa: E731
    return jax.tree.map(pick, new, old)


def _same_document(segments: Array, carry: Carry, persistent: int) -> Array:
    """[B, 1, C, N_p + 2 C]: tokens of the own document; h if it was read from its memory."""
    same = (segments[:, :, None] == segments[:, None])[:, None]
    known, first = carry.memory.segment, segments[:, 0]
    told = segments == jnp.where(known < 0, first, known)[:, None]
    first_columns = jnp.ones((*same.shape[:3], persistent), bool)
    return jnp.concatenate([first_columns, same & told[:, None, :, None], same], -1)


def _of_last_document(past: Array, segments: Array, known: Array) -> Array:
    """Inputs of the convolution that belong to the document of the last token; others 0."""
    first = jnp.where(known < 0, segments[:, 0], known)
    ids = jnp.concatenate([jnp.tile(first[:, None], (1, past.shape[1])), segments], 1)
    same = ids[:, segments.shape[1] :] == segments[:, -1:]
    return jnp.where(same[..., None], past, 0)
