"""Block-sparse softmax attention in plain XLA: fast on any backend, memory linear in the length.

For every tile of queries the live tiles of keys are visited one after another (online softmax):

    s = cap(scale q k^T) + bias                          -inf where the mask says no
    m' = max(m, rowmax s)      p = exp(s - m')           d = exp(m - m')
    l = d l + rowsum p         a = d a + p v
    o = a / l                  lse = m + log l

and the backward pass visits the same tiles again, recomputing p = exp(s - lse):

    ds = p (do v^T - delta)    delta = rowsum(do o) - dlse
    dq += ds k                 dk += ds^T q              dv += p^T do

Dead tiles cost nothing, full tiles run without mask code, partial tiles evaluate the mask function
on their own indices. The loops are `while` loops with bounds read from the schedule, so the program
is small and the same whether the schedule was known on the host or computed on the device.

A mask is anything callable as `mask(b, h, i, j) -> bool` that is a pytree. Non-finite numbers in
keys or values that a query may not attend to never reach it, nor its gradients; one that it does
attend to gives NaN. Reverse-mode differentiation only (custom_vjp).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse.schedule import Schedule, Tiles


@dataclasses.dataclass(frozen=True)
class _Config:
    """All that is static. Three axes: batch rows B, kv heads K, query heads per kv head G."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    grain: int
    keys: int
    sizes: tuple[int, int, int]  # B, K, G
    unit: tuple[int, int, int]  # how many of each are worked on at once
    has: tuple[bool, bool]  # full tiles, partial tiles
    upcast: bool  # multiply in float32
    scaled: bool  # the scale goes into q before the product, else onto the product


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Any,
    schedule: Schedule,
    *,
    scale: float,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_offset: Any = 0,
    tiles: Tiles | None = None,
    upcast: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the live tiles of a mask.

    Args:
        q: [B, T, N, H]. k: [B, S, K, H]. v: [B, S, K, H']. Query head h reads kv head h // (N / K).
        mask: callable pytree, `mask(b, h, i, j) -> bool` on broadcastable absolute indices.
        schedule: the live tiles of this mask at this offset for `tiles.clip(T, S)`.
        scale: factor on q k^T.
        bias: [B|1, N|1, T, S], added after the soft cap.
        soft_cap: s -> soft_cap tanh(s / soft_cap).
        sinks: [N] logits of a virtual key without value.
        q_offset: int or [B], absolute index of the first query.
        tiles: sizes of the work.
        upcast: multiply in float32 (best on a CPU), else in the arrays' own type, summing in
            float32.

    Returns:
        o [B, T, N, H'] in v's dtype and lse [B, T, N] in float32, both differentiable; 0 and -inf
        where nothing may be attended.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, tiles = N // K, (tiles or Tiles()).clip(T, S)
    bq, bk, grain = tiles.block_q, tiles.block_k, tiles.grain or tiles.block_k
    spare = bk - grain  # a tile that begins at the last multiple of the grain hangs over
    cfg = _Config(
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        block_q=bq,
        block_k=bk,
        grain=grain,
        keys=S,
        sizes=(B, K, G),
        unit=_unit((B, K, G), bq * bk, tiles.entries, schedule),
        has=schedule.has(),
        upcast=upcast,
        scaled=upcast or q.dtype == _sum_type(q),  # bfloat16 queries would be rounded once more
    )
    if bias is not None:
        heads = (K, G) if bias.shape[1] > 1 else (1, 1)
        bias = _pad(_pad(bias.reshape(bias.shape[0], *heads, T, S), 3, bq), 4, grain, spare)
    o, lse = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg,
        _pad(q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4), 3, bq),
        _pad(k.transpose(0, 2, 1, 3), 2, grain, spare),
        _pad(v.transpose(0, 2, 1, 3), 2, grain, spare),
        bias,
        None if sinks is None else sinks.astype(_sum_type(q)).reshape(1, K, G),
        mask,
        Schedule(*(jnp.asarray(x) for x in schedule)),
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)),
    )
    o = o[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1])
    return o, lse[..., :T].transpose(0, 3, 1, 2).reshape(B, T, N)


