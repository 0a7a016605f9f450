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

Deviation: capping and row-norm sampling of the theory are left out, as the authors' code does
(`approx_d_reference` is the theory's estimate of the denominators, for tests and teaching); keys
that fill up a block are masked, samples in a query's block always are, the lse keeps its gradient;
lengths are padded once to a multiple of 2^levels. Paper: arXiv 2310.05869.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from causal_jax.attention._approx_d import approx_d_reference
from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._hyper_problem import Inputs, Settings, Where, solve
from causal_jax.attention._lsh import angular_lsh, check_order
from causal_jax.attention.dense import (
    _check,
    _check_mask,
    _check_scalars,
    dense_attention,
    edited_mask,
)
from causal_jax.attention.merge import merge_attention
from causal_jax.errors import InputError
from causal_jax.masks import And, Causal, Chunked, Mask, Prefix, Window, as_mask, parts_of
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap

__all__ = ["HyperAttention", "approx_d_reference", "hyper_attention", "is_causal"]
IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")


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
            only), "tpu" and "gpu" (Hopper; neither was ever run on a real chip, so they must be
            named).

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
        cfg = Settings(
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
        for p in parts_of(mask)
    )


def _exact(q, k, v, mask, scale, q_offset, implementation):
    return dense_attention(
        q, k, v, mask=mask, scale=scale, q_offset=q_offset, return_lse=True,
        implementation=implementation,
    )  # fmt: skip


def _full(q, k, v, mask, proj, key, q_offset, cfg: Settings):
    """One problem per sequence and kv head."""
    (B, T), (S, K) = q.shape[:2], k.shape[1:3]
    start = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    first = jnp.zeros(1, jnp.int32)
    where = Where(B, K, T, S, first, first, jnp.repeat(start, K), jnp.zeros(B * K, jnp.int32))
    x = Inputs.of(q, k, v, proj, cfg.order)
    return solve(x, where, mask, key, cfg._replace(strict=False))


def _causal(q, k, v, mask, proj, key, min_seq_len: int, cfg: Settings):
    """Exact pieces on the diagonal, then level by level what lies below it."""
    (B, n), K = q.shape[:2], k.shape[2]
    levels = _levels(n, min_seq_len)
    piece = -(-n // 2**levels)
    o, lse = _exact(q, k, v, Chunked(piece) & mask, cfg.scale, 0, cfg.implementation)
    outs, lses = [o], [lse]
    rest = And.of(*(p for p in parts_of(mask) if p != Causal()))
    x = Inputs.of(q, k, v, proj, cfg.order)
    for level in range(levels):
        half = piece * 2 ** (levels - 1 - level)
        pair = 2 * half * jnp.arange(2**level, dtype=jnp.int32)
        starts = (jnp.tile(start, B * K) for start in (pair + half, pair))
        where = Where(B, K, half, half, pair + half, pair, *starts)
        draw = None if key is None else jax.random.fold_in(key, level)
        o, lse = solve(x, where, rest, draw, cfg)
        outs.append(o)
        lses.append(lse)
    return merge_attention(outs, lses)


def _levels(n: int, min_seq_len: int) -> int:
    """How often n tokens are halved until a piece is short."""
    return next(levels for levels in range(64) if -(-n // 2**levels) <= min_seq_len)


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
