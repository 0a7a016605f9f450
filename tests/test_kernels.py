"""The TPU kernels without a TPU: values in the interpreter, races, the compiler for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax import masks as M
from causal_jax.attention import dense_attention
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


def arrays(H=32, Hv=32, N=4, K=2, dtype=jnp.float32, T=T, S=S):
    shapes = ((2, T, N, H), (2, S, K, H), (2, S, K, Hv), (2, T, N, Hv))
    rng = np.random.default_rng(1)
    do_q_k_v = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    return (*do_q_k_v, jnp.asarray(rng.standard_normal((2, T, N)), jnp.float32))


def kernel(q, k, v, mask, *, tiles=Tiles(128, 128), interpret=True, **kw):
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
def run(ours, mask, q, k, v, sinks, do, dlse, soft_cap=None, q_offset=0, tiles=Tiles(128, 128)):
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


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    q, k, v, do, dlse = arrays()
    compare(MASKS[name], (q, k, v, None, do, dlse))


@pytest.mark.parametrize("name", ["streaming", "documents", "empty_rows"])
def test_cap_sinks_offset_and_tiles(name):
    q, k, v, do, dlse = arrays(N=4, K=1, H=64, Hv=32, T=140)
    args = (q, k, v, jnp.array([0.5, -1.0, 2.0, -jnp.inf]), do, dlse)
    compare(MASKS[name], args, soft_cap=3.0, q_offset=120, tiles=Tiles(128, 256))


def test_bfloat16():
    args = arrays(dtype=jnp.bfloat16)
    compare(MASKS["documents"], (*args[:3], None, *args[3:]), tol=(2e-2, 4e-2))
