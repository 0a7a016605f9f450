"""The bodies of the Mosaic GPU kernels of `gpu.py`: o, and dq with dk and dv."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._compat import mosaic_gpu
from pallas_kernels._hopper import buffer, fetch, kernel, loaded, product
from pallas_kernels.gated_linear.gpu import CHUNK, Config
from pallas_kernels.gated_linear.halves import between, levels, part

SQUARE = (CHUNK, CHUNK)
_buffer = functools.partial(buffer, dtype=jnp.bfloat16)


def _put(x, source, target) -> None:
    """float32 from registers through shared memory to the memory of the chip."""
    plgpu = mosaic_gpu()
    source[...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)


def _staged(x, target) -> Any:
    """x in shared memory as bfloat16, for products."""
    target[...] = x.astype(jnp.bfloat16)
    mosaic_gpu().commit_smem()
    return target


class _Chunk:
    """Indices, gates and documents of a chunk."""

    def __init__(self, cfg: Config, gates, document, before, batch, chunk):
        self.cfg, self.gates = cfg, gates
        ids = functools.partial(lax.broadcasted_iota, jnp.int32, SQUARE)
        layout: Any = None
        if not cfg.interpret:
            layout = mosaic_gpu().Layout.WGMMA
            ids = functools.partial(mosaic_gpu().broadcasted_iota, jnp.int32, SQUARE, layout=layout)
        self.i, self.j = ids(0), ids(1)
        self.same = None
        if cfg.documents:
            here = document.at[batch, pl.ds(chunk * CHUNK, CHUNK)]
            self.row, column = (
                loaded(cfg, here, None if layout is None else layout.reduce(1 - axis))
                for axis in (0, 1)
            )
            self.before, self.last = before[batch, chunk], document[batch, (chunk + 1) * CHUNK - 1]
            rows = lax.broadcast_in_dim(self.row, SQUARE, [0])
            self.same = rows == lax.broadcast_in_dim(column, SQUARE, [1])

    def decay(self, mask) -> Any:
        """exp of sums of gates [C, F]: those that a matrix of booleans picks, row by row."""
        ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
        shape = (CHUNK, self.gates[0].shape[1])
        parts = [product(self.cfg, ones, gate, shape) for gate in self.gates]
        return jnp.exp(parts[0] + parts[1] + parts[2])

    def middle(self, level: int) -> Any:
        """What each position decays by to the middle of its block."""
        return self.decay(between(level, self.i, self.j))

    def reads(self) -> Any:
        """A query's share of the state before the chunk."""
        return self._where("before", self.decay(self.j <= self.i))

    def writes(self) -> Any:
        """A key's share in the state after the chunk."""
        return self._where("last", self.decay(self.j > self.i))

    def _where(self, name: str, x) -> Any:
        if self.same is None:
            return x
        rows = lax.broadcast_in_dim(self.row, x.shape, [0])
        return jnp.where(rows == getattr(self, name), x, 0.0)

    def pairs(self, level: int, x, flip: bool = False) -> Any:
        """The pairs of one level (-1: each with itself) of [queries, keys], or the other way."""
        i, j = (self.j, self.i) if flip else (self.i, self.j)
        x = jnp.where(i == j if level < 0 else part(level, i, j), x, 0.0)
        return x if self.same is None else jnp.where(self.same, x, 0.0)


