"""The bodies of the Mosaic TPU kernels: one step each of o, dq, and dk with dv. See `tpu.py`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import tpu_call
from pallas_kernels.block_sparse.steps import FULL, PARTIAL
from pallas_kernels.block_sparse.tpu import LANES, Config, Listed

_SEMANTICS = ("parallel", "parallel", "arbitrary")


def _dot(a, b, contract: tuple[int, int]) -> jax.Array:
    """a . b over one axis of each, summed in float32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _finite(x):
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def _clean(x):
    return jnp.where(_finite(x), x.astype(jnp.float32), 0).astype(x.dtype)


def _bad_in_lanes(x) -> jax.Array:
    """[1, rows] booleans: is something in this row of x not finite? The product turns them over."""
    flags = jnp.where(_finite(x), 0.0, 1.0).astype(jnp.bfloat16)
    ones = jnp.ones((8, x.shape[1]), jnp.bfloat16)
    return _dot(ones, flags, (1, 1))[:1] > 0


@dataclasses.dataclass
class _Turn:
    """One step of a kernel: which tile it is, and what the mask says there."""

    cfg: Config
    listed: Listed
    scalars: Any  # words, stored, offset, sinks
    vectors: Any

    def __post_init__(self):
        self.batch, self.head = pl.program_id(0), pl.program_id(1)
        word = _word(self.listed, self.batch, self.head, pl.program_id(2), self.scalars[0])
        self.kind, self.first, self.last = word & 3, (word & 4) != 0, (word & 8) != 0
        self.row, self.column, self.query_head = _tile(self.cfg, self.listed, self.head, word)

    def allowed(self):
        """The mask on the tile: [queries, keys], or [keys, queries] when by keys."""
        cfg, flip = self.cfg, self.listed.by_keys
        shape = (cfg.block_k, cfg.block_q) if flip else (cfg.block_q, cfg.block_k)
        i = self.row * cfg.block_q + lax.broadcasted_iota(jnp.int32, shape, int(flip))
        j = self.column * cfg.block_k + lax.broadcasted_iota(jnp.int32, shape, 1 - flip)
        tiles = []
        for ref, axis in zip(self.vectors, cfg.axes):
            if axis == "stored":
                x = ref[...].astype(jnp.float32)
                tiles.append(x.T if flip else x)
                continue
            x = ref[...] if (axis == "q") == flip else ref[0][:, None]
            tiles.append(jnp.broadcast_to(x, shape))
        i = i + self.scalars[2][self.batch]
        ok = cfg.mask(shape, self.batch, self.query_head, i, j, tiles)
        return ok & (j < cfg.keys) if cfg.keys % cfg.block_k else ok

    def scores(self, s):
        """(scores, d scores / d (scale q k) or None) from the products."""
        s = s * self.cfg.scale
        if self.cfg.soft_cap is None:
            return s, None
        t = jnp.tanh(s / self.cfg.soft_cap)
        return self.cfg.soft_cap * t, 1 - t * t

    def visit(self, step):
        """`step(partial)` if the tile is live: two programs, one of them without mask code."""
        pl.when(self.kind == FULL)(lambda: step(False))
        pl.when(self.kind == PARTIAL)(lambda: step(True))


def _word(listed: Listed, batch, head, n, words):
    b, h, slots = listed.shape
    return words[((batch if b > 1 else 0) * h + (head if h > 1 else 0)) * slots + n]


def _tile(cfg: Config, listed: Listed, head, word):
    """(tile of queries, tile of keys, query head)."""
    inner, outer, group = listed.packing.tiles(word)
    if listed.by_keys:
        return inner, outer, head * cfg.groups + group
    return outer, inner, head


def _specs(cfg: Config, listed: Listed, arrays: list[tuple[str, tuple[int, ...]]]):
    """A block per array. Names of sides: "q" and "k" [b, heads, length, width], "q^" and "k^"
    [b, heads, 1, length], "stored" [b, heads, P block_q, block_k]; an axis of 1 is shared."""

    def spec(side, shape):
        block = cfg.block_q if side[0] == "q" else cfg.block_k
        flat = side.endswith("^")

        def at(batch, head, n, words, stored, *_):
            word = _word(listed, batch, head, n, words)
            row, column, query_head = _tile(cfg, listed, head, word)
            tile = row if side[0] == "q" else column
            own = lax.div(query_head, cfg.groups) if side == "k" else query_head
            where = (batch if shape[0] > 1 else 0, own if shape[1] > 1 else 0)
            if side == "stored":
                return *where, _word(listed, batch, head, n, stored), 0
            return (*where, 0, tile) if flat else (*where, tile, 0)

        if side == "stored":
            return pl.BlockSpec((None, None, cfg.block_q, cfg.block_k), at)
        return pl.BlockSpec((None, None, *((1, block) if flat else (block, shape[3]))), at)

    return [spec(side, shape) for side, shape in arrays]


