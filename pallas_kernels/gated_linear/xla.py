"""Gated linear attention in chunks, in plain XLA: time and memory linear in the length.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = q_t^T S_t        g <= 0, one per feature

Between positions i >= j lies the decay exp(sum of g over j+1 .. i), which must never be split into
exp(b_i) exp(-b_j): the second factor overflows. Here every exponent that is formed is a sum of some
g, so at most 0. Blocks meet in pairs, 8 -> 16 -> 32 -> 64: a row of the second block decays from
the block's beginning (`since`), a column of the first to its end (`until`), and their product is a
matrix product. Inside the smallest blocks the decays of all pairs are written out. Chunks of the
final size then exchange their states, one after another. In long sequences whose chunks all decay
by less than 20 nats (gates of trained models do), each chunk is one product instead.

Everything is float32. Sums of products are written as einsums: as reductions XLA of jaxlib 0.10.2
ends the process at larger sizes on a CPU (its library YNNPACK faults). The backward pass is written
by hand and keeps the inputs only: products are made again, the gradient of the state goes back from
chunk to chunk, and that of the gates is

    dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) in the chunk + sum_v S dS at its end

arXiv 2312.06635 (section 4), with its secondary chunking as a binary tree.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

SMALLEST = 8  # positions of a block whose pairs are written out
AT_ONCE = 512  # positions from which on chunks of mild decay are done as one product each
MILD = 20.0  # largest decay of a chunk in nats: exp(20) is far from overflow, and costs no digits


def gated_linear_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    state: jax.Array,
    document: jax.Array | None = None,
    *,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of all positions and the state after the last.

    Args:
        q: [B, T, N, F] features of queries; head h reads key head h // (N / K).
        k: [B, T, K, F] features of keys; 0: the key is not there.
        v: [B, T, K, V].
        g: [B, T, K, F] logs of gates, at most 0.
        state: [B, K, F, V], before the first position.
        document: [B, T] int32, not decreasing: the state is 0 where it steps up; 0 goes on from
            `state`. None: one document.
        chunk: positions of a chunk, a power of two of at least 8.

    Returns:
        (o [B, T, N, V], state [B, K, F, V]), float32.
    """
    if chunk < SMALLEST or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk}: expected a power of two, at least {SMALLEST}")
    (B, T, N, F), (K, V) = q.shape, v.shape[2:]
    while chunk // 2 >= max(T, SMALLEST):
        chunk //= 2
    padding = -T % chunk

    def cut(x):  # [B, T, K, ...] -> float32 [B, K, n, chunk, ...]
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x, 1, 2).reshape(B, K, -1, chunk, *x.shape[3:])

    if document is not None:
        document = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")
        document = document.astype(jnp.int32).reshape(B, 1, -1, chunk)
    o, state = _attend(
        cut(q.reshape(B, T, K, N // K, F)), cut(k), cut(v), cut(g), state.astype(jnp.float32),
        document,
    )  # fmt: skip
    o = o.transpose(0, 2, 3, 1, 4, 5).reshape(B, T + padding, N, V)
    return o[:, :T], state


class _Ends(NamedTuple):
    """What a chunk has to do with those around it, [B, K, n, C, F] and [B, K, n, F]."""

    reads: jax.Array  # what a query sees of the state before
    writes: jax.Array  # what of a key is left in the state after
    decay: jax.Array  # what of the state before


def _ends(g, docs) -> _Ends:
    reads, writes = jnp.exp(jnp.cumsum(g, 3)), jnp.exp(_until(g))
    decay = reads[..., -1, :]
    if docs is not None:
        last = docs[..., -1:]
        before = jnp.pad(last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        reads = jnp.where((docs == before)[..., None], reads, 0)
        writes = jnp.where((docs == last)[..., None], writes, 0)
        decay = jnp.where(last == before, decay, 0)
    return _Ends(reads, writes, decay)


def _until(g):
    """Log decay from each position to the end of its block: the sum of the later g."""
    later = jnp.pad(g[..., 1:, :], ((0, 0),) * (g.ndim - 2) + ((0, 1), (0, 0)))
    return lax.cumsum(later, axis=g.ndim - 2, reverse=True)


def _states(ends: _Ends, k, v, state) -> tuple[jax.Array, jax.Array]:
    """The states before the chunks [n, B, K, F, V], and that after the last."""
    new = _einsum("bkncf,bkncv->nbkfv", k * ends.writes, v)

    def step(state, xs):
        decay, new = xs
        return decay[..., None] * state + new, state

    end, before = lax.scan(step, state, (jnp.moveaxis(ends.decay, 2, 0), new))
    return before, end


def _inside(g, run: Callable[[Callable], Any]) -> Any:
    """`run(pairs)` with the cheapest way to go through the pairs of a chunk."""
    if g.shape[2] * g.shape[3] < AT_ONCE:  # not worth compiling both
        return run(_tree)
    mild = g.sum(3).min() > -MILD
    return lax.cond(mild, lambda: run(_at_once), lambda: run(_tree))


@jax.custom_vjp
def _attend(q, k, v, g, state, docs):
    """o [B, K, n, C, G, V] and the last state; q [B, K, n, C, G, F]."""
    ends = _ends(g, docs)
    before, end = _states(ends, k, v, state)
    o = _inside(g, lambda pairs: pairs(q, k, v, g, docs))
    return o + _einsum("bkncgf,nbkfv->bkncgv", q * ends.reads[..., None, :], before), end


def _attend_fwd(*args):
    return _attend(*args), args


def _attend_bwd(saved, grads):
    (q, k, v, g, state, docs), (do, dend) = saved, grads
    ends = _ends(g, docs)
    before, end = _states(ends, k, v, state)
    reads = ends.reads[..., None, :]
    new = _einsum("bkncgf,bkncgv->nbkfv", q * reads, do)

    def step(after, xs):
        decay, new = xs
        return decay[..., None] * after + new, after

    dstate, after = lax.scan(step, dend, (jnp.moveaxis(ends.decay, 2, 0), new), reverse=True)
    dq, dk, dv = _inside(g, lambda pairs: pairs(q, k, v, g, docs, do))
    dq = dq + reads * _einsum("bkncgv,nbkfv->bkncgf", do, before)
    dk = dk + ends.writes * _einsum("bkncv,nbkfv->bkncf", v, after)
    dv = dv + _einsum("bkncf,nbkfv->bkncv", k * ends.writes, after)
    tail = _einsum("nbkfv,nbkfv->nbkf", jnp.concatenate([before[1:], end[None]]), after)
    moved = _einsum("bkncgf,bkncgf->bkncf", q, dq) - k * dk
    dg = lax.cumsum(moved, axis=3, reverse=True)
    dg = dg + jnp.moveaxis(tail, 0, 2)[..., None, :]
    return dq, dk, dv, dg, dstate, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _products(rows, columns, seen, v, do=None):
    """Weights of one kind of pairs at work: o of the rows, or gradients of rows, columns and v.

    Args:
        rows, columns: decayed queries [B, K, m, i, G, F] and keys [B, K, m, j, F].
        seen: which pairs there are, [B|1, 1, m|1, i, j]; None: all.
        v: of the columns; do: of the rows.
    """
    seen = None if seen is None else seen[:, :, :, :, None]
    only = lambda x: x if seen is None else jnp.where(seen, x, 0)  # noqa: E731
    w = only(_einsum("bkmigf,bkmjf->bkmigj", rows, columns))
    if do is None:
        return _einsum("bkmigj,bkmjv->bkmigv", w, v)
    dw = only(_einsum("bkmigv,bkmjv->bkmigj", do, v))
    return (
        _einsum("bkmigj,bkmjf->bkmigf", dw, columns),
        _einsum("bkmigj,bkmigf->bkmjf", dw, rows),
        _einsum("bkmigj,bkmigv->bkmjv", w, do),
    )


def _at_once(q, k, v, g, docs, do=None):
    """All pairs of chunks whose gates close so little that the decay may be split.

    Rows decay from the middle of the chunk, columns to it: both factors stay within exp(20).
    """
    b, size = jnp.cumsum(g, 3), g.shape[3]
    up = jnp.exp(b - b[..., size // 2, :][..., None, :])
    down = 1 / up
    i = jnp.arange(size)
    seen = (i[:, None] >= i[None])[None, None, None]
    if docs is not None:
        seen = seen & (docs[..., :, None] == docs[..., None, :])
    found = _products(q * up[..., None, :], k * down, seen, v, do)
    if do is None:
        return found
    rows, columns, dv = found
    return rows * up[..., None, :], columns * down, dv


def _tree(q, k, v, g, docs, do=None):
    """All pairs, block by block: the smallest with every decay, then halves of larger ones."""
    size, out = SMALLEST, _smallest(q, k, v, g, docs, do)
    while size < g.shape[3]:
        out = jax.tree.map(jnp.add, out, _halves(q, k, v, g, docs, do, size))
        size *= 2
    return out


def _blocks(x, size):
    """[B, K, n, C, ...] -> [B, K, n C / size, size, ...]."""
    return x.reshape(*x.shape[:2], -1, size, *x.shape[4:])


def _smallest(q, k, v, g, docs, do):
    """The pairs within blocks of 8, each with its own decay."""
    o = (*q.shape[:-1], v.shape[-1])
    shapes = [o] if do is None else [x.shape for x in (q, k, v)]
    q, k, v, g = (_blocks(x, SMALLEST) for x in (q, k, v, g))
    b, i = jnp.cumsum(g, 3), jnp.arange(SMALLEST)
    seen = (i[:, None] >= i[None])[None, None, None]
    if docs is not None:
        docs = _blocks(docs, SMALLEST)
        seen = seen & (docs[..., :, None] == docs[..., None, :])
    decay = jnp.exp(jnp.where(seen[..., None], b[..., :, None, :] - b[..., None, :, :], -jnp.inf))
    keys = k[..., None, :, :] * decay  # [B, K, m, i, j, F]
    w = _einsum("bkmigf,bkmijf->bkmijg", q, keys)
    if do is None:
        out = (_einsum("bkmijg,bkmjv->bkmigv", w, v),)
    else:
        do = _blocks(do, SMALLEST)
        dw = _einsum("bkmigv,bkmjv->bkmijg", do, v)
        back = _einsum("bkmijg,bkmigf->bkmijf", dw, q) * decay
        out = (
            _einsum("bkmijg,bkmijf->bkmigf", dw, keys),
            functools.reduce(jnp.add, (back[:, :, :, i] for i in range(SMALLEST))),
            _einsum("bkmijg,bkmigv->bkmjv", w, do),
        )
    out = tuple(x.reshape(shape) for x, shape in zip(out, shapes))
    return out[0] if do is None else out


def _halves(q, k, v, g, docs, do, size):
    """The pairs of a query in the second half of a block of 2 `size`, a key in the first."""

    def halves(x):
        x = x.reshape(*x.shape[:2], -1, 2, size, *x.shape[4:])
        return x[:, :, :, 0], x[:, :, :, 1]

    def placed(x, half: int, shape):
        zero = jnp.zeros_like(x)
        return jnp.stack((zero, x) if half else (x, zero), 3).reshape(shape)

    (_, q2), (k1, _), (v1, _), (g1, g2) = (halves(x) for x in (q, k, v, g))
    since, until = jnp.exp(jnp.cumsum(g2, 3))[..., None, :], jnp.exp(_until(g1))
    seen = None
    if docs is not None:
        d1, d2 = halves(docs)
        seen = d2[..., :, None] == d1[..., None, :]
    if do is None:
        o = _products(q2 * since, k1 * until, seen, v1)
        return placed(o, 1, (*q.shape[:-1], v.shape[-1]))
    rows, columns, dv = _products(q2 * since, k1 * until, seen, v1, halves(do)[1])
    parts = ((rows * since, 1, q), (columns * until, 0, k), (dv, 0, v))
    return tuple(placed(x, half, like.shape) for x, half, like in parts)
