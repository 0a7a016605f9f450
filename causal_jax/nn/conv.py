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
from causal_jax.shapes import Array, Float, Int


def causal_conv(
    x: Float[Array, "B T D"],
    w: Float[Array, "W D"],
    state: Float[Array, "B P D"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
    """Convolve every channel with its own taps, looking back only.

    A sequence cut anywhere gives the same numbers when the state is handed on; one shorter than the
    taps is fine. Padding in front of a sequence changes nothing where x is 0 there.

    Args:
        x: the sequence, or its next T positions.
        w: taps, the current token's last.
        state: the W - 1 rows before x; None: zeros, the beginning.
        segments: document ids: no tap reaches into another document. The rows of `state` count as
            the document of x's first position.

    Returns:
        y in x's dtype, and the state after it: the last P = W - 1 rows.

    Raises:
        InputError: taps or state that do not fit x.
    """
    (B, T, D), W = x.shape, w.shape[0]
    if W < 1 or w.shape[1] != D:
        raise InputError(f"w {w.shape}: expected [W, {D}] with W >= 1 for x {x.shape}")
    if state is None:
        state = jnp.zeros((B, W - 1, D), x.dtype)
    if state.shape != (B, W - 1, D):
        raise InputError(f"state {state.shape}: expected {(B, W - 1, D)} for {W} taps, x {x.shape}")
    w = w.astype(x.dtype)
    past = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    if segments is not None:
        before = jnp.broadcast_to(segments[:, :1], (B, W - 1))
        documents = jnp.concatenate([before, segments], axis=1)
    y = x * w[-1][None, None]
    for i in range(W - 1):
        shifted = past[:, i : i + T]
        if segments is not None:
            same = documents[:, i : i + T] == segments
            shifted = jnp.where(same[..., None], shifted, 0)
        y = y + shifted * w[i][None, None]
    return y, past[:, T:]


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
