"""Exact softmax attention under any mask.

    s_ij  = cap(scale q_i . k_j) + bias_ij       cap(x) = soft_cap tanh(x / soft_cap), if set
            and then score_mod(s_ij, b, h, i, j), if set
    p_ij  = exp(s_ij - lse_i) where the mask allows j, else 0
    lse_i = log( sum_allowed exp(s_ij) [+ exp(sinks_h)] )
    o_i   = sum_j p_ij v_j

A row that may attend to nothing gives o = 0, lse = -inf and zero gradients. Keys and values that a
query may not attend to never reach it, even if they are NaN ("reference" and "xla"); attending to a
NaN gives NaN.

    cost     2 (H + H') operations per head and allowed pair ("xla": per pair in a live tile)
    memory   "reference": B N T S scores; all others linear in T and S
    exact    always: the other mechanisms are measured against this one

Deviation: none. Papers: Attention Is All You Need, arXiv 1706.03762; online softmax by tiles, arXiv
2112.05682 and 2205.14135; windows with sinks, arXiv 2309.17453.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._implementations import (
    IMPLEMENTATIONS,
    causal_window,
    choose,
    few,
)
from causal_jax.attention._scores import few_queries, reference
from causal_jax.attention._tiles import choose_tiles
from causal_jax.errors import InputError
from causal_jax.hardware import target
from causal_jax.masks import Dense as DenseMask
from causal_jax.masks import Mask, Prefix, Sinks, Window, as_mask
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap
from pallas_kernels.block_sparse import Tiles, block_sparse_attention, gpu, tpu


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | Bool[Array, "..."] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_offset: int | Int[Array, "B"] = 0,
    kv_length: Int[Array, "B"] | None = None,
    return_lse: bool = False,
    key: Key[Array, ""] | None = None,
    tap: Tap = OFF,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention, computed in float32.

    Args:
        q: queries; N is a multiple of K, query head h reads key/value head h // (N / K).
        k, v: keys and values.
        mask: `Mask`, booleans [T, S] or [B|1, N|1, T, S] (True: may attend), or None: everything.
        bias: added to the scores after the soft cap.
        scale: factor on q . k; None: H ** -0.5.
        soft_cap: squashes the scores to (-soft_cap, soft_cap).
        score_mod: `score_mod(s, b, h, i, j) -> s` on scores and broadcastable int32 indices
            (sequence, query head, absolute query, key), entry by entry, after cap and bias; also
            asked where the mask says no, where its slope must be finite. A callable pytree
            (`jax.tree_util.Partial`) gets gradients of its arrays; what a plain function closes
            over is constant. "reference" and "xla" only.
        sinks: per head the logit of a virtual key without value: it takes weight, gives nothing.
        q_offset: absolute position of the first query (for masks); one for all or one per sequence.
        kv_length: keys from this index on do not exist.
        return_lse: also return the log of the sum of exponentials (differentiable).
        key: not used, nothing is random here; part of the contract of all mechanisms.
        tap: sites `mask` and `bias` [B,N,T,S] (materialised only if wanted), `scores` (before the
            mask) and `pattern` [B,N,T,S] float32 (only "reference" has them, and is chosen if they
            are wanted), `z` = o.
        implementation: None chooses and never fails; "reference", "xla", "cudnn", "tokamax", "tpu",
            "gpu". "reference" differentiates in every mode, the others in reverse mode only. "tpu"
            and "gpu" (Hopper) are never chosen, only named: they have been interpreted and compiled
            or lowered, not run on a chip. They are one program per device: under a mesh call them
            inside `jax.shard_map`.

    Returns:
        o in v's dtype; with return_lse also lse in float32.

    Raises:
        InputError: shapes that do not fit, unknown implementation.
        NotImplementedError: the implementation named cannot serve these arguments.
    """
    _check(q, k, v, mask, bias, sinks, soft_cap, scale)
    (B, T, N, H), S = q.shape, k.shape[1]
    mask, scale = as_mask(mask), H**-0.5 if scale is None else scale
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    _check_mask(mask, B, N)
    if tap.wants("mask"):
        mask, q_offset = edited_mask(mask, tap, (B, N, T, S), q_offset)
    if tap.wants("bias"):
        full: Any = jnp.zeros((B, N, T, S), jnp.float32)
        bias = tap("bias", full if bias is None else full + bias)  # pyright: ignore
    name, _ = choose(
        q, k, v, mask=mask, bias=bias, soft_cap=soft_cap, score_mod=score_mod, sinks=sinks,
        q_offset=q_offset, return_lse=return_lse, tap=tap, implementation=implementation,
    )  # fmt: skip
    if name in ("cudnn", "tokamax"):
        o, lse = _vendor(name, q, k, v, mask, bias, scale, soft_cap), None
    else:
        run = {"xla": _xla, "tpu": _tpu, "gpu": _gpu}.get(
            name, functools.partial(reference, tap=tap)
        )
        o, lse = run(
            q, k, v, mask, bias=bias, scale=scale, soft_cap=soft_cap, score_mod=score_mod,
            sinks=sinks, q_offset=q_offset,
        )  # fmt: skip
    z: Any = tap("z", o)
    return z if lse is None or not return_lse else (z, lse)


