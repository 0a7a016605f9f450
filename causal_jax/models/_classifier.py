"""A small feed-forward classifier with one scalar bias per layer."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.shapes import Array, Float, Key


class Classifier(nnx.Module):
    """h <- relu(h W_l + b_l) `depth` times, then logits h W; b_l is a scalar (arXiv 2312.03002).

    W_l ~ N(0, 2 / fan in), b_l = 0, W ~ N(0, 1 / width). Deviation: code derived from the author's
    draws b_l ~ N(0, 1 / width), which now and then leaves all units of a layer dead from the start.
    """

    def __init__(self, d_in: int, width: int, depth: int, labels: int, key: Key[Array, ""]):
        sizes = (d_in, *[width] * depth)
        shapes = [*itertools.pairwise(sizes), (sizes[-1], labels)]
        cuts = np.cumsum([math.prod(s) for s in shapes])
        draws = jnp.split(jax.random.normal(key, (cuts[-1],)), cuts[:-1])  # one: quick to compile
        *weights, head = (x.reshape(s) for x, s in zip(draws, shapes))
        self.layers = nnx.List(nnx.Param((2 / w.shape[0]) ** 0.5 * w) for w in weights)
        self.bias = nnx.Param(jnp.zeros(depth))
        self.head = nnx.Param(sizes[-1] ** -0.5 * head)

    def __call__(self, h: Float[Array, "B D"]) -> Float[Array, "B V"]:
        for layer, b in zip(self.layers, self.bias[...]):
            h = jax.nn.relu(h @ layer[...] + b)
        return h @ self.head[...]
