"""A decoder small enough to compile in a second, its runs, and two batches to patch between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.models.decoder import Decoder
from causal_jax.taps import run

SPEC = Decoder(vocab=31, layers=3, width=16, heads=4, kv_heads=2, context=32)
L, B, T, N, D = 3, 2, 9, 4, 16
SITES = ("resid_post", "attn.z", "mlp_out", "attn.pattern", "q", "resid_mid", "logits")


@functools.cache
def model():
    """Parameters away from their starting values, made by one program."""
    graph = nnx.split(nnx.eval_shape(lambda: SPEC.build(jax.random.key(0))))[0]

    @jax.jit
    def make():
        params = nnx.split(SPEC.build(jax.random.key(0)))[1]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return jax.tree.unflatten(tree, noisy)

    with jax.ensure_compile_time_eval():  # the first call may come from inside a trace
        return nnx.merge(graph, make())


@functools.partial(jax.jit, static_argnames="capture")
def _run(params, tokens, edits, capture):
    out, acts = run(nnx.merge(nnx.split(model())[0], params), tokens, edits=edits, capture=capture)
    return out, acts


def go(tokens, edits=(), capture=SITES):
    """(logits, captures) of the tiny decoder."""
    return _run(nnx.split(model())[1], tokens, edits, capture)


def ids(seed=0, length=T):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (B, length)), jnp.int32)


@functools.cache
def two():
    """(captures of one batch, captures of another)."""
    with jax.ensure_compile_time_eval():  # as in `model`: kept arrays must not belong to a trace
        return go(ids(0))[1], go(ids(1))[1]


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)
