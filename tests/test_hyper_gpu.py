"""The GPU kernels of HyperAttention without a GPU: the interpreter, lowering for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention.hyper import hyper_attention
from causal_jax.hardware import compiling_for
from causal_jax.masks import Causal, Documents
from pallas_kernels import _testing
from pallas_kernels.lsh_attention import Places, Problem, gpu, reference


def problem(P=2, Q=64, S=64, R=64, H=64, masked=False):
    """Three blocks, four tiles: the first block has two, the last none; some keys do not exist."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)  # noqa: E731
    whole = lambda most, *s: jnp.asarray(rng.integers(0, most, s), jnp.int32)  # noqa: E731
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (P, 400)), 1))
    places = Places(
        b=jnp.arange(P), h=whole(1, P, 4, Q), i=whole(400, P, 4, Q), j=whole(400, P, 3, S),
        j_sample=whole(400, P, R),
    )  # fmt: skip
    return Problem(
        q=draw(P, 4, Q, H),
        k=draw(P, 3, S, H),
        v=draw(P, 3, S, H),
        k_sample=draw(P, R, H),
        v_sample=draw(P, R, H),
        block=jnp.broadcast_to(jnp.asarray([0, 0, 1, 1], jnp.int32), (P, 4)),
        block_sample=whole(3, P, R),
        bias=jnp.where(jnp.asarray(rng.random((P, 3, S)) < 0.1), -jnp.inf, 0.0),
        bias_sample=jnp.full((P, R), 0.7),
        mask=Causal() & Documents(ids) if masked else None,
        places=places if masked else None,
    )


NAMES = ("q", "k", "v", "k_sample", "v_sample")


def results(f, x):
    """o, lse and gradients of everything, the lse having a cotangent too."""

    def loss(*a):
        o, lse = f(x._replace(**dict(zip(NAMES, a))))
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(lse)), (o, lse)

    arrays = tuple(getattr(x, name) for name in NAMES)
    return jax.value_and_grad(loss, tuple(range(5)), has_aux=True)(*arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kw", [{}, {"Q": 40, "S": 50, "R": 30}, {"masked": True}, {"R": 0, "P": 1}], ids=str
)
def test_values_and_gradients(kw):
    x = problem(**kw)
    ours = results(lambda x: gpu(x, 0.3, interpret=_testing.gpu_interpreter()), x)
    wide = x._replace(**{n: getattr(x, n).astype(jnp.float32) for n in NAMES})
    theirs = jax.jit(lambda x: results(lambda x: reference(x, 0.3), x))(wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        if b.size:
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=2e-2 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize(
    ("S", "H"), [(256, 64), *(pytest.param(s, 128, marks=pytest.mark.slow) for s in (64, 256))]
)
def test_lowers_for_hopper(S, H):
    x = problem(Q=128, S=S, R=256, H=H)
    arrays = [getattr(x, name) for name in NAMES]

    def run(*a):
        return results(lambda x: gpu(x, H**-0.5), x._replace(**dict(zip(NAMES, a))))

    text = _testing.lower_for_gpu(run, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
    assert text.count("mosaic_gpu") >= 3  # o; dq; dk and dv


@pytest.mark.slow
def test_hyper_attention_names_it():
    def loss(q, k, v):
        return hyper_attention(
            q, k, v, mask=Causal(), key=jax.random.key(0), min_seq_len=256, implementation="gpu"
        ).astype(jnp.float32).sum()  # fmt: skip

    shapes = [jax.ShapeDtypeStruct((1, 1024, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    with compiling_for("gpu"):
        text = _testing.lower_for_gpu(jax.grad(loss, (0, 1, 2)), *shapes)
    assert text.count("mosaic_gpu") >= 9  # two levels and the exact pieces, three kernels each
