"""The bodies of the warp-specialised Mosaic GPU kernels: o, dq, and dk with dv. See `gpu.py`.

Three warpgroups share a tile of 128 rows. Two compute, 64 rows each; the third only reads the list
and starts the copies of what the others need next, into rings of a few buffers:

    producer   wait until the buffer is free (both have read it)   copy tile n      (TMA)
    consumers  wait until the buffer is full    multiply (WGMMA)   say that it is free

Both consumers walk the same list, so barriers stay uniform; each evaluates the mask of its half of
a partial tile. For dk and dv the rows are keys, and queries come round in the rings, 128 at a time,
multiplied 64 at a time so that scores fit into registers beside the two sums.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._compat import mosaic_gpu
from pallas_kernels._hopper import buffer, kernel, product
from pallas_kernels.block_sparse.gpu import LOG2E, Config
from pallas_kernels.block_sparse.gpu_kernels import (
    _allowed,
    _begin,
    _biased,
    _end,
    _held,
    _online,
    _scores,
    _turned,
    _vector,
    _wide,
)

COMPUTE, HALF = 2, 64  # warpgroups that multiply, rows of each


class _Ring(NamedTuple):
    """Buffers that are filled and emptied in turn."""

    buffers: Any  # [stages, rows, width]
    full: Any  # barriers
    free: Any

    def slot(self, n) -> Any:
        return lax.rem(n, jnp.int32(self.buffers.shape[0]))

    def take(self, n) -> Any:
        """Buffer of tile n, once it is there."""
        mosaic_gpu().barrier_wait(self.full.at[self.slot(n)])
        return self.buffers.at[self.slot(n)]

    def give_back(self, n) -> None:
        mosaic_gpu().barrier_arrive(self.free.at[self.slot(n)])

    def fill(self, n, source) -> None:
        slot = self.slot(n)

        @pl.when(n >= self.buffers.shape[0])
        def _():
            mosaic_gpu().barrier_wait(self.free.at[slot])

        mosaic_gpu().copy_gmem_to_smem(source, self.buffers.at[slot], self.full.at[slot])


def _stages(*widths: int) -> int:
    """How many buffers of 128 rows fit into 227 KiB beside what stays."""
    return 4 if max(widths) <= 64 else 2


def _rings(rows: int, widths: tuple[int, int], dtype: Any) -> list[Any]:
    """Scratch of two rings: buffers, barriers of filling, barriers of emptying."""
    plgpu, stages = mosaic_gpu(), _stages(*widths)
    out = []
    for width in widths:
        out += [
            buffer(rows, width, dtype, (stages,)),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        ]
    return out


def _feed(listed, at, bk: int, rings, sources, where) -> None:
    """The producer of o and dq: tiles of keys and of values, in the order that they are read."""
    batch, own = where

    def step(partial, n, column, slot, carry):
        for ring, source in zip(rings, sources):
            ring.fill(n, source.at[batch, pl.ds(column * bk, bk), own])
        return carry

    _walk(listed, at, 0, step, 0)


def _divided(cfg: Config, compute: Callable, feed: Callable) -> None:
    """`compute(half)` in two warpgroups, `feed()` in the third."""
    plgpu, wg = mosaic_gpu(), lax.axis_index("wg")

    @pl.when(wg < COMPUTE)
    def _():
        if not cfg.interpret:
            plgpu.set_max_registers(232, action="increase")
        compute(wg)

    @pl.when(wg == COMPUTE)
    def _():
        if not cfg.interpret:
            plgpu.set_max_registers(40, action="decrease")
        feed()


def _at(listed, batch, head, row) -> tuple[Any, ...]:
    full = listed[0]
    return (batch if full.shape[0] > 1 else 0, head if full.shape[1] > 1 else 0, row)


def _walk(listed, at, begin, step, carry) -> Any:
    """`carry = step(partial, n, tile, slot, carry)` for a row's tiles, full ones first.

    `n` counts on from `begin`, for the rings; `slot`: where a partial tile is stored.
    """
    full, count, idx, stored = listed
    for partial, first, end in ((False, 0, full[at]), (True, full[at], count[at])):

        def turn(n, carry, partial=partial):
            return step(partial, begin + n, idx[(*at, n)], stored[(*at, n)], carry)

        carry = lax.fori_loop(first, end, turn, carry)
    return carry


def _accumulated(cfg: Config, acc, a, b) -> Any:
    """acc + a b."""
    plgpu = mosaic_gpu()
    if cfg.interpret:  # knows no state of a warpgroup's accumulator
        return acc + product(cfg, a, b, acc.shape)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def _resident(pairs, barriers, half) -> None:
    """Copy what a warpgroup keeps, and wait for it."""
    plgpu = mosaic_gpu()
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barriers.at[half])
        plgpu.barrier_wait(barriers.at[half])


def forward(cfg: Config, q, k, v, sinks, offset, listed, vectors):
    """o [B, T, N, H'] and lse [B, N, T]."""
    plgpu = mosaic_gpu()
    (B, T, N, H), width = q.shape, v.shape[3]
    bq, bk, tile = cfg.block_q, cfg.block_k, (HALF, cfg.block_k)
    halved = dataclasses.replace(cfg, block_q=HALF)

    def body(*refs):
        q, k, v, sinks, offset, *refs = refs
        listed, (*vectors, o, lse, q_s, o_s, lse_s, there) = refs[:4], refs[4:-6]
        keys, values = _Ring(*refs[-6:-3]), _Ring(*refs[-3:])
        batch, head, row = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        own, at = lax.div(head, jnp.int32(cfg.groups)), _at(listed, batch, head, row)

        def compute(half):
            mine = pl.ds(row * bq + half * HALF, HALF)
            _resident([(q.at[batch, mine, head], q_s.at[half])], there, half)

            def step(partial, n, column, slot, carry):
                acc, m, l = carry
                s, _ = _scores(cfg, product(cfg, q_s.at[half], keys.take(n), tile, True))
                keys.give_back(n)
                s = _biased(cfg, vectors, s, batch, column, 1)
                if partial:
                    spot = (row * COMPUTE + half, column, slot * COMPUTE + half)
                    ok = _allowed(halved, vectors, offset, batch, head, *spot, False)
                    s = jnp.where(ok, s, -jnp.inf)
                p, decay, m, l = _online(s, m, l)
                acc = acc * _wide(decay, acc.shape, 0)
                acc = _accumulated(cfg, acc, p.astype(q_s.dtype), values.take(n))
                values.give_back(n)
                return acc, m, l

            carry = _begin(cfg, HALF, width, sinks[head] if cfg.sinks else None)
            out, out_lse = _end(*_walk(listed, at, 0, step, carry))
            o_s.at[half][...] = out.astype(o_s.dtype)
            lse_s.at[half][...] = out_lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[half], o.at[batch, mine, head])
            plgpu.copy_smem_to_gmem(lse_s.at[half], lse.at[batch, head, mine])
            plgpu.wait_smem_to_gmem(0)

        feed = functools.partial(_feed, listed, at, bk, (keys, values), (k, v), (batch, own))
        _divided(cfg, compute, feed)

    out = [
        jax.ShapeDtypeStruct((B, T, N, width), v.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    scratch = [
        buffer(HALF, H, q.dtype, (COMPUTE,)), buffer(HALF, width, q.dtype, (COMPUTE,)),
        plgpu.SMEM((COMPUTE, HALF), jnp.float32), plgpu.Barrier(num_barriers=COMPUTE),
        *_rings(bk, (H, width), q.dtype),
    ]  # fmt: skip
    run = kernel(body, cfg, (N, T // bq, B), out, scratch, COMPUTE + 1)
    return run(q, k, v, sinks, offset, *listed, *vectors)


def backward_q(cfg: Config, q, k, v, do, far, delta, offset, listed, vectors):
    """dq [B, T, N, H]; `far` is lse in base 2, +inf in rows without keys, [B, N, T] as delta."""
    plgpu = mosaic_gpu()
    (B, T, N, H), width = q.shape, v.shape[3]
    bq, bk, tile = cfg.block_q, cfg.block_k, (HALF, cfg.block_k)
    halved = dataclasses.replace(cfg, block_q=HALF)

    def body(*refs):
        q, k, v, do, far, delta, offset, *refs = refs
        listed, (*vectors, dq, q_s, do_s, there) = refs[:4], refs[4:-6]
        keys, values = _Ring(*refs[-6:-3]), _Ring(*refs[-3:])
        batch, head, row = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        own, at = lax.div(head, jnp.int32(cfg.groups)), _at(listed, batch, head, row)

        def compute(half):
            mine = pl.ds(row * bq + half * HALF, HALF)
            pairs = [(q.at[batch, mine, head], q_s.at[half])]
            pairs.append((do.at[batch, mine, head], do_s.at[half]))
            _resident(pairs, there, half)
            fari, deltai = (_vector(cfg, x.at[batch, head, mine], 0) for x in (far, delta))

            def step(partial, n, column, slot, acc):
                kj = keys.take(n)
                s, slope = _scores(cfg, product(cfg, q_s.at[half], kj, tile, True))
                s = _biased(cfg, vectors, s, batch, column, 1)
                p = jnp.exp2(s * LOG2E - _wide(fari, tile, 0))
                dp = product(cfg, do_s.at[half], values.take(n), tile, True)
                values.give_back(n)
                ds = p * (dp - _wide(deltai, tile, 0))
                ds = ds if slope is None else ds * slope
                if partial:
                    spot = (row * COMPUTE + half, column, slot * COMPUTE + half)
                    ok = _allowed(halved, vectors, offset, batch, head, *spot, False)
                    ds = jnp.where(ok, ds, 0.0)
                acc = _accumulated(cfg, acc, ds.astype(q_s.dtype), kj)
                keys.give_back(n)
                return acc

            acc = _walk(listed, at, 0, step, _held(cfg, (HALF, H), 0.0))
            q_s.at[half][...] = (acc * cfg.scale).astype(q_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[half], dq.at[batch, mine, head])
            plgpu.wait_smem_to_gmem(0)

        feed = functools.partial(_feed, listed, at, bk, (keys, values), (k, v), (batch, own))
        _divided(cfg, compute, feed)

    scratch = [
        buffer(HALF, H, q.dtype, (COMPUTE,)), buffer(HALF, width, q.dtype, (COMPUTE,)),
        plgpu.Barrier(num_barriers=COMPUTE), *_rings(bk, (H, width), q.dtype),
    ]  # fmt: skip
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    run = kernel(body, cfg, (N, T // bq, B), out, scratch, COMPUTE + 1)
    return run(q, k, v, do, far, delta, offset, *listed, *vectors)[0]


def backward_kv(cfg: Config, q, k, v, do, far, delta, offset, listed, vectors):
    """dk [B, S, K, H], dv [B, S, K, H']: scores are [keys, queries] here."""
    plgpu = mosaic_gpu()
    (B, S, K, H), width = k.shape, v.shape[3]
    vectors = [_turned(cfg, x) if axis == "stored" else x for x, axis in zip(vectors, cfg.axes)]
    bq, bk, tile = cfg.block_q, cfg.block_k, (HALF, HALF)
    halved = dataclasses.replace(cfg, block_q=HALF, block_k=HALF)
    parts = bq // HALF

    def body(*refs):
        q, k, v, do, far, delta, offset, *refs = refs
        listed, (*vectors, dk, dv, k_s, v_s, there) = refs[:4], refs[4:-6]
        queries, grads = _Ring(*refs[-6:-3]), _Ring(*refs[-3:])
        batch, own, column = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))

        def over_heads(step, carry):
            """All query heads of the group; the rings' count goes on from one to the next."""

            def of_head(group, carry):
                head = own * cfg.groups + group
                at, (begin, inner) = _at(listed, batch, head, column), carry
                inner = _walk(listed, at, begin, lambda *a: step(head, *a), inner)
                return begin + listed[1][at], inner

            return lax.fori_loop(0, cfg.groups, of_head, (jnp.int32(0), carry))[1]

        def compute(half):
            mine = pl.ds(column * bk + half * HALF, HALF)
            pairs = [(k.at[batch, mine, own], k_s.at[half])]
            pairs.append((v.at[batch, mine, own], v_s.at[half]))
            _resident(pairs, there, half)

            def step(head, partial, n, row, slot, carry):
                dk, dv = carry
                q_n, do_n = queries.take(n), grads.take(n)
                for part in range(parts):
                    inside = pl.ds(part * HALF, HALF)
                    qi, doi = q_n.at[inside], do_n.at[inside]
                    here = pl.ds(row * bq + part * HALF, HALF)
                    fari, deltai = (_vector(cfg, x.at[batch, head, here], 1) for x in (far, delta))
                    s, slope = _scores(cfg, product(cfg, k_s.at[half], qi, tile, True))
                    s = _biased(halved, vectors, s, batch, column * COMPUTE + half, 0)
                    p = jnp.exp2(s * LOG2E - _wide(fari, tile, 1))
                    dp = product(cfg, v_s.at[half], doi, tile, True)
                    ds = p * (dp - _wide(deltai, tile, 1))
                    ds = ds if slope is None else ds * slope
                    if partial:
                        ok = _part_allowed(part, head, row, slot, half)
                        p, ds = jnp.where(ok, p, 0.0), jnp.where(ok, ds, 0.0)
                    dv = _accumulated(cfg, dv, p.astype(k_s.dtype), doi)
                    dk = _accumulated(cfg, dk, ds.astype(k_s.dtype), qi)
                queries.give_back(n)
                grads.give_back(n)
                return dk, dv

            def _part_allowed(part, head, row, slot, half):
                spot = (row * parts + part, column * COMPUTE + half, slot * COMPUTE + half)
                return _allowed(
                    halved, _columns(vectors, cfg.axes, part), offset, batch, head, *spot, True
                )

            carry = (_held(cfg, (HALF, H), 0.0), _held(cfg, (HALF, width), 0.0))
            dk_, dv_ = over_heads(step, carry)
            k_s.at[half][...] = (dk_ * cfg.scale).astype(k_s.dtype)
            v_s.at[half][...] = dv_.astype(v_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s.at[half], dk.at[batch, mine, own])
            plgpu.copy_smem_to_gmem(v_s.at[half], dv.at[batch, mine, own])
            plgpu.wait_smem_to_gmem(0)

        def feed():
            def step(head, partial, n, row, slot, carry):
                here = pl.ds(row * bq, bq)
                queries.fill(n, q.at[batch, here, head])
                grads.fill(n, do.at[batch, here, head])
                return carry

            over_heads(step, 0)

        _divided(cfg, compute, feed)

    scratch = [
        buffer(HALF, H, q.dtype, (COMPUTE,)), buffer(HALF, width, q.dtype, (COMPUTE,)),
        plgpu.Barrier(num_barriers=COMPUTE), *_rings(bq, (H, width), q.dtype),
    ]  # fmt: skip
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    run = kernel(body, cfg, (K, S // bk, B), out, scratch, COMPUTE + 1)
    return run(q, k, v, do, far, delta, offset, *listed, *vectors)


def _columns(vectors, axes, part: int) -> list[Any]:
    """Stored tiles [keys, queries]: the columns of one part of the queries."""
    there = pl.ds(part * HALF, HALF)
    return [x.at[:, :, :, there] if axis == "stored" else x for x, axis in zip(vectors, axes)]
