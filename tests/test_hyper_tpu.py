"""The TPU kernel of HyperAttention without a TPU: interpreters, races, compiled ahead of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention.hyper import hyper_attention
from causal_jax.masks import Causal
from pallas_kernels import _testing
from pallas_kernels.lsh_attention import Places, Problem, reference, tpu


def problem(P=2, Q=128, S=128, R=128, H=64, dtype=jnp.float32):
    """Three blocks, four tiles: the first block has two, the last none; some keys do not exist."""
    rng = np.random.default_rng(0)
    block = jnp.broadcast_to(jnp.asarray([0, 0, 1, 1], jnp.int32), (P, 4))
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)  # noqa: E731
    return Problem(
        q=draw(P, 4, Q, H),
        k=draw(P, 3, S, H),
        v=draw(P, 3, S, H),
        k_sample=draw(P, R, H),
        v_sample=draw(P, R, H),
        block=block,
        block_sample=jnp.asarray(rng.integers(0, 3, (P, R)), jnp.int32),
        bias=jnp.where(jnp.asarray(rng.random((P, 3, S)) < 0.1), -jnp.inf, 0.0),
        bias_sample=jnp.full((P, R), 0.7),
    )


def results(f, x):
    """o, lse and gradients of everything, the lse having a cotangent too."""
    arrays = (x.q, x.k, x.v, x.k_sample, x.v_sample)
    names = ("q", "k", "v", "k_sample", "v_sample")

    def apply(*a):
        return f(x._replace(**dict(zip(names, a))))

    def loss(*a):
        o, lse = apply(*a)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))

    return jax.jit(lambda *a: (apply(*a), jax.grad(loss, tuple(range(5)))(*a)))(*arrays)


@pytest.mark.parametrize(
    ("sizes", "tol"),
    [
        ({}, 1e-4),
        ({"Q": 40, "S": 24, "R": 0, "H": 16}, 1e-4),
        ({"P": 1, "H": 192, "dtype": jnp.bfloat16}, 3e-2),
    ],
)
def test_interpreted_equals_the_reference(sizes, tol):
    x = problem(**sizes)
    ours = results(lambda x: tpu(x, 0.3, interpret=True), x)
    theirs = results(lambda x: reference(x, 0.3), x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        if not b.size:  # no samples
            continue
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tol * max(scale, 1)
        )


@pytest.mark.slow
def test_no_races_and_nothing_uninitialised():
    x = problem(P=1)
    ours = results(lambda x: tpu(x, 0.3, interpret=_testing.tpu_interpreter()), x)
    assert not _testing.races_found()
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(results(lambda x: reference(x, 0.3), x))
    ):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(_testing.no_tpu_compiler() is not None, reason=str(_testing.no_tpu_compiler()))
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("H", [64, 128, 192, 256])
def test_compiles_for_a_tpu(topology, H):
    """The kernels at the paper's sizes; sorting and gathering around them are XLA's."""
    abstract = jax.eval_shape(lambda: problem(P=4, Q=128, S=256, R=256, H=H, dtype=jnp.bfloat16))
    leaves, tree = jax.tree.flatten(abstract)

    def grads(*leaves):
        def loss(q, k, v):
            o, lse = tpu(x._replace(q=q, k=k, v=v), H**-0.5)
            return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

        x = jax.tree.unflatten(tree, leaves)
        return jax.value_and_grad(loss, (0, 1, 2))(x.q, x.k, x.v)

    program = _testing.compile_for_tpu(grads, *leaves, topology=topology)
    assert "lsh_attention_backward" in program.as_text()


def test_refusals():
    x = problem()
    places = Places(*(jnp.zeros(1, jnp.int32),) * 5)
    with pytest.raises(NotImplementedError, match="knows no mask"):
        tpu(x._replace(mask=Causal(), places=places), 1.0)
    with pytest.raises(NotImplementedError, match="one type"):
        tpu(x._replace(v=x.v.astype(jnp.bfloat16)), 1.0)
    q = jnp.zeros((1, 64, 2, 8))
    for name, reason in (("tpu", "it needs a TPU"), ("gpu", "it needs a GPU")):
        with pytest.raises(NotImplementedError, match=reason):
            hyper_attention(q, q, q, key=jax.random.key(0), min_seq_len=8, implementation=name)
