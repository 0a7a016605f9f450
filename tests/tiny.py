"""A model small enough to compile in a second, for tests of what surrounds a model.

It meets the contract of `ModelSpec`: names like the decoder's, stacked layers under `stack/blocks`,
`hidden`, `unembed`, `spec`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.models._base import ModelSpec
from causal_jax.nn.linear import Embed, Linear
from causal_jax.nn.norm import RMSNorm
from causal_jax.objectives.next_token import NextToken
from causal_jax.placement import with_batch
from causal_jax.training import state, step


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
        x = self.embed(tokens, jnp.dtype("float32"))
        if key is not None and self.spec.noise:
            x = x + self.spec.noise * jax.random.normal(key, x.shape)
        count = jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)[None, :, None]
        x = x + jnp.cumsum(x, axis=1) / count
        x = with_batch(x)
        graph, params = nnx.split(self.stack.blocks[0])
        x, _ = jax.lax.scan(lambda x, p: (with_batch(nnx.merge(graph, p)(x)), None), x, params)
        return self.norm(x)

    def unembed(self, h):
        return jnp.einsum("btd,vd->btv", h, self.embed.table[...])


NEXT = NextToken()


def random_batch(rows, length, vocab, seed=0):
    """A batch in which every row has another number of targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    counts = rng.integers(1, length + 1, rows)
    position = np.arange(length, dtype=np.int32)[None]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (position < counts[:, None]).astype(np.float32),
        "segments": np.zeros((rows, length), np.int32),
        "positions": np.repeat(position, rows, axis=0),
    }


def make_run(
    spec, optimizer, mesh, *, objective=NEXT, steps=10, accumulate=1, ema=None, trainable=""
):
    """(state at step 0, step function, abstract state) on a mesh."""
    tx = optimizer.transformation()
    abstract, _ = state.abstract_state(spec, tx, mesh, ema=ema is not None, trainable=trainable)
    graph = state.graph_of(spec)
    run = step.make_step(
        graph, objective, optimizer, abstract, mesh, steps=steps, accumulate=accumulate, ema=ema,
        trainable=trainable,
    )  # fmt: skip
    return state.new_state(spec, tx, abstract, 0, trainable=trainable), run, abstract


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs compiled by one run are there for the next, in this process or another."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (folder, 0.0)):
        jax.config.update(name, value)
    yield folder
    for name, value in zip(names, before):
        jax.config.update(name, value)
