"""The formula, all tiles at once, differentiated by jax."""

import jax
import jax.numpy as jnp

from pallas_kernels.lsh_attention.problem import Problem


def reference(x: Problem, scale: float) -> tuple[jax.Array, jax.Array]:
    """o [P, C, Q, V] in v's dtype and lse [P, C, Q] in float32 (or wider)."""
    (P, C), R = x.block.shape, x.k_sample.shape[1]
    wide = jnp.promote_types(jnp.float32, x.q.dtype)
    p = jnp.arange(P)[:, None]

    def listed(blocks, samples):
        """[P, C, S + R, ..]: the keys of a tile's list."""
        shared = jnp.broadcast_to(samples[:, None], (P, C, *samples.shape[1:]))
        return jnp.concatenate([blocks[p, x.block], shared], 2)

    keys, values = (listed(*pair).astype(wide) for pair in ((x.k, x.k_sample), (x.v, x.v_sample)))
    bias = listed(x.bias, x.bias_sample)
    other = x.block_sample[:, None] != x.block[..., None]
    bias = bias.at[..., bias.shape[-1] - R :].add(jnp.where(other, 0, -jnp.inf))
    exact = jax.lax.Precision.HIGHEST
    s = jnp.einsum("pcqh,pcsh->pcqs", x.q.astype(wide), keys, precision=exact) * scale
    s = s + bias[:, :, None]
    if x.mask is not None and x.places is not None:
        j = listed(x.places.j, x.places.j_sample)[:, :, None]
        at = x.places.b.reshape(-1, 1, 1, 1), x.places.h[..., None], x.places.i[..., None], j
        s = jnp.where(x.mask(*at), s, -jnp.inf)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    w = jnp.exp(s - top)
    total = w.sum(-1, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    o = jnp.einsum("pcqs,pcsv->pcqv", w / total, values, precision=exact)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))[..., 0]
    return o.astype(x.v.dtype), lse
