"""Kernels of gated linear attention without their hardware: interpreted, compiled ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention.gated_linear import gated_linear_attention
from causal_jax.hardware import compiling_for
from causal_jax.masks import Causal, Documents, Keys
from pallas_kernels import _testing
from pallas_kernels.gated_linear import (
    gated_linear_gpu,
    gated_linear_recurrent,
    gated_linear_tpu,
    gpu,
    tpu,
)


def problem(B=2, T=37, N=4, K=2, F=8, V=5, scale=0.3, dtype=jnp.float32, documents=False):
    """q, k, v, g, a state, documents (or None), and cotangents of o and of the last state."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, F), (B, T, K, F), (B, T, K, V), (B, T, K, F), (B, K, F, V))
    q, k, v, g, state = (rng.uniform(0, 1, s) for s in shapes)
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v - 0.5)]
    ids = np.sort(rng.integers(0, 4, (B, T)), 1).astype(np.int32) if documents else None
    pull = (rng.normal(size=(B, T, N, V)), rng.normal(size=state.shape))
    return (
        (*arrays, jnp.asarray(-scale * g, jnp.float32), jnp.asarray(state, jnp.float32)),
        None if ids is None else jnp.asarray(ids),
        tuple(jnp.asarray(x, jnp.float32) for x in pull),
    )


def results(form, arrays, documents, pull):
    def run(*arrays):
        out, back = jax.vjp(functools.partial(form, document=documents), *arrays)
        return *out, *back(pull)

    return jax.jit(run)(*arrays)


def check(ours, theirs, tol):
    for name, a, b in zip(("o", "end", "q", "k", "v", "g", "state"), ours, theirs):
        assert bool(jnp.isfinite(a).all()), name
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tol * np.abs(b).max(), err_msg=name)


interpreted = functools.partial(gated_linear_tpu, interpret=True)


