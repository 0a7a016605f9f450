"""Maps of tiles: they cover the mask, list no dead tile needlessly, never overflow in silence."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import (
    ALL,
    IDS,
    LEAVES,
    RNG,
    STATIC,
    TRACED,
    S,
    T,
    assert_map,
    built,
    combined,
    even_sum,
    host_dense,
)

from causal_jax import masks as M
from causal_jax.errors import InputError

EXACT = [k for k in ALL if k not in ("traced-cross", "traced-packed", "traced-mutual")]


@pytest.mark.parametrize("name", ALL)
def test_block_map(name):
    mask = ALL[name][0]
    dense = np.asarray(mask.to_dense(T, S))

    def build(mask):
        bm = mask.block_map(T, S, 8, 6)
        turned = bm.transpose()
        return bm, turned, bm.tiles(), turned.tiles(), turned.transpose().tiles()

    bm, turned, *grids = build(mask) if mask.is_static else jax.jit(build)(mask)
    assert bm.is_host == mask.is_static == isinstance(bm.cnt, np.ndarray)
    assert_map(bm, dense, exact=name in EXACT)
    assert turned.cnt.shape[-1] == bm.num_tiles[1]
    assert_map(turned, dense, exact=name in EXACT)
    np.testing.assert_array_equal(grids[0].swapaxes(-1, -2), grids[1])
    np.testing.assert_array_equal(grids[0], grids[2])
    np.testing.assert_array_equal(jax.tree.map(np.asarray, bm).tiles(), grids[0])


@given(combined(LEAVES, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=60)
def test_block_map_of_random_compositions(tree, block_q, block_k, offset):
    mask = built(tree)
    bm = mask.block_map(T - offset, S, block_q, block_k, q_offset=offset)
    assert_map(bm, host_dense(mask)[:, :, offset:])


@pytest.mark.parametrize("name", ["causal", "streaming", "blocks", "heads", "dense"])
def test_traced_offsets_equal_static_ones(name):
    mask = STATIC[name][0]
    build = jax.jit(lambda off: mask.block_map(8, S, 4, 5, q_offset=off))
    bm = build(jnp.array([3, 14]))
    for n, offset in enumerate((3, 14)):
        want = mask.block_map(8, S, 4, 5, q_offset=offset).tiles()
        np.testing.assert_array_equal(bm.tiles()[n], want[min(n, want.shape[0] - 1)])
    np.testing.assert_array_equal(build(jnp.array(3)).tiles()[0], bm.tiles()[0])


@pytest.mark.parametrize(
    ("static", "traced"),
    [
        (M.Prefix(7), M.Prefix(jnp.array([7]))),
        (STATIC["blocks"][0], TRACED["blocks"][0]),
        (STATIC["dense"][0], TRACED["dense"][0]),
        (M.Keys((0, 5)), M.Keys(np.isin(np.arange(S), (0, 5)))),
        (M.Causal() & M.Sinks(3), M.Causal() & M.Prefix(np.array(3))),
    ],
    ids=str,
)
def test_traced_equals_static(static, traced):
    assert static.is_static
    assert not traced.is_static
    want, got = static.block_map(T, S, 5, 4), jax.jit(lambda m: m.block_map(T, S, 5, 4))(traced)
    np.testing.assert_array_equal(got.tiles(), want.tiles())
    np.testing.assert_array_equal(got.cnt, want.cnt)
    assert isinstance(want.idx, np.ndarray)
    for row in np.ndindex(*got.cnt.shape):
        np.testing.assert_array_equal(got.idx[row][: got.cnt[row]], want.idx[row][: got.cnt[row]])


@pytest.mark.parametrize("turn", [False, True], ids=["rows", "transposed"])
def test_a_static_map_is_refined_at_run_time(turn):
    static, docs = M.Causal() & M.Window(9, 0), M.Documents(IDS)
    bm = static.block_map(T, S, 4, 4)
    bm = bm.transpose() if turn else bm
    got = jax.jit(lambda docs: bm & docs)(docs)
    assert got.idx.shape[-1] <= bm.idx.shape[-1]  # the static map bounds the lists
    assert_map(got, np.asarray((static & docs).to_dense(T, S)))
    want = (static & docs).block_map(T, S, 4, 4)
    np.testing.assert_array_equal((want.transpose() if turn else want).tiles(), got.tiles())
    assert got.num_live < 2 * bm.num_live  # documents took some
    host = bm & M.Sinks(2)
    assert host.is_host
    assert_map(host, np.asarray((static & M.Sinks(2)).to_dense(T, S)))


def test_refinement_keeps_the_offset():
    bm = M.Causal().block_map(8, S, 4, 4, q_offset=12) & M.Documents(IDS)
    want = np.asarray((M.Causal() & M.Documents(IDS)).to_dense(8, S, q_offset=12))
    assert_map(bm, want, exact=True)


def test_lists_of_blocks_bound_the_map_by_themselves():
    chosen = M.BlockList(jnp.zeros((1, 2, 8, 3), jnp.int32), 16, 16)
    assert chosen.block_map(128, 128, 16, 16).idx.shape[-1] == 3
    assert chosen.block_map(128, 128, 32, 8).idx.shape[-1] == 12
    mixed = M.Causal() & (M.Window(15, 0) | chosen)
    assert mixed.block_map(128, 128, 16, 16).idx.shape[-1] == 5
    assert_map(mixed.block_map(128, 128, 16, 16), np.asarray(mixed.to_dense(128)), exact=True)


def test_overflow_is_never_silent():
    with pytest.raises(InputError, match=r"max_blocks=2.*has 3 live tiles"):
        M.Causal().block_map(12, 12, 4, 4, max_blocks=2)
    docs = M.Causal() & M.Documents(np.zeros((1, 12), np.int32))
    with pytest.raises(InputError, match="max_blocks=2"):
        docs.block_map(12, 12, 4, 4, max_blocks=2)
    bm = jax.jit(lambda m: m.block_map(12, 12, 4, 4, max_blocks=2))(docs)
    assert bool(bm.overflow)
    np.testing.assert_array_equal(bm.cnt, [[[1, 2, 2]]])
    np.testing.assert_array_equal(bm.idx, [[[[0, 0], [0, 1], [0, 1]]]])
    with pytest.raises(InputError, match="max_blocks=2"):
        bm.check()
    fits = jax.jit(lambda m: m.block_map(12, 12, 4, 4, max_blocks=3))(docs)
    assert not bool(fits.check().overflow)
    with pytest.raises(InputError, match="max_blocks=2"):
        fits.transpose(max_blocks=2)


def test_a_long_static_map_takes_milliseconds():
    mask = M.streaming(4095) | M.Dilated(64, 7)
    spent = []
    for n in range(5):  # other offsets: the cache must not help
        start = time.process_time()
        bm = mask.block_map(32768, 32768, 512, 512, q_offset=n * 512)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.05
    assert bm.sparsity > 0.8
    assert mask.block_map(32768, 32768, 512, 512, q_offset=512) is mask.block_map(
        32768, 32768, 512, 512, q_offset=512
    )


def test_from_fn_looks_only_where_others_leave_it_open():
    seen = []

    def fn(b, h, i, j):
        seen.append(int(np.prod(np.broadcast_shapes(b.shape, h.shape, i.shape, j.shape))))
        return (i + j) % 3 == 0

    mask = M.from_fn(fn) & M.Window(15, 0)
    assert_map(mask.block_map(512, 512, 16, 16), np.asarray(mask.to_dense(512)), exact=False)
    assert sum(n for n in seen if n < 512 * 512) <= 2 * 32 * 16 * 16
    lazy = M.from_fn(even_sum, evaluate=False)
    assert (lazy.block_map(16, 16, 4, 4).tiles() == M.PARTIAL).all()
    closed = M.from_fn(even_sum, status=lambda b, h, q0, q1, k0, k1: 1 + (q1 - q0 == k1 - k0) * 0)
    assert (closed.block_map(16, 16, 4, 4).tiles() == M.PARTIAL).all()
    with pytest.raises(InputError, match=r"returned int.*: expected booleans"):
        M.from_fn(lambda b, h, i, j: i - j)(0, 0, 1, 2)


# ---- recipes ----


def test_bigbird_draws_blocks_of_the_past():
    mask = M.bigbird(64, window=3, globals=2, random=2, block=8, heads=2, seed=1)
    assert mask.is_static
    assert mask == M.bigbird(64, window=3, globals=2, random=2, block=8, heads=2, seed=1)
    assert mask != M.bigbird(64, window=3, globals=2, random=2, block=8, heads=2, seed=2)
    dense = host_dense(mask, 64, 64)
    assert dense.shape == (1, 2, 64, 64)
    i, j = np.arange(64)[:, None], np.arange(64)[None]
    base = (i - j <= 3) | (j < 2) | (i < 2)
    assert not dense[0][:, j > i].any()
    assert dense[0][:, base & (j <= i)].all()
    extra = dense[0, :, 56:] & ~base[56:]
    per_block = extra.reshape(2, 8, 8, 8).any((1, 3)).sum(-1)
    assert ((per_block >= 1) & (per_block <= 2)).all()
    assert (dense[0, 0] != dense[0, 1]).any()
    both_ways = host_dense(M.bigbird(64, window=3, random=2, block=8, causal=False), 64, 64)
    assert both_ways[0, 0][j > i + 3].any()


@pytest.mark.parametrize(
    ("block_q", "block_k", "rows", "cols"), [(8, 8, 6, 6), (1, 8, 48, 6), (16, 4, 3, 12)]
)
def test_top_k_blocks(block_q, block_k, rows, cols):
    k = 6
    scores = RNG.normal(size=(2, 2, rows, cols)).astype(np.float32)
    scores[0, 0, 0] = np.nan
    scores[1, 1, :, 2] = np.inf
    pick = jax.jit(lambda s: M.top_k_blocks(s, k, block_q, block_k, groups=2))
    chosen = pick(jnp.asarray(scores))
    assert (chosen.batch, chosen.heads) == (2, 4)
    idx = np.asarray(chosen.idx)
    np.testing.assert_array_equal(idx[:, ::2], idx[:, 1::2])  # shared by the heads of a group
    for b, h, r in np.ndindex(2, 2, rows):
        mine = [c for c in idx[b, 2 * h, r] if c >= 0]
        own = range(r * block_q // block_k, ((r + 1) * block_q - 1) // block_k + 1)
        assert len(set(mine)) == len(mine) == min(k, own[-1] + 1)  # no duplicates, all if few
        assert mine == sorted(mine)
        assert max(mine) == own[-1]  # nothing from the future
        forced = {0, *own, max(0, own[0] - 1)}
        assert forced <= set(mine)
        if not np.isnan(scores[b, h, r]).any():
            free = [c for c in range(own[-1] + 1) if c not in forced]
            best = sorted(free, key=lambda c: -scores[b, h, r, c])[: k - len(forced)]
            assert set(mine) == forced | set(best)
    mask = M.Causal() & chosen
    assert np.asarray(mask.to_dense(48)).any(-1).all()
    assert_map(mask.block_map(48, 48, 8, 8), np.asarray(mask.to_dense(48)))
