"""Block-sparse softmax attention in plain XLA: fast on any backend, memory linear in the length.

For every tile of queries the live tiles of keys are visited one after another (online softmax):

    s = mod(cap(scale q k^T) + bias)                     -inf where the mask says no
    m' = max(m, rowmax s)      p = exp(s - m')           d = exp(m - m')
    l = d l + rowsum p         a = d a + p v
    o = a / l                  lse = m + log l

and the backward pass visits the same tiles again, recomputing p = exp(s - lse):

    ds = p (do v^T - delta)    delta = rowsum(do o) - dlse
    dq += ds k                 dk += ds^T q              dv += p^T do

Dead tiles cost nothing, full tiles run without mask code, partial tiles evaluate the mask function
on their own indices. The loops are `while` loops with bounds read from the schedule, so the program
is small and the same whether the schedule was known on the host or computed on the device. A tile
that would hang over the last key begins earlier and masks what it repeats.

Heads go first, so that tiles are contiguous; where each is read once, a window's, they are cut out
of the caller's arrays as they lie: copies in another order would cost as much as the products.

A mask is anything callable as `mask(b, h, i, j) -> bool` that is a pytree. Non-finite numbers in
keys or values that a query may not attend to never reach it, nor its gradients; one that it does
attend to gives NaN. Reverse-mode differentiation only (custom_vjp).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    single: bool  # every tile of queries has exactly one of keys
    rows: int  # tiles of queries worked on at once
    upcast: bool  # multiply in float32
    scaled: bool  # the scale goes into q before the product, else onto the product
    apart: bool  # one product per batch row and kv head, not one for all of a unit; in place

    @property
    def axis(self) -> int:
        """Of the queries: [B, T, K, G, ..] where they lie, else [B, K, G, T, ..]."""
        return 1 if self.apart else 3


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
    score_mod: Any = None,
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
        score_mod: `score_mod(s, b, h, i, j) -> s` entry by entry, after the bias and also where the
            mask says no; a callable pytree (`jax.tree_util.Partial`) gets gradients of its leaves.
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
    unit = _unit((B, K, G), bq * bk, tiles, schedule)
    lanes = tiles.lanes // (unit[0] * unit[1]) if schedule.single() else 1
    cfg = _Config(
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        block_q=bq,
        block_k=bk,
        grain=grain,
        keys=S,
        sizes=(B, K, G),
        unit=unit,
        has=schedule.has(),
        single=schedule.single(),
        rows=_rows(-(-T // bq), lanes),
        upcast=upcast,
        scaled=upcast or q.dtype == _sum_type(q),  # bfloat16 queries would be rounded once more
        apart=tiles.lanes > 0,
    )
    if bias is not None:
        heads = (K, G) if bias.shape[1] > 1 else (1, 1)
        bias = _pad(bias.reshape(bias.shape[0], *heads, T, S), 3, bq)
    q = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, cfg.axis)
    o, lse = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg,
        _pad(q, cfg.axis, bq),
        k if cfg.apart else k.swapaxes(1, 2),
        v if cfg.apart else v.swapaxes(1, 2),
        bias,
        None if sinks is None else sinks.astype(_sum_type(q)).reshape(1, K, G),
        jax.tree_util.Partial(score_mod) if jax.tree_util.all_leaves([score_mod]) else score_mod,
        mask,
        Schedule(*(jnp.asarray(x) for x in schedule)),
        jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)),
    )
    o, lse = (jnp.moveaxis(x, cfg.axis, 1)[:, :T] for x in (o, lse))
    return o.reshape(B, T, N, v.shape[-1]), lse.reshape(B, T, N)


def _unit(sizes, tile: int, tiles: Tiles, schedule: Schedule) -> tuple[int, int, int]:
    """How many batch rows, kv heads and query heads per kv head share one set of loops."""
    B, K, G = sizes
    if schedule.full.shape[1] > 1:  # every query head has its own list
        return 1, 1, 1
    rows = 1 if schedule.full.shape[0] > 1 else B
    if not tiles.entries and not tiles.lanes:
        return rows, K, G
    room = max(1, tiles.entries // (tile * G) if tiles.entries else B * K)
    room = min(room, tiles.lanes or room)
    if room < K:
        return 1, max(d for d in range(1, room + 1) if K % d == 0), G
    return max(d for d in range(1, min(rows, room // K) + 1) if rows % d == 0), K, G


def _rows(count: int, most: int) -> int:
    """How many tiles of queries share a turn: a divisor of their number."""
    return max(d for d in range(1, max(1, most) + 1) if count % d == 0)


def _sum_type(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _dot(spec: str, a, b) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=_sum_type(a))


def _times_t(a, b):
    """[b, k, .., h] [b, k, .., h] -> [b, k, .., ..]. XLA copies operands that have more axes."""
    flat = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return _dot("bkmh,bknh->bkmn", *flat).reshape(*a.shape[:-1], *b.shape[2:-1])


def _times(a, b, axes: int = 1):
    """[b, k, .., n] [b, k, n, ..] -> [b, k, .., ..]; n may be several axes."""
    left = a.reshape(*a.shape[:2], -1, math.prod(a.shape[-axes:]))
    right = b.reshape(*b.shape[:2], left.shape[-1], -1)
    out = _dot("bkmn,bkno->bkmo", left, right)
    return out.reshape(*a.shape[:-axes], *b.shape[2 + axes :])


def _pad(x, axis: int, multiple: int):
    extra = -x.shape[axis] % multiple
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


def _inexact(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _added(sums: Any, more: Any) -> Any:
    """Gradients of the real leaves of a pytree, as a list; None begins with zeros."""
    more = [x for x in jax.tree.leaves(more) if _inexact(x)]
    if sums is None:
        return [jnp.zeros(x.shape, _sum_type(x)) for x in more]
    return [a + b for a, b in zip(sums, more)]


def _shaped(sums: Any, like: Any) -> Any:
    """The gradients as a pytree like the one they belong to."""
    left = iter(sums)

    def grad(x):
        if _inexact(x):
            return next(left).astype(x.dtype)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(grad, like)


def _flags(x):
    """0 for every vector, NaN for one that is not finite."""
    return jnp.where(jnp.isfinite(x).all(-1), 0.0, jnp.nan).astype(x.dtype)


def _key_flags(cfg: _Config, x):
    """Those of keys or values, [B, K, S], if they are asked for."""
    if not cfg.has[1]:
        return None
    return _flags(x).swapaxes(1, 2) if cfg.apart else _flags(x)


def _clean(x, flags):
    """x with a vector of zeros where one is not finite."""
    return jnp.where(jnp.isnan(flags)[..., None], 0, x)


def _over_units(cfg: _Config, body, carry) -> Any:
    """`carry = body(at, carry)` unit by unit; `at`: first batch row, kv head, head in the group."""
    counts = tuple(n // u for n, u in zip(cfg.sizes, cfg.unit))
    if math.prod(counts) == 1:  # nothing is sliced along batch and heads: they may be sharded
        return body((0, 0, 0), carry)

    def turn(n, carry):
        at = n // (counts[1] * counts[2]), n // counts[2] % counts[1], n % counts[2]
        return body(tuple(x * u for x, u in zip(at, cfg.unit)), carry)

    return lax.fori_loop(0, math.prod(counts), turn, carry)


def _over_tiles(cfg: _Config, schedule: Schedule, at, rows, step, state) -> Any:
    """`state = step(partial, starts, state)` for the live tiles of some rows.

    `starts` has the first key for each of the rows (its tile may hang over the last key); more than
    one row have one tile each. Full tiles come first, then partial ones. The first `state` is None
    if there is only one step.
    """
    b = at[0] if schedule.full.shape[0] > 1 else 0
    h = at[1] * cfg.sizes[2] + at[2] if schedule.full.shape[1] > 1 else 0
    if cfg.single:
        starts = [schedule.idx[b, h, row, 0] * cfg.grain for row in rows]
        return step(cfg.has[1], starts, state)
    full, count, idx = (x[b, h, rows[0]] for x in schedule)

    def visit(partial, n, state):
        return step(partial, [idx[n] * cfg.grain], state)

    if cfg.has[0]:
        state = lax.fori_loop(0, full, functools.partial(visit, False), state)
    if cfg.has[1]:
        state = lax.fori_loop(full, count, functools.partial(visit, True), state)
    return state


class _Part(NamedTuple):
    """Some batch rows, kv heads and heads of a group, whose products are one."""

    at: tuple[Any, Any, Any]
    sizes: tuple[int, int, int]
    spot: tuple[int, int] | None  # within the unit; None: all of it

    def of(self, x):
        """Its share of a tile made for the unit."""
        for axis, n in enumerate(self.spot or ()):
            if x.shape[axis] > 1:
                x = lax.slice_in_dim(x, n, n + 1, axis=axis)
        return x


class _Unit:
    """What forward and backward share for one unit of work: operands, scores and mask of a tile.

    Tiles of scores are [b, k, g, queries, keys] forward and [b, k, keys, g, queries] backward: so
    every product contracts the last axis of its left and the second of its right factor, which
    spares transposing tiles of scores.
    """

    def __init__(self, cfg: _Config, mask, offset, at):
        self.cfg, self.mask, self.at = cfg, mask, at
        self.inside = cfg.keys % cfg.grain == 0 and cfg.grain == cfg.block_k
        ub, uk, ug = cfg.unit
        self.b = (at[0] + jnp.arange(ub)).reshape(-1, 1, 1, 1, 1)
        h = (at[1] + jnp.arange(uk))[:, None] * cfg.sizes[2] + (at[2] + jnp.arange(ug))[None]
        self.h = h.reshape(1, uk, ug, 1, 1)
        self.first = lax.dynamic_slice_in_dim(offset, at[0], ub).reshape(-1, 1, 1, 1, 1)
        self.parts = [_Part(at, cfg.unit, None)]
        if cfg.apart:
            spots = [(b, k) for b in range(ub) for k in range(uk)]
            self.parts = [
                _Part((at[0] + b, at[1] + k, at[2]), (1, 1, ug), (b, k)) for b, k in spots
            ]

    def queries(self, x, part: _Part, i0) -> Any:
        """A tile [b, k, g, queries, ..] of x."""
        sizes = self._in_order(*part.sizes, self.cfg.block_q)
        tile = _take(x, self._in_order(*part.at, i0), sizes)
        return self._operand(jnp.moveaxis(tile, self.cfg.axis, 3))

    def put(self, x, tile, part: _Part, i0):
        """x with a tile of queries overwritten."""
        return _put(x, jnp.moveaxis(tile, 3, self.cfg.axis), self._in_order(*part.at, i0))

    def _in_order(self, b, k, g, i):
        return (b, i, k, g) if self.cfg.apart else (b, k, g, i)

    def keys(self, x, part: _Part, j0) -> Any:
        """A tile [b, k, keys, ..] of x."""
        if not self.cfg.apart:
            return self._operand(self.flags(x, part, j0))
        (b, k, _), (ub, uk, _) = part.at, part.sizes
        return self._operand(_take(x, (b, j0, k), (ub, self.cfg.block_k, uk)).swapaxes(1, 2))

    def add(self, x, tile, j0):
        """x with a tile of keys added, that of all parts."""
        if not self.cfg.apart:
            return _add(x, tile, (*self.at[:2], j0))
        return _add(x, tile.swapaxes(1, 2), (self.at[0], j0, self.at[1]))

    def flags(self, x, part: _Part, j0) -> Any:
        """A tile [b, k, keys] of x [B, K, S]"""
        return _take(x, (*part.at[:2], j0), (*part.sizes[:2], self.cfg.block_k))

    def whole(self, tiles):
        """Tiles of all parts [b, k, ..] as one of the unit."""
        uk = self.cfg.unit[1]
        rows = [tiles[n : n + uk] for n in range(0, len(tiles), uk)]
        rows = [jnp.concatenate(row, 1) if len(row) > 1 else row[0] for row in rows]
        return jnp.concatenate(rows) if len(rows) > 1 else rows[0]

    def first_key(self, start):
        """Where the tile that covers the keys from `start` on begins."""
        return start if self.inside else jnp.minimum(start, self.cfg.keys - self.cfg.block_k)

    def _operand(self, x):
        return x.astype(_sum_type(x)) if self.cfg.upcast else x

    def scores(self, s, bias):
        """(s, ds / d(scale q k^T) or None) from the raw products, before score_mod and the mask."""
        slope = None
        if not self.cfg.scaled:
            s = s * self.cfg.scale
        if self.cfg.soft_cap is not None:
            t = jnp.tanh(s / self.cfg.soft_cap)
            s, slope = self.cfg.soft_cap * t, 1 - t * t
        return (s if bias is None else s + bias.astype(s.dtype)), slope

    def index(self, i0, j0, backward=False) -> tuple[Any, ...]:
        """b, h, i, j of a tile, in the layout of its scores."""
        i = self.first + (i0 + jnp.arange(self.cfg.block_q)).reshape(1, 1, 1, -1, 1)
        j = (j0 + jnp.arange(self.cfg.block_k)).reshape(1, 1, 1, 1, -1)
        index = (self.b, self.h, i, j)
        return tuple(x.transpose(0, 1, 4, 2, 3) for x in index) if backward else index

    def modified(self, mod, s, part: _Part, i0, j0, backward=False):
        """(score_mod(s), its pullback to (ds, gradient of its leaves)); forward: (.., None)."""
        if mod is None:
            return s, None
        index = tuple(part.of(x) for x in self.index(i0, j0, backward))
        if not backward:
            return mod(s, *index).astype(s.dtype), None
        return jax.vjp(lambda s, mod: mod(s, *index).astype(s.dtype), s, mod)

    def allowed(self, i0, start, backward=False):
        """The mask on a tile, in the layout of its scores."""
        index = self.index(i0, self.first_key(start), backward)
        ok = self.mask(*index)
        ok = ok if self.inside else ok & (index[3] >= start)
        # Computed once and read, not anew by every pass over the scores of every head.
        return lax.optimization_barrier(ok) if self.cfg.upcast else ok


def _forward(cfg: _Config, q, k, v, bias, sinks, mod, mask, schedule, offset):
    acc, width = _sum_type(q), v.shape[-1]
    flags = _key_flags(cfg, v)

    def start(part: _Part):
        rows = (*part.sizes, cfg.block_q, 1)
        if sinks is None:
            m, l = jnp.full(rows, -jnp.inf, acc), jnp.zeros(rows, acc)
        else:
            m = _take(sinks, (0, *part.at[1:]), (1, *part.sizes[1:]))
            m = jnp.broadcast_to(m[..., None, None], rows)
            l = jnp.where(m == -jnp.inf, 0, jnp.ones(rows, acc))
        return m, l, jnp.zeros((*rows[:-1], width), acc)

    def unit(at, carry):
        here = _Unit(cfg, mask, offset, at)

        def turn(r, carry):
            tiles = [r * cfg.rows + n for n in range(cfg.rows)]
            firsts = [tile * cfg.block_q for tile in tiles]
            lanes = [(n, part) for n in range(cfg.rows) for part in here.parts]
            queries = [here.queries(q, part, firsts[n]) for n, part in lanes]
            queries = [qi * cfg.scale if cfg.scaled else qi for qi in queries]

            def attend(qi, part, i0, j0, ok, state):
                kj, vj = here.keys(k, part, j0), here.keys(v, part, j0)
                tile = _take(bias, (*part.at, i0, j0), (*part.sizes, cfg.block_q, cfg.block_k))
                s, _ = here.scores(_times_t(qi, kj), tile)
                s, _ = here.modified(mod, s, part, i0, j0)
                if ok is not None:
                    bad = here.flags(flags, part, j0)
                    s = jnp.where(part.of(ok), s + bad[:, :, None, None], -jnp.inf)
                    vj = _clean(vj, bad)
                top = s.max(-1, keepdims=True)
                top = top if state is None else jnp.maximum(state[0], top)
                safe = jnp.where(top == -jnp.inf, 0, top)
                p = jnp.exp(s - safe)
                l, a = p.sum(-1, keepdims=True), _times(p.astype(vj.dtype), vj)
                if state is None:
                    return top, l, a
                decay = jnp.exp(state[0] - safe)
                return top, decay * state[1] + l, decay * state[2] + a

            def step(partial, starts, states):
                oks = [here.allowed(i0, j0) if partial else None for i0, j0 in zip(firsts, starts)]
                states = states or [None] * len(lanes)
                return [
                    attend(qi, part, firsts[n], here.first_key(starts[n]), oks[n], state)
                    for (n, part), qi, state in zip(lanes, queries, states)
                ]

            alone = cfg.single and sinks is None
            states = None if alone else [start(part) for _, part in lanes]
            states = _over_tiles(cfg, schedule, at, tiles, step, states)
            o, lse = carry
            for (n, part), (m, l, a) in zip(lanes, states):
                nothing = l == 0
                l = jnp.where(nothing, 1, l)
                o = here.put(o, a / l, part, firsts[n])
                late = jnp.where(nothing, -jnp.inf, m + jnp.log(l))[..., 0]
                lse = here.put(lse, late, part, firsts[n])
            return o, lse

        return lax.fori_loop(0, q.shape[cfg.axis] // cfg.block_q // cfg.rows, turn, carry)

    shape = q.shape[:4]
    return _over_units(
        cfg, unit, (jnp.zeros((*shape, width), v.dtype), jnp.full(shape, -jnp.inf, acc))
    )


class _Row:
    """What the backward pass reads of a tile of queries."""

    def __init__(self, cfg: _Config, here: _Unit, part: _Part, i0, arrays):
        q, do, far, delta = (here.queries(x, part, i0) for x in arrays)
        self.q, self.do = q * cfg.scale if cfg.scaled else q, do
        self.bad_do = _flags(do)
        self.clean_q, self.clean_do = _clean(self.q, _flags(self.q)), _clean(do, self.bad_do)
        self.far, self.delta = far[:, :, None], delta[:, :, None]


def _backward(cfg: _Config, saved: Any, grads: Any):
    q, k, v, bias, sinks, mod, mask, schedule, offset, o, lse = saved
    do, dlse = grads
    acc = _sum_type(q)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1) - dlse.astype(acc)
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    flags = _key_flags(cfg, k)
    bias_t = None if bias is None else bias.transpose(0, 1, 4, 2, 3)

    def unit(at, carry):
        here = _Unit(cfg, mask, offset, at)

        def turn(r, carry):
            i0 = r * cfg.block_q
            rows = [_Row(cfg, here, part, i0, (q, do, far, delta)) for part in here.parts]

            def attend(row: _Row, part, j0, ok, dmod):
                kj, vj = here.keys(k, part, j0), here.keys(v, part, j0)
                spot = (*part.at[:2], j0, part.at[2], i0)
                sizes = (*part.sizes[:2], cfg.block_k, part.sizes[2], cfg.block_q)
                s, slope = here.scores(_times_t(kj, row.q), _take(bias_t, spot, sizes))
                s, pull = here.modified(mod, s, part, i0, j0, backward=True)
                p = jnp.exp(s - row.far)
                ds = p * (_times_t(vj, row.do) - row.delta)
                qx, dox = row.q, row.do
                if ok is not None:
                    ok = part.of(ok)
                    p = jnp.where(ok, p + row.bad_do[:, :, None], 0)
                    ds = jnp.where(ok, ds, 0)
                    slope = None if slope is None else jnp.where(ok, slope, 0)
                    qx, dox = row.clean_q, row.clean_do
                    kj = _clean(kj, here.flags(flags, part, j0))
                if pull is not None:
                    ds, more = pull(ds)
                    dmod = _added(dmod, more)
                dbias = ds
                if slope is not None:
                    ds = ds * slope
                ds, p = ds.astype(kj.dtype), p.astype(dox.dtype)
                dqi = _times(kj.swapaxes(2, 3), ds)
                dkj = _times(ds, qx, 2)
                dvj = _times(p, dox, 2)
                return (dqi, dkj, dvj, dbias), dmod

            def step(partial, starts, state):
                dqi, dk, dv, dbias, dmod = state
                j0, tiles = here.first_key(starts[0]), []
                ok = here.allowed(i0, starts[0], backward=True) if partial else None
                for part, row in zip(here.parts, rows):
                    some, dmod = attend(row, part, j0, ok, dmod)
                    tiles.append(some)
                # One sum per array: XLA copies all of an array to read what it has just added.
                dqs, dkj, dvj, ds = (here.whole(x) for x in zip(*tiles))
                if bias is not None:
                    dbias = _add(dbias, ds, (at[0], at[1], j0, at[2], i0))
                return dqi + dqs, here.add(dk, dkj, j0), here.add(dv, dvj, j0), dbias, dmod

            zero = jnp.zeros((*cfg.unit[:2], q.shape[-1], cfg.unit[2], cfg.block_q), acc)
            dqi, *sums = _over_tiles(cfg, schedule, at, [r], step, (zero, *carry[1:]))
            dqi = dqi.transpose(0, 1, 3, 4, 2) * cfg.scale
            return here.put(carry[0], dqi, _Part(at, cfg.unit, None), i0), *sums

        return lax.fori_loop(0, q.shape[cfg.axis] // cfg.block_q, turn, carry)

    zeros = [None if x is None else jnp.zeros(x.shape, acc) for x in (k, v, bias_t)]
    zeros.append(_added(None, mod))
    dq, dk, dv, dbias, dmod = _over_units(cfg, unit, (jnp.zeros_like(q), *zeros))
    dsinks = None
    if sinks is not None:
        weight = jnp.exp(jnp.expand_dims(sinks, cfg.axis) - far)
        weight = jnp.where(lse == -jnp.inf, 0, weight)
        dsinks = -(weight * delta).sum((0, cfg.axis))[None]
    if bias is not None:
        dbias = dbias.transpose(0, 1, 3, 4, 2).astype(bias.dtype)
    dk = dk if cfg.scaled else dk * cfg.scale
    return (
        dq,
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        dbias,
        dsinks,
        _shaped(dmod, mod),
        None,
        None,
        None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg, q, k, v, bias, sinks, mod, mask, schedule, offset):
    return _forward(cfg, q, k, v, bias, sinks, mod, mask, schedule, offset)


def _attend_fwd(cfg, *args):
    o, lse = _forward(cfg, *args)
    return (o, lse), (*args, o, lse)


_attend.defvjp(_attend_fwd, _backward)
