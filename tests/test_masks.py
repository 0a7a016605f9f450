"""Masks: formulas, sound statuses, maps that cover, traced equal to static, errors that help."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_jax import masks as M
from causal_jax.errors import InputError

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
each = pytest.mark.parametrize(("mask", "formula"), ALL.values(), ids=ALL.keys())


def table(formula, batch, heads):
    return np.array(
        [
            [
                [[bool(formula(b, h, i, j)) for j in range(S)] for i in range(T)]
                for h in range(heads)
            ]
            for b in range(batch)
        ]
    )


def host_dense(mask, rows=T, cols=S):
    """The mask in numpy, element by element: for static masks."""
    axes = (np.arange(n) for n in (mask.batch, mask.heads, rows, cols))
    return mask(*np.meshgrid(*axes, indexing="ij", sparse=True))


@each
def test_formula(mask, formula):
    dense = mask.to_dense(T, S)
    np.testing.assert_array_equal(dense, table(formula, mask.batch, mask.heads))
    if mask.is_static:
        host = host_dense(mask)
        assert isinstance(host, np.ndarray)
        np.testing.assert_array_equal(host, dense)


@each
def test_q_offset_shifts_the_queries(mask, formula):
    whole = np.asarray(mask.to_dense(T, S))
    np.testing.assert_array_equal(mask.to_dense(9, S, q_offset=6), whole[:, :, 6:15])
    if mask.batch == 2:
        mine = np.asarray(mask.to_dense(9, S, q_offset=jnp.array([2, 11])))
        np.testing.assert_array_equal(mine[0], whole[0, :, 2:11])
        np.testing.assert_array_equal(mine[1], whole[1, :, 11:20])


# ---- statuses ----

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


def random_tiles(seed, n, rows, cols):
    rng = np.random.default_rng(seed)
    q0, k0 = rng.integers(0, rows, n), rng.integers(0, cols, n)
    return q0, rng.integers(q0, rows) + 1, k0, rng.integers(k0, cols) + 1


def assert_sound(dense, status, q0, q1, k0, k1):
    """dense [B, N, T, S], status [B, N, tiles]. Returns the exact statuses."""
    exact = np.empty_like(status)
    for n in range(len(q0)):
        tile = dense[:, :, q0[n] : q1[n], k0[n] : k1[n]]
        exact[:, :, n] = np.where(tile.all((2, 3)), 2, tile.any((2, 3)))
    decided = status != M.PARTIAL
    np.testing.assert_array_equal(status[decided], exact[decided])
    return exact


def statuses(mask, tiles):
    b = np.arange(mask.batch).reshape(-1, 1, 1)
    h = np.arange(mask.heads).reshape(1, -1, 1)
    return mask.status(b, h, *tiles)


@given(combined(LEAVES, 6), st.integers(0, 1000))
@settings(max_examples=150)
def test_status_is_sound_for_random_compositions(tree, seed):
    mask, tiles = built(tree), random_tiles(seed, 24, 32, 32)
    status = statuses(mask, tiles)
    assert isinstance(status, np.ndarray)
    assert status.dtype == np.int8
    assert_sound(host_dense(mask, 32, 32), status, *tiles)


@given(LEAVES, st.integers(0, 1000))
@settings(max_examples=100)
def test_status_of_a_primitive_is_exact(tree, seed):
    mask, tiles = built(tree), random_tiles(seed, 24, 32, 32)
    status = statuses(mask, tiles)
    exact = assert_sound(host_dense(mask, 32, 32), status, *tiles)
    composed = isinstance(mask, M.And | M.Or)  # recipes among the leaves: sound, not always exact
    assert composed or (status == exact).all()


@given(combined(ARRAY_LEAVES, 4), st.sampled_from([0, 1]))
@settings(max_examples=12)
def test_status_is_sound_with_arrays(tree, seed):
    mask, tiles = built(tree), random_tiles(seed, 16, T, S)
    assert_sound(np.asarray(mask.to_dense(T, S)), np.asarray(statuses(mask, tiles)), *tiles)


@given(combined(LEAVES, 3), combined(LEAVES, 3))
def test_de_morgan(one, other):
    a, b = built(one), built(other)
    np.testing.assert_array_equal(host_dense(~(a & b)), host_dense(~a | ~b))
    np.testing.assert_array_equal(host_dense(~(a | b)), host_dense(~a & ~b))
    np.testing.assert_array_equal(host_dense(a & ~b), host_dense(a) & ~host_dense(b))
    assert ~~a is a or not isinstance(~a, M.Not)


@pytest.mark.parametrize("name", sorted(TRACED))
def test_status_of_arrays(name):
    mask, tiles = TRACED[name][0], random_tiles(1, 40, T, S)
    exact = assert_sound(
        np.asarray(mask.to_dense(T, S)), status := np.asarray(statuses(mask, tiles)), *tiles
    )
    if name in ("prefix", "keys", "queries", "blocks", "dense", "valid", "fn"):
        np.testing.assert_array_equal(status, exact)


def test_documents_with_padding_are_exact():
    mask, tiles = M.Documents(IDS), random_tiles(2, 60, 26, 26)
    exact = assert_sound(
        np.asarray(mask.to_dense(26)), status := np.asarray(statuses(mask, tiles)), *tiles
    )
    np.testing.assert_array_equal(status, exact)  # sorted ids, -1 behind: no dead tile is kept


# ---- maps of tiles ----

EXACT = [k for k in ALL if k not in ("traced-cross", "traced-packed", "traced-mutual")]


def assert_map(bm, dense, exact=False):
    """Everything a map promises, against the dense mask [B, N, T, S]."""
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


@pytest.mark.parametrize("name", ALL)
def test_block_map(name):
    mask = ALL[name][0]
    dense = np.asarray(mask.to_dense(T, S))
    bm = mask.block_map(T, S, 8, 6)
    assert bm.is_host == mask.is_static == isinstance(bm.cnt, np.ndarray)
    assert_map(bm, dense, exact=name in EXACT)
    turned = bm.transpose()
    assert turned.cnt.shape[-1] == bm.num_tiles[1]
    assert_map(turned, dense, exact=name in EXACT)
    np.testing.assert_array_equal(turned.transpose().tiles(), bm.tiles())


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
