"""One layer of linear attention, read at the last token, with the value map whole or factorised.

    z = sum_t x_t (x_t . W_KQ x_T)            no softmax, no scale
    logits = W z                              W = W_O W_V^T (factorised) or W_OV (merged)

No residual, no positions, no unembedding: with one-hot tokens a logit is a token. Both forms have
the same functions (for a rank of at least that of W); gradient descent finds different ones. The
small model of the theory of factual recall: arXiv 2412.06538, 2506.10887.
"""

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Key

Params = dict[str, Array]


def init(
    key: Key[Array, ""],
    width: int,
    rank: int | None = None,
    *,
    merged: bool = False,
    ones: float = 0.0,
) -> Params:
    """Parameters, float32: W_KQ = 1e-4 everywhere, the value map ~ N(0, 1/width).

    Args:
        key: randomness of the value map.
        width: D, also the number of outputs.
        rank: H, inner width of the factorised map; None: D.
        merged: the value map is one matrix.
        ones: where positive, the value map starts with this in every entry instead.

    Returns:
        "kq" [D, D] and "ov" [D, D], or "o" [D, H] and "v" [D, H].
    """
    if merged and rank is not None:
        raise InputError(f"rank = {rank}: a merged map has no inner width")
    shapes = {"ov": (width, width)} if merged else dict.fromkeys("ov", (width, rank or width))
    keys = jax.random.split(key, len(shapes))
    value = {
        name: jnp.full(shape, ones) if ones else jax.random.normal(k, shape) * width**-0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"kq": jnp.full((width, width), 1e-4)} | value


def output_value(params: Params) -> Float[Array, "D D"]:
    """W: what is read [:, token] to what is written [token, :]."""
    return params["ov"] if "ov" in params else params["o"] @ params["v"].T


def read(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """z, the tokens added up by how the last one scores them."""
    # products and sums rather than einsum: batched matrix-vector products are slow on CPUs
    scores = (x * jnp.expand_dims(x[:, -1] @ params["kq"].T, 1)).sum(-1, keepdims=True)
    return (x * scores).sum(1)


def logits(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """The layer's output at the last token."""
    z = read(params, x)
    return z @ params["ov"].T if "ov" in params else (z @ params["v"]) @ params["o"].T
