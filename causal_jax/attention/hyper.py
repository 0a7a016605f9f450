"""HyperAttention: the heavy keys by sorted hashing, the rest by sampling, in near-linear time.

Large entries of exp(q . k) belong to vectors of a small angle. Queries and keys are hashed alike
(`lsh_rank`: neighbouring buckets differ in one hyperplane), sorted by their rank and cut into
blocks; a query attends to the b keys of its block exactly, and to m keys drawn uniformly with
replacement from all n, which stand for the keys outside of the block:

    s_ij = scale q_i . k_j               for j in i's block
           scale q_i . k_j + log(n / m)  for a sample j outside of it
    o_i  = sum_j softmax_j(s_ij) v_j

so that E[sum exp s] is the softmax's true denominator. Under a causal mask the sequence is halved
again and again: later queries attend to the earlier half by the above, all problems of a level in
one batch, and pieces of up to `min_seq_len` tokens are exact. The parts are merged by their lse.

    cost     2 (H + H') n (b + m) per head, causal n/2 (b + m) per level and n min_seq_len / 2 exact
    exact    up to min_seq_len tokens (below it without a causal mask), and with one block (n <= b)

Faithful blocks hold equal numbers of *queries*: which keys a query meets then depends on the other
queries of its half, later ones too. Values never leak, but later tokens change earlier outputs.
`causal_strict` gives every query the block of keys its own rank points at (ties: the k-th part of a
bucket for the k-th part of the queries' time), so the past alone decides.

Any mask is honoured pair by pair, but blocks and samples are chosen without it: one that allows few
pairs leaves most of them unused. Grouped query heads are sorted and served together. Queries that
are not the keys' own under a causal mask (a cache) are served exactly.

Deviation: capping and row-norm sampling of the theory are left out, as the authors' code does; keys
that fill up a block are masked, samples in a query's block always are, the lse keeps its gradient;
lengths are padded once to a multiple of 2^levels. Paper: arXiv 2310.05869.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._implementations import target
from causal_jax.attention._lsh import angular_lsh, check_order, lsh_rank
from causal_jax.attention.dense import (
    _check,
    _check_mask,
    _check_scalars,
    dense_attention,
    edited_mask,
)
from causal_jax.attention.merge import merge_attention
from causal_jax.errors import InputError
from causal_jax.masks import And, Causal, Chunked, Full, Mask, Not, Prefix, Window, as_mask
from causal_jax.masks import Dense as DenseMask
from causal_jax.masks.values import field_shape
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap
from pallas_kernels import lsh_attention as kernels

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")


class _Settings(NamedTuple):
    """What one problem needs to know."""

    block_size: int
    sample_size: int
    order: str
    center: bool
    strict: bool
    scale: float
    implementation: str | None


def hyper_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Mask | Bool[Array, "..."] | None = None,
    key: Key[Array, ""] | None = None,
    proj: Float[Array, "H r"] | None = None,
    block_size: int = 256,
    sample_size: int = 256,
    lsh_num_projs: int = 7,
    min_seq_len: int = 4096,
    causal_strict: bool = True,
    order: str = "rank",
    center: bool = False,
    scale: float | None = None,
    q_offset: int | Int[Array, "B"] = 0,
    kv_length: Int[Array, "B"] | None = None,
    return_lse: bool = False,
    tap: Tap = OFF,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Approximate softmax attention, computed in float32.

    Args:
        q, k, v, q_offset, kv_length: as in `dense_attention`.
        mask: as in `dense_attention`; `Causal()` in it (or a window without future) makes the
            recursive form, everything else is asked pair by pair.
        key: draws hyperplanes and samples; not needed where nothing is drawn.
        proj: hyperplanes [H, r] from `angular_lsh`, to keep them from call to call; None: drawn.
        block_size: b, keys of a block; 0: the samples alone.
        sample_size: m, sampled keys per kv head and problem; 0: the blocks alone.
        lsh_num_projs: r, bits of a hash; 0: blocks of positions. Must be proj's width if that is
            given.
        min_seq_len: pieces of up to so many tokens are exact.
        causal_strict: earlier outputs do not depend on later queries either.
        order: of the buckets, see `lsh_rank`.
        center: hash keys without their mean (an attention sink puts all keys on one side).
        scale: factor on q . k; None: H ** -0.5.
        return_lse: also return the estimated log of the sum of exponentials (differentiable).
        tap: sites `mask` [B,N,T,S] (materialised only if wanted; under a causal mask edits can only
            forbid) and `z` = o.
        implementation: None chooses, "xla" so far; "reference", "xla" (reverse-mode derivatives
            only), "tpu" (never run on a real chip, so it must be named).

    Returns:
        o in v's dtype; 0 for a query that may attend to nothing.

    Raises:
        InputError: shapes or sizes that do not fit, no key where one is needed.
        NotImplementedError: the implementation named cannot serve these arguments.
    """
    _check(q, k, v, mask, None, None, None, scale)
    _check_sizes(block_size, sample_size, lsh_num_projs, min_seq_len)
    check_order(order)
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise InputError(f"implementation={implementation!r}: expected None or one of {known}")
    if implementation == "gpu":
        raise NotImplementedError("gpu: hyper attention has no kernel for GPUs yet, 'xla' serves")
    (B, T, N, H), S = q.shape, k.shape[1]
    mask = as_mask(mask)
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    _check_mask(mask, B, N)
    causal = is_causal(mask)
    if tap.wants("mask"):
        edited, q_offset = edited_mask(mask, tap, (B, N, T, S), q_offset)
        mask = edited & Causal() if causal and isinstance(q_offset, int) else edited
    factor: float = H**-0.5 if scale is None else scale
    aligned = T == S and isinstance(q_offset, int) and q_offset == 0
    short = min_seq_len >= T if causal else min_seq_len > T
    if short or (causal and not aligned):
        o, lse = _exact(q, k, v, mask, factor, q_offset, implementation)
    else:
        if key is None and (proj is None or sample_size):
            raise InputError("hyper attention draws hyperplanes and samples: give key=")
        keys = (None, None) if key is None else jax.random.split(key)
        if proj is None:
            proj = angular_lsh(keys[0], H, lsh_num_projs)  # pyright: ignore[reportArgumentType]
        cfg = _Settings(
            block_size, sample_size, order, center, causal_strict, factor, implementation
        )
        if causal:
            o, lse = _causal(q, k, v, mask, proj, keys[1], min_seq_len, cfg)
        else:
            o, lse = _full(q, k, v, mask, proj, keys[1], q_offset, cfg)
    z: Any = tap("z", o)
    return (z, lse) if return_lse else z