def forward(cfg: Config, document, before, q, k, v, gates, states) -> Any:
    """o [B, T, N, V], float32."""
    (B, T, N, F), V = q.shape, v.shape[3]

    def body(document, before, q, k, v, g1, g2, g3, states, o, *scratch):
        q_s, k_s, v_s, *gates, s_s, x_s, o_s, barrier = scratch
        batch, head, chunk = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        own = lax.div(head, jnp.int32(cfg.groups))
        here = pl.ds(chunk * CHUNK, CHUNK)
        at = (batch, here, own)
        fetch(
            [(q.at[batch, here, head], q_s), (k.at[at], k_s), (v.at[at], v_s),
             *((g.at[at], s) for g, s in zip((g1, g2, g3), gates)),
             (states.at[batch, own, pl.ds(chunk * F, F)], s_s)],
            barrier,
        )  # fmt: skip
        it = _Chunk(cfg, gates, document, before, batch, chunk)
        qi, ki = (_registers(cfg, x) for x in (q_s, k_s))
        a = it.pairs(-1, product(cfg, q_s, k_s, SQUARE, True))
        for level in range(levels(CHUNK)):
            x = it.middle(level)
            kx = _staged(ki * x, x_s)
            a = a + it.pairs(level, product(cfg, _half(qi * x), kx, SQUARE, True))
        out = product(cfg, _half(a), v_s, (CHUNK, V))
        out = out + product(cfg, _half(qi * it.reads()), s_s, (CHUNK, V))
        _put(out, o_s, o.at[batch, here, head])

    plgpu = mosaic_gpu()
    scratch = [
        *(_buffer(CHUNK, n) for n in (F, F, V, F, F, F)), _buffer(F, V), _buffer(CHUNK, F),
        plgpu.SMEM((CHUNK, V), jnp.float32), plgpu.Barrier(num_barriers=7),
    ]  # fmt: skip
    out = jax.ShapeDtypeStruct((B, T, N, V), jnp.float32)
    run = kernel(body, cfg, (N, T // CHUNK, B), [out], scratch)
    return run(document, before, q, k, v, *gates, states)[0]


def backward(cfg: Config, document, before, q, k, v, gates, states, after, do) -> Any:
    """dq [B, T, N, F], dk [B, T, K, F], dv [B, T, K, V], float32."""
    (B, T, _, F), (K, V) = q.shape, v.shape[2:]
    widths = sorted({F, V})  # shared memory is short: one buffer per width for what is written

    def body(document, before, q, k, v, g1, g2, g3, states, after, do, dq, dk, dv, *scratch):
        q_s, k_s, v_s, *gates, s_s, d_s, do_s, x_s, barrier = scratch[: -len(widths)]
        out_s = dict(zip(widths, scratch[-len(widths) :]))
        batch, own, chunk = (lax.axis_index(x) for x in ("batch", "heads", "tiles"))
        here = pl.ds(chunk * CHUNK, CHUNK)
        at, state = (batch, here, own), (batch, own, pl.ds(chunk * F, F))
        fetch(
            [(k.at[at], k_s), (v.at[at], v_s),
             *((g.at[at], s) for g, s in zip((g1, g2, g3), gates)),
             (states.at[state], s_s), (after.at[state], d_s)],
            barrier,
        )  # fmt: skip
        it = _Chunk(cfg, gates, document, before, batch, chunk)
        ki, writes = _registers(cfg, k_s), it.writes()
        dki = writes * product(cfg, v_s, d_s, (CHUNK, F), True)
        dvi = product(cfg, _half(ki * writes), d_s, (CHUNK, V))

        def of_head(group, carry):
            dki, dvi = carry
            head = own * cfg.groups + group
            fetch([(q.at[batch, here, head], q_s), (do.at[batch, here, head], do_s)], barrier)
            qi, ki = (_registers(cfg, x) for x in (q_s, k_s))
            da = product(cfg, do_s, v_s, SQUARE, True)
            flipped = product(cfg, v_s, do_s, SQUARE, True)
            weights = it.pairs(-1, product(cfg, k_s, q_s, SQUARE, True), True)
            dqi = it.reads() * product(cfg, do_s, s_s, (CHUNK, F), True)
            dqi = dqi + product(cfg, _half(it.pairs(-1, da)), k_s, (CHUNK, F))
            dki = dki + product(cfg, _half(it.pairs(-1, flipped, True)), q_s, (CHUNK, F))
            for level in range(levels(CHUNK)):
                x = it.middle(level)
                kx = _staged(ki * x, x_s)
                dqi = dqi + x * product(cfg, _half(it.pairs(level, da)), kx, (CHUNK, F))
                qx = _staged(qi * x, x_s)
                down = _half(it.pairs(level, flipped, True))
                dki = dki + x * product(cfg, down, qx, (CHUNK, F))
                own_part = product(cfg, _half(ki * x), qx, SQUARE, True)
                weights = weights + it.pairs(level, own_part, True)
            dvi = dvi + product(cfg, _half(weights), do_s, (CHUNK, V))
            _put(dqi, out_s[F], dq.at[batch, here, head])
            return dki, dvi

        dki, dvi = lax.fori_loop(0, cfg.groups, of_head, (dki, dvi))
        _put(dki, out_s[F], dk.at[at])
        _put(dvi, out_s[V], dv.at[at])

    plgpu = mosaic_gpu()
    scratch = [
        *(_buffer(CHUNK, n) for n in (F, F, V, F, F, F)), _buffer(F, V), _buffer(F, V),
        _buffer(CHUNK, V), _buffer(CHUNK, F), plgpu.Barrier(num_barriers=7),
        *(plgpu.SMEM((CHUNK, n), jnp.float32) for n in widths),
    ]  # fmt: skip
    out = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v)]
    run = kernel(body, cfg, (K, T // CHUNK, B), out, scratch)
    return run(document, before, q, k, v, *gates, states, after, do)


def _half(x) -> Any:
    return x.astype(jnp.bfloat16)


def _registers(cfg: Config, ref) -> Any:
    """A buffer as float32, laid out as products are."""
    return loaded(cfg, ref, mosaic_gpu().Layout.WGMMA).astype(jnp.float32)
