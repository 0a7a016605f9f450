"""The GPU kernels without a GPU: values in the interpreter, lowering to Mosaic's module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax import masks as M
from causal_jax.attention import choose, dense_attention
from causal_jax.hardware import compiling_for
from pallas_kernels import _testing
from pallas_kernels.block_sparse import Tiles, gpu

RNG = np.random.default_rng(0)
T, S = 100, 150
MASKS = {
    "streaming": M.streaming(60, 4),
    "documents": M.Causal() & M.Documents(jnp.asarray(np.sort(RNG.integers(0, 3, (1, 192)), 1))),
    "empty_rows": M.Causal() & M.Window(50, None) & ~M.Queries(range(60, 100)),
    "per_head": M.HeadSplit((M.Causal(), ~M.Window(40, 40))),
    "array": M.Dense(jnp.asarray(RNG.random((1, 2, 192, 192)) < 0.1)),
}


def arrays(T=T, S=S, H=64):
    shapes = ((1, T, 2, H), (1, S, 1, H), (1, S, 1, H), (1, T, 2, H))
    rng = np.random.default_rng(1)
    q_k_v_do = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]
    return (*q_k_v_do, jnp.asarray(rng.standard_normal((1, T, 2)), jnp.float32))


def graded(attend, q, k, v, do, dlse):
    (o, lse), pull = jax.vjp(attend, q, k, v)
    return o, lse, pull((do, jnp.where(lse == -jnp.inf, 0, dlse)))


def kernel(q, k, v, mask, interpret, ring=False):
    tiles = gpu.legal_tiles(Tiles(64, 64), ring)
    live = mask.block_map(q.shape[1], k.shape[1], tiles.block_q, tiles.block_k)
    return gpu.block_sparse_attention(
        q, k, v, mask, live.tiles(), scale=0.125, soft_cap=4.0, sinks=jnp.array([0.5, -jnp.inf]),
        tiles=Tiles(64, 64), apart=(mask.batch, mask.heads), interpret=interpret,
        ring=ring,
    )  # fmt: skip


def reference(q, k, v, mask):
    return dense_attention(
        q, k, v, mask=mask, scale=0.125, soft_cap=4.0, sinks=jnp.array([0.5, -jnp.inf]),
        return_lse=True, implementation="reference",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, ring):
    args = arrays()
    mask = MASKS[name]
    run = functools.partial(kernel, mask=mask, interpret=_testing.gpu_interpreter(), ring=ring)
    ours = graded(run, *args)
    exact = [x.astype(jnp.float32) for x in args]
    theirs = jax.jit(lambda *a: graded(functools.partial(reference, mask=mask), *a))(*exact)
    half = jax.jit(lambda *a: graded(functools.partial(reference, mask=mask), *a))(*args)
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, half))):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        same = np.isfinite(b)
        np.testing.assert_array_equal(a[~same], b[~same])
        a, b, c = (x[same] for x in (a, b, c))
        # twice what rounding the reference's own results to bfloat16 costs, and of p and ds
        assert np.abs(a - b).max() <= 2 * np.abs(c - b).max() + 2e-2 * np.abs(b).max()


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(
    "name", [n if n == "documents" else pytest.param(n, marks=pytest.mark.slow) for n in MASKS]
)
def test_lowers_for_cuda(name, ring):
    def f(*args):
        attend = functools.partial(kernel, mask=MASKS[name], interpret=False, ring=ring)
        return graded(attend, *args)

    text = _testing.lower_for_gpu(f, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()))
    assert text.count("mosaic_gpu") >= 3  # o; dq; dk and dv


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128, 192, 256])
def test_dense_attention_lowers_for_cuda(H):
    def loss(q, k, v):
        return dense_attention(q, k, v, mask=M.Causal(), implementation="gpu").sum()

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(T=512, S=512, H=H)[:3]]
    with compiling_for("gpu"):
        text = _testing.lower_for_gpu(jax.grad(loss, (0, 1, 2)), *shapes)
    assert text.count("mosaic_gpu") >= 3


def test_refusals():
    q, k, v, *_ = arrays()
    with pytest.raises(NotImplementedError, match="gpu: it needs a GPU, this is cpu"):
        dense_attention(q, k, v, implementation="gpu")
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        kernel(*(x[..., :32] for x in (q, k, v)), M.Causal(), False)
    with pytest.raises(NotImplementedError, match="one type"):
        kernel(q.astype(jnp.float32), k, v, M.Causal(), False)
    named = functools.partial(choose, platform="gpu", implementation="gpu")
    assert named(q, k, v).name == "gpu"
    with pytest.raises(NotImplementedError, match="bias"):
        named(q, k, v, bias=jnp.zeros((1, 1, T, S)))
    assert (
        choose(q, k, v, mask=M.Causal(1), platform="gpu").name != "gpu"
    )  # until it has run on one
