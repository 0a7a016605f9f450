"""Depthwise causal convolution over time: a few taps per channel, the past only.

    y_t = sum_{i < W} w_i * x_{t - W + 1 + i}    x = 0 before the sequence; w_{W-1}: current token

Cost W multiplications per channel and position. No bias, no activation: what follows decides. Used
on queries and keys before linear attention (LAWCAT, arXiv 2509.18467) and on the projections of
neural memories (arXiv 2501.00663).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.linear_maps import causal_conv
from causal_jax.shapes import Array, Float, Int


class CausalConv(nnx.Module):
    """Taps of a causal convolution, near the identity at the start or drawn.

    Args:
        width: number of channels.
        size: number of taps W.
        rngs: draws taps from N(0, 1 / W); None: 1 for the current token, 0.001 for the others.
    """

    def __init__(self, width: int, size: int = 4, *, rngs: nnx.Rngs | None = None):
        if size < 1:
            raise InputError(f"size={size}: expected at least one tap")
        if rngs is None:
            taps = jnp.full((size, width), 0.001).at[-1].set(1.0)
        else:
            taps = jax.random.normal(rngs.params(), (size, width), jnp.float32) * size**-0.5
        self.taps = nnx.Param(taps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B P D"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
        return causal_conv(x, self.taps[...], state, segments)