def is_causal(mask: Mask) -> bool:
    """Does the mask, by its form, forbid every later key?"""
    return any(
        (isinstance(p, Causal) and p.offset <= 0) or (isinstance(p, Window) and p.right == 0)
        for p in (mask.parts if isinstance(mask, And) else (mask,))
    )


def _exact(q, k, v, mask, scale, q_offset, implementation):
    return dense_attention(
        q, k, v, mask=mask, scale=scale, q_offset=q_offset, return_lse=True,
        implementation=implementation,
    )  # fmt: skip


def _full(q, k, v, mask, proj, key, q_offset, cfg: _Settings):
    """One problem per sequence and kv head."""
    (B, T, N, H), K = q.shape, k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    start = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    where = _Where(B, K, jnp.repeat(start, K), jnp.zeros(B * K, jnp.int32))
    o, lse = _hyper(
        grouped.reshape(B * K, T, N // K, H), _heads_first(k), _heads_first(v), where, mask,
        proj, key, cfg._replace(strict=False),
    )  # fmt: skip
    return _heads_last(o, B), _heads_last(lse, B)


def _causal(q, k, v, mask, proj, key, min_seq_len: int, cfg: _Settings):
    """Exact pieces on the diagonal, then level by level what lies below it."""
    (B, n, N, H), K = q.shape, k.shape[2]
    levels = _levels(n, min_seq_len)
    piece = -(-n // 2**levels)
    o, lse = _exact(q, k, v, Chunked(piece) & mask, cfg.scale, 0, cfg.implementation)
    outs, lses = [o], [lse]
    rest = And.of(*(p for p in _parts(mask) if p != Causal()))
    grouped = q.reshape(B, n, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B * K, n, N // K, H)
    arrays = [_fill(x, piece * 2**levels) for x in (grouped, _heads_first(k), _heads_first(v))]
    for level in range(levels):
        half = piece * 2 ** (levels - 1 - level)

        def halves(x, half=half):
            """[B K, n, ..] -> [B K pairs, 2, half, ..]"""
            return x.reshape(-1, 2, half, *x.shape[2:])

        pair = 2 * half * jnp.tile(jnp.arange(2**level, dtype=jnp.int32), B * K)
        where = _Where(B, K, pair + half, pair)
        a, b, c = (halves(x) for x in arrays)
        draw = None if key is None else jax.random.fold_in(key, level)
        o, lse = _hyper(a[:, 1], b[:, 0], c[:, 0], where, rest, proj, draw, cfg)
        outs.append(_heads_last(_second(o, 0.0, B * K), B)[:, :n])
        lses.append(_heads_last(_second(lse, -jnp.inf, B * K), B)[:, :n])
    return merge_attention(outs, lses)


def _levels(n: int, min_seq_len: int) -> int:
    """How often n tokens are halved until a piece is short."""
    return next(levels for levels in range(64) if -(-n // 2**levels) <= min_seq_len)


def _second(x, fill: float, rows: int):
    """[rows pairs, half, ..] of second halves -> [rows, n, ..], `fill` in the first halves."""
    x = jnp.stack([jnp.full_like(x, fill), x], 1)
    return x.reshape(rows, -1, *x.shape[3:])


def _heads_first(x):
    """[B, S, K, ..] -> [B K, S, ..]"""
    x = x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _heads_last(x, B: int):
    """[B K, T, G, ..] -> [B, T, K G, ..]"""
    x = x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(B, x.shape[1], -1, *x.shape[4:])


def _fill(x, length: int):
    """Zero rows at the end of axis 1."""
    extra = length - x.shape[1]
    return jnp.pad(x, [(0, extra * (a == 1)) for a in range(x.ndim)]) if extra else x


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, And) else (mask,)


class _Where(NamedTuple):
    """Problems [B, K, problems of one head], flat: P. Absolute positions of their first rows."""

    B: int
    K: int
    q_start: Any  # [P]
    k_start: Any  # [P]

    @property
    def b(self):
        """Sequence of each problem, [P]."""
        return jnp.arange(len(self.k_start)) // (len(self.k_start) // self.B)

    @property
    def kv(self):
        """Key/value head of each problem, [P]."""
        return jnp.arange(len(self.k_start)) // (len(self.k_start) // (self.B * self.K)) % self.K


def _hyper(q, k, v, where: _Where, mask: Mask, proj, key, cfg: _Settings):
    """q [P, n, G, H], k [P, s, H], v [P, s, V] -> o [P, n, G, V], lse [P, n, G]."""
    (P, n, G, H), s = q.shape, k.shape[1]
    b = min(cfg.block_size or 128, s)  # without blocks there still are tiles of queries
    M = -(-s // b)
    q = q.reshape(P, n * G, H)
    ok = [jnp.isfinite(x) for x in (k, v)]
    # NaN where a key or its value is not finite: the mask decides who sees it
    bias = jnp.where(ok[0].all(-1) & ok[1].all(-1), 0.0, jnp.nan).astype(jnp.float32)
    k, v = (jnp.where(fine, x, 0) for fine, x in zip(ok, (k, v)))
    seen = _seen(mask, where, s, G)
    rank_q, rank_k = _ranks(q, k, seen, proj, cfg)
    by_rank = jnp.argsort(rank_k, axis=1, stable=True).astype(jnp.int32)
    back = _inverse(by_rank, s)
    keys = jnp.pad(by_rank, ((0, 0), (0, M * b - s)), constant_values=s)
    k, v = (_move(x, keys, back).reshape(P, M, b, -1) for x in (k, v))
    bias = _take(bias, keys, -jnp.inf).reshape(P, M, b)
    if cfg.strict:
        slot, block, Q = _pointed(rank_q, jnp.take_along_axis(rank_k, by_rank, 1), b, M, n)
    else:
        Q = -(-n * G // M)
        block = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (P, M))
        slot = _inverse(jnp.argsort(rank_q, axis=1, stable=True), n * G)
    rows = _inverse(slot, block.shape[1] * Q)  # [P, C Q]: the query in every slot, or n G: none
    m = cfg.sample_size if M > 1 or not cfg.block_size else 0
    drawn = jnp.zeros((P, 0), jnp.int32)
    if m:
        drawn = jax.random.randint(key, (P, m), 0, s, jnp.int32)  # in the sorted order: as uniform
    k_sample, v_sample = (_rows(x.reshape(P, M * b, -1), drawn) for x in (k, v))
    places, masked = None, not isinstance(mask, Full)
    if masked:
        at = jnp.minimum(rows, n * G - 1).reshape(P, -1, Q)
        j = where.k_start[:, None] + jnp.minimum(keys, s - 1)
        places = kernels.Places(
            b=where.b,
            h=where.kv.reshape(-1, 1, 1) * G + at % G,
            i=where.q_start.reshape(-1, 1, 1) + at // G,
            j=j.reshape(P, M, b),
            j_sample=jnp.take_along_axis(j, drawn, 1),
        )
    problem = kernels.Problem(
        q=_move(q, rows, slot).reshape(P, -1, Q, H),
        k=k,
        v=v,
        k_sample=k_sample,
        v_sample=v_sample,
        block=block,
        block_sample=drawn // b if cfg.block_size else jnp.full_like(drawn, -1),
        bias=bias if cfg.block_size else jnp.full_like(bias, -jnp.inf),
        bias_sample=jnp.take_along_axis(bias.reshape(P, -1), drawn, 1) + math.log(s / max(m, 1)),
        mask=mask if masked else None,
        places=places,
    )
    o, lse = _run(problem, cfg)
    o = _move(o.reshape(P, -1, o.shape[-1]), slot, rows)
    lse = _move(lse.reshape(P, -1, 1), slot, rows)
    return o.reshape(P, n, G, -1), lse.reshape(P, n, G)


def _run(problem: kernels.Problem, cfg: _Settings):
    if cfg.implementation == "reference":
        return kernels.reference(problem, cfg.scale)
    if cfg.implementation == "tpu":
        if target() != "tpu":
            raise NotImplementedError(f"tpu: it needs a TPU, this is {target()}")
        return kernels.tpu(problem, cfg.scale)
    on_cpu = target() == "cpu"
    return kernels.xla(problem, cfg.scale, entries=2**19 if on_cpu else 0, upcast=on_cpu)


def _ranks(q, k, seen, proj, cfg: _Settings):
    """Ranks of queries [P, n G] and keys [P, s]; keys that nobody sees come last."""
    hashed = k.astype(jnp.float32)
    if cfg.center:
        weight = jnp.ones(k.shape[:2]) if seen is None else seen.astype(jnp.float32)
        mean = jnp.einsum("psh,ps->ph", hashed, weight)
        mean = mean / jnp.maximum(weight.sum(1, keepdims=True), 1)
        hashed = hashed - mean[:, None]
    rank_q, rank_k = lsh_rank(q, proj, cfg.order), lsh_rank(hashed, proj, cfg.order)
    last = jnp.iinfo(jnp.int32).max
    return rank_q, rank_k if seen is None else jnp.where(seen, rank_k, last)


def _seen(mask: Mask, where: _Where, s: int, G: int):
    """[P, s] keys that a mask leaves to some query of the head group, or None: not asked.

    Asked are masks of keys (padding) and booleans: what hidden keys hold must not move the others.
    """
    out = None
    j = where.k_start[:, None] + jnp.arange(s)[None]
    for part in _parts(mask):
        whole = part.part if isinstance(part, Not) else part
        if isinstance(whole, Prefix):
            ok = part(where.b[:, None], 0, 0, j)
        elif isinstance(part, DenseMask):
            some = part.to_dense(*field_shape(part.array, 4)[2:]).any(2, keepdims=True)
            heads = where.kv.reshape(-1, 1, 1) * G + jnp.arange(G).reshape(1, -1, 1)
            ok = DenseMask(some)(where.b.reshape(-1, 1, 1), heads, 0, j[:, None]).any(1)
        else:
            continue
        out = ok if out is None else out & ok
    return out


def _pointed(rank_q, sorted_k, b: int, M: int, n: int):
    """The block that a query's own rank points at, and room for any number of queries per block.

    Tiles of Q queries belong to one block; a block has as many as it needs, at most C in all.

    Returns:
        slot [P, n G] of every query among the C Q, block [P, C] of every tile, Q.
    """
    count, s = rank_q.shape[1], sorted_k.shape[1]
    Q = min(128, b)
    C = (count + M * (Q - 1)) // Q
    first, last = (
        jax.vmap(lambda a, x, side=side: jnp.searchsorted(a, x, side=side))(sorted_k, rank_q)
        for side in ("left", "right")
    )
    time = (jnp.arange(count) // (count // n) + 0.5) / n
    inside = jnp.floor(time[None] * (last - first)).astype(jnp.int32)
    to = jnp.minimum(first + inside, s - 1) // b
    by_block = jnp.argsort(to, axis=1, stable=True)  # earlier queries first: later ones move none
    sorted_to = jnp.take_along_axis(to, by_block, 1)
    begin = jax.vmap(lambda a: jnp.searchsorted(a, jnp.arange(M + 1)))(sorted_to)  # [P, M + 1]
    tiles = -(-(begin[:, 1:] - begin[:, :-1]) // Q)
    end = jnp.cumsum(tiles, 1)
    at = jnp.arange(count)[None] - jnp.take_along_axis(begin, sorted_to, 1)
    at = at + Q * jnp.take_along_axis(end - tiles, sorted_to, 1)
    slot = jax.vmap(lambda order, x: jnp.zeros(count, jnp.int32).at[order].set(x))(by_block, at)
    block = jax.vmap(lambda e: jnp.searchsorted(e, jnp.arange(C), side="right"))(end)
    return slot, jnp.minimum(block, M - 1).astype(jnp.int32), Q


def _inverse(index, size: int):
    """[P, size]: which entry of index [P, n] holds this number; n: none."""
    n = index.shape[1]
    empty, entries = jnp.full(size, n, jnp.int32), jnp.arange(n, dtype=jnp.int32)
    return jax.vmap(lambda i: empty.at[i].set(entries, unique_indices=True))(index)


def _take(x, index, fill):
    """x [P, n, ..] at index [P, m] -> [P, m, ..]; `fill` where the index is out of range."""
    return jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=fill))(x, index)


def _rows(x, index):
    return jax.vmap(lambda a, i: a[i])(x, index)


@jax.custom_vjp
def _move(x, to, back):
    """x [P, n, ..] at `to` [P, m], 0 out of range; `back` [P, n] is where every row went.

    Rows are moved, never summed: the gradient is a gather as well, not a scatter.
    """
    return _take(x, to, 0)


def _move_bwd(back, g):
    return _take(g, back, 0), None, None


_move.defvjp(lambda x, to, back: (_take(x, to, 0), back), _move_bwd)


def _check_sizes(block_size: int, sample_size: int, lsh_num_projs: int, min_seq_len: int) -> None:
    sizes = (
        ("block_size", block_size, 0),
        ("sample_size", sample_size, 0),
        ("lsh_num_projs", lsh_num_projs, 0),
        ("min_seq_len", min_seq_len, 1),
    )
    for field, value, least in sizes:
        if value < least:
            raise InputError(f"{field}={value}: expected an integer >= {least}")
    if not block_size and not sample_size:
        raise InputError("block_size=0, sample_size=0: no keys are left, set one of them")


@attention.register(
    "hyper",
    cases=(
        Case((2, 17, 4, 8), spec={"seed": 0}),
        Case(
            (2, 23, 4, 8),
            kv_heads=2,
            spec={"min_seq_len": 12, "block_size": 4, "sample_size": 8, "lsh_num_projs": 0},
        ),
        Case(
            (1, 19, 2, 8),
            S=27,
            spec={"min_seq_len": 8, "block_size": 8, "sample_size": 8, "lsh_num_projs": 0},
        ),
        Case((1, 32768, 4, 64), spec={"seed": 0}, tags=("bench",)),
    ),
)
@dataclasses.dataclass(frozen=True)
class HyperAttention(AttentionSpec):
    """HyperAttention (arXiv 2310.05869), for self-attention over long sequences.

    Attributes:
        block_size, sample_size, lsh_num_projs, min_seq_len, order, center, scale: see
            `hyper_attention`.
        causal_strict: the paper's form is False; then a decoder's earlier outputs depend on later
            tokens.
        seed: hyperplanes and samples are those of this seed in every call, and no key is needed;
            None: drawn anew from the key of each call.
    """

    block_size: int = 256
    sample_size: int = 256
    lsh_num_projs: int = 7
    min_seq_len: int = 4096
    causal_strict: bool = True
    order: str = "rank"
    center: bool = False
    scale: float | None = None
    seed: int | None = None

    patterns: ClassVar[frozenset[str]] = frozenset({"self-causal", "self-full", "cross-full"})

    def __post_init__(self):
        _check_sizes(self.block_size, self.sample_size, self.lsh_num_projs, self.min_seq_len)
        check_order(self.order)
        _check_scalars(None, self.scale)

    @property
    def needs_key(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Unless there is a seed."""
        return self.seed is None

    def exact_when(self, length: int) -> bool:
        """Below min_seq_len, and where one block holds all keys."""
        short = length < self.min_seq_len or length <= self.block_size
        return short and self.scale is None

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """2 (H + H') per head and pair of the exact pieces, the blocks and the samples."""
        listed = min(S, self.block_size + self.sample_size)
        if T != S:
            pairs = T * (S if self.min_seq_len > T else listed)
        else:
            levels = _levels(T, self.min_seq_len)
            piece = T / 2**levels
            pairs = T * (piece + 1) / 2 + levels * T / 2 * listed
        return float(2 * (H + Hv) * N * pairs)

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
        o = hyper_attention(
            q, k, v, mask=mask, key=key if self.seed is None else jax.random.key(self.seed),
            block_size=self.block_size, sample_size=self.sample_size,
            lsh_num_projs=self.lsh_num_projs, min_seq_len=self.min_seq_len,
            causal_strict=self.causal_strict, order=self.order, center=self.center,
            scale=self.scale, q_offset=q_offset, kv_length=kv_length, tap=tap,
            implementation=implementation,
        )  # fmt: skip
        assert not isinstance(o, tuple)
        return o
