"""A model small enough to compile in a second, for tests of what surrounds a model.

It meets the contract of `ModelSpec`: names like the decoder's, stacked layers under `stack/blocks`,
`hidden`, `unembed`, `spec`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.models._base import ModelSpec
from causal_jax.nn.linear import Embed, Linear
from causal_jax.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class Tiny(ModelSpec):
    """Two residual layers; each token sees the mean of the tokens before it.

    Attributes:
        width: of the residual stream. layers: how many.
    """

    width: int = 16
    layers: int = 2
    noise: float = 0.0  # standard deviation of noise on the embedding while training

    def build(self, key):
        return TinyModel(self, nnx.Rngs(key))

    def flops_per_token(self, length):
        return 6.0 * (self.layers * 2 * self.width * 4 * self.width + self.vocab * self.width)


class Layer(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = RMSNorm(width)
        self.up = Linear(width, 4 * width, bias=True, rngs=rngs)
        self.down = Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Stack(nnx.Module):
    def __init__(self, width, layers, rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Layer(width, rngs)

        self.blocks = nnx.List([make(rngs)])


class TinyModel(nnx.Module):
    def __init__(self, spec, rngs):
        self.spec = spec
        self.embed = Embed(spec.vocab, spec.width, rngs=rngs)
        self.stack = Stack(spec.width, spec.layers, rngs)
        self.norm = RMSNorm(spec.width)

    def hidden(self, tokens, *, segments=None, positions=None, key=None):
        x = self.embed(tokens, jnp.float32)
        if key is not None and self.spec.noise:
            x = x + self.spec.noise * jax.random.normal(key, x.shape)
        count = jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)[None, :, None]
        x = x + jnp.cumsum(x, axis=1) / count
        graph, params = nnx.split(self.stack.blocks[0])
        x, _ = jax.lax.scan(lambda x, p: (nnx.merge(graph, p)(x), None), x, params)
        return self.norm(x)

    def unembed(self, h):
        return jnp.einsum("btd,vd->btv", h, self.embed.table[...])
