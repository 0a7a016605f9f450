"""Gated linear attention: positive features, and a state that forgets feature by feature.

    S_t = diag(exp g_t) S_{t-1} + k_t [v_t, 1]^T     [num_t, den_t] = q_t^T S_t     o_t = num / den
        = sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj    w_tj = sum_c q_tc k_jc exp(b_tc - b_jc)

with q, k >= 0 features and b the running sum of the log gates g <= 0. So o_t is a mean of past
values whose weights fade; without gates it is linear attention. The state is as large after a
million tokens as after one. Three forms of the same numbers: token by token ("recurrent"), in
chunks ("xla", parallel, what training and prefill use), all pairs ("reference", serves any mask).
The kernels "tpu" and "gpu" work in chunks too; never run on their hardware, they must be named.

    cost     4 F (H' + 1) operations per head and token for the state, C (F + H') within chunks of C
    exact    never: its features are not softmax's

`GatedLinear` is the mechanism without parameters of its own: features [softmax(x), softmax(-x)] and
one constant gate; `causal_jax.nn.lawcat` learns both. (`linear` is the theory's: signed weights.)

Deviation: none in the recurrence. Gated linear attention, arXiv 2312.06635; features, 2402.04347
(Hedgehog); the normaliser as a column of ones, 2509.18467 (LAWCAT).
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._scores import _finite, _with_bad
from causal_jax.errors import InputError
from causal_jax.hardware import elsewhere
from causal_jax.masks import (
    Causal,
    Documents,
    Full,
    Keys,
    Mask,
    Not,
    Prefix,
    Sinks,
    as_mask,
    parts_of,
)
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap
from pallas_kernels.gated_linear import (
    gated_linear_chunked,
    gated_linear_gpu,
    gated_linear_recurrent,
    gated_linear_tpu,
    gpu,
    tpu,
)

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

IMPLEMENTATIONS = ("reference", "recurrent", "xla", "tpu", "gpu")
EPS = 1e-10  # under the normaliser


def hedgehog(
    x: Float[Array, "B T N H"], w: Float[Array, "N H f"] | None = None
) -> Float[Array, "B T N F"]:
    """Positive features [softmax(x w), softmax(-x w)] of every head, F = 2 f, at least 1e-12.

    Both halves sum to 1, so 0 < phi(q) . phi(k) <= 2 (arXiv 2402.04347).

    Args:
        w: a map per head; None: the identity, f = H.
    """
    x = x.astype(jnp.float32)
    bad = ~jnp.isfinite(x).all(-1, keepdims=True)  # said in the value, kept out of the gradient
    x = jnp.where(bad, 0, x)
    y = x if w is None else _einsum("btnh,nhf->btnf", x, w.astype(jnp.float32))
    both = jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], -1)
    return jnp.where(bad, jnp.nan, jnp.maximum(both, 1e-12))


def gated_linear_attention(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K V"],
    *,
    log_gate: Float[Array, "B S K G"] | None = None,
    normalise: bool = True,
    state: Float[Array, "B K F W"] | None = None,
    return_state: bool = False,
    mask: Mask | Bool[Array, "..."] | None = None,
    chunk: int = 64,
    q_offset: int | Int[Array, "B"] = 0,
    kv_length: Int[Array, "B"] | None = None,
    key: Key[Array, ""] | None = None,
    tap: Tap = OFF,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B K F W"]]:
    """Attend to the past through a decaying state, in float32.

    Causality is part of it, as the state knows no future. Where the mask says no more than which
    keys exist (padding, before or behind) and which document a position is of (contiguous ones),
    the time is linear; any other mask takes all pairs. A key that is masked leaves the state as it
    was: its gate does not count.

    Args:
        q, k: features, not negative where `normalise`.
        v: values.
        log_gate: g, at most 0; None: nothing is forgotten.
        normalise: divide by the sum of the weights.
        state: before the first position, as returned; None: zeros.
        return_state: also return the state after the last key. Neither goes with a mask that needs
            all pairs.
        mask, kv_length, key, tap: as in `linear_attention`.
        chunk: positions worked on at once, a power of two.
        q_offset: position of the first query among the keys.
        implementation: None chooses ("xla" or "reference") and never fails; "reference",
            "recurrent", "xla", "tpu", "gpu" (which has chunks of 64 and products in bfloat16).

    Returns:
        o in v's dtype, 0 for a query that may attend to nothing; the state [B, K, F, V (+ 1)],
        float32, its last column the normaliser's.

    Raises:
        InputError: shapes that do not fit, unknown implementation.
        NotImplementedError: the implementation named, or a state, with a mask it cannot serve.
    """
    _check(q, k, v, log_gate, chunk, implementation)
    (B, T, _, F), (S, K) = q.shape, k.shape[1:3]
    mask = as_mask(mask)
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    g = jnp.zeros((1, 1, 1, 1)) if log_gate is None else log_gate.astype(jnp.float32)
    g = jnp.broadcast_to(g, k.shape)
    w = v.astype(jnp.float32)
    if normalise:
        w = jnp.concatenate([w, jnp.ones((*v.shape[:3], 1))], -1)
    shape = (B, K, F, w.shape[-1])
    if state is not None and state.shape != shape:
        raise InputError(f"state {state.shape}: expected {shape}")

    own = S == T and isinstance(q_offset, int) and q_offset == 0
    plain = causal_parts(mask, B, jnp.arange(S)) if own else None
    only = "only 'reference' without a state does"
    lost = None if plain else f"it serves causal masks with documents and missing keys: {only}"
    if site := next((s for s in ("mask", "pattern") if tap.wants(s)), None):
        lost = f"site {site!r} needs all pairs: {only}"
    lost = lost or _own_refusal(implementation, q, k, w)
    linear = implementation != "reference" and (implementation is not None or lost is None)
    stateful = state is not None or return_state
    if (lost and (linear or stateful)) or (stateful and not linear):
        raise NotImplementedError(
            f"{implementation or 'a state'}: {lost or 'all pairs have no state'}"
        )
    if linear and plain is not None:
        valid, document = plain
        state = jnp.zeros(shape, jnp.float32) if state is None else state
        if valid is not None:
            there = valid[..., None, None]
            k, w, g = (jnp.where(there, x, 0) for x in (k, w, g))
        forms = {
            "recurrent": gated_linear_recurrent,
            "gpu": gated_linear_gpu,
            "tpu": functools.partial(gated_linear_tpu, chunk=chunk),
        }
        run = forms.get(implementation or "", functools.partial(gated_linear_chunked, chunk=chunk))
        o, state = run(q, k, w, g, state, document)
    else:
        o = _all_pairs(q, k, w, g, mask & Causal(), q_offset, normalise, tap)
    if normalise:
        o = o[..., :-1] / (o[..., -1:] + EPS)
    z = tap("z", o.astype(v.dtype))
    return (z, state) if return_state and state is not None else z


def _own_refusal(implementation: str | None, q, k, v) -> str | None:
    """Why a kernel that was named cannot serve, or None."""
    if implementation not in ("tpu", "gpu"):
        return None
    kernel = tpu if implementation == "tpu" else gpu
    return elsewhere(implementation) or kernel.refusal(q, k, v)


def _all_pairs(q, k, v, g, mask, q_offset, normalise, tap):
    """sum_j w_ij v_j with every weight written out, [B, N, T, S, F] in memory: any mask."""
    (B, T, N, F), (S, K) = q.shape, k.shape[1:3]
    allowed = mask.to_dense(T, S, q_offset=q_offset)
    if tap.wants("mask"):
        allowed = tap("mask", jnp.broadcast_to(allowed, (B, N, T, S)))
    (q, bad_q), (k, bad_k), (v, bad_v) = (_finite(x.astype(jnp.float32)) for x in (q, k, v))
    at = jnp.reshape(jnp.asarray(q_offset), (-1, 1)) + jnp.arange(T)[None]  # [B or 1, T]
    # a key that no query may see does not exist, so its gate does not count either
    there = jnp.broadcast_to(allowed, (B, N, T, S)).any(2).reshape(B, K, N // K, S).any(2)
    g = jnp.where(there[..., None], g.transpose(0, 2, 1, 3), 0)  # [B, K, S, F]
    later = jnp.arange(S)[None] > jnp.arange(S)[:, None]  # [from, gate]
    decay = jnp.cumsum(jnp.where(later[None, None, ..., None], g[:, :, None], 0), 3)
    decay = jnp.take_along_axis(decay, jnp.broadcast_to(at, (B, T))[:, None, None, :, None], 3)
    decay = jnp.moveaxis(decay, 3, 2)  # [B, K, T, S, F]
    q = q.reshape(B, T, K, N // K, F)
    s = _einsum("btkgf,bskf,bktsf->bkgts", q, k, jnp.exp(decay)).reshape(B, N, T, S)
    s = _with_bad(s, bad_q, bad_k + bad_v)
    p = jnp.where(allowed, s, 0)
    if tap.wants("pattern"):
        total = p.sum(-1, keepdims=True) + EPS if normalise else jnp.ones((1, 1, 1, 1))
        p = tap("pattern", p / total) * total
    o = _einsum("bkgts,bskv->btkgv", p.reshape(B, K, N // K, T, S), v)
    return o.reshape(B, T, N, -1)


def causal_parts(
    mask: Mask, batch: int, at: Int[Array, "T"], *, whole: bool = True
) -> tuple[Bool[Array, "B T"] | None, Int[Array, "B T"] | None] | None:
    """What a causal mask says beyond causality, if it is no more than missing keys and documents.

    Args:
        at: positions of the keys.
        whole: they are the whole sequence; a part of one cannot be in documents.

    Returns:
        (which keys exist, document numbers that count up from 0 for contiguous documents), each
        None where the mask is silent; None: the mask says something else.
    """
    causal, valid, document = False, None, None
    for part in parts_of(mask):
        inner = part.part if isinstance(part, Not) else part
        if isinstance(part, Causal) and part.offset == 0:
            causal = True
        elif isinstance(inner, Keys | Prefix | Sinks):
            exist = part(jnp.arange(batch)[:, None], 0, 0, at[None])
            exist = jnp.broadcast_to(exist, (batch, at.shape[0]))
            valid = exist if valid is None else valid & exist
        elif isinstance(part, Documents) and part.kv_ids is None and document is None and whole:
            ids = jnp.atleast_2d(part.q_ids)[:, : at.shape[0]]
            document = jnp.cumsum(ids[:, 1:] != ids[:, :-1], 1, dtype=jnp.int32)
            document = jnp.pad(document, ((0, 0), (1, 0)))
            document = jnp.broadcast_to(document, (batch, at.shape[0]))
        elif not isinstance(part, Full):
            return None
    return (valid, document) if causal else None


def _check(q, k, v, log_gate, chunk, implementation) -> None:
    (B, _, N, F), (S, K) = q.shape, k.shape[1:3]
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"implementation={implementation!r}: expected None or one of {known}")
    if k.shape != (B, S, K, F) or v.shape[:3] != (B, S, K) or N % K:
        raise InputError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, F], [B, S, K, F] and "
            "[B, S, K, H'] with N a multiple of K"
        )
    if log_gate is not None and log_gate.shape != k.shape:
        raise InputError(
            f"log_gate {log_gate.shape}: expected one gate per feature of every key, {k.shape}"
        )
    _check_chunk(chunk)


def _check_chunk(chunk: int) -> None:
    if chunk < 8 or chunk & (chunk - 1):
        raise InputError(f"chunk={chunk}: expected a power of two, at least 8")


@attention.register(
    "gated_linear",
    cases=(
        Case((2, 17, 4, 8)),
        Case((2, 75, 4, 8), kv_heads=2, spec={"half_life": 4.0, "chunk": 16}),
        Case((1, 19, 2, 8), spec={"half_life": None, "normalise": False}),
    ),
)
@dataclasses.dataclass(frozen=True)
class GatedLinear(AttentionSpec):
    """Gated linear attention without parameters of its own (arXiv 2312.06635).

    Attributes:
        half_life: tokens after which a key counts half; None: nothing is forgotten.
        normalise: divide by the sum of the weights.
        chunk: positions worked on at once, a power of two.
    """

    half_life: float | None = None
    normalise: bool = True
    chunk: int = 64

    patterns: ClassVar[frozenset[str]] = frozenset({"self-causal"})
    streams: ClassVar[bool] = True

    def __post_init__(self):
        if self.half_life is not None and not self.half_life > 0:
            raise InputError(f"half_life={self.half_life}: expected tokens > 0, or None")
        _check_chunk(self.chunk)

    def exact_when(self, length: int) -> bool:
        """Never."""
        return False

    @property
    def by_distance(self) -> bool:
        """Always."""
        return True

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """State and chunk, F = 2 H features."""
        return float(N * T * (4 * 2 * H * (Hv + 1) + self.chunk * (2 * H + Hv + 1)))

    def init_state(self, batch: int, kv_heads: int, head_dim: int) -> Float[Array, "B K F W"]:
        """Zeros: the state before the first position."""
        columns = head_dim + int(self.normalise)
        return jnp.zeros((batch, kv_heads, 2 * head_dim, columns), jnp.float32)

    def step(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        state: Float[Array, "B K F W"],
        *,
        mask: Mask | None = None,
        length: int | Int[Array, ""] = 0,
        tap: Tap = OFF,
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B K F W"]]:
        """T further positions (T = 1: decoding) at a cost that does not grow with the past.

        Raises:
            InputError: a mask that says more than which keys exist.
        """
        B, T = q.shape[:2]
        parts = causal_parts(mask or Causal(), B, length + jnp.arange(T), whole=False)
        if parts is None:
            raise InputError(f"mask {mask}: a state serves causal masks with padding, and no more")
        allowed = Causal() if parts[0] is None else Causal() & Keys(parts[0])
        out = self._attend(
            q, k, v, state, mask=allowed, return_state=True, tap=tap,
            implementation="recurrent" if T < 8 else None,
        )  # fmt: skip
        assert isinstance(out, tuple)
        return out

    def _attend(self, q, k, v, state=None, **kwargs):
        gate = 0.0 if self.half_life is None else -math.log(2) / self.half_life
        phi_q, phi_k = hedgehog(q), hedgehog(k)
        return gated_linear_attention(
            phi_q, phi_k, v, log_gate=jnp.full(phi_k.shape, gate), normalise=self.normalise,
            state=state, chunk=self.chunk, **kwargs,
        )  # fmt: skip

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
        """Attend."""
        o = self._attend(
            q, k, v, mask=mask, key=key, tap=tap, implementation=implementation,
            q_offset=q_offset, kv_length=kv_length,
        )  # fmt: skip
        assert not isinstance(o, tuple)
        return o
