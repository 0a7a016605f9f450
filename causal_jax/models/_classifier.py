"""A small feed-forward classifier with one scalar bias per layer."""

import jax
from flax import nnx

from causal_jax.shapes import Array, Float, Key


class Classifier(nnx.Module):
    """h <- relu(h W_l + b_l) `depth` times, then logits h W; b_l is a scalar (arXiv 2312.03002).

    W_l ~ N(0, 2 / fan in), b_l ~ N(0, 1 / width), W ~ N(0, 1 / width).
    """

    def __init__(self, d_in: int, width: int, depth: int, labels: int, key: Key[Array, ""]):
        keys = jax.random.split(key, depth + 2)
        sizes = (d_in, *[width] * depth)
        draw = jax.random.normal
        self.layers = nnx.List(
            nnx.Param((2 / n) ** 0.5 * draw(k, (n, m)))
            for k, n, m in zip(keys, sizes[:-1], sizes[1:])
        )
        self.bias = nnx.Param(width**-0.5 * draw(keys[-2], (depth,)))
        self.head = nnx.Param(sizes[-1] ** -0.5 * draw(keys[-1], (sizes[-1], labels)))

    def __call__(self, h: Float[Array, "B D"]) -> Float[Array, "B V"]:
        for layer, b in zip(self.layers, self.bias[...]):
            h = jax.nn.relu(h @ layer[...] + b)
        return h @ self.head[...]
