"""LAWCAT: an attention layer of a pretrained decoder as gated linear attention.

    q, k = conv(x W_q), conv(x W_k)      a few causal taps per channel, keys spread to all heads
    phi(u) = [softmax(u W), softmax(-u W)]                         one map per head, for q and k
    log a = logsigmoid(x U_1 U_2 + c) / 16                         a gate per feature
    S_t = diag(a_t) S_{t-1} + phi(k_t) [v_t, 1]^T
    [num, den] = phi(q_t)^T S_t          y = num / den             then W_o as before

W_q, W_k, W_v, W_o are the teacher's, and keep their names. Queries and keys are not rotated here,
though the teacher's are: the gates carry the place, which is why the layer works at lengths it has
not seen. With a window w > 0 the softmax weights of the last w keys join in (those are rotated),

    y = (s num_w + num) / (s den_w + den)            s = sigmoid of a number per head

While `teach` is on, the layer *is* the softmax attention: that output goes on to the next layer,
and the student's, from the same input, is only seen at its site. So all layers learn at once, each
from the teacher's stream.

    cost     linear in T; decode state: [F, H + 1] per head, the last taps, the window's keys
    exact    never

Sites: `lawcat.q`, `lawcat.k` [B,T,N,F] features, `lawcat.gate` [B,T,N,F] log a, `lawcat.z`
[B,T,N,H]; with `teach` also `lawcat.teacher` [B,T,N,H] and attention's own.

Deviation: none known; the hybrid's window is exact to the token, not in blocks. arXiv 2509.18467.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax import masks
from causal_jax.attention import AttentionSpec, Dense
from causal_jax.attention.gated_linear import (
    EPS,
    causal_parts,
    gated_linear_recurrent,
    hedgehog,
)
from causal_jax.errors import InputError
from causal_jax.nn.attention import Attention, Rotations
from causal_jax.nn.conv import CausalConv
from causal_jax.nn.mixer import MixerSpec, layer_of, mixers, with_layer
from causal_jax.positions import Rotary, turn
from causal_jax.shapes import Array, Bool, Float, Int
from causal_jax.taps import OFF, Tap
from pallas_kernels.gated_linear import gated_linear_chunked


@mixers.register("lawcat")
@dataclasses.dataclass(frozen=True)
class Lawcat(MixerSpec):
    """Gated linear attention on a teacher's projections (arXiv 2509.18467).

    Attributes:
        kernel: taps of the convolutions on q and k; 1: none but the token itself.
        features: columns of the feature map, f; there are F = 2 f features. 0: half a head's width.
        gated: whether the state forgets.
        gate_rank: of the gate's projection.
        gate_normaliser: divides the gates' logs.
        rotate: also rotate q and k here; an ablation, which ruins longer sequences.
        normalise: divide by the sum of the weights; False is an ablation.
        window: keys (self included) whose softmax weights join in; 0: purely linear.
        teach: put the teacher's output on (stage one); False: the student's.
        teacher: the attention that the layer had.
        chunk: positions worked on at once, a power of two.
    """

    kernel: int = 4
    features: int = 0
    gated: bool = True
    gate_rank: int = 16
    gate_normaliser: float = 16.0
    rotate: bool = False
    normalise: bool = True
    window: int = 0
    teach: bool = False
    teacher: AttentionSpec = Dense()
    chunk: int = 64

    def __post_init__(self):
        for name, least in (("kernel", 1), ("features", 0), ("gate_rank", 1), ("window", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not self.gate_normaliser > 0:
            raise InputError(f"gate_normaliser={self.gate_normaliser}: expected a number > 0")
        if isinstance(self.teacher, MixerSpec):
            raise InputError(f"teacher={self.teacher}: expected attention, it is a mixer already")
        if self.chunk < 8 or self.chunk & (self.chunk - 1):
            raise InputError(f"chunk={self.chunk}: expected a power of two, at least 8")
        if self.window and not self.normalise:
            raise InputError(f"window={self.window}: its weights need normalise=True")

    @property
    def by_distance(self) -> bool:
        """Always, unless the teacher at work is not."""
        return not self.teach or self.teacher.by_distance

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Projections (of as many key heads as query heads), state, chunk and window."""
        F = 2 * (self.features or H // 2)
        state = 4 * F * (Hv + 1) + self.chunk * (F + Hv + 1) + 2 * H * F + 4 * H * self.kernel
        return float(N * T * (8 * N * H * H + state + 4 * self.window * H))

    def build(
        self, *, width: int, heads: int, kv_heads: int = 0, head_dim: int, rotary: Rotary | None,
        rngs: nnx.Rngs, **sizes: Any,
    ) -> "LawcatMixer":  # fmt: skip
        """The module; projections as `Attention` draws them."""
        return LawcatMixer(
            self, width=width, heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim,
            rotary=rotary, rngs=rngs, **sizes,
        )  # fmt: skip


class Learned(nnx.Module):
    """What the student has of its own: taps near the identity, features at it, slow gates."""

    def __init__(
        self, spec: Lawcat, width: int, heads: int, kv_heads: int, H: int, *, rngs: nnx.Rngs
    ):
        if not spec.features and H % 2:
            raise InputError(f"features=0 means half a head's width, which is {H}: give a number")
        f = spec.features or H // 2
        self.conv_q, self.conv_k = (CausalConv(heads * H, spec.kernel) for _ in range(2))
        self.features = nnx.Param(jnp.broadcast_to(jnp.eye(H, f), (heads, H, f)))
        if spec.gated:
            draw = lambda *shape: 0.006 * jax.random.normal(rngs.params(), shape)  # noqa: E731
            self.gate_in = nnx.Param(draw(width, spec.gate_rank))
            self.gate_out = nnx.Param(draw(spec.gate_rank, kv_heads * 2 * f))
            self.gate_bias = nnx.Param(jnp.zeros(kv_heads * 2 * f))
        if spec.window:
            self.share = nnx.Param(jnp.zeros(heads))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LawcatCache:
    """What a student remembers, stacked over layers [L, B, ...]; its size knows no length.

    Attributes:
        conv_q, conv_k: the last taps - 1 rows before the convolutions, [L, B, P, N H].
        state: [L, B, N, F, H + 1] float32.
        keys, values: rotated keys and values of the window, [L, B, w, N, H].
    """

    conv_q: Array
    conv_k: Array
    state: Array
    keys: Array
    values: Array


class LawcatMixer(Attention):
    """Attention's projections, and beside them what the student learns (`lawcat/...`)."""

    def __init__(
        self, student: Lawcat, *, width: int, heads: int, kv_heads: int, head_dim: int,
        rotary: Rotary | None, rngs: nnx.Rngs, **sizes: Any,
    ):  # fmt: skip
        turns = student.teach or student.rotate or student.window > 0
        super().__init__(
            student.teacher, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            rotary=rotary if turns else None, rngs=rngs, **sizes,
        )  # fmt: skip
        self.student = student
        self.lawcat = Learned(student, width, heads, kv_heads, head_dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: masks.Mask,
        rotations: Rotations,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:
        z, _ = self._mix(x, None, 0, mask, rotations, tap.scope("lawcat"))
        if self.student.teach:
            q, k, v = self._project(x, rotations, tap)
            z = self.spec(q, k, v, mask=mask, tap=tap.scope("attn"), **self._placed(rotations))
            z = tap.scope("lawcat")("teacher", z)
        return self.o(z.reshape(*x.shape[:2], -1))

    def init_cache(self, layers: int, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """Nothing read yet; while teaching, attention's keys and values for `length` positions."""
        if self.student.teach:
            return super().init_cache(layers, batch, length, dtype)
        return jax.tree.map(
            lambda c: jnp.broadcast_to(c[None], (layers, *c.shape)), self._blank(batch, dtype)
        )

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
        """T more positions; the cost does not grow with those already read."""
        if self.student.teach:
            return super().extend(
                x, cache, layer, length=length, mask=mask, rotations=rotations, tap=tap
            )
        one = layer_of(cache, layer)
        z, one = self._mix(x, one, length, mask, rotations, tap.scope("lawcat"))
        return self.o(z.reshape(*x.shape[:2], -1)), with_layer(cache, layer, one)

    def _mix(
        self, x: Array, cache: LawcatCache | None, length: Any, mask: masks.Mask,
        rotations: Rotations, tap: Tap,
    ) -> tuple[Array, LawcatCache]:  # fmt: skip
        """The student's heads z [B, T, N, H] and its cache after the T positions of x."""
        spec, own, (B, T, _) = self.student, self.lawcat, x.shape
        N, H, group = self.heads, self.head_dim, self.heads // self.kv_heads
        parts = causal_parts(mask, B, length + jnp.arange(T), whole=cache is None)
        if parts is None:
            raise InputError(
                f"mask {mask}: lawcat is causal inside documents, with padding, and no more"
            )
        valid, document = parts
        at = length + jnp.arange(-spec.window, 0)
        before = causal_parts(mask, B, at, whole=False) if spec.window and cache else None
        past = jnp.broadcast_to(at[None] >= 0, (B, spec.window))
        if before is not None and before[0] is not None:
            past = past & before[0]
        if cache is None:
            cache = self._blank(B, x.dtype)
        q, k, v = self._heads_of(x)
        turned = (q, k)
        if self.rotary is not None and (spec.rotate or spec.window):
            tables = rotations.tables[self.rotary]
            turned = turn(q, tables, self.rotary), turn(k, tables, self.rotary)
        if spec.rotate:
            q, k = turned
        k, v, window_k = (jnp.repeat(y, group, axis=2) for y in (k, v, turned[1]))
        if valid is not None:
            q, k = (jnp.where(valid[..., None, None], y, 0) for y in (q, k))
        flat = (B, T, N * H)
        q, conv_q = own.conv_q(q.reshape(flat), cache.conv_q, document)
        k, conv_k = own.conv_k(k.reshape(flat), cache.conv_k, document)
        phi_q, phi_k = (hedgehog(y.reshape(B, T, N, H), own.features[...]) for y in (q, k))
        phi_q, phi_k, g = tap("q", phi_q), tap("k", phi_k), tap("gate", self._gates(x))
        w = jnp.concatenate([v.astype(jnp.float32), jnp.ones((B, T, N, 1))], -1)
        if valid is not None:
            phi_k, w, g = (jnp.where(valid[..., None, None], y, 0) for y in (phi_k, w, g))
        if T < 8:
            o, state = gated_linear_recurrent(phi_q, phi_k, w, g, cache.state, document)
        else:
            o, state = gated_linear_chunked(
                phi_q, phi_k, w, g, cache.state, document, chunk=spec.chunk
            )
        keys, values = cache.keys, cache.values
        if spec.window:
            keys = jnp.concatenate([keys, window_k.astype(keys.dtype)], 1)
            values = jnp.concatenate([values, v.astype(values.dtype)], 1)
            own_share = jax.nn.sigmoid(own.share[...])[None, None, :, None]
            o = o + own_share * window_terms(turned[0], keys, values, past, valid, document)
            keys, values = keys[:, T:], values[:, T:]
        z = o[..., :-1] / (o[..., -1:] + EPS) if spec.normalise else o[..., :-1]
        z = tap("z", z.astype(x.dtype))
        return z, LawcatCache(conv_q, conv_k, state, keys, values)

    def _blank(self, batch: int, dtype: Any) -> LawcatCache:
        """A student's cache of one layer before the first position."""
        N, H, spec = self.heads, self.head_dim, self.student
        rows = jnp.zeros((batch, spec.kernel - 1, N * H), dtype)
        state = jnp.zeros((batch, N, 2 * (spec.features or H // 2), H + 1), jnp.float32)
        past = jnp.zeros((batch, spec.window, N, H), dtype)
        return LawcatCache(rows, rows, state, past, past)

    def _gates(self, x: Array) -> Array:
        """log a [B, T, N, F], float32."""
        spec, own, (B, T, _) = self.student, self.lawcat, x.shape
        F = own.features.shape[-1] * 2
        if not spec.gated:
            return jnp.zeros((B, T, self.heads, F))
        wide = x.astype(jnp.float32)
        z = jnp.matmul(jnp.matmul(wide, own.gate_in[...]), own.gate_out[...])
        g = jax.nn.log_sigmoid(z + own.gate_bias[...][None, None]) / spec.gate_normaliser
        return jnp.repeat(g.reshape(B, T, self.kv_heads, F), self.heads // self.kv_heads, axis=2)


def window_terms(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    past: Bool[Array, "B P"],
    valid: Bool[Array, "B T"] | None,
    document: Int[Array, "B T"] | None,
) -> Float[Array, "B T N W"]:
    """Softmax numerator and denominator over the last w keys, self included; W = V + 1.

        num_t = sum_j exp(a_tj - max_j a_tj) v_j        a = q . k / sqrt(H)

    Blocks of w queries see their own keys and those of the block before: linear in T.

    Args:
        q: T queries, rotated.
        k, v: of the w positions before them, then of the same T; S = w + T.
        past: which of the former exist, P = w.
        valid, document: which of the latter exist, and their documents; None: all, one.
    """
    (B, T, N, H), w = q.shape, past.shape[1]
    there = jnp.ones((B, T), bool) if valid is None else valid
    n, padding = -(-T // w), -T % w

    def blocks(x):  # [B, w + T, ...] -> [B, n, 2 w, ...]: every block and the one before
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(B, n + 1, w, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], 2)

    there = blocks(jnp.concatenate([past, there], 1))
    document = jnp.zeros((B, T), jnp.int32) if document is None else document
    document = blocks(jnp.concatenate([jnp.zeros((B, w), jnp.int32), document], 1))
    k, v = (blocks(x.astype(jnp.float32)) for x in (k, v))
    q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(B, n, w, N, H) * H**-0.5
    i, j = jnp.arange(w)[:, None] + w, jnp.arange(2 * w)[None]
    seen = ((j <= i) & (j > i - w))[None, None] & there[:, :, None]
    seen = seen & (document[:, :, w:, None] == document[:, :, None])
    a = jnp.einsum("bnihd,bnjhd->bnhij", q, k, precision=jax.lax.Precision.HIGHEST)
    a = jnp.where(seen[:, :, None], a, -jnp.inf)
    top = jax.lax.stop_gradient(a.max(-1, keepdims=True))
    p = jnp.exp(a - jnp.where(jnp.isfinite(top), top, 0))
    v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1))], -1)
    o = jnp.einsum("bnhij,bnjhv->bnihv", p, v, precision=jax.lax.Precision.HIGHEST)
    return o.reshape(B, n * w, N, -1)[:, :T]
