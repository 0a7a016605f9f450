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

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_sparse.schedule import Schedule, Tiles
from pallas_kernels.block_sparse.xla_tiles import (
    Config,
    Part,
    Unit,
    add_block,
    clean,
    keys_not_finite,
    not_finite,
    over_tiles,
    over_units,
    sum_type,
    take_block,
    times,
    times_t,
)


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
    cfg = Config(
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
        scaled=upcast or q.dtype == sum_type(q),  # bfloat16 queries would be rounded once more
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
        None if sinks is None else sinks.astype(sum_type(q)).reshape(1, K, G),
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


def _pad(x, axis: int, multiple: int):
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra * (a == axis)) for a in range(x.ndim)]) if extra else x


def _inexact(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _added(sums: Any, more: Any) -> Any:
    """Gradients of the real leaves of a pytree, as a list; None begins with zeros."""
    more = [x for x in jax.tree.leaves(more) if _inexact(x)]
    if sums is None:
        return [jnp.zeros(x.shape, sum_type(x)) for x in more]
    return [a + b for a, b in zip(sums, more)]


def _shaped(sums: Any, like: Any) -> Any:
    """The gradients as a pytree like the one they belong to."""
    left = iter(sums)

    def grad(x):
        if _inexact(x):
            return next(left).astype(x.dtype)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(grad, like)


def _forward(cfg: Config, q, k, v, bias, sinks, mod, mask, schedule, offset):
    acc, width = sum_type(q), v.shape[-1]
    flags = keys_not_finite(cfg, v)

    def start(part: Part):
        rows = (*part.sizes, cfg.block_q, 1)
        if sinks is None:
            m, l = jnp.full(rows, -jnp.inf, acc), jnp.zeros(rows, acc)
        else:
            m = take_block(sinks, (0, *part.at[1:]), (1, *part.sizes[1:]))
            m = jnp.broadcast_to(m[..., None, None], rows)
            l = jnp.where(m == -jnp.inf, 0, jnp.ones(rows, acc))
        return m, l, jnp.zeros((*rows[:-1], width), acc)

    def unit(at, carry):
        here = Unit(cfg, mask, offset, at)

        def turn(r, carry):
            tiles = [r * cfg.rows + n for n in range(cfg.rows)]
            firsts = [tile * cfg.block_q for tile in tiles]
            lanes = [(n, part) for n in range(cfg.rows) for part in here.parts]
            queries = [here.queries(q, part, firsts[n]) for n, part in lanes]
            queries = [qi * cfg.scale if cfg.scaled else qi for qi in queries]

            def attend(qi, part, i0, j0, ok, state):
                kj, vj = here.keys(k, part, j0), here.keys(v, part, j0)
                tile = take_block(bias, (*part.at, i0, j0), (*part.sizes, cfg.block_q, cfg.block_k))
                s, _ = here.scores(times_t(qi, kj), tile)
                s, _ = here.modified(mod, s, part, i0, j0)
                if ok is not None:
                    bad = here.flags(flags, part, j0)
                    s = jnp.where(part.of(ok), s + bad[:, :, None, None], -jnp.inf)
                    vj = clean(vj, bad)
                top = s.max(-1, keepdims=True)
                top = top if state is None else jnp.maximum(state[0], top)
                safe = jnp.where(top == -jnp.inf, 0, top)
                p = jnp.exp(s - safe)
                l, a = p.sum(-1, keepdims=True), times(p.astype(vj.dtype), vj)
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
            states = over_tiles(cfg, schedule, at, tiles, step, states)
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
    return over_units(
        cfg, unit, (jnp.zeros((*shape, width), v.dtype), jnp.full(shape, -jnp.inf, acc))
    )


class _Row:
    """What the backward pass reads of a tile of queries."""

    def __init__(self, cfg: Config, here: Unit, part: Part, i0, arrays):
        q, do, far, delta = (here.queries(x, part, i0) for x in arrays)
        self.q, self.do = q * cfg.scale if cfg.scaled else q, do
        self.bad_do = not_finite(do)
        self.clean_q, self.clean_do = clean(self.q, not_finite(self.q)), clean(do, self.bad_do)
        self.far, self.delta = far[:, :, None], delta[:, :, None]


def _backward(cfg: Config, saved: Any, grads: Any):
    q, k, v, bias, sinks, mod, mask, schedule, offset, o, lse = saved
    do, dlse = grads
    acc = sum_type(q)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1) - dlse.astype(acc)
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    flags = keys_not_finite(cfg, k)
    bias_t = None if bias is None else bias.transpose(0, 1, 4, 2, 3)

    def unit(at, carry):
        here = Unit(cfg, mask, offset, at)

        def turn(r, carry):
            i0 = r * cfg.block_q
            rows = [_Row(cfg, here, part, i0, (q, do, far, delta)) for part in here.parts]

            def attend(row: _Row, part, j0, ok, dmod):
                kj, vj = here.keys(k, part, j0), here.keys(v, part, j0)
                spot = (*part.at[:2], j0, part.at[2], i0)
                sizes = (*part.sizes[:2], cfg.block_k, part.sizes[2], cfg.block_q)
                s, slope = here.scores(times_t(kj, row.q), take_block(bias_t, spot, sizes))
                s, pull = here.modified(mod, s, part, i0, j0, backward=True)
                p = jnp.exp(s - row.far)
                ds = p * (times_t(vj, row.do) - row.delta)
                qx, dox = row.q, row.do
                if ok is not None:
                    ok = part.of(ok)
                    p = jnp.where(ok, p + row.bad_do[:, :, None], 0)
                    ds = jnp.where(ok, ds, 0)
                    slope = None if slope is None else jnp.where(ok, slope, 0)
                    qx, dox = row.clean_q, row.clean_do
                    kj = clean(kj, here.flags(flags, part, j0))
                if pull is not None:
                    ds, more = pull(ds)
                    dmod = _added(dmod, more)
                dbias = ds
                if slope is not None:
                    ds = ds * slope
                ds, p = ds.astype(kj.dtype), p.astype(dox.dtype)
                dqi = times(kj.swapaxes(2, 3), ds)
                dkj = times(ds, qx, 2)
                dvj = times(p, dox, 2)
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
                    dbias = add_block(dbias, ds, (at[0], at[1], j0, at[2], i0))
                return dqi + dqs, here.add(dk, dkj, j0), here.add(dv, dvj, j0), dbias, dmod

            zero = jnp.zeros((*cfg.unit[:2], q.shape[-1], cfg.unit[2], cfg.block_q), acc)
            dqi, *sums = over_tiles(cfg, schedule, at, [r], step, (zero, *carry[1:]))
            dqi = dqi.transpose(0, 1, 3, 4, 2) * cfg.scale
            return here.put(carry[0], dqi, Part(at, cfg.unit, None), i0), *sums

        return lax.fori_loop(0, q.shape[cfg.axis] // cfg.block_q, turn, carry)

    zeros = [None if x is None else jnp.zeros(x.shape, acc) for x in (k, v, bias_t)]
    zeros.append(_added(None, mod))
    dq, dk, dv, dbias, dmod = over_units(cfg, unit, (jnp.zeros_like(q), *zeros))
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
