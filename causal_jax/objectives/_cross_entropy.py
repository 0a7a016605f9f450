"""Cross-entropy without all logits: a scan over time, each piece recomputed going backward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from causal_jax.objectives._pieces import in_pieces
from causal_jax.shapes import Array, Float, Int


def chunked_cross_entropy(
    h: Float[Array, "B T D"],
    unembed: Callable[[Array], Array],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over all positions of what a next-token loss needs.

        nll = lse(logits) - logits[target],  lse = log sum exp

    Args:
        h: final hidden states.
        unembed: hidden states to float32 logits [B, C, V].
        targets, weights: ids and their weights (0: no loss here).
        chunk: positions of the time axis per piece; at most B x chunk x V logits exist at a time.
            At least T: one piece, kept whole.

    Returns:
        sums `nll`, `z2` (lse squared, for the z-loss), `correct` (argmax hits), each weighted, and
            `count` (sum of weights).
    """

    def sums(h, targets, weights):
        logits = unembed(h)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        lse = jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)) + top
        hit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return {
            "nll": jnp.sum((lse - hit) * weights),
            "z2": jnp.sum(jnp.square(lse) * weights),
            "correct": jnp.sum((hit >= top) * weights),
        }

    return in_pieces(sums, (h, targets, weights), chunk=chunk) | {"count": jnp.sum(weights)}
