"""One batch of problems of HyperAttention: hash, sort, cut into blocks, sample, attend."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from causal_jax.attention._lsh import lsh_rank
from causal_jax.hardware import elsewhere, target
from causal_jax.masks import Dense as DenseMask
from causal_jax.masks import Full, Mask, Not, Prefix, parts_of
from causal_jax.masks.values import field_shape
from pallas_kernels import lsh_attention as kernels


class Settings(NamedTuple):
    """What one problem needs to know."""

    block_size: int
    sample_size: int
    order: str
    center: bool
    strict: bool
    scale: float
    implementation: str | None


class Where(NamedTuple):
    """Problems [B, K, problems of one head], flat: P; n queries and s keys each."""

    B: int
    K: int
    n: int
    s: int
    q_first: Any  # [problems of one head]: row of the first query in the arrays
    k_first: Any  # [problems of one head]
    q_start: Any  # [P]: absolute position of the first query
    k_start: Any  # [P]

    @property
    def b(self):
        """Sequence of each problem, [P]."""
        return jnp.arange(len(self.k_start)) // (len(self.k_start) // self.B)

    @property
    def kv(self):
        """Key/value head of each problem, [P]."""
        return jnp.arange(len(self.k_start)) // (len(self.k_start) // (self.B * self.K)) % self.K


class Inputs(NamedTuple):
    """What all problems share. Rows stay where the caller has them until they are sorted."""

    q: Any  # [B, T, K, G, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, V]
    rank_q: Any  # [B, T, K, G]
    rank_k: Any  # [B, S, K]
    bias: Any  # [B, S, K]: 0, or NaN where a key or its value is not finite
    proj: Any  # [H, r]

    @classmethod
    def of(cls, q, k, v, proj, order: str) -> "Inputs":
        """From q [B, T, N, H], k [B, S, K, H], v [B, S, K, V]."""
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        fine = jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1)
        bias = jnp.where(fine, 0.0, jnp.nan).astype(jnp.float32)
        return cls(q, k, v, lsh_rank(q, proj, order), lsh_rank(k, proj, order), bias, proj)


def solve(x: Inputs, where: Where, mask: Mask, key, cfg: Settings):
    """o [B, T, N, V] and lse [B, T, N] of the problems' queries; 0 and -inf for all others."""
    (B, T, K, G, H), n, s = x.q.shape, where.n, where.s
    b = min(cfg.block_size or 128, s)  # without blocks there still are tiles of queries
    M = -(-s // b)
    rank_q = _cut(x.rank_q, where.q_first, n).reshape(-1, n * G)
    rank_k = _key_ranks(x, _seen(mask, where, s, G), where, cfg)
    P = rank_q.shape[0]
    bound = 2 ** x.proj.shape[1] + 1
    by_rank = _argsort(rank_k, bound)
    back = _inverse(by_rank, s)
    keys = jnp.pad(by_rank, ((0, 0), (0, M * b - s)), constant_values=s)
    # NaN where a key or its value is not finite: the mask decides who sees it
    bias = _take(_cut(x.bias, where.k_first, s), keys, -jnp.inf)
    fine = jnp.where(jnp.isnan(bias), s, keys)  # zeros for what is not finite
    key_rows = _rows_of(where.k_first, fine, s, x.k.shape[1], B, K)
    key_slots = _slots(where.k_first, back, M * b, x.k.shape[1], B, K, 1)
    k, v = (move(a[:, :, :, None], key_rows, key_slots).reshape(P, M, b, -1) for a in (x.k, x.v))
    bias = bias.reshape(P, M, b)
    used = None
    if cfg.strict:
        slot, block, Q, used = _pointed(rank_q, jnp.take_along_axis(rank_k, by_rank, 1), b, M, n)
    else:
        Q = -(-n * G // M)
        block = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (P, M))
        slot = _inverse(_argsort(rank_q, bound), n * G)
    rows = _inverse(slot, block.shape[1] * Q)  # [P, C Q]: the query in every slot, or n G: none
    m = cfg.sample_size if M > 1 or not cfg.block_size else 0
    drawn = jnp.zeros((P, 0), jnp.int32)
    if m:
        drawn = jax.random.randint(key, (P, m), 0, s, jnp.int32)  # in the sorted order: as uniform
    k_sample, v_sample = (_rows(a.reshape(P, M * b, -1), drawn) for a in (k, v))
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
    query_rows = _rows_of(where.q_first, rows, n, T, B, K, G)
    query_slots = _slots(where.q_first, slot, block.shape[1] * Q, T, B, K, G)
    problem = kernels.Problem(
        q=move(x.q, query_rows, query_slots).reshape(P, -1, Q, H),
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
        used=used,
    )
    o, lse = _run(problem, cfg)
    o, lse = (
        move_back(a.reshape(B, K, query_rows.shape[2], -1), query_slots, query_rows)
        for a in (o, lse)
    )
    lse = jnp.where(query_slots < query_rows.shape[2], lse[..., 0], -jnp.inf)
    return o.reshape(B, T, K * G, -1), lse.reshape(B, T, K * G)


def _run(problem: kernels.Problem, cfg: Settings):
    if cfg.implementation == "reference":
        return kernels.reference(problem, cfg.scale)
    if cfg.implementation in ("tpu", "gpu"):
        if reason := elsewhere(cfg.implementation):
            raise NotImplementedError(f"{cfg.implementation}: {reason}")
        kernel = kernels.tpu if cfg.implementation == "tpu" else kernels.gpu
        return kernel(problem, cfg.scale)
    on_cpu = target() == "cpu"
    return kernels.xla(problem, cfg.scale, entries=2**19 if on_cpu else 0, upcast=on_cpu)


def _key_ranks(x: Inputs, seen, where: Where, cfg: Settings):
    """Ranks of the problems' keys [P, s]; keys that nobody sees come last."""
    if cfg.center:
        hashed = _cut(x.k, where.k_first, where.s).astype(jnp.float32)
        hashed = jnp.where(jnp.isfinite(hashed), hashed, 0)
        weight = jnp.ones(hashed.shape[:2]) if seen is None else seen.astype(jnp.float32)
        mean = jnp.einsum("psh,ps->ph", hashed, weight)
        mean = mean / jnp.maximum(weight.sum(1, keepdims=True), 1)
        rank_k = lsh_rank(hashed - mean[:, None], x.proj, cfg.order)
    else:
        rank_k = _cut(x.rank_k, where.k_first, where.s)
    last = min(2 ** x.proj.shape[1], jnp.iinfo(jnp.int32).max)
    return rank_k if seen is None else jnp.where(seen, rank_k, last)


def _seen(mask: Mask, where: Where, s: int, G: int):
    """[P, s] keys that a mask leaves to some query of the head group, or None: not asked.

    Asked are masks of keys (padding) and booleans: what hidden keys hold must not move the others.
    """
    out = None
    j = where.k_start[:, None] + jnp.arange(s)[None]
    for part in parts_of(mask):
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
        slot [P, n G] of every query among the C Q, block [P, C] of every tile, Q, and how many
        tiles hold queries [P].
    """
    count, s = rank_q.shape[1], sorted_k.shape[1]
    Q = min(128, b)
    C = (count + M * (Q - 1)) // Q
    C += -C % 16 if C > 16 else 0  # whole turns of `kernels.xla`, which would copy the queries
    first, last = (
        jax.vmap(lambda a, x, side=side: jnp.searchsorted(a, x, side=side))(sorted_k, rank_q)
        for side in ("left", "right")
    )
    time = (jnp.arange(count) // (count // n) + 0.5) / n
    inside = jnp.floor(time[None] * (last - first)).astype(jnp.int32)
    to = jnp.minimum(first + inside, s - 1) // b
    by_block = _argsort(to, M)  # earlier queries first: later ones move none
    sorted_to = jnp.take_along_axis(to, by_block, 1)
    begin = jax.vmap(lambda a: jnp.searchsorted(a, jnp.arange(M + 1)))(sorted_to)  # [P, M + 1]
    tiles = -(-(begin[:, 1:] - begin[:, :-1]) // Q)
    end = jnp.cumsum(tiles, 1)
    at = jnp.arange(count)[None] - jnp.take_along_axis(begin, sorted_to, 1)
    at = at + Q * jnp.take_along_axis(end - tiles, sorted_to, 1)
    slot = jax.vmap(lambda order, x: jnp.zeros(count, jnp.int32).at[order].set(x))(by_block, at)
    block = jax.vmap(lambda e: jnp.searchsorted(e, jnp.arange(C), side="right"))(end)
    return slot, jnp.minimum(block, M - 1).astype(jnp.int32), Q, end[:, -1]


def _argsort(x, bound: int):
    """Stable order of x [P, n] in [0, bound). Sorted with their places in one integer if that fits.

    XLA sorts one array of integers six times as fast as two together on a CPU.
    """
    n = x.shape[1]
    if bound * n > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(x, axis=1, stable=True).astype(jnp.int32)
    return jnp.sort(x * n + jnp.arange(n, dtype=jnp.int32)[None], axis=1) % n


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


def _cut(x, first, length: int):
    """x [B, T, K, ..] -> [P, length, ..]: the rows of each problem, 0 beyond the last."""
    at = first[:, None] + jnp.arange(length)[None]
    x = jnp.moveaxis(x.at[:, at].get(mode="fill", fill_value=0), 3, 1)
    return x.reshape(-1, *x.shape[3:])


def _rows_of(first, index, none: int, total: int, B: int, K: int, G: int = 1):
    """[B, K, problems x m]: where in the arrays the rows `index` [P, m] of the problems are.

    Row and head of the group in one number; `total` G for those that are none.
    """
    index = index.reshape(B, K, len(first), -1)
    row = jnp.where(index < none * G, first.reshape(1, 1, -1, 1) * G + index, total * G)
    return jnp.minimum(row, total * G).reshape(B, K, -1)


def _slots(first, slot, slots: int, total: int, B: int, K: int, G: int):
    """[B, total, K, G]: the slot of each row of the arrays, of all problems' slots in a row.

    `slot` [P, length G] is counted from the problem's own first; problems x slots: in none.
    """
    count = len(first)
    slot = slot.reshape(B, K, count, -1, G) + slots * jnp.arange(count).reshape(1, 1, -1, 1, 1)
    at = first[:, None] + jnp.arange(slot.shape[3])[None]
    out = jnp.full((B, total, K, G), count * slots, jnp.int32)
    values = slot.transpose(0, 2, 3, 1, 4).reshape(B, -1, K, G).astype(jnp.int32)
    return out.at[:, at.reshape(-1)].set(values, mode="drop", unique_indices=True)


def _gather(x, rows):
    """x [B, T, K, G, D] at rows [B, K, m] -> [B, K, m, D]; 0 out of range."""
    B, T, K, G, D = x.shape
    if target() == "cpu":  # which works out every part of an index anew for each number moved
        b, k = jnp.arange(B).reshape(B, 1, 1), jnp.arange(K).reshape(1, K, 1)
        flat = ((b * T + rows // G) * K + k) * G + rows % G
        flat = jnp.where(rows < T * G, flat, x.size // D)
        return x.reshape(-1, D).at[flat].get(mode="fill", fill_value=0)
    dims = lax.GatherDimensionNumbers(
        offset_dims=(3,),
        collapsed_slice_dims=(1, 3),
        start_index_map=(1, 3),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 1),
    )
    at, sizes = jnp.stack([rows // G, rows % G], -1), (1, 1, 1, 1, D)
    return lax.gather(x, at, dims, sizes, mode="fill", fill_value=0)


def _gather_back(y, slots):
    """y [B, K, m, D] at slots [B, T, K, G] -> [B, T, K, G, D]; 0 out of range."""
    B, K, m, D = y.shape
    if target() == "cpu":
        b, k = jnp.arange(B).reshape(B, 1, 1, 1), jnp.arange(K).reshape(1, 1, K, 1)
        flat = jnp.where(slots < m, (b * K + k) * m + slots, B * K * m)
        return y.reshape(-1, D).at[flat].get(mode="fill", fill_value=0)
    dims = lax.GatherDimensionNumbers(
        offset_dims=(4,),
        collapsed_slice_dims=(2,),
        start_index_map=(2,),
        operand_batching_dims=(0, 1),
        start_indices_batching_dims=(0, 2),
    )
    sizes = (1, 1, 1, D)
    return lax.gather(y, slots[..., None], dims, sizes, mode="fill", fill_value=0)


# Rows are moved, never summed: the gradient is a gather as well, not a scatter.
@jax.custom_vjp
def move(x, rows, slots):
    """x [B, T, K, G, D] at `rows` [B, K, m] -> [B, K, m, D]; `slots` is where each row goes."""
    return _gather(x, rows)


@jax.custom_vjp
def move_back(y, slots, rows):
    """y [B, K, m, D] at `slots` [B, T, K, G] -> [B, T, K, G, D]; `rows` as in `move`."""
    return _gather_back(y, slots)


move.defvjp(
    lambda x, rows, slots: (_gather(x, rows), slots),
    lambda slots, g: (_gather_back(g, slots), None, None),
)
move_back.defvjp(
    lambda y, slots, rows: (_gather_back(y, slots), rows),
    lambda rows, g: (_gather(g, rows), None, None),
)
