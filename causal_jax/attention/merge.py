"""Attention to a union of disjoint sets of keys, from the attention to each of them.

    lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

`lse_i` is the log of the sum of exponentials over part i's keys. Associative and commutative up to
rounding; a part without keys (lse = -inf, o anything, NaN too) changes nothing and gets no
gradient.

    do_i = w_i do        dlse_i = w_i (do . (o_i - o) + dlse)        w_i = exp(lse_i - lse)

Used wherever keys are shared out: HyperAttention, ring attention, keys split over programs, a
memory beside a window. Paper: online softmax by parts, arXiv 2112.05682.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float


def merge_attention(
    outs: Sequence[Float[Array, "*B V"]], lses: Sequence[Float[Array, "*B"]]
) -> tuple[Float[Array, "*B V"], Float[Array, "*B"]]:
    """Softmax attention to all parts' keys together, in float32 or wider.

    Args:
        outs: attention to each part, any layout with the value's width last.
        lses: log of the sum of exponentials of each part; -inf: no key.

    Returns:
        o in the first part's dtype (0 where no part has a key), lse in float32 or wider.

    Raises:
        InputError: no parts, or not one lse for each.
    """
    if not outs or len(outs) != len(lses):
        raise InputError(
            f"{len(outs)} outs, {len(lses)} lses: expected one lse for each, at least 1"
        )
    wide = jnp.promote_types(jnp.float32, lses[0].dtype)
    lses = [x.astype(wide) for x in lses]
    top = jax.lax.stop_gradient(jnp.stack(lses).max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    # exp(-inf) = 0 has the gradient 0 exp'(-inf) = 0, but -inf - x in a product would be NaN
    dead = [x == -jnp.inf for x in lses]
    weights = [jnp.where(d, 0, jnp.exp(jnp.where(d, 0, x - top))) for x, d in zip(lses, dead)]
    total = sum(weights[1:], weights[0])
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    o = jnp.zeros((), wide)
    for out, weight, d in zip(outs, weights, dead):
        share = jnp.where(d[..., None], 0, out.astype(wide)) * (weight / total)[..., None]
        o = share if o.ndim == 0 else o + share
    return o.astype(outs[0].dtype), jnp.where(nothing, -jnp.inf, top + jnp.log(total))
