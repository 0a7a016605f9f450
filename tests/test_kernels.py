"""The TPU kernels without a TPU: values in the interpreter, races, the compiler for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax import masks as M
from causal_jax.attention import choose, dense_attention
from causal_jax.hardware import compiling_for
from pallas_kernels import _testing
from pallas_kernels.block_sparse import Tiles, tpu
from pallas_kernels.block_sparse.steps import by_key_tile, by_query_tile
from pallas_kernels.block_sparse.tile_mask import cut

RNG = np.random.default_rng(0)
T, S = 300, 270
IDS = jnp.asarray(np.sort(RNG.integers(0, 5, (2, 512)), axis=1))
MASKS = {
    "causal": M.Causal(),
    "none_dead": M.Full(),
    "nothing": ~M.Full(),
    "window": M.Causal() & M.Window(90, None),
    "streaming": M.streaming(60, 4),
    "chunked": M.Causal() & M.Chunked(70),
    "strided": M.strided_sparse(37),
    "dilated": M.Dilated(9, 5),
    "longformer": M.longformer(20, (0, 200)),
    "empty_rows": M.Causal() & M.Window(50, None) & ~M.Queries(range(130, 260)),
    "per_head": M.HeadSplit((M.Causal(), M.Full(), M.Window(2, 2), ~M.Window(40, 40))),
    "documents": M.Causal() & M.Documents(IDS),
    "prefix": M.Causal() | M.Prefix(jnp.array([4, 200])),
    "keys": M.Causal() & M.Keys(jnp.asarray(RNG.random((2, 512)) < 0.5)),
    "function": M.from_fn(lambda b, h, i, j: (i * 3 + j + h) % 7 < 3, heads=4),
    "bigbird": M.bigbird(512, window=20, globals=4, random=1, block=32),
    "array": M.Dense(jnp.asarray(RNG.random((2, 4, 320, 320)) < 0.1)),
    "top_k": M.Causal() & M.top_k_blocks(jnp.asarray(RNG.random((2, 4, 5, 5))), 3, 64, 64),
}
STORED = ("bigbird", "array", "top_k")  # looked up by query and key at once
QUICK = ("empty_rows", "per_head", "documents", "bigbird")
TILES = Tiles(128, 128)


def arrays(H=32, Hv=32, N=4, K=2, dtype=jnp.float32, T=T, S=S):
    shapes = ((2, T, N, H), (2, S, K, H), (2, S, K, Hv), (2, T, N, Hv))
    rng = np.random.default_rng(1)
    do_q_k_v = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    return (*do_q_k_v, jnp.asarray(rng.standard_normal((2, T, N)), jnp.float32))


def kernel(q, k, v, mask, *, tiles=TILES, interpret=True, **kw):
    tiles = tpu.legal_tiles(tiles, q.shape[1], k.shape[1])
    live = mask.block_map(
        q.shape[1], k.shape[1], tiles.block_q, tiles.block_k, q_offset=kw.get("q_offset", 0)
    )
    return tpu.block_sparse_attention(
        q, k, v, mask, live.tiles(), tiles=tiles, interpret=interpret,
        apart=(mask.batch, mask.heads), **({"scale": q.shape[-1] ** -0.5} | kw),
    )  # fmt: skip


def graded(attend, q, k, v, sinks, do, dlse):
    (o, lse), pull = jax.vjp(attend, q, k, v, sinks)
    return o, lse, pull((do.astype(o.dtype), jnp.where(lse == -jnp.inf, 0, dlse)))


@functools.partial(jax.jit, static_argnames=("ours", "soft_cap", "q_offset", "tiles"))
def run(ours, mask, q, k, v, sinks, do, dlse, soft_cap=None, q_offset=0, tiles=TILES):
    def attend(q, k, v, sinks):
        if ours:
            return kernel(
                q, k, v, mask, sinks=sinks, soft_cap=soft_cap, q_offset=q_offset, tiles=tiles
            )
        return dense_attention(
            q, k, v, mask=mask, sinks=sinks, soft_cap=soft_cap, q_offset=q_offset, return_lse=True,
            implementation="reference",
        )  # fmt: skip

    return graded(attend, q, k, v, sinks, do, dlse)


def compare(mask, args, tol=(2e-5, 2e-4), **kw):
    """Outputs within tol[0], gradients within tol[1], each relative to its largest entry."""
    ours, theirs = (run(mine, mask, *args, **kw) for mine in (True, False))
    for n, (a, b) in enumerate(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        size = max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a / size, b / size, atol=tol[n > 1], rtol=tol[n > 1])


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MASKS]
)
def test_every_mask(name):
    q, k, v, do, dlse = arrays()
    compare(MASKS[name], (q, k, v, None, do, dlse))


@pytest.mark.parametrize(
    "name", ["streaming", *(pytest.param(n, marks=pytest.mark.slow) for n in QUICK)]
)
def test_cap_sinks_offset_and_tiles(name):
    q, k, v, do, dlse = arrays(N=4, K=1, H=64, Hv=32, T=140)
    args = (q, k, v, jnp.array([0.5, -1.0, 2.0, -jnp.inf]), do, dlse)
    compare(MASKS[name], args, soft_cap=3.0, q_offset=120, tiles=Tiles(128, 256))


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128, 192])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
def test_widths_and_heads(H, heads):
    args = arrays(H=H, Hv=H - 32, N=heads[0], K=heads[1])
    compare(MASKS["documents"], (*args[:3], None, *args[3:]))


@pytest.mark.slow
def test_bfloat16():
    args = arrays(dtype=jnp.bfloat16)
    compare(MASKS["documents"], (*args[:3], None, *args[3:]), tol=(2e-2, 4e-2))


def test_only_live_tiles_are_multiplied():
    q, k, v, *_ = arrays()
    for name in ("streaming", "per_head", "empty_rows"):
        live = MASKS[name].block_map(T, S, 128, 128)
        *_, work = jax.jit(functools.partial(kernel, mask=MASKS[name], work=True))(q, k, v)
        np.testing.assert_array_equal(work, np.broadcast_to(live.cnt, work.shape))
        steps = by_query_tile(live.tiles())
        least_one = np.maximum(live.cnt, 1)  # an empty row has a step of its own, to be written
        assert steps.count == least_one.sum(-1).max()


@pytest.mark.parametrize("name", QUICK)
def test_steps_are_the_live_tiles(name):
    """Both lists hold every live tile once, with its kind, between the marks of its output tile."""
    for order in ("rows", "columns"):
        grid = np.asarray(MASKS[name].block_map(T, S, 32, 64).tiles())
        groups = 1 if order == "rows" else 2
        steps = by_query_tile(grid) if order == "rows" else by_key_tile(grid, 2)
        traced = jax.jit(lambda g, o=order: by_query_tile(g).words if o == "rows" else
                         by_key_tile(g, 2).words)(grid)  # fmt: skip
        words = np.asarray(steps.words)
        np.testing.assert_array_equal(np.asarray(traced)[..., : steps.count], words)
        for b, h in np.ndindex(*words.shape[:2]):
            word = words[b, h]
            inner, outer, group = steps.packing.tiles(word)
            kind, first, last = word & 3, word >> 2 & 1, word >> 3 & 1
            assert (first.sum(), last.sum()) == (outer.max() + 1,) * 2
            assert (np.diff(outer) >= 0).all()
            assert set(outer) == set(range(grid.shape[2 if order == "rows" else 3]))
            found = {}
            for i, o, g, k in zip(inner, outer, group, kind):
                if k:
                    head = 0 if grid.shape[1] == 1 else h if groups == 1 else h * groups + g
                    key = (head, *((o, i) if groups == 1 else (i, o)), g)
                    assert key not in found
                    found[key] = k
            heads = [h] if groups == 1 else range(h * groups, (h + 1) * groups)
            wanted = sum(int((grid[b, 0 if grid.shape[1] == 1 else n] > 0).sum()) for n in heads)
            assert len(found) == wanted
            assert all(grid[b, n, r, c] == k for (n, r, c, _), k in found.items())


def test_what_is_cut_and_what_is_stored():
    for name, mask in MASKS.items():
        made = cut(mask, (2, 4, 256, 256), jnp.zeros(1, jnp.int32))
        assert (made is None) == (name in STORED), name
        assert name not in ("causal", "per_head", "function") or made.vectors == ()


def test_nan_reaches_nobody_who_may_not_see_it():
    q, k, v, *_ = arrays(T=256, S=256)
    late = (jnp.arange(256) >= 200)[None, :, None, None]

    def f(q, k, v):
        o, lse = kernel(q, k, v, M.Causal())
        return jnp.sum(jnp.sin(o[:, :200])) + jnp.sum(lse[:, :200]), o

    value = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, clean), grads = value(q, k, v)
    for bad in (jnp.nan, jnp.inf):
        (_, dirty), dirty_grads = value(q, *(jnp.where(late, bad, x) for x in (k, v)))
        np.testing.assert_array_equal(clean[:, :200], dirty[:, :200])  # bit for bit
        assert jnp.isnan(dirty[:, 200:]).all()  # these do attend to it: nothing is hidden
        np.testing.assert_allclose(grads[0][:, :200], dirty_grads[0][:, :200], atol=1e-6)


def test_deterministic_and_indifferent_to_kinds_and_tiles():
    q, k, v, *_ = arrays(T=256, S=256)
    mask = M.streaming(60, 4)
    live = mask.block_map(256, 256, 128, 128)
    attend = jax.jit(lambda kinds: tpu.block_sparse_attention(
        q, k, v, mask, kinds, scale=0.2, tiles=TILES, interpret=True
    )[0])  # fmt: skip
    o = attend(live.tiles())
    for _ in range(2):
        np.testing.assert_array_equal(o, attend(live.tiles()))
    partial = attend(np.minimum(live.tiles(), 1))
    np.testing.assert_allclose(o, partial, atol=1e-6)
    large = jax.jit(functools.partial(kernel, mask=mask, scale=0.2, tiles=Tiles(256, 256)))(q, k, v)
    np.testing.assert_allclose(o, large[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents", "bigbird"])
def test_no_races(name):
    q, k, v, do, dlse = arrays(N=2, K=1)
    attend = functools.partial(
        kernel, mask=MASKS[name], interpret=_testing.tpu_interpreter(num_cores_or_threads=1)
    )
    o, lse, grads = jax.jit(lambda *args: graded(lambda q, k, v, _: attend(q, k, v), *args))(
        q, k, v, None, do, dlse
    )
    assert not _testing.races_found()
    theirs = run(False, MASKS[name], q, k, v, None, do, dlse)
    for a, b in zip(jax.tree.leaves((o, lse, grads)), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


def compiled(make, topology, T=4096, H=128, N=4, K=2):
    def f(q, k, v, do, dlse, ids):
        mask = make(ids)
        attend = lambda q, k, v, _: kernel(q, k, v, mask, tiles=Tiles(512, 512), interpret=False)  # noqa: E731
        return graded(attend, q, k, v, None, do, dlse)

    shapes = [jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K, K, N)]
    shapes.append(jax.ShapeDtypeStruct((1, T, N), jnp.float32))
    shapes.append(jax.ShapeDtypeStruct((1, T), jnp.int32))
    return _testing.compile_for_tpu(f, *shapes, topology=topology)


needs_compiler = pytest.mark.skipif(
    _testing.no_tpu_compiler() is not None, reason=str(_testing.no_tpu_compiler())
)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "topology", "H"),
    [
        ("documents", "v5e:2x2", 128),
        *(
            pytest.param(name, topology, H, marks=pytest.mark.slow)
            for name, topology, H in [
                *(("streaming", t, H) for t in _testing.TOPOLOGIES for H in (64, 128, 192, 256)),
                *((n, "v6e:2x2", 128) for n in ("strided", "chunked", "per_head", "bigbird")),
                *((n, "v6e:2x2", 128) for n in ("prefix", "function", "top_k")),
                # v6e: jaxlib 0.10.2 cannot read back the program that libtpu 0.0.52 makes of the
                # gather outside of the kernels ("async-update instruction")
                ("keys", "v5e:2x2", 128),
            ]
        ),
    ],
)
def test_compiles_for_real_chips(name, topology, H):
    makers = {
        "documents": lambda ids: M.Causal() & M.Documents(ids),
        "keys": lambda ids: M.Causal() & M.Keys(ids > 0),
        "prefix": lambda ids: M.Causal() | M.Prefix(ids[:, 0]),
        "bigbird": lambda ids: M.bigbird(4096, window=64, globals=64),
        "top_k": lambda ids: (
            M.Causal()
            & M.top_k_blocks(ids.astype(jnp.float32)[:, :256].reshape(1, 4, 8, 8), 4, 512, 512)
        ),
    }
    text = compiled(makers.get(name, lambda ids: MASKS[name]), topology, H=H).as_text()
    assert text.count("tpu_custom_call") >= 3  # o; dq; dk and dv


def test_refusals():
    q, k, v, *_ = arrays()
    with pytest.raises(NotImplementedError, match="one type"):
        kernel(q, k.astype(jnp.bfloat16), v, M.Causal())
    with pytest.raises(NotImplementedError, match="take larger tiles"):
        by_query_tile(np.ones((1, 1, 512, 512), np.int8))


def test_dense_attention_names_them():
    q, k, v, *_ = arrays(H=64, Hv=64)
    with pytest.raises(NotImplementedError, match="tpu: it needs a TPU, this is cpu"):
        dense_attention(q, k, v, implementation="tpu")
    assert choose(q, k, v, mask=M.Causal(), platform="tpu").name == "xla"  # until it has run on one
    with pytest.raises(NotImplementedError, match="bias"):
        choose(q, k, v, bias=jnp.zeros((1, 1, T, S)), platform="tpu", implementation="tpu")


@needs_compiler
def test_dense_attention_compiles_for_a_tpu():
    def loss(q, k, v):
        mask = M.streaming(300, 4)
        return dense_attention(q, k, v, mask=mask, implementation="tpu", soft_cap=20.0).sum()

    shapes = [jax.ShapeDtypeStruct((2, 2000, n, 64), jnp.float32) for n in (4, 2, 2)]
    with compiling_for("tpu"):
        text = _testing.compile_for_tpu(jax.grad(loss, (0, 1, 2)), *shapes).as_text()
    assert all(f"block_sparse_{name}" in text for name in ("o", "dq", "dkv"))
