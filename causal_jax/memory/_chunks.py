"""Sequences cut into chunks, and back."""

import jax.numpy as jnp

from causal_jax.shapes import Array


def into_chunks(x: Array, C: int, heads: bool = True) -> Array:
    """[B, T, N, ...] -> [n, B, N, C, ...] (no heads: [B, T] -> [n, B, 1, C]), 0 behind the end."""
    T = x.shape[1]
    n = -(-T // C)
    x = jnp.pad(x, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], n, C, *x.shape[2:])
    if not heads:
        return jnp.swapaxes(x, 0, 1)[:, :, None]
    return jnp.moveaxis(x, (1, 3), (0, 2))


def from_chunks(y: Array, T: int) -> Array:
    """[n, B, N, C, H] -> [B, T, N, H]."""
    y = jnp.moveaxis(y, (0, 2), (1, 3))
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :T]
