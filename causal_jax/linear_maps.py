"""Linear maps that layers and memories share: a product over the last axis, a short convolution.

y = x W                                      `matmul`
y_t = sum_{i < W} w_i * x_{t - W + 1 + i}    `causal_conv`, channel by channel, the past only
"""

import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.placement import time_is_whole
from causal_jax.shapes import Array, Float, Int


def matmul(x: Float[Array, "*B D"], w: Float[Array, "D F"], **kw) -> Float[Array, "*B F"]:
    """x w over all leading axes, which are folded into one where no mesh cuts the time axis.

    The same numbers either way; but the gradient of w is then one plain product, where the unfolded
    form makes XLA:CPU transpose both activations first (a quarter of a feed-forward layer's time).
    """
    if x.ndim > 2 and time_is_whole():
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), w, **kw)
        return y.reshape(*x.shape[:-1], w.shape[-1])
    return jnp.einsum("...d,df->...f", x, w, **kw)


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
