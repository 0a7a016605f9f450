"""The recurrence as it is written, one position after another; differentiated by jax."""

import functools

import jax
import jax.numpy as jnp

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def gated_linear_recurrent(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    state: jax.Array,
    document: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.

    Args:
        q, k, v, g, state, document: as `gated_linear_chunked`.

    Returns:
        o [B, T, N, V] and the state after the last position [B, K, F, V], float32.
    """
    (B, T, N, F), K = q.shape, k.shape[2]
    q, k, v, g = (x.astype(jnp.float32) for x in (q.reshape(B, T, K, N // K, F), k, v, g))
    if document is None:
        document = jnp.zeros((B, T), jnp.int32)
    fresh = jnp.diff(document, axis=1, prepend=0) != 0

    def step(state, xs):
        q, k, v, g, fresh = xs
        kept = jnp.where(fresh[:, None, None, None], 0, jnp.exp(g)[..., None] * state)
        state = kept + k[..., None] * v[:, :, None]
        return state, _einsum("bkgf,bkfv->bkgv", q, state)

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, fresh))
    state, o = jax.lax.scan(step, state.astype(jnp.float32), xs)
    return jnp.moveaxis(o, 0, 1).reshape(B, T, N, -1), state
