"""Masks and their formulas, written out a second time as oracles: what the tests of masks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from causal_jax import masks as M

T, S = 22, 26
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 4, (2, 26)), 1).astype(np.int32)
IDS[1, 20:] = -1
BLOCKS = RNG.integers(-1, 6, (2, 3, 5, 2)).astype(np.int32)
CHOICE = RNG.random((2, 26)) < 0.2
ARRAY = RNG.random((1, 3, T, S)) < 0.1


def even_sum(b, h, i, j):
    return (i + j) % 2 == 0


def near_block(b, h, i, j, x):
    return jnp.abs(x[b, jnp.clip(i, 0, 25)] - j) < 3


# name: (mask, formula); the formulas are the oracle, written out once more, entry by entry
STATIC = {
    "full": (M.Full(), lambda b, h, i, j: True),
    "none": (~M.Full(), lambda b, h, i, j: False),
    "causal": (M.Causal(), lambda b, h, i, j: j <= i),
    "causal+2": (M.Causal(2), lambda b, h, i, j: j <= i + 2),
    "causal-3": (M.Causal(-3), lambda b, h, i, j: j <= i - 3),
    "window": (M.Window(4, 2), lambda b, h, i, j: i - 4 <= j <= i + 2),
    "left": (M.Window(3, None), lambda b, h, i, j: j >= i - 3),
    "right": (M.Window(None, 0), lambda b, h, i, j: j <= i),
    "sinks": (M.Sinks(3), lambda b, h, i, j: j < 3),
    "prefix": (M.Prefix(7), lambda b, h, i, j: j < 7),
    "chunked": (M.Chunked(5), lambda b, h, i, j: i // 5 == j // 5),
    "strided": (M.Strided(4), lambda b, h, i, j: (i - j) % 4 == 0),
    "strided1": (M.Strided(1), lambda b, h, i, j: True),
    "dilated": (M.Dilated(3, 4), lambda b, h, i, j: (i - j) in (0, 4, 8)),
    "dilated1": (M.Dilated(6, 1), lambda b, h, i, j: 0 <= i - j < 6),
    "keys": (M.Keys((1, 2, 9)), lambda b, h, i, j: j in (1, 2, 9)),
    "queries": (M.Queries(range(4, 8)), lambda b, h, i, j: 4 <= i < 8),
    "blocks": (M.BlockList(BLOCKS, 5, 4), lambda b, h, i, j: j // 4 in BLOCKS[b, h, i // 5]),
    "dense": (M.Dense(M.constant(ARRAY)), lambda b, h, i, j: ARRAY[0, h, i, j]),
    "fn": (M.from_fn(even_sum), lambda b, h, i, j: (i + j) % 2 == 0),
    "heads": (
        M.HeadSplit((M.Causal(), M.Window(1, 1), M.Causal())),
        lambda b, h, i, j: abs(i - j) <= 1 if h == 1 else j <= i,
    ),
    "streaming": (M.streaming(4, 2), lambda b, h, i, j: j <= i and (j >= i - 4 or j < 2)),
    "longformer": (
        M.longformer(2, (0, 9)),
        lambda b, h, i, j: abs(i - j) <= 2 or i in (0, 9) or j in (0, 9),
    ),
    "longformer-causal": (
        M.longformer(2, 1, causal=True),
        lambda b, h, i, j: j <= i and (i - j <= 2 or j == 0),
    ),
    "strided-sparse": (
        M.strided_sparse(5),
        lambda b, h, i, j: j <= i and (i - j < 5 or (i - j) % 5 == 0),
    ),
}
TRACED = {
    "prefix": (M.Prefix(np.array([3, 17])), lambda b, h, i, j: j < (3, 17)[b]),
    "documents": (M.Documents(IDS), lambda b, h, i, j: IDS[b, i] == IDS[b, j]),
    "cross": (M.Documents(IDS, IDS[:1, ::-1]), lambda b, h, i, j: IDS[b, i] == IDS[0, 25 - j]),
    "keys": (M.Keys(CHOICE), lambda b, h, i, j: CHOICE[b, j]),
    "queries": (M.Queries(CHOICE[0]), lambda b, h, i, j: CHOICE[0, i]),
    "blocks": (
        M.BlockList(jnp.asarray(BLOCKS), 5, 4),
        lambda b, h, i, j: j // 4 in BLOCKS[b, h, i // 5],
    ),
    "dense": (M.Dense(ARRAY), lambda b, h, i, j: ARRAY[0, h, i, j]),
    "valid": (M.Dense(CHOICE[:, None, None]), lambda b, h, i, j: CHOICE[b, j]),
    "fn": (
        M.from_fn(near_block, jnp.asarray(IDS), batch=2),
        lambda b, h, i, j: abs(IDS[b, i] - j) < 3,
    ),
    "mutual": (
        M.modality_mutual(jnp.asarray(CHOICE), jnp.asarray(~CHOICE)),
        lambda b, h, i, j: j <= i or (CHOICE[b, i] and not CHOICE[b, j]),
    ),
    "packed": (
        M.Causal() & M.Window(6, 0) & M.Documents(IDS),
        lambda b, h, i, j: 0 <= i - j <= 6 and IDS[b, i] == IDS[b, j],
    ),
}
ALL = {f"static-{k}": v for k, v in STATIC.items()} | {f"traced-{k}": v for k, v in TRACED.items()}


def host_dense(mask, rows=T, cols=S):
    """The mask in numpy, element by element: for static masks."""
    axes = (np.arange(n) for n in (mask.batch, mask.heads, rows, cols))
    return mask(*np.meshgrid(*axes, indexing="ij", sparse=True))


# Descriptions, built into masks by the test: name, arguments.
LEAVES = st.one_of(
    st.sampled_from([(name, ()) for name, (m, _) in STATIC.items() if m.batch == m.heads == 1]),
    st.tuples(st.just(M.Causal), st.tuples(st.integers(-30, 30))),
    st.tuples(
        st.just(M.Window),
        st.tuples(st.integers(0, 30) | st.none(), st.integers(0, 30) | st.none()),
    ),
    st.tuples(st.just(M.Dilated), st.tuples(st.integers(1, 5), st.integers(1, 9))),
    st.tuples(st.sampled_from([M.Strided, M.Chunked]), st.tuples(st.integers(1, 30))),
    st.tuples(st.sampled_from([M.Sinks, M.Prefix]), st.tuples(st.integers(0, 30))),
    st.tuples(
        st.sampled_from([M.Keys, M.Queries]), st.tuples(st.sets(st.integers(0, 30), max_size=9))
    ),
    st.tuples(
        st.just(lambda seed, bq, bk: M.BlockList(_random_blocks(seed), bq, bk)),
        st.tuples(st.integers(0, 99), st.integers(4, 9), st.integers(2, 9)),
    ),
)
ARRAY_LEAVES = st.sampled_from([("traced", name) for name in TRACED] + [("causal", ())])


def _random_blocks(seed):
    return np.random.default_rng(seed).integers(-1, 9, (8, 2))


def combined(leaves, most):
    def grow(inner):
        pairs = st.tuples(st.sampled_from(["&", "|", "heads"]), st.tuples(inner, inner))
        return pairs | st.tuples(st.just("~"), st.tuples(inner))

    return st.recursive(leaves, grow, max_leaves=most)


def built(tree):
    what, args = tree
    if what == "traced":
        return TRACED[args][0]
    if what in STATIC:
        return STATIC[what][0]
    if callable(what):
        return what(*args)
    parts = [built(a) for a in args]
    if what == "~":
        return ~parts[0]
    if what == "heads" and all(p.heads == 1 for p in parts):
        return M.HeadSplit((parts[0], parts[1], parts[0]))
    return parts[0] | parts[1] if what == "|" else parts[0] & parts[1]


def assert_map(bm, dense, exact=False):
    """Everything a map promises, against the dense mask [B, N, T, S]."""
    bm = jax.tree.map(np.asarray, bm)  # on the host its methods need no compilation
    cnt, idx, kind = (np.asarray(x) for x in (bm.cnt, bm.idx, bm.kind))
    assert cnt.dtype == idx.dtype == kind.dtype == np.int32
    slot = np.arange(idx.shape[-1])
    valid = slot < cnt[..., None]
    rising = np.diff(idx, axis=-1) > 0
    assert (rising | ~valid[..., 1:]).all()
    last = np.take_along_axis(idx, np.maximum(cnt - 1, 0)[..., None], -1)
    assert (np.where(valid, last, idx) == last).all()
    np.testing.assert_array_equal(kind > 0, valid)
    nq, nk = bm.num_tiles
    grid, covered = np.asarray(bm.tiles()), np.asarray(bm.to_dense())
    if bm.transposed:
        grid = grid.swapaxes(-1, -2)
    shape = np.broadcast_shapes(grid.shape[:2], dense.shape[:2])
    assert grid.shape[2:] == (nq, nk)
    assert (covered | ~dense).all()
    padded = np.zeros((*dense.shape[:2], nq * bm.block_q, nk * bm.block_k), bool)
    padded[:, :, : bm.T, : bm.S] = dense
    tiles = padded.reshape(*dense.shape[:2], nq, bm.block_q, nk, bm.block_k)
    tiles_any, tiles_all = (
        np.broadcast_to(f((3, 5)), (*shape, nq, nk)) for f in (tiles.any, tiles.all)
    )
    grid = np.broadcast_to(grid, (*shape, nq, nk))
    assert tiles_all[grid == 2].all()  # also at the edge: the padded entries count as hidden
    assert not tiles_any[grid == 0].any()
    if exact:
        np.testing.assert_array_equal(grid > 0, tiles_any)
    assert int(bm.num_live) == cnt.sum() == (np.asarray(bm.tiles()) > 0).sum()
    assert float(bm.sparsity) == pytest.approx(1 - (np.asarray(bm.tiles()) > 0).mean())