def edited_mask(
    mask: Mask, tap: Tap, shape: tuple[int, int, int, int], q_offset: int | Int[Array, "B"]
) -> tuple[Mask, int | Int[Array, "B"]]:
    """The mask after the edits of site `mask`, and the offset that goes with it.

    Edits that say by index what they forbid (`edits.Deferrable`) stay functions of the indices, so
    that dead tiles are skipped as before; others are made on the whole array [B, N, T, S].
    """
    put_off = tap.deferred("mask") if isinstance(q_offset, int) and q_offset == 0 else None
    if put_off is None:
        dense = jnp.broadcast_to(mask.to_dense(*shape[2:], q_offset=q_offset), shape)
        return DenseMask(tap("mask", dense)), 0
    for edit, on in put_off:
        mask = edit.op.later(mask, on, shape, *edit.args)
    return mask, q_offset


def _xla(q, k, v, mask, *, bias, scale, soft_cap, score_mod, sinks, q_offset):
    T, S = q.shape[1], k.shape[1]
    on_cpu = target() == "cpu"
    if few(q, k) and on_cpu:
        return few_queries(
            q, k, v, mask, bias=bias, scale=scale, soft_cap=soft_cap, score_mod=score_mod,
            sinks=sinks, q_offset=q_offset,
        )  # fmt: skip
    tiles, schedule = choose_tiles(mask, T, S, q_offset)
    return block_sparse_attention(
        q, k, v, mask, schedule, scale=scale, bias=bias, soft_cap=soft_cap, score_mod=score_mod,
        sinks=sinks, q_offset=q_offset, tiles=tiles, upcast=on_cpu,
    )  # fmt: skip


def _tpu(q, k, v, mask, *, bias, scale, soft_cap, score_mod, sinks, q_offset):
    T, S = q.shape[1], k.shape[1]
    tiles = tpu.legal_tiles(Tiles(), T, S)
    live = mask.block_map(T, S, tiles.block_q, tiles.block_k, q_offset=q_offset)
    return tpu.block_sparse_attention(
        q, k, v, mask, live.tiles(), scale=scale, soft_cap=soft_cap, sinks=sinks,
        q_offset=q_offset, tiles=tiles, apart=(mask.batch, mask.heads),
    )  # fmt: skip


def _gpu(q, k, v, mask, *, bias, scale, soft_cap, score_mod, sinks, q_offset):
    tiles = gpu.legal_tiles(Tiles())
    live = mask.block_map(q.shape[1], k.shape[1], tiles.block_q, tiles.block_k, q_offset=q_offset)
    return gpu.block_sparse_attention(
        q, k, v, mask, live.tiles(), scale=scale, soft_cap=soft_cap, sinks=sinks,
        q_offset=q_offset, tiles=tiles, apart=(mask.batch, mask.heads),
    )  # fmt: skip


def _vendor(name, q, k, v, mask, bias, scale, soft_cap):
    """Kernels of others; `choose` has made sure that they can honour every argument."""
    causal, left = causal_window(mask) or (False, None)
    window = None if left is None else (left, 0)
    if name == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, bias, scale=scale, is_causal=causal, local_window_size=window,
            implementation="cudnn",
        )  # fmt: skip
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.dot_product_attention(
        q, k, v, bias, scale=scale, is_causal=causal, local_window_size=window,
        logits_soft_cap=soft_cap,
    )  # fmt: skip


def _check(q, k, v, mask, bias, sinks, soft_cap, scale) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"{name} of shape {x.shape}: expected [batch, length, heads, width]")
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape[:3] != v.shape[:3]:
        raise InputError(f"k {k.shape} and v {v.shape}: batch, length and heads must be equal")
    if k.shape[0] != B:
        raise InputError(f"q {q.shape} and k {k.shape}: the batch must be equal")
    if k.shape[3] != H:
        raise InputError(f"q {q.shape} and k {k.shape}: the head width (last axis) must be equal")
    if N % K:
        raise InputError(f"{N} query heads: expected a multiple of the {K} key/value heads")
    if bias is not None and not _fits(bias.shape, (B, N, T, S)):
        raise InputError(f"bias of shape {bias.shape}: expected [{B} or 1, {N} or 1, {T}, {S}]")
    if isinstance(mask, jax.Array | np.ndarray):
        if mask.shape != (T, S) and not _fits(mask.shape, (B, N, T, S)):
            full = f"[{B} or 1, {N} or 1, {T}, {S}]"
            raise InputError(f"mask of shape {mask.shape}: expected [{T}, {S}] or {full}")
        if mask.dtype != bool:
            raise InputError(f"mask of {mask.dtype}: expected bool, True = may attend")
    if sinks is not None and sinks.shape != (N,):
        raise InputError(f"sinks of shape {sinks.shape}: expected [{N}], a logit per query head")
    _check_scalars(soft_cap, scale)


