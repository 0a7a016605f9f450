"""Masks: formulas, sound statuses, maps that cover, traced equal to static, errors that help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from mask_cases import (
    ALL,
    ARRAY,
    ARRAY_LEAVES,
    BLOCKS,
    CHOICE,
    IDS,
    LEAVES,
    TRACED,
    S,
    T,
    built,
    combined,
    even_sum,
    host_dense,
)

from causal_jax import masks as M
from causal_jax.errors import InputError

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


@each
def test_formula(mask, formula):
    dense = mask.to_dense(T, S)
    np.testing.assert_array_equal(dense, table(formula, mask.batch, mask.heads))
    if mask.is_static:
        host = host_dense(mask)
        assert isinstance(host, np.ndarray)
        np.testing.assert_array_equal(host, dense)


SHIFTED = ["static-causal", "static-blocks", "static-heads", *(k for k in ALL if "traced" in k)]


@pytest.mark.parametrize("name", SHIFTED)
def test_q_offset_shifts_the_queries(name):
    mask = ALL[name][0]
    whole = np.asarray(mask.to_dense(T, S))
    np.testing.assert_array_equal(mask.to_dense(9, S, q_offset=6), whole[:, :, 6:15])
    if mask.batch == 2:
        mine = np.asarray(mask.to_dense(9, S, q_offset=jnp.array([2, 11])))
        np.testing.assert_array_equal(mine[0], whole[0, :, 2:11])
        np.testing.assert_array_equal(mine[1], whole[1, :, 11:20])


# ---- statuses ----


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
@settings(max_examples=8)
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


# ---- masks as values ----


def test_static_masks_stay_on_the_host_inside_a_trace():
    mask = M.Causal() & (M.Window(9, 0) | M.bigbird(64, window=4, random=1, block=8))
    mask = mask & M.from_fn(uses_jnp)

    @jax.jit
    def f(x):
        q0 = np.arange(0, 64, 8).reshape(-1, 1)
        assert isinstance(mask.status(0, 0, q0, q0 + 8, q0.T, q0.T + 8), np.ndarray)
        assert isinstance(mask(0, 0, q0, q0.T), np.ndarray)
        bm = mask.block_map(64, 64, 8, 8)
        assert bm.is_host
        assert isinstance(bm.num_live, int)  # a schedule may depend on it
        return x * bm.num_live

    assert f(1.0) == mask.block_map(64, 64, 8, 8).num_live > 0


def uses_jnp(b, h, i, j):
    return jnp.where(i > 20, (i ^ j) % 3 != 0, True)


def test_equal_by_value():
    def make(n=4):
        return M.Causal() & (M.Window(n, 0) | M.Keys((1, 2))) & M.BlockList(BLOCKS[:1, :1], 5, 4)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(5)
    assert M.Window(3, 0) != M.Window(3, None)
    assert M.Causal() & M.Sinks(2) != M.Causal() | M.Sinks(2)
    assert M.BlockList(BLOCKS, 5, 4) != M.BlockList(BLOCKS + 1, 5, 4)
    docs = M.Documents(IDS)
    assert docs == M.Documents(IDS)  # one and the same array
    assert docs != M.Documents(IDS.copy())
    with pytest.raises(TypeError, match="holds 1 array"):
        hash(M.Causal() & docs)


def test_jit_traces_once():
    traces = []

    def f(mask, x):
        traces.append(mask)
        return jnp.where(mask.to_dense(4), x, 0).sum()

    x, by_leaf, by_value = jnp.ones((4, 4)), jax.jit(f), jax.jit(f, static_argnums=0)
    for ids in ([0, 0, 1, 1], [0, 1, 2, 3]):
        assert by_leaf(M.Causal() & M.Documents(np.array(ids)), x) == {1: 6, 3: 4}[ids[-1]]
    assert len(traces) == 1
    for _ in range(2):
        assert by_value(M.Causal() & M.Window(1, 0), x) == 7
        assert by_leaf(M.Causal() & M.Window(1, 0), x) == 7  # no leaves: static as an argument, too
    assert len(traces) == 3
    assert traces[2].is_static
    by_value(M.Causal() & M.Window(2, 0), x)
    assert len(traces) == 4


def test_masks_are_pytrees():
    mask = M.Causal() & M.Documents(jnp.asarray(IDS)) & ~M.Keys(jnp.asarray(CHOICE))
    leaves, structure = jax.tree.flatten(mask)
    assert [x.shape for x in leaves] == [(2, 26), (2, 26)]
    assert jax.tree.unflatten(structure, leaves) == mask
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(mask)]
    assert paths == [".parts[1].q_ids", ".parts[2].part.tokens"]
    axes = jax.tree.map(lambda _: 0, mask)  # placeholders pass the checks of the constructors
    per_row = jax.vmap(lambda m: m.to_dense(26)[0, 0], in_axes=(axes,))(mask)
    np.testing.assert_array_equal(per_row, mask.to_dense(26)[:, 0])
    maps = jax.vmap(lambda m: m.block_map(26, 26, 8, 8).tiles()[0, 0])(mask)
    np.testing.assert_array_equal(maps, mask.block_map(26, 26, 8, 8).tiles()[:, 0])

    def loss(x, mask):
        return jnp.where(mask.to_dense(26), x, 0).sum()

    grad = jax.jit(jax.grad(loss))(jnp.ones((2, 1, 26, 26)), mask)
    np.testing.assert_array_equal(grad, np.asarray(mask.to_dense(26), np.float32))


def test_combining():
    array = np.eye(4, dtype=bool)
    for mixed in (M.Causal() & array, array & M.Causal(), jnp.asarray(array) & M.Causal()):
        np.testing.assert_array_equal(mixed.to_dense(4)[0, 0], array)
    np.testing.assert_array_equal((array | ~M.Full()).to_dense(4)[0, 0], array)
    assert M.Full() & M.Causal() == M.Causal() == M.Causal() & None
    assert M.Full() | M.Causal() == M.Full() == M.as_mask(None)
    assert (M.Causal() & M.Sinks(1) & M.Strided(2)).parts == (M.Causal(), M.Sinks(1), M.Strided(2))
    static, rest = M.split_static(M.Causal() & M.Documents(IDS) & M.Window(3, 0))
    assert static == M.Causal() & M.Window(3, 0)
    assert rest == M.Documents(IDS)
    assert repr(M.Causal() & (M.Window(4, 0) | M.Documents(IDS))) == (
        "Causal(0) & (Window(4, 0) | Documents(int32[2, 26], None))"
    )


def test_reads_outside_of_arrays_are_clamped():
    mask = M.Documents(np.array([[3, 4], [3, 3]]))
    np.testing.assert_array_equal(mask(7, 0, np.array([9, -5]), 9), [True, True])
    np.testing.assert_array_equal(mask(-1, 0, np.array([9, -5]), 9), [True, False])


def test_masks_run_inside_a_kernel():
    mask = M.Causal() & (M.Window(3, 0) | M.Sinks(2) | M.Keys((9,))) & ~M.Chunked(5) & M.Full()
    mask = M.HeadSplit((mask, M.Dilated(3, 2), mask))

    def kernel(out):
        i = jax.lax.broadcasted_iota(jnp.int32, (16, 16), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (16, 16), 1)
        out[...] = mask(0, pl.program_id(0), i, j).astype(jnp.int32)[None]

    shape = jax.ShapeDtypeStruct((3, 16, 16), jnp.int32)
    call = pl.pallas_call(
        kernel,
        out_shape=shape,
        grid=(3,),
        out_specs=pl.BlockSpec((1, 16, 16), lambda h: (h, 0, 0)),
        interpret=True,
    )
    np.testing.assert_array_equal(call() > 0, mask.to_dense(16)[0])


# ---- errors ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: M.Window(-1, 0), r"Window: left=-1: expected an integer >= 0 or None"),
        (lambda: M.Window(0, -2), r"Window: right=-2: expected an integer >= 0 or None"),
        (lambda: M.Causal(True), r"Causal: offset=True: expected an integer"),
        (lambda: M.Sinks(-2), r"Sinks: n=-2: expected an integer >= 0"),
        (lambda: M.Prefix(-2), r"Prefix: length=-2"),
        (lambda: M.Prefix(np.array([1.0])), r"Prefix: length is float64\[1\]: expected a integer"),
        (lambda: M.Chunked(0), r"Chunked: size=0: expected an integer >= 1"),
        (lambda: M.Strided(0), r"Strided: stride=0"),
        (lambda: M.Dilated(0, 1), r"Dilated: window=0"),
        (lambda: M.Keys((-1, 2)), r"Keys: position -1: expected >= 0"),
        (lambda: M.Queries(np.ones(3)), r"Queries: tokens is float64\[3\]: expected a boolean"),
        (lambda: M.BlockList(BLOCKS, 0, 4), r"BlockList: block_q=0"),
        (lambda: M.BlockList(BLOCKS[0], 5, 4), r"BlockList: idx is int32\[3, 5, 2\]: expected"),
        (lambda: M.Documents(IDS[..., None]), r"Documents: q_ids is int32\[2, 26, 1\]: expected"),
        (lambda: M.Documents(IDS, np.zeros((3, 4), int)), r"batch of q_ids and kv_ids: .*\[2, 3\]"),
        (lambda: M.Dense(np.ones((3, 3))), r"Dense: array is float64\[3, 3\]: expected a boolean"),
        (lambda: M.Dense(np.ones((1, 3, 3), bool)), r"Dense: array is bool\[1, 3, 3\]"),
        (lambda: M.Causal() & np.ones((3, 3), int), r"Dense: array is int64\[3, 3\]"),
        (lambda: M.HeadSplit(()), r"HeadSplit: parts=\(\): expected one mask per query head"),
        (
            lambda: M.HeadSplit((M.Causal(), M.BlockList(BLOCKS, 5, 4))),
            r"HeadSplit: part 1 distinguishes 3 heads: expected 1 or 2",
        ),
        (
            lambda: M.HeadSplit((M.Causal(),) * 2) & M.BlockList(BLOCKS, 5, 4),
            r"heads: masks with \[2, 3\] cannot be combined",
        ),
        (lambda: M.Documents(IDS) | M.Prefix(np.ones(3, int)), r"batch: masks with \[2, 3\]"),
        (lambda: M.Causal().to_dense(0), r"T=0: expected an integer >= 1"),
        (lambda: M.Causal().to_dense(4, q_offset=-1), r"q_offset=-1: expected a position >= 0"),
        (lambda: M.Causal().to_dense(4, q_offset=np.ones(2)), r"q_offset of float64\[2\]"),
        (
            lambda: M.Documents(IDS).to_dense(4, q_offset=np.zeros(3, int)),
            r"batch of mask and q_offset: .*\[2, 3\]",
        ),
        (lambda: M.Documents(IDS).to_dense(27), r"q_ids covers 26 queries, but 27 are asked for"),
        (lambda: M.Documents(IDS).to_dense(4, 27), r"q_ids covers 26 keys, but 27 are asked for"),
        (lambda: M.Documents(IDS).block_map(20, 26, 4, 4, q_offset=8), r"26 queries, but 28"),
        (lambda: (~M.Dense(ARRAY)).to_dense(T + 1, S), r"array covers 22 queries, but 23"),
        (lambda: M.Dense(ARRAY).block_map(T, S + 1, 4, 4), r"array covers 26 keys, but 27"),
        (lambda: M.Keys(CHOICE).to_dense(4, 30), r"tokens covers 26 keys, but 30"),
        (lambda: M.BlockList(BLOCKS, 5, 4).to_dense(26), r"idx covers 25 queries, but 26"),
        (lambda: M.Causal().block_map(8, 8, 0, 4), r"block_q=0: expected an integer >= 1"),
        (lambda: M.Causal().block_map(8, 8, 4, 4, max_blocks=0), r"max_blocks=0: expected"),
        (lambda: M.Causal().block_map(8, 8, 4, 4) & M.Documents(IDS[:, :6]), r"6 queries, but 8"),
        (lambda: M.bigbird(64, window=2, random=-1), r"bigbird: random=-1"),
        (lambda: M.top_k_blocks(jnp.ones((1, 1, 4, 4)), 5, 8, 8), r"k=5: expected 1 ... 4"),
        (lambda: M.top_k_blocks(jnp.ones((1, 1, 4, 4)), 2, 8, 8), r"k=2: .* claim 3 blocks"),
        (lambda: M.from_fn(even_sum, heads=0), r"from_fn: heads=0"),
        (lambda: M.draw(M.Documents(IDS), 4, b=2), r"b=2: the mask distinguishes 2"),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- pictures ----


def test_draw():
    assert M.draw(M.Causal() & (M.Window(1, 0) | M.Sinks(1)), 5).split() == [
        "█····",
        "██···",
        "███··",
        "█·██·",
        "█··██",
    ]
    assert M.draw(M.Causal(), 8, 12, block=4).split() == ["▒··", "█▒·"]
    assert M.draw(M.Documents(np.array([0, 0, 1])), 3).split() == ["██·", "██·", "··█"]
    assert M.draw(M.HeadSplit((M.Full(), ~M.Full())), 1, 2, h=1) == "··"
    assert M.draw(np.array([[True, False]]), 1, 2) == "█·"
    assert len(M.draw(M.streaming(4095), 1 << 17, block=4096).split()) == 32  # never T x S


def test_draw_png(tmp_path):
    from matplotlib.image import imread

    M.draw_png(M.Causal(), 16, path=tmp_path / "m.png", title="causal")
    pixels = imread(tmp_path / "m.png")[..., :3]
    dark = (np.abs(pixels - np.array([31, 78, 121]) / 255) < 0.02).all(-1)
    light = (np.abs(pixels - np.array([242, 239, 232]) / 255) < 0.02).all(-1)
    assert 0.8 < light.sum() / dark.sum() < 1.0  # 120 hidden entries, 136 allowed ones
