"""Normalisation over the last axis, in float32 (or wider), returned in the input's dtype."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.shapes import Array, Float

NormName = Literal["rms", "layer"]


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + self.eps)
        return (h * _wide(self.scale[...], h)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias (arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + self.eps)
        return (h * _wide(self.scale[...], h) + _wide(self.bias[...], h)).astype(x.dtype)


def make_norm(kind: NormName, width: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm called `kind`."""
    return RMSNorm(width, eps=eps) if kind == "rms" else LayerNorm(width, eps=eps)


def _wide(vector: Array, like: Array) -> Array:
    return jnp.expand_dims(vector.astype(like.dtype), range(like.ndim - 1))
