"""Masks, arrays and jitted references shared by the tests of dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention import _tiles, dense_attention
from causal_jax.masks import (
    Causal,
    Documents,
    Full,
    HeadSplit,
    Prefix,
    Sinks,
    Window,
    as_mask,
    from_fn,
    top_k_blocks,
)
from pallas_kernels.block_sparse import Tiles

RNG = np.random.default_rng(1)
IDS = jnp.asarray(np.sort(RNG.integers(0, 4, (2, 64)), axis=1))

MASKS = {
    "none": None,
    "causal": Causal(),
    "shifted": Causal(5),
    "window": Causal() & Window(7, None),
    "streaming": Causal() & (Window(5, 0) | Sinks(3)),
    "both_sides": Window(3, 9),
    "documents": Causal() & Documents(IDS),
    "per_head": HeadSplit((Causal(), Full(), Window(2, 2), ~Window(4, 4))),
    "prefix": Causal() | Prefix(jnp.array([4, 20])),
    "array": jnp.asarray(RNG.random((2, 1, 37, 45)) < 0.2),
    "array2": jnp.asarray(RNG.random((37, 45)) < 0.5),
    "blocks": top_k_blocks(jnp.asarray(RNG.random((2, 4, 5, 6))), 4, 8, 8),
    "parity": from_fn(lambda b, h, i, j: (i * j) % 3 == 0),
}


def arrays(*shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def qkv(B=2, T=37, S=45, N=4, K=2, H=8, Hv=8, **kw):
    return arrays((B, T, N, H), (B, S, K, H), (B, S, K, Hv), **kw)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(
        np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tol, rtol=tol
    )


def visible(name, T=37, S=45, q_offset=0):
    """A mask of the table as booleans [2, 4, T, S]."""
    mask = MASKS[name]
    if isinstance(mask, jax.Array):
        return jnp.broadcast_to(mask, (2, 4, T, S))
    return jnp.broadcast_to(as_mask(mask).to_dense(T, S, q_offset=q_offset), (2, 4, T, S))


STATIC = ("implementation", "soft_cap", "scale", "q_offset", "return_lse")
attention = jax.jit(dense_attention, static_argnames=STATIC)


def with_gradients(q, k, v, mask, bias, sinks, do, dlse, **static):
    """o, lse and the gradients of all float arguments for cotangents of both outputs."""

    def f(q, k, v, bias, sinks):
        return dense_attention(
            q, k, v, mask=mask, bias=bias, sinks=sinks, return_lse=True, **static
        )

    (o, lse), pull = jax.vjp(f, q, k, v, bias, sinks)
    return o, lse, pull((do, jnp.where(lse == -jnp.inf, 0, dlse)))


graded = jax.jit(with_gradients, static_argnames=STATIC)
reference = jax.jit(  # apart: its programs outlive the change of tiles
    functools.partial(with_gradients, implementation="reference"), static_argnames=STATIC
)


@pytest.fixture(name="small_tiles")
def _small_tiles(monkeypatch):
    """Several tiles already at small lengths. Cached programs with other tiles are forgotten."""
    monkeypatch.setattr(_tiles, "_tall", lambda T, S: Tiles(16, 8))
    yield
    graded.clear_cache()
