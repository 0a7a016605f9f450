"""Memories in chunks, in plain XLA: the CPU's path, and every backend's where no kernel serves.

What does not depend on the state is done for several chunks at once, which both cores of a CPU can
share; a scan carries the state through them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.memory_chunk.decay import unit_lower_inverse
from pallas_kernels.memory_chunk.linear import Tokens, advance, prepare

GROUP = 16  # chunks prepared at once


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

    n = len(x.q)
    many = -(-n // -(-n // GROUP))  # as equal groups as can be
    spare = -n % many
    x = jax.tree.map(lambda a: jnp.pad(a, [(0, spare)] + [(0, 0)] * (a.ndim - 1)), x)
    x = jax.tree.map(lambda a: a.reshape(-1, many, *a.shape[1:]), x)

    def group(state, x):
        document = None if x.new is None else jnp.cumsum(x.new, -1)
        p = prepare(
            x, to_init=to_init, read_at=read_at, document=document, inverse=unit_lower_inverse
        )

        def chunk(state, inputs):
            p, x = inputs
            y, U, state = advance(p, x, state, initial)
            return state, (y, U, jnp.isfinite(state).all((-1, -2)))

        return lax.scan(chunk, state, (p, x))

    state, out = lax.scan(jax.checkpoint(group, prevent_cse=False), state, x)
    y, U, ok = (a.reshape(-1, *a.shape[2:])[:n] for a in out)
    return y, U, state, ok
