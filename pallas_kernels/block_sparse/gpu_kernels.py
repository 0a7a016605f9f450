"""The bodies of the plain Mosaic GPU kernels: o, dq, and dk with dv. See `gpu.py`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._compat import mosaic_gpu
from pallas_kernels._hopper import buffer, fetch, kernel, loaded, product
from pallas_kernels.block_sparse.gpu import LOG2E, Config


def _held(cfg: Config, shape: tuple[int, ...], value: float) -> Any:
    plgpu = mosaic_gpu()
    if cfg.interpret:  # the interpreter knows no layouts
        return jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _vector(cfg: Config, ref, along: int) -> Any:
    """A vector in memory, held so that it can be repeated along the other axis of a tile."""
    return loaded(cfg, ref, mosaic_gpu().Layout.WGMMA.reduce(1 - along))


def _wide(x, shape, axis: int) -> Any:
    """A vector along `axis` of a tile, repeated."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _scores(cfg: Config, s) -> tuple[Any, Any]:
    """(scores, their derivative by the scaled product or None)."""
    s = s * cfg.scale
    if cfg.soft_cap is None:
        return s, None
    t = jnp.tanh(s / cfg.soft_cap)
    return cfg.soft_cap * t, 1 - t * t


def _allowed(cfg: Config, vectors, offset, batch, head, row, column, slot, flip: bool) -> Any:
    """The mask on a tile [queries, keys], or [keys, queries] when flipped."""
    plgpu = mosaic_gpu()
    shape = (cfg.block_k, cfg.block_q) if flip else (cfg.block_q, cfg.block_k)
    ids = functools.partial(lax.broadcasted_iota, jnp.int32, shape)
    if not cfg.interpret:
        ids = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=plgpu.Layout.WGMMA)
    i = ids(int(flip)) + (row * cfg.block_q + offset[batch])
    j = ids(int(not flip)) + column * cfg.block_k
    tiles = []
    for ref, axis in zip(vectors, cfg.axes):
        if axis == "bias":
            continue
        at = (batch if ref.shape[0] > 1 else 0, head if ref.shape[1] > 1 else 0)
        if axis == "stored":
            part = ref.at[(*at, pl.ds(slot * shape[0], shape[0]), slice(None))]
            tiles.append(loaded(cfg, part, plgpu.Layout.WGMMA))
            continue
        block, tile = (cfg.block_q, row) if axis == "q" else (cfg.block_k, column)
        along = int((axis == "q") == flip)
        x = _vector(cfg, ref.at[(*at, 0, pl.ds(tile * block, block))], along)
        tiles.append(_wide(x, shape, along))
    ok = cfg.mask(shape, batch, head, i, j, tiles)
    return ok & (j < cfg.keys) if cfg.keys % cfg.block_k else ok


def _biased(cfg: Config, vectors, s, batch, column, along: int) -> Any:
    """Scores with the keys' own bias, if there is one; keys on axis `along`."""
    if cfg.axes[-1:] != ("bias",):
        return s
    there = vectors[-1].at[batch, pl.ds(column * cfg.block_k, cfg.block_k)]
    return s + _wide(_vector(cfg, there, along), s.shape, along)


def _begin(cfg: Config, rows: int, width: int, sink: Any) -> tuple[Any, Any, Any]:
    """(sum of p v, maximum, sum of p) of an online softmax in base 2 before the first key."""
    m, l = _held(cfg, (rows,), -jnp.inf), _held(cfg, (rows,), 0.0)
    if cfg.sinks:
        m = _held(cfg, (rows,), 0.0) + sink * LOG2E
        l = jnp.where(m == -jnp.inf, 0.0, 1.0)
    return _held(cfg, (rows, width), 0.0), m, l


def _online(s, m, l) -> tuple[Any, Any, Any, Any]:
    """(p, decay of what was summed before, maximum, sum of p) with the scores of a further tile."""
    top = jnp.maximum(m, s.max(axis=1) * LOG2E)
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    p, decay = jnp.exp2(s * LOG2E - _wide(safe, s.shape, 0)), jnp.exp2(m - safe)
    return p, decay, top, l * decay + p.sum(axis=1)


def _end(acc, m, l) -> tuple[Any, Any]:
    """(o, lse) after the last key."""
    nothing = l == 0
    l = jnp.where(nothing, 1.0, l)
    return acc / _wide(l, acc.shape, 0), jnp.where(nothing, -jnp.inf, m / LOG2E + jnp.log(l))


