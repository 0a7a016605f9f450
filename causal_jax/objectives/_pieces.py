"""Sums over time in pieces: what a loss needs of all logits, without holding all logits."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from causal_jax.placement import rows_here
from causal_jax.shapes import Array


def in_pieces(
    sums: Callable[..., dict[str, Array]], arrays: Sequence[Array], *, chunk: int
) -> dict[str, Array]:
    """sums(*arrays), a scan over pieces of the time axis, each recomputed going backward.

    Args:
        sums: arrays [B, C, ...] -> named sums over all their positions, 0 for positions of zeros.
        arrays: [B, T, ...] each.
        chunk: positions per piece; at least T: one piece, kept whole.
    """
    length = arrays[0].shape[1]
    if chunk >= length:
        return sums(*arrays)
    pieces = -(-length // chunk)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    def body(total, piece):
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums, prevent_cse=False)(*piece)), None

    cuts = tuple(cut(x) for x in arrays)
    shapes = jax.eval_shape(sums, *(x[0] for x in cuts))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zero, cuts)[0]


def piece_length(rows: int, vocab: int, mebibytes: int) -> int:
    """Positions per piece so that one device's float32 logits fill so many mebibytes.

    Args:
        rows: of the whole batch; what counts is the share of them that a device holds.
        vocab: logits per position.
        mebibytes: most of one piece on one device.
    """
    return max(1, mebibytes * 2**20 // (4 * rows_here(rows) * vocab))
