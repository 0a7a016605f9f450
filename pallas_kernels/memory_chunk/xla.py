"""Memories in chunks, in plain XLA: the CPU's path, and every backend's where no kernel serves.

What does not depend on the state is done for all chunks at once; a scan carries the state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.memory_chunk.decay import unit_lower_inverse
from pallas_kernels.memory_chunk.linear import Tokens, advance, prepare


def linear(
    x: Tokens, state: jax.Array, initial: jax.Array, *, to_init: bool, read_at: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The exact linear form over n chunks, differentiable.

    Args:
        x: tokens [n, ..., C, H]; what is padding is not stored.
        state: [M | S] (M alone without momentum) before the first, [..., H, 2 V], float32.
        initial: M_0, that broadcasts to M.
        to_init: forgetting leads to M_0 instead of 0.
        read_at: "post" or "pre": read after or before the token is written.

    Returns:
        y [n, ..., C, V], U [n, ..., C, V] (theta times the errors), [M | S] after the last chunk,
        and whether it was finite after each, [n, ...].
    """

    def body(state, x):
        document = None if x.new is None else jnp.cumsum(x.new, -1)
        p = prepare(
            x, to_init=to_init, read_at=read_at, document=document, inverse=unit_lower_inverse
        )
        y, U, state = advance(p, x, state, initial)
        return state, (y, U, jnp.isfinite(state).all((-1, -2)))

    state, (y, U, ok) = lax.scan(jax.checkpoint(body, prevent_cse=False), state, x)
    return y, U, state, ok