@pytest.mark.parametrize(
    ("sizes", "chunk", "tol"),
    [
        pytest.param({}, 16, 1e-5, marks=pytest.mark.slow),
        ({"T": 35, "documents": True, "scale": 20.0}, 16, 1e-5),
        pytest.param({"T": 150, "scale": 20.0}, 64, 1e-5, marks=pytest.mark.slow),
        pytest.param({"T": 150, "documents": True}, 64, 1e-5, marks=pytest.mark.slow),
        pytest.param({"T": 1, "N": 2}, 64, 1e-5, marks=pytest.mark.slow),
        pytest.param({"T": 40, "dtype": jnp.bfloat16}, 32, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_tpu_interpreted_is_the_recurrence(sizes, chunk, tol):
    made = problem(**sizes)
    ours = results(functools.partial(interpreted, chunk=chunk), *made)
    check(ours, results(gated_linear_recurrent, *made), tol)


def test_what_the_mask_hides_reaches_neither_output_nor_gradient(monkeypatch):
    """NaN behind the last key and before the first, handed to the kernel as attention does it."""
    (q, k, v, g, _), _, (pull, _) = problem(T=20)
    real = jnp.broadcast_to((jnp.arange(20) >= 3) & (jnp.arange(20) < 18), (2, 20))
    hidden = ~real[..., None, None]
    monkeypatch.setattr("causal_jax.attention.gated_linear.gated_linear_tpu", interpreted)
    run = functools.partial(gated_linear_attention, mask=Causal() & Keys(real), chunk=16)

    def graded(name, *arrays):
        def loss(*a):
            o = run(*a[:3], log_gate=a[3], implementation=name)
            assert not isinstance(o, tuple)
            return jnp.sum(jnp.where(hidden, 0, o * pull)), o

        (_, o), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
        return jnp.where(hidden, 0, o), *grads

    with compiling_for("tpu"):
        poisoned = [jnp.where(hidden, jnp.nan, x) for x in (k, v, g)]
        ours = graded("tpu", q, *poisoned)
    for a, b in zip(ours, graded("recurrent", q, k, v, g)):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_tpu_has_no_races_and_reads_nothing_unwritten():
    made = problem(T=35, documents=True)
    form = functools.partial(gated_linear_tpu, chunk=16, interpret=_testing.tpu_interpreter())
    ours = results(form, *made)
    assert not _testing.races_found()
    check(ours, results(gated_linear_recurrent, *made), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(_testing.no_tpu_compiler() is not None, reason=str(_testing.no_tpu_compiler()))
@pytest.mark.parametrize("topology", _testing.TOPOLOGIES)
@pytest.mark.parametrize(
    ("N", "K", "F", "V", "chunk", "dtype"),
    [(9, 3, 64, 65, 64, jnp.bfloat16), (4, 4, 128, 129, 128, jnp.float32)],
)
def test_compiles_for_a_tpu(topology, N, K, F, V, chunk, dtype):
    abstract = jax.eval_shape(
        lambda: problem(T=1000, N=N, K=K, F=F, V=V, dtype=dtype, documents=True)
    )
    (arrays, ids, pull), form = abstract, functools.partial(gated_linear_tpu, chunk=chunk)

    def graded(*args):
        out, back = jax.vjp(functools.partial(form, document=args[5]), *args[:5])
        return out, back(args[6:])

    program = _testing.compile_for_tpu(graded, *arrays, ids, *pull, topology=topology)
    for kernel in ("forward", "states", "backward"):
        assert f"gated_linear_{kernel}" in program.as_text()
    assert program.cost_analysis()["flops"] > 1e9  # what the kernels do is counted


def on_gpu(T=100, documents=True):
    return problem(B=1, T=T, N=2, K=1, F=64, V=33, documents=documents)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_gpu_interpreted_is_the_recurrence(documents):
    made = on_gpu(documents=documents)
    form = functools.partial(gated_linear_gpu, interpret=_testing.gpu_interpreter())
    check(results(form, *made), results(gated_linear_recurrent, *made), 2e-2)  # bfloat16 products


@pytest.mark.slow
@pytest.mark.parametrize(("F", "V"), [(64, 65), (128, 128)])
def test_lowers_for_cuda(F, V):
    made = jax.eval_shape(lambda: problem(B=1, T=100, N=2, K=1, F=F, V=V, documents=True))
    arrays, ids, pull = made

    def graded(*args):
        out, back = jax.vjp(functools.partial(gated_linear_gpu, document=args[5]), *args[:5])
        return out, back(args[6:])

    text = _testing.lower_for_gpu(graded, *arrays, ids, *pull)
    assert text.count("mosaic_gpu") >= 2  # o; dq, dk, dv


def test_thirds_add_up():
    g = jax.random.normal(jax.random.key(0), (1000,)) * 30
    parts = jax.jit(gpu.thirds)(g)
    assert all(p.dtype == jnp.bfloat16 for p in parts)
    np.testing.assert_allclose(sum(p.astype(jnp.float32) for p in parts), g, rtol=1e-6)


def test_refusals():
    (q, k, v, g, state), *_ = problem(T=9)
    for name in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match=f"{name}: it needs a {name.upper()}"):
            gated_linear_attention(q, k, v, mask=Causal(), implementation=name)
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match="64 or 128 features"):
        gated_linear_attention(q, k, v, mask=Causal(), implementation="gpu")
    with pytest.raises(NotImplementedError, match="float16"):
        gated_linear_tpu(*(x.astype(jnp.float16) for x in (q, k, v)), g, state)
    wide = jax.ShapeDtypeStruct((1, 8, 1, 1024), jnp.float32)
    assert "1024 x 1024" in (tpu.refusal(wide, wide, wide) or "")
    assert [tpu.legal_chunk(*x) for x in ((8, 100), (64, 20), (256, 999))] == [16, 32, 128]
    ids = Documents(jnp.zeros((2, 9), jnp.int32))
    with compiling_for("tpu"), pytest.raises(NotImplementedError, match="only 'reference'"):
        gated_linear_attention(q, k, v, mask=ids, implementation="tpu")