def _check_scalars(soft_cap: float | None, scale: float | None) -> None:
    if soft_cap is not None and not soft_cap > 0:
        raise InputError(f"soft_cap={soft_cap}: expected a number > 0, or None")
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"scale={scale}: expected a finite number, or None (head width ** -0.5)")


def _check_mask(mask: Mask, B: int, N: int) -> None:
    if mask.batch not in (1, B):
        raise InputError(f"mask for {mask.batch} sequences: expected {B} or 1")
    if mask.heads not in (1, N):
        raise InputError(f"mask for {mask.heads} heads: expected {N} or 1")


def _fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Is it [B|1, N|1, T, S]?"""
    return len(shape) == 4 and all(
        n == m or (axis < 2 and n == 1) for axis, (n, m) in enumerate(zip(shape, full))
    )


@attention.register(
    "dense",
    cases=(
        Case((2, 17, 4, 8)),
        Case((2, 33, 4, 8), kv_heads=2, spec={"window": 5, "sinks": 2}),
        Case((1, 19, 2, 8), S=27, spec={"soft_cap": 5.0, "scale": 0.5}),
        Case((2, 33, 4, 8), kv_heads=1, spec={"implementation": "xla"}),
        Case((1, 8192, 4, 64), tags=("bench",)),
        Case((1, 8191, 4, 64), tags=("bench",)),
        Case((1, 8192, 8, 64), kv_heads=2, spec={"window": 1023, "sinks": 4}, tags=("bench",)),
    ),
)
@dataclasses.dataclass(frozen=True)
class Dense(AttentionSpec):
    """Exact attention, everywhere or within a window (StreamingLLM with sinks, arXiv 2309.17453).

    Attributes:
        window: keys before itself that a query may see; None: all.
        sinks: number of first tokens that stay visible beyond the window.
        soft_cap: squashes the scores to (-soft_cap, soft_cap); None: not.
        scale: factor on q . k; None: head width ** -0.5.
        implementation: see `dense_attention`.
    """

    window: int | None = None
    sinks: int = 0
    soft_cap: float | None = None
    scale: float | None = None
    implementation: str | None = None

    patterns: ClassVar[frozenset[str]] = frozenset(
        {"self-causal", "self-full", "cross-causal", "cross-full"}
    )

    def __post_init__(self):
        if self.window is not None and self.window < 0:
            raise InputError(f"window={self.window}: expected a number of keys >= 0, or None")
        if self.sinks < 0:
            raise InputError(f"sinks={self.sinks}: expected a number of first tokens >= 0")
        if self.sinks and self.window is None:
            raise InputError(f"sinks={self.sinks}: all tokens are visible unless window is set")
        _check_scalars(self.soft_cap, self.scale)
        if self.implementation not in (None, *IMPLEMENTATIONS):
            known = ", ".join(IMPLEMENTATIONS)
            raise InputError(f"implementation={self.implementation!r}: expected one of {known}")

    def exact_when(self, length: int) -> bool:
        """Unless the window is shorter than the past, or the scores are capped or rescaled."""
        plain = self.soft_cap is None and self.scale is None
        return plain and (self.window is None or self.window >= length - 1)

    @property
    def by_distance(self) -> bool:
        """Unless there are sinks, which are the first places."""
        return not self.sinks

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """2 (H + H') operations per head and allowed pair; the queries are the last positions."""
        past = np.arange(max(S - T, 0), max(S - T, 0) + T, dtype=np.float64)
        seen = np.minimum(past + 1, S)
        if self.window is not None:
            seen = np.minimum(seen, self.window + 1 + np.clip(past - self.window, 0, self.sinks))
        return float(2 * (H + Hv) * N * seen.sum())

    def allowed(self, mask: Mask | Bool[Array, "..."] | None) -> Mask:
        """`mask` within the spec's own window."""
        if self.window is None:
            return as_mask(mask)
        return as_mask(mask) & (Window(self.window, None) | Sinks(self.sinks))

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
        """Attend; an `implementation` given here wins over the spec's."""
        o = dense_attention(
            q, k, v, mask=self.allowed(mask), scale=self.scale, soft_cap=self.soft_cap, key=key,
            q_offset=q_offset, kv_length=kv_length, tap=tap,
            implementation=implementation or self.implementation,
        )  # fmt: skip
        assert not isinstance(o, tuple)
        return o
