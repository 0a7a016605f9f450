"""One residual block around a feed-forward layer: the smallest net with a feature and a detour.

    r0 = x E,   h = gelu(r0 W_in + b),   r1 = r0 + h W_out,   logits = r1 U,   value = r1 w

Two heads read r1: class logits and a scalar. Whether h carries the class is a matter of training:
the class is also in r0. Toy of arXiv 2311.17030's argument, in its smallest learned form.
"""

import jax
import jax.numpy as jnp

from causal_jax.shapes import Array, Float, Key

Params = dict[str, Array]


def init(
    key: Key[Array, ""], inputs: int, *, width: int = 64, hidden: int = 256, classes: int = 2
) -> Params:
    """Parameters, float32, N(0, 1 / rows) each."""
    shapes = {
        "embed": (inputs, width),
        "in": (width, hidden),
        "out": (hidden, width),
        "classes": (width, classes),
        "value": (width, 1),
    }
    keys = jax.random.split(key, len(shapes))
    draw = {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return draw | {"bias": jnp.zeros(hidden)}


def embed(params: Params, x: Float[Array, "B I"]) -> Float[Array, "B D"]:
    """r0."""
    return x @ params["embed"]


def hidden(params: Params, r0: Float[Array, "B D"]) -> Float[Array, "B F"]:
    """h."""
    return jax.nn.gelu(r0 @ params["in"] + params["bias"][None])


def finish(params: Params, r0: Float[Array, "B D"], h: Float[Array, "B F"]) -> Float[Array, "B D"]:
    """r1, which both heads read."""
    return r0 + h @ params["out"]


def logits(params: Params, r1: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Class logits."""
    return r1 @ params["classes"]


def value(params: Params, r1: Float[Array, "B D"]) -> Float[Array, "B"]:
    """The scalar."""
    return (r1 @ params["value"])[:, 0]
