"""The kernels of `tpu.py`: forward, states before the chunks, backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import pl, pltpu, tpu_call
from pallas_kernels.gated_linear.halves import decays, levels, part

CHUNKED, KEYS, HEADS = "chunked", "keys", "heads"  # how an array is cut over the grid


def _dot(a, b, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


class _Chunk:
    """What a program knows of its chunk before it looks at queries.

    `reads` and `writes` are what a query sees of the state before, and what a key leaves in the
    state after; `decay` [1, F] is what remains of the former in the latter.
    """

    def __init__(self, cfg, ids, row, k, v, g):
        C = cfg.chunk
        self.k, self.v = (x[0, 0, 0].astype(jnp.float32) for x in (k, v))
        self.tree, self.reads, self.writes = decays(g[0, 0, 0], _dot)
        self.decay = self.reads[C - 1 : C]
        self.i, self.j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        self.same = None
        if cfg.documents:
            ids = ids[0, 0]
            own, before = ids[:, :1], ids[:, 1:]
            last = own[C - 1 : C]
            self.same = own == row[0, 0]
            self.reads = jnp.where(own == before, self.reads, 0)
            self.writes = jnp.where(own == last, self.writes, 0)
            self.decay = jnp.where(last == before[:1], self.decay, 0)

    def pairs(self, level: int, x):
        """The pairs of one level of a matrix [C, C]; -1: those of a position and itself."""
        x = jnp.where(self.i == self.j if level < 0 else part(level, self.i, self.j), x, 0)
        return x if self.same is None else jnp.where(self.same, x, 0)

    def weights(self, q):
        """A: what each query makes of each key [C, C]."""
        a = self.pairs(-1, jnp.broadcast_to((q * self.k).sum(1, keepdims=True), self.i.shape))
        for level, x in enumerate(self.tree):
            a = a + self.pairs(level, _dot(q * x, self.k * x, (1, 1)))
        return a

    def after(self, state):
        """The state [V, F] behind the chunk."""
        return state * self.decay + _dot(self.v, self.k * self.writes, (0, 0))


def _forward_kernel(cfg, ids, row, q, k, v, g, first, o, end, scratch):
    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = first[0, 0]

    it, state = _Chunk(cfg, ids, row, k, v, g), scratch[...]
    for head in range(q.shape[1]):
        qi = q[0, head, 0].astype(jnp.float32)
        o[0, head, 0] = _dot(it.weights(qi), it.v) + _dot(qi * it.reads, state, (1, 1))
    scratch[...] = it.after(state)
    end[0, 0] = scratch[...]


def _states_kernel(cfg, ids, row, k, v, g, first, states, scratch):
    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = first[0, 0]

    states[0, 0, 0] = scratch[...]
    scratch[...] = _Chunk(cfg, ids, row, k, v, g).after(scratch[...])


def _backward_kernel(
    cfg, ids, row, q, k, v, g, states, do, dend, dq, dk, dv, dg, dfirst, scratch
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)  # the last chunk: they come in reverse
    def _():
        scratch[...] = dend[0, 0]

    it, before, after = _Chunk(cfg, ids, row, k, v, g), states[0, 0, 0], scratch[...]
    dki = it.writes * _dot(it.v, after)
    dvi = _dot(it.k * it.writes, after, (1, 1))
    tail = (it.after(before) * after).sum(0, keepdims=True)
    state, moved = after * it.decay, jnp.zeros_like(it.k)
    for head in range(q.shape[1]):
        qi, doi = q[0, head, 0].astype(jnp.float32), do[0, head, 0]
        da = _dot(doi, it.v, (1, 1))
        own = it.pairs(-1, da).sum(1, keepdims=True)
        dqi = it.reads * _dot(doi, before) + own * it.k
        dki = dki + own * qi
        for level, x in enumerate(it.tree):
            dal = it.pairs(level, da)
            dqi = dqi + x * _dot(dal, it.k * x)
            dki = dki + x * _dot(dal, qi * x, (0, 0))
        dvi = dvi + _dot(it.weights(qi), doi, (0, 0))
        state = state + _dot(doi, qi * it.reads, (0, 0))
        moved = moved + qi * dqi
        dq[0, head, 0] = dqi
    dk[0, 0, 0], dv[0, 0, 0] = dki, dvi
    later = (it.j >= it.i).astype(jnp.float32)
    dg[0, 0, 0] = _dot(later, moved - it.k * dki) + tail
    scratch[...] = state
    dfirst[0, 0] = state


def forward(cfg, ids, q, k, v, g, first) -> tuple[jax.Array, jax.Array]:
    """o [B, N, chunks, C, V] and the state [B, K, V, F] after the last chunk."""
    out = [_float(*q.shape[:4], v.shape[-1]), _float(*first.shape)]
    inputs = [(q, HEADS), (k, CHUNKED), (v, CHUNKED), (g, CHUNKED), (first, KEYS)]
    return _call(cfg, _forward_kernel, "gated_linear_forward", ids, inputs, out, [HEADS, KEYS])


def states(cfg, ids, k, v, g, first) -> jax.Array:
    """The states before the chunks, [B, K, chunks, V, F]."""
    B, K, n = k.shape[:3]
    out = [_float(B, K, n, *first.shape[2:])]
    inputs = [(k, CHUNKED), (v, CHUNKED), (g, CHUNKED), (first, KEYS)]
    return _call(cfg, _states_kernel, "gated_linear_states", ids, inputs, out, [CHUNKED])[0]


def backward(cfg, ids, q, k, v, g, before, do, dend) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v, g and of the state before the first chunk, float32."""
    out = [_float(*x.shape) for x in (q, k, v, g, dend)]
    inputs = [
        (q, HEADS), (k, CHUNKED), (v, CHUNKED), (g, CHUNKED), (before, CHUNKED), (do, HEADS),
        (dend, KEYS),
    ]  # fmt: skip
    cuts = [HEADS, CHUNKED, CHUNKED, CHUNKED, KEYS]
    name = "gated_linear_backward"
    return _call(cfg, _backward_kernel, name, ids, inputs, out, cuts, reverse=True)


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(cfg, kernel, name: str, ids, inputs, out, cuts, *, reverse: bool = False) -> Any:
    """Run a kernel over (batch rows, key heads, chunks), the chunks in order or in reverse."""
    named = {cut: x for x, cut in inputs}
    (B, K, n), (V, F) = named[CHUNKED].shape[:3], named[KEYS].shape[2:]

    def at(c):
        return n - 1 - c if reverse else c

    def spec(shape, cut: str):
        if cut == KEYS:
            return pl.BlockSpec((1, 1, *shape[2:]), lambda b, h, c: (b, h, 0, 0))
        return pl.BlockSpec(
            (1, shape[1] // K, 1, *shape[3:]), lambda b, h, c: (b, h, at(c), 0, 0)
        )  # a group's query heads follow one another

    listed = [pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, c: (b, at(c), 0, 0)) for x in ids]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=(B, K, n),
        in_specs=[*listed, *(spec(x.shape, cut) for x, cut in inputs)],
        out_specs=[spec(x.shape, cut) for x, cut in zip(out, cuts)],
        scratch_shapes=[pltpu.VMEM((V, F), jnp.float32)],
    )
    arrays = [*ids, *(x for x, _ in inputs)]
    run = tpu_call(
        functools.partial(kernel, cfg),
        grid_spec=grid,
        out_shape=out,
        semantics=("parallel", "parallel", "arbitrary"),
        interpret=cfg.interpret,
        name=name,
        cost_estimate=_cost(cfg, kernel, inputs, arrays, out),
    )
    return run(*arrays)


def _cost(cfg, kernel, inputs, arrays, out) -> pl.CostEstimate:
    """Operations, bytes and exponentials of all programs."""
    shapes, C = {cut: x.shape for x, cut in inputs}, cfg.chunk
    (B, K, n), (V, F) = shapes[CHUNKED][:3], shapes[KEYS][2:]
    group, tree = shapes.get(HEADS, (B, K))[1] // K, levels(C) * C * C * F
    shared, each = tree + 2 * C * C * F + C * F * V, 0
    if kernel is _forward_kernel:
        each = tree + C * C * V + C * F * V
    elif kernel is _backward_kernel:
        shared, each = shared + 2 * C * F * V + C * C * F, 3 * tree + 2 * C * C * V + 2 * C * F * V
    return pl.CostEstimate(
        flops=2 * B * K * n * (shared + group * each),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*arrays, *out]),
        transcendentals=B * K * n * (levels(C) + 2) * C * F,
    )