def _over(listed, batch, head, row, step, carry) -> Any:
    """`carry = step(partial, tile, slot, carry)` for the live tiles of a row, full ones first.

    `slot`: where a partial tile is stored.
    """
    full, count, idx, stored = listed
    at = (batch if full.shape[0] > 1 else 0, head if full.shape[1] > 1 else 0, row)
    for partial, first, end in ((False, 0, full[at]), (True, full[at], count[at])):

        def turn(n, carry, partial=partial):
            return step(partial, idx[(*at, n)], stored[(*at, n)], carry)

        carry = lax.fori_loop(first, end, turn, carry)
    return carry


def forward(cfg: Config, q, k, v, sinks, offset, listed, vectors):
    """o [B, T, N, H'] and lse [B, N, T]."""
    plgpu = mosaic_gpu()
    (B, T, N, H), width = q.shape, v.shape[3]
    bq, bk, tile = cfg.block_q, cfg.block_k, (cfg.block_q, cfg.block_k)

    def body(*refs):
        q, k, v, sinks, offset, full, count, idx, stored, *refs = refs
        *vectors, o, lse, q_s, k_s, v_s, o_s, lse_s, barrier, _ = refs
        batch, head, row = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        own = lax.div(head, jnp.int32(cfg.groups))
        here = pl.ds(row * bq, bq)
        fetch([(q.at[batch, here, head], q_s)], barrier)

        def step(partial, column, slot, carry):
            acc, m, l = carry
            there = pl.ds(column * bk, bk)
            fetch([(k.at[batch, there, own], k_s), (v.at[batch, there, own], v_s)], barrier)
            s, _ = _scores(cfg, product(cfg, q_s, k_s, tile, True))
            s = _biased(cfg, vectors, s, batch, column, 1)
            if partial:
                ok = _allowed(cfg, vectors, offset, batch, head, row, column, slot, False)
                s = jnp.where(ok, s, -jnp.inf)
            p, decay, m, l = _online(s, m, l)
            part = product(cfg, p.astype(v_s.dtype), v_s, (bq, width))
            return acc * _wide(decay, acc.shape, 0) + part, m, l

        carry = _begin(cfg, bq, width, sinks[head] if cfg.sinks else None)
        carry = _over((full, count, idx, stored), batch, head, row, step, carry)
        out, out_lse = _end(*carry)
        o_s[...] = out.astype(o_s.dtype)
        lse_s[...] = out_lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o.at[batch, here, head])
        plgpu.copy_smem_to_gmem(lse_s, lse.at[batch, head, here])
        plgpu.wait_smem_to_gmem(0)

    out = [
        jax.ShapeDtypeStruct((B, T, N, width), v.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    scratch = [
        buffer(bq, H, q.dtype), buffer(bk, H, q.dtype), buffer(bk, width, q.dtype),
        buffer(bq, width, q.dtype), plgpu.SMEM((bq,), jnp.float32),
        plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=1),
    ]  # fmt: skip
    run = kernel(body, cfg, (N, T // bq, B), out, scratch)
    return run(q, k, v, sinks, offset, *listed, *vectors)


def backward_q(cfg: Config, q, k, v, do, far, delta, offset, listed, vectors):
    """dq [B, T, N, H]; `far` is lse in base 2, +inf in rows without keys, [B, N, T] as delta."""
    plgpu = mosaic_gpu()
    (B, T, N, H), width = q.shape, v.shape[3]
    bq, bk, tile = cfg.block_q, cfg.block_k, (cfg.block_q, cfg.block_k)

    def body(*refs):
        q, k, v, do, far, delta, offset, full, count, idx, stored, *refs = refs
        *vectors, dq, q_s, do_s, k_s, v_s, barrier = refs
        batch, head, row = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        own = lax.div(head, jnp.int32(cfg.groups))
        here = pl.ds(row * bq, bq)
        fetch([(q.at[batch, here, head], q_s), (do.at[batch, here, head], do_s)], barrier)
        far, delta = (_vector(cfg, x.at[batch, head, here], 0) for x in (far, delta))

        def step(partial, column, slot, acc):
            there = pl.ds(column * bk, bk)
            fetch([(k.at[batch, there, own], k_s), (v.at[batch, there, own], v_s)], barrier)
            s, slope = _scores(cfg, product(cfg, q_s, k_s, tile, True))
            s = _biased(cfg, vectors, s, batch, column, 1)
            p = jnp.exp2(s * LOG2E - _wide(far, tile, 0))
            ds = p * (product(cfg, do_s, v_s, tile, True) - _wide(delta, tile, 0))
            ds = ds if slope is None else ds * slope
            if partial:
                ok = _allowed(cfg, vectors, offset, batch, head, row, column, slot, False)
                ds = jnp.where(ok, ds, 0.0)
            return acc + product(cfg, ds.astype(k_s.dtype), k_s, (bq, H))

        acc = _over((full, count, idx, stored), batch, head, row, step, _held(cfg, (bq, H), 0.0))
        q_s[...] = (acc * cfg.scale).astype(q_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq.at[batch, here, head])
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        buffer(bq, H, q.dtype), buffer(bq, width, q.dtype), buffer(bk, H, q.dtype),
        buffer(bk, width, q.dtype), plgpu.Barrier(num_barriers=2),
    ]  # fmt: skip
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    run = kernel(body, cfg, (N, T // bq, B), out, scratch)
    return run(q, k, v, do, far, delta, offset, *listed, *vectors)[0]


def _turned(cfg: Config, store):
    """Stored tiles [b, h, P block_q, block_k], each transposed."""
    tiles = store.reshape(*store.shape[:2], -1, cfg.block_q, cfg.block_k).swapaxes(3, 4)
    return tiles.reshape(*store.shape[:2], -1, cfg.block_q)


def backward_kv(cfg: Config, q, k, v, do, far, delta, offset, listed, vectors):
    """dk [B, S, K, H], dv [B, S, K, H']: scores are [keys, queries] here."""
    plgpu = mosaic_gpu()
    (B, S, K, H), width = k.shape, v.shape[3]
    vectors = [_turned(cfg, x) if axis == "stored" else x for x, axis in zip(vectors, cfg.axes)]
    bq, bk, tile = cfg.block_q, cfg.block_k, (cfg.block_k, cfg.block_q)

    def body(*refs):
        q, k, v, do, far, delta, offset, full, count, idx, stored, *refs = refs
        *vectors, dk, dv, q_s, do_s, k_s, v_s, barrier = refs
        batch, own, column = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        there = pl.ds(column * bk, bk)
        fetch([(k.at[batch, there, own], k_s), (v.at[batch, there, own], v_s)], barrier)

        def of_head(group, carry):
            head = own * cfg.groups + group

            def step(partial, row, slot, carry):
                dk, dv = carry
                here = pl.ds(row * bq, bq)
                fetch([(q.at[batch, here, head], q_s), (do.at[batch, here, head], do_s)], barrier)
                fari, deltai = (_vector(cfg, x.at[batch, head, here], 1) for x in (far, delta))
                s, slope = _scores(cfg, product(cfg, k_s, q_s, tile, True))
                s = _biased(cfg, vectors, s, batch, column, 0)
                p = jnp.exp2(s * LOG2E - _wide(fari, tile, 1))
                ds = p * (product(cfg, v_s, do_s, tile, True) - _wide(deltai, tile, 1))
                ds = ds if slope is None else ds * slope
                if partial:
                    ok = _allowed(cfg, vectors, offset, batch, head, row, column, slot, True)
                    p, ds = jnp.where(ok, p, 0.0), jnp.where(ok, ds, 0.0)
                dv = dv + product(cfg, p.astype(do_s.dtype), do_s, (bk, width))
                return dk + product(cfg, ds.astype(q_s.dtype), q_s, (bk, H)), dv

            return _over((full, count, idx, stored), batch, head, column, step, carry)

        carry = (_held(cfg, (bk, H), 0.0), _held(cfg, (bk, width), 0.0))
        dk_, dv_ = lax.fori_loop(0, cfg.groups, of_head, carry)
        k_s[...] = (dk_ * cfg.scale).astype(k_s.dtype)
        v_s[...] = dv_.astype(v_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_s, dk.at[batch, there, own])
        plgpu.copy_smem_to_gmem(v_s, dv.at[batch, there, own])
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        buffer(bq, H, q.dtype), buffer(bq, width, q.dtype), buffer(bk, H, q.dtype),
        buffer(bk, width, q.dtype), plgpu.Barrier(num_barriers=2),
    ]  # fmt: skip
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    run = kernel(body, cfg, (K, S // bk, B), out, scratch)
    return run(q, k, v, do, far, delta, offset, *listed, *vectors)
