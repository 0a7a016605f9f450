"""One batch of problems of HyperAttention: hash, sort, cut into blocks, sample, attend."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from causal_jax.attention._lsh import lsh_rank
from causal_jax.hardware import elsewhere, target
from causal_jax.masks import And, Full, Mask, Not, Prefix
from causal_jax.masks import Dense as DenseMask
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


def solve(q, k, v, where: Where, mask: Mask, proj, key, cfg: Settings):
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
    used = None
    if cfg.strict:
        slot, block, Q, used = _pointed(rank_q, jnp.take_along_axis(rank_k, by_rank, 1), b, M, n)
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
        used=used,
    )
    o, lse = _run(problem, cfg)
    o = _move(o.reshape(P, -1, o.shape[-1]), slot, rows)
    lse = _move(lse.reshape(P, -1, 1), slot, rows)
    return o.reshape(P, n, G, -1), lse.reshape(P, n, G)


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


def _ranks(q, k, seen, proj, cfg: Settings):
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
    return slot, jnp.minimum(block, M - 1).astype(jnp.int32), Q, end[:, -1]


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


def parts_of(mask: Mask) -> tuple[Mask, ...]:
    """What is and-ed together in a mask."""
    return mask.parts if isinstance(mask, And) else (mask,)