def _unit(sizes, tile: int, entries: int, schedule: Schedule) -> tuple[int, int, int]:
    """How many batch rows, kv heads and query heads per kv head share one set of loops."""
    B, K, G = sizes
    if schedule.full.shape[1] > 1:  # every query head has its own list
        return 1, 1, 1
    rows = 1 if schedule.full.shape[0] > 1 else B
    if not entries:
        return rows, K, G
    room = max(1, entries // (tile * G))
    if room < K:
        return 1, max(d for d in range(1, room + 1) if K % d == 0), G
    return max(d for d in range(1, min(rows, room // K) + 1) if rows % d == 0), K, G


def _sum_type(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _dot(spec: str, a, b) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=_sum_type(a))


def _pad(x, axis: int, multiple: int, spare: int = 0):
    extra = -x.shape[axis] % multiple + spare
    return jnp.pad(x, [(0, extra * (a == axis)) for a in range(x.ndim)]) if extra else x


def _take(x: Any, starts, sizes) -> Any:
    """A block of x; an axis of size 1 is shared, an axis taken whole is not sliced."""
    if x is None:
        return None
    for axis, (start, size) in enumerate(zip(starts, sizes)):
        if x.shape[axis] not in (1, size):
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def _put(x, part, starts):
    """x with a block overwritten."""
    starts = (*starts, *(0,) * (x.ndim - len(starts)))
    starts = [jnp.asarray(s if n > 1 else 0, jnp.int32) for s, n in zip(starts, x.shape)]
    return lax.dynamic_update_slice(x, part.astype(x.dtype), starts)


def _add(x, part, starts):
    """x with a block added; an axis that x shares is summed over."""
    shared = tuple(a for a, n in enumerate(x.shape) if n == 1 and part.shape[a] > 1)
    part = part.sum(shared, keepdims=True) if shared else part
    return _put(x, _take(x, starts, part.shape) + part, starts)


def _clean(x):
    """(x with a vector of zeros where one is not finite, 0 or NaN per vector)."""
    flag = jnp.where(jnp.isfinite(x).all(-1), 0.0, jnp.nan).astype(x.dtype)
    return jnp.where(jnp.isnan(flag)[..., None], 0, x), flag


def _over_units(cfg: _Config, body, carry) -> Any:
    """`carry = body(at, carry)` unit by unit; `at`: first batch row, kv head, head in the group."""
    counts = tuple(n // u for n, u in zip(cfg.sizes, cfg.unit))
    if math.prod(counts) == 1:  # nothing is sliced along batch and heads: they may be sharded
        return body((0, 0, 0), carry)

    def turn(n, carry):
        at = n // (counts[1] * counts[2]), n // counts[2] % counts[1], n % counts[2]
        return body(tuple(x * u for x, u in zip(at, cfg.unit)), carry)

    return lax.fori_loop(0, math.prod(counts), turn, carry)


def _over_tiles(cfg: _Config, schedule: Schedule, at, row, step, state) -> Any:
    """`state = step(partial, j0, state)` for the live tiles of a row: full ones, then partial."""
    b = at[0] if schedule.full.shape[0] > 1 else 0
    h = at[1] * cfg.sizes[2] + at[2] if schedule.full.shape[1] > 1 else 0
    full, count, idx = (x[b, h, row] for x in schedule)

    def visit(partial, n, state):
        return step(partial, idx[n] * cfg.grain, state)

    if cfg.has[0]:
        state = lax.fori_loop(0, full, functools.partial(visit, False), state)
    if cfg.has[1]:
        state = lax.fori_loop(full, count, functools.partial(visit, True), state)
    return state


class _Unit:
    """What forward and backward share for one unit of work: operands, scores and mask of a tile.

    Tiles of scores are [b, k, g, queries, keys] forward and [b, k, keys, g, queries] backward: so
    every product contracts the last axis of its left and the second of its right factor, which
    spares transposing tiles of scores.
    """

    def __init__(self, cfg: _Config, mask, offset, at):
        self.cfg, self.mask, self.at = cfg, mask, at
        ub, uk, ug = cfg.unit
        self.b = (at[0] + jnp.arange(ub)).reshape(-1, 1, 1, 1, 1)
        h = (at[1] + jnp.arange(uk))[:, None] * cfg.sizes[2] + (at[2] + jnp.arange(ug))[None]
        self.h = h.reshape(1, uk, ug, 1, 1)
        self.first = lax.dynamic_slice_in_dim(offset, at[0], ub).reshape(-1, 1, 1, 1, 1)

    def queries(self, x, i0) -> Any:
        return self._operand(_take(x, (*self.at, i0), (*self.cfg.unit, self.cfg.block_q)))

    def keys(self, x, j0) -> Any:
        return self._operand(_take(x, (*self.at[:2], j0), (*self.cfg.unit[:2], self.cfg.block_k)))

    def keys_t(self, x, j0) -> Any:
        sizes = (*self.cfg.unit[:2], x.shape[2], self.cfg.block_k)
        return self._operand(_take(x, (*self.at[:2], 0, j0), sizes))

    def _operand(self, x):
        return x.astype(_sum_type(x)) if self.cfg.upcast else x

    def scores(self, s, bias):
        """(s, ds / d(scale q k^T) or None) from the raw products, before the mask."""
        slope = None
        if not self.cfg.scaled:
            s = s * self.cfg.scale
        if self.cfg.soft_cap is not None:
            t = jnp.tanh(s / self.cfg.soft_cap)
            s, slope = self.cfg.soft_cap * t, 1 - t * t
        return (s if bias is None else s + bias.astype(s.dtype)), slope

    def allowed(self, i0, j0, backward=False):
        """The mask on a tile, in the layout of its scores."""
        i = self.first + (i0 + jnp.arange(self.cfg.block_q)).reshape(1, 1, 1, -1, 1)
        j = (j0 + jnp.arange(self.cfg.block_k)).reshape(1, 1, 1, 1, -1)
        index = (self.b, self.h, i, j)
        if backward:
            index = tuple(x.transpose(0, 1, 4, 2, 3) for x in index)
        ok = self.mask(*index)
        inside = self.cfg.keys % self.cfg.grain == 0 and self.cfg.grain == self.cfg.block_k
        return ok if inside else ok & (index[3] < self.cfg.keys)


def _forward(cfg: _Config, q, k, v, bias, sinks, mask, schedule, offset):
    acc, width = _sum_type(q), v.shape[-1]
    rows = (*cfg.unit, cfg.block_q, 1)
    k = k.swapaxes(2, 3)

    def start(at):
        if sinks is None:
            m, l = jnp.full(rows, -jnp.inf, acc), jnp.zeros(rows, acc)
        else:
            m = _take(sinks, (0, *at[1:]), (1, *cfg.unit[1:]))
            m = jnp.broadcast_to(m[..., None, None], rows)
            l = jnp.where(m == -jnp.inf, 0, jnp.ones(rows, acc))
        return m, l, jnp.zeros((*rows[:-1], width), acc)

    def unit(at, carry):
        here = _Unit(cfg, mask, offset, at)

        def row(r, carry):
            i0 = r * cfg.block_q
            qi = here.queries(q, i0)
            qi = qi * cfg.scale if cfg.scaled else qi

            def step(partial, j0, state):
                m, l, a = state
                kj, vj = here.keys_t(k, j0), here.keys(v, j0)
                tile = _take(bias, (*at, i0, j0), (*cfg.unit, cfg.block_q, cfg.block_k))
                s, _ = here.scores(_dot("bkgqh,bkhs->bkgqs", qi, kj), tile)
                if partial:
                    vj, bad = _clean(vj)
                    s = jnp.where(here.allowed(i0, j0), s + bad[:, :, None, None], -jnp.inf)
                top = jnp.maximum(m, s.max(-1, keepdims=True))
                safe = jnp.where(top == -jnp.inf, 0, top)
                p, decay = jnp.exp(s - safe), jnp.exp(m - safe)
                l = decay * l + p.sum(-1, keepdims=True)
                return top, l, decay * a + _dot("bkgqs,bksh->bkgqh", p.astype(vj.dtype), vj)

            m, l, a = _over_tiles(cfg, schedule, at, r, step, start(at))
            nothing = l == 0
            l = jnp.where(nothing, 1, l)
            lse = jnp.where(nothing, -jnp.inf, m + jnp.log(l))[..., 0]
            return _put(carry[0], a / l, (*at, i0)), _put(carry[1], lse, (*at, i0))

        return lax.fori_loop(0, q.shape[3] // cfg.block_q, row, carry)

    shape = (*cfg.sizes, q.shape[3])
    return _over_units(
        cfg, unit, (jnp.zeros((*shape, width), v.dtype), jnp.full(shape, -jnp.inf, acc))
    )


def _backward(cfg: _Config, saved: Any, grads: Any):
    q, k, v, bias, sinks, mask, schedule, offset, o, lse = saved
    do, dlse = grads
    acc = _sum_type(q)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1) - dlse.astype(acc)
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    kt = k.swapaxes(2, 3)
    bias_t = None if bias is None else bias.transpose(0, 1, 4, 2, 3)

    def unit(at, carry):
        here = _Unit(cfg, mask, offset, at)

        def row(r, carry):
            i0 = r * cfg.block_q
            qi, doi = here.queries(q, i0), here.queries(do, i0)
            qi = qi * cfg.scale if cfg.scaled else qi
            qt, dot = (x.transpose(0, 1, 4, 2, 3) for x in (qi, doi))
            clean_q, (clean_do, bad_do) = _clean(qi)[0], _clean(doi)
            fari, deltai = (here.queries(x, i0)[:, :, None] for x in (far, delta))

            def step(partial, j0, state):
                dqi, dk, dv, dbias = state
                kj, vj, ktj = here.keys(k, j0), here.keys(v, j0), here.keys_t(kt, j0)
                spot = (*at[:2], j0, at[2], i0)
                tile = _take(bias_t, spot, (*cfg.unit[:2], cfg.block_k, cfg.unit[2], cfg.block_q))
                s, slope = here.scores(_dot("bksh,bkhgq->bksgq", kj, qt), tile)
                p = jnp.exp(s - fari)
                ds = p * (_dot("bksh,bkhgq->bksgq", vj, dot) - deltai)
                qx, dox = qi, doi
                if partial:
                    ok = here.allowed(i0, j0, backward=True)
                    p = jnp.where(ok, p + bad_do[:, :, None], 0)
                    ds = jnp.where(ok, ds, 0)
                    slope = None if slope is None else jnp.where(ok, slope, 0)
                    qx, dox = clean_q, clean_do
                    ktj = jnp.where(jnp.isnan(_clean(kj)[1])[:, :, None], 0, ktj)
                if bias is not None:
                    dbias = _add(dbias, ds, spot)
                if slope is not None:
                    ds = ds * slope
                ds, p = ds.astype(kj.dtype), p.astype(dox.dtype)
                dqi = dqi + _dot("bkhs,bksgq->bkhgq", ktj, ds)
                dk = _add(dk, _dot("bksgq,bkgqh->bksh", ds, qx), (*at[:2], j0))
                dv = _add(dv, _dot("bksgq,bkgqh->bksh", p, dox), (*at[:2], j0))
                return dqi, dk, dv, dbias

            state = (jnp.zeros(qt.shape, acc), *carry[1:])
            dqi, *rest = _over_tiles(cfg, schedule, at, r, step, state)
            return _put(carry[0], dqi * cfg.scale, (*at[:2], 0, at[2], i0)), *rest

        return lax.fori_loop(0, q.shape[3] // cfg.block_q, row, carry)

    zeros = (None if x is None else jnp.zeros(x.shape, acc) for x in (k, v, bias_t))
    dq = jnp.zeros((*q.shape[:2], q.shape[4], *q.shape[2:4]), q.dtype)
    dq, dk, dv, dbias = _over_units(cfg, unit, (dq, *zeros))
    dsinks = None
    if sinks is not None:
        weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks[..., None] - far))
        dsinks = -(weight * delta).sum((0, 3))[None]
    if bias is not None:
        dbias = dbias.transpose(0, 1, 3, 4, 2).astype(bias.dtype)
    dk = dk if cfg.scaled else dk * cfg.scale
    dq = dq.transpose(0, 1, 3, 4, 2)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dbias, dsinks, None, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg, q, k, v, bias, sinks, mask, schedule, offset):
    return _forward(cfg, q, k, v, bias, sinks, mask, schedule, offset)


def _attend_fwd(cfg, *args):
    o, lse = _forward(cfg, *args)
    return (o, lse), (*args, o, lse)


_attend.defvjp(_attend_fwd, _backward)
