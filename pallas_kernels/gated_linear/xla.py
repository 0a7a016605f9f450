"""Gated linear attention in chunks, in plain XLA: time and memory linear in the length.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = q_t^T S_t        g <= 0, one per feature

Between positions i >= j lies the decay exp(sum of g over j+1 .. i), which must never be split into
exp(b_i) exp(-b_j): the second factor overflows. Here every exponent that is formed is a sum of some
g, so at most 0. Blocks are joined in pairs, 8 -> 16 -> 32 -> 64: a row of the second block decays
from the block's beginning (`since`), a column of the first to its end (`until`), and their product
is a matrix product. Inside the smallest blocks the decays of all pairs are written out. Chunks of
the final size then exchange their states, one after another. In long sequences whose chunks all
decay by less than 20 nats (gates of trained models do), each chunk is one product instead.

Everything is float32; gradients are those of autodiff, the pairs of the smallest blocks recomputed.
arXiv 2312.06635 (section 4), with its secondary chunking as a binary tree.
"""

import functools

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
    n, padding = -(-T // chunk), -T % chunk

    def cut(x):  # [B, T, K, ...] -> float32 [B, K, T / 8, 8, ...]
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x, 1, 2).reshape(B, K, -1, SMALLEST, *x.shape[3:])

    q, k, v, g = cut(q.reshape(B, T, K, N // K, F)), cut(k), cut(v), cut(g)
    if document is not None:
        document = jnp.pad(document, ((0, 0), (0, padding)), mode="edge")
    docs = None if document is None else document.reshape(B, 1, -1, SMALLEST)

    def joined():
        o = jax.checkpoint(_pairs)(q, k, v, g, docs)
        return _join(q, k, v, o, jnp.cumsum(g, 3), _until(g), docs, chunk)

    def at_once():
        blocks = [_blocks(x, chunk) for x in (q, k, v, g)]
        return _at_once(*blocks, docs=docs)

    if T < AT_ONCE:  # not worth compiling both
        parts = joined()
    else:
        mild = _blocks(g, chunk).sum(3).min() > -MILD
        parts = lax.cond(mild, at_once, joined)

    def whole(x):  # [B, K, blocks, size, ...] -> [n, B, K, chunk, ...]
        return jnp.moveaxis(_blocks(x, chunk), 2, 0)

    o, since, until = parts
    q, k, v, since, until = (whole(x) for x in (q, k, v, since, until))
    decay = jnp.exp(since[..., -1, :])
    reads, writes = q * jnp.exp(since)[..., None, :], k * jnp.exp(until)
    if document is not None:
        docs = jnp.moveaxis(document.reshape(B, n, chunk), 1, 0)
        last = docs[..., -1]
        before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
        same = (docs == before[..., None])[:, :, None, :, None, None]
        reads = jnp.where(same, reads, 0)
        writes = jnp.where((docs == last[..., None])[:, :, None, :, None], writes, 0)
        decay = jnp.where((last == before)[:, :, None, None], decay, 0)
    new = _einsum("nbkcf,nbkcv->nbkfv", writes, v)

    def step(state, xs):
        decay, new = xs
        return decay[..., None] * state + new, state

    state, states = lax.scan(step, state.astype(jnp.float32), (decay, new))
    o = whole(o) + _einsum("nbkcgf,nbkfv->nbkcgv", reads, states)
    o = o.transpose(1, 0, 3, 2, 4, 5).reshape(B, n * chunk, N, V)
    return o[:, :T], state


def _blocks(x, size):
    """[B, K, blocks, c, ...] -> [B, K, blocks', size, ...]."""
    return x.reshape(*x.shape[:2], -1, size, *x.shape[4:])


def _at_once(q, k, v, g, docs):
    """o, since and until of whole chunks whose gates close so little that the decay may be split.

    Rows decay from the middle of the chunk, columns to it: both factors stay within exp(20).
    """
    b, size = jnp.cumsum(g, 3), g.shape[3]
    middle = b[..., size // 2, :][..., None, :]
    rows, columns = q * jnp.exp(b - middle)[..., None, :], k * jnp.exp(middle - b)
    w = _einsum("bkmigf,bkmjf->bkmigj", rows, columns)
    i = jnp.arange(size)
    seen = (i[:, None] >= i[None])[None, None, None]
    if docs is not None:
        docs = _blocks(docs, size)
        seen = seen & (docs[..., :, None] == docs[..., None, :])
    w = jnp.where(seen[:, :, :, :, None], w, 0)
    return _einsum("bkmigj,bkmjv->bkmigv", w, v), b, _until(g)


def _until(g):
    """Log decay from each position to the end of its block: the sum of the later g."""
    later = jnp.pad(g[..., 1:, :], ((0, 0),) * (g.ndim - 2) + ((0, 1), (0, 0)))
    return lax.cumsum(later, axis=g.ndim - 2, reverse=True)


def _pairs(q, k, v, g, docs):
    """o of the smallest blocks alone, every pair with its own decay: [B, K, m, c, G, V]."""
    b, i = jnp.cumsum(g, 3), jnp.arange(SMALLEST)
    seen = (i[:, None] >= i[None])[None, None, None]
    if docs is not None:
        seen = seen & (docs[..., :, None] == docs[..., None, :])
    # the mask is put on the exponent: exp of a masked one could be inf, its gradient NaN
    decay = jnp.where(seen[..., None], b[..., :, None, :] - b[..., None, :, :], -jnp.inf)
    keys = k[..., None, :, :] * jnp.exp(decay)
    w = jnp.sum(q[..., :, None, :, :] * keys[..., None, :], -1)  # [B, K, m, i, j, G]
    return _einsum("bkmijg,bkmjv->bkmigv", w, v)


def _join(q, k, v, o, since, until, docs, chunk):
    """Join blocks in pairs until they have `chunk` positions."""
    size = SMALLEST
    while size < chunk:

        def halves(x, size=size):
            x = x.reshape(*x.shape[:2], -1, 2, size, *x.shape[4:])
            return x[:, :, :, 0], x[:, :, :, 1]

        (_, q2), (k1, _), (v1, _), (o1, o2) = (halves(x) for x in (q, k, v, o))
        (since1, since2), (until1, until2) = halves(since), halves(until)
        rows, columns = q2 * jnp.exp(since2)[..., None, :], k1 * jnp.exp(until1)
        w = _einsum("bkmigf,bkmjf->bkmigj", rows, columns)
        if docs is not None:
            d1, d2 = halves(docs)
            w = jnp.where((d2[..., :, None] == d1[..., None, :])[:, :, :, :, None], w, 0)
        o2 = o2 + _einsum("bkmigj,bkmjv->bkmigv", w, v1)
        first = since1[..., -1:, :]
        second = since2[..., -1:, :]
        joined = ((o1, o2), (since1, since2 + first), (until1 + second, until2))
        size *= 2

        def both(pair, size=size):
            x = jnp.stack(pair, 3)
            return x.reshape(*x.shape[:3], size, *x.shape[5:])

        o, since, until = (both(pair) for pair in joined)
    return o, since, until