def _call(cfg, listed, kernel, grid, scalars, inputs, outputs, scratch, name):
    """Run a kernel whose operands are [(side, array)] and results [(side, shape, dtype)]."""
    out_specs = _specs(cfg, listed, [(side, shape) for side, shape, _ in outputs])
    out_shape = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
    if name == "block_sparse_o" and cfg.work:
        B, N, T = inputs[0][1].shape[:3]
        out_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
        out_shape.append(jax.ShapeDtypeStruct((B * N * (T // cfg.block_q),), jnp.int32))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=grid,
        in_specs=_specs(cfg, listed, [(side, x.shape) for side, x in inputs]),
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    run = tpu_call(
        kernel,
        grid_spec=spec,
        out_shape=out_shape,
        semantics=_SEMANTICS,
        interpret=cfg.interpret,
        name=name,
        cost_estimate=_cost(cfg, listed, grid, inputs, out_shape, name),
    )
    return run(*scalars, *(x for _, x in inputs))


# products of a tile over the width of keys, and of values
_PRODUCTS = {"block_sparse_o": (1, 1), "block_sparse_dq": (2, 1), "block_sparse_dkv": (2, 2)}


def _cost(cfg, listed, grid, inputs, outputs, name) -> pl.CostEstimate:
    """Of all listed tiles (of a list made on the device: of its room, an upper bound)."""
    of_keys, of_values = _PRODUCTS[name]
    turns = grid[0] * grid[1] * listed.shape[2]
    pairs = turns * cfg.block_q * cfg.block_k
    width = of_keys * inputs[1][1].shape[3] + of_values * inputs[2][1].shape[3]
    blocks = {"q": cfg.block_q, "k": cfg.block_k}  # the side that a turn brings in anew
    inner = "q" if listed.by_keys else "k"
    moved = sum(
        turns * blocks[inner] * x.shape[3] * x.dtype.itemsize
        if side == inner
        else x.size * x.dtype.itemsize
        for side, x in inputs
    )
    moved += sum(math.prod(o.shape) * o.dtype.itemsize for o in outputs)
    return pl.CostEstimate(flops=2 * pairs * width, bytes_accessed=moved, transcendentals=pairs)


def forward(cfg: Config, q, k, v, scalars, steps, vectors):
    """[o [B,N,T,H'], lse [B,N,1,T]] and, if asked, the work [B N nq]."""
    (B, N, T, _), width, bq = q.shape, v.shape[3], cfg.block_q
    count = len(cfg.axes)

    def kernel(*refs):
        scalars, (q, k, v), refs = refs[:4], refs[4:7], refs[7:]
        vectors, (o, lse, *work), (m_ref, l_ref, acc) = refs[:count], refs[count:-3], refs[-3:]
        turn = _Turn(cfg, cfg.rows, scalars, vectors)

        @pl.when(turn.first)
        def _():
            m = scalars[3][turn.head] if cfg.sinks else -jnp.inf
            m_ref[...] = jnp.full(m_ref.shape, m, jnp.float32)
            l_ref[...] = jnp.where(m_ref[...] == -jnp.inf, 0.0, 1.0)
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            for ref in work:
                ref[_counter(turn, N, T // bq)] = 0

        @turn.visit
        def _(partial):
            vj = v[...]
            s, _ = turn.scores(_dot(q[...], k[...], (1, 1)))
            if partial:
                s = jnp.where(_bad_in_lanes(vj), jnp.nan, s)
                s = jnp.where(turn.allowed(), s, -jnp.inf)
                vj = _clean(vj)
            m = m_ref[:, :1]
            top = jnp.maximum(m, s.max(-1, keepdims=True))
            safe = jnp.where(top == -jnp.inf, 0.0, top)
            p, decay = jnp.exp(s - safe), jnp.exp(m - safe)
            total = decay * l_ref[:, :1] + p.sum(-1, keepdims=True)
            m_ref[...] = jnp.broadcast_to(top, m_ref.shape)
            l_ref[...] = jnp.broadcast_to(total, l_ref.shape)
            acc[...] = decay * acc[...] + _dot(p.astype(vj.dtype), vj, (1, 0))
            for ref in work:
                ref[_counter(turn, N, T // bq)] += 1

        @pl.when(turn.last)
        def _():
            l = l_ref[...]
            nothing = l == 0
            l = jnp.where(nothing, 1.0, l)
            o[...] = (acc[...] / l[:, :1]).astype(o.dtype)
            lse[...] = jnp.where(nothing, -jnp.inf, m_ref[...] + jnp.log(l)).T[:1]

    inputs = [("q", q), ("k", k), ("k", v), *_handed(cfg, vectors)]
    outputs = [("q", (B, N, T, width), v.dtype), ("q^", (B, N, 1, T), jnp.float32)]
    scratch = [(bq, LANES), (bq, LANES), (bq, width)]
    grid = (B, N, steps[2])
    return _call(
        cfg, cfg.rows, kernel, grid, (*steps[:2], *scalars), inputs, outputs, scratch,
        "block_sparse_o",
    )  # fmt: skip


def _counter(turn: _Turn, heads: int, rows: int):
    return (turn.batch * heads + turn.head) * rows + turn.row


def _handed(cfg: Config, vectors):
    sides = (axis if axis == "stored" else axis + "^" for axis in cfg.axes)
    return list(zip(sides, vectors))


def backward_q(cfg: Config, q, k, v, do, far, delta, scalars, steps, vectors):
    """dq [B,N,T,H]; `far` is lse, +inf in rows without keys, [B,N,1,T] as delta."""
    B, N, _, H = q.shape

    def kernel(*refs):
        scalars, (q, k, v, do, far, delta), refs = refs[:4], refs[4:10], refs[10:]
        *vectors, dq, acc = refs
        turn = _Turn(cfg, cfg.rows, scalars, vectors)

        @pl.when(turn.first)
        def _():
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        @turn.visit
        def _(partial):
            kj = k[...]
            s, slope = turn.scores(_dot(q[...], kj, (1, 1)))
            p = jnp.exp(s - far[0][:, None])
            ds = p * (_dot(do[...], v[...], (1, 1)) - delta[0][:, None])
            ds = ds if slope is None else ds * slope
            if partial:
                ds = jnp.where(turn.allowed(), ds, 0.0)
                kj = _clean(kj)
            acc[...] += _dot(ds.astype(kj.dtype), kj, (1, 0))

        @pl.when(turn.last)
        def _():
            dq[...] = (acc[...] * cfg.scale).astype(dq.dtype)

    inputs = [("q", q), ("k", k), ("k", v), ("q", do), ("q^", far), ("q^", delta)]
    inputs += _handed(cfg, vectors)
    outputs = [("q", q.shape, q.dtype)]
    return _call(
        cfg, cfg.rows, kernel, (B, N, steps[2]), (*steps[:2], *scalars), inputs, outputs,
        [(cfg.block_q, H)], "block_sparse_dq",
    )[0]  # fmt: skip


def backward_kv(cfg: Config, q, k, v, do, far, delta, scalars, steps, vectors):
    """dk [B,K,S,H], dv [B,K,S,H']: scores are [keys, queries] here."""
    B, K, _, H = k.shape

    def kernel(*refs):
        scalars, (q, k, v, do, far, delta), refs = refs[:4], refs[4:10], refs[10:]
        *vectors, dk, dv, dk_acc, dv_acc = refs
        turn = _Turn(cfg, cfg.columns, scalars, vectors)

        @pl.when(turn.first)
        def _():
            dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
            dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

        @turn.visit
        def _(partial):
            qi, doi = q[...], do[...]
            s, slope = turn.scores(_dot(k[...], qi, (1, 1)))
            p = jnp.exp(s - far[...])
            ds = p * (_dot(v[...], doi, (1, 1)) - delta[...])
            ds = ds if slope is None else ds * slope
            if partial:
                ok = turn.allowed()
                p = jnp.where(ok, jnp.where(_bad_in_lanes(doi), jnp.nan, p), 0.0)
                ds = jnp.where(ok, ds, 0.0)
                qi, doi = _clean(qi), _clean(doi)
            dv_acc[...] += _dot(p.astype(doi.dtype), doi, (1, 0))
            dk_acc[...] += _dot(ds.astype(qi.dtype), qi, (1, 0))

        @pl.when(turn.last)
        def _():
            dk[...] = (dk_acc[...] * cfg.scale).astype(dk.dtype)
            dv[...] = dv_acc[...].astype(dv.dtype)

    inputs = [("q", q), ("k", k), ("k", v), ("q", do), ("q^", far), ("q^", delta)]
    inputs += _handed(cfg, vectors)
    outputs = [("k", k.shape, k.dtype), ("k", v.shape, v.dtype)]
    scratch = [(cfg.block_k, H), (cfg.block_k, v.shape[3])]
    return _call(
        cfg, cfg.columns, kernel, (B, K, steps[2]), (*steps[:2], *scalars), inputs, outputs,
        scratch, "block_sparse_dkv",
    )  # fmt: skip
