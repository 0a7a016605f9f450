"""Prompts with something taken out: what would be said, had this not been there?

Rows are next-token rows (`tokens`, `targets`, `weights`, `positions`, `segments`, [B, T]), one
document each, padding in front or behind. Everything works on arrays of fixed shape, under jit: a
row that gets shorter is closed up, and padded behind.

LeaF, arXiv 2506.07851.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float, Int

Rows = dict[str, Array]


def run_numbers(chosen: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Maximal contiguous runs of chosen tokens, numbered 1, 2, ... in each row; 0 elsewhere."""
    before = jnp.pad(chosen[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(chosen, jnp.cumsum(chosen & ~before, axis=1), 0)


def prune(batch: Mapping[str, Array], removed: Bool[Array, "B T"]) -> Rows:
    """The rows without some tokens.

    What follows closes up and its positions are counted anew, so the answer stands at other places
    of the row; its tokens and weights stay. Removing the token in front of an answer's first leaves
    that first to be predicted from what now stands before it.

    Args:
        batch: rows. The weight of a token says that it is predicted, so it must not be removed.
        removed: tokens to take out.

    Returns:
        Rows of the same shape.
    """
    tokens = batch["tokens"]
    T = tokens.shape[1]
    whole = jnp.concatenate([tokens, batch["targets"][:, -1:]], 1)
    weights = jnp.pad(batch["weights"], ((0, 0), (1, 0)))
    gone = jnp.pad(removed, ((0, 0), (0, 1)))
    order = jnp.argsort(gone, axis=1, stable=True)
    left = T + 1 - gone.sum(1, keepdims=True)
    place = jnp.arange(T + 1)[None]

    def closed(x, end, fill):
        return jnp.where(place < end, jnp.take_along_axis(x, order, 1), fill)

    whole, weights = closed(whole, left, 0), closed(weights, left, 0.0)
    segments = jnp.pad(batch["segments"], ((0, 0), (0, 1)), mode="edge")
    segments = closed(segments, left - 1, -1)[:, :-1]  # the last token is a target only
    return {
        "tokens": jnp.where(place < left - 1, whole, 0)[:, :-1],
        "targets": whole[:, 1:],
        "weights": weights[:, 1:],
        "segments": segments,
        "positions": _counted(segments),
    }


def before_answer(batch: Mapping[str, Array]) -> Bool[Array, "B T"]:
    """The tokens of the prompt: real, and before the first that is predicted."""
    answered = jnp.pad(batch["weights"][:, :-1], ((0, 0), (1, 0))) > 0
    return (batch["segments"] >= 0) & (jnp.cumsum(answered, axis=1) == 0)


def split_response(weights: Float[Array, "B T"], part: int, parts: int) -> Float[Array, "B T"]:
    """Weights of one part of the answer; what comes before it is then context, what after is not.

    Of m answer tokens part p has those from floor(p m / parts) to floor((p + 1) m / parts).

    Args:
        part: from 0.
        parts: how many.

    Raises:
        InputError: no such part.
    """
    if not 0 <= part < parts:
        raise InputError(f"part = {part}: expected 0 to {parts - 1}")
    on = weights > 0
    number = jnp.cumsum(on, axis=1) - 1
    m = on.sum(1, keepdims=True)
    inside = (number >= part * m // parts) & (number < (part + 1) * m // parts)
    return jnp.where(on & inside, weights, 0.0)


def _counted(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... over the real tokens of each row (padding in front is at 0)."""
    return jnp.maximum(jnp.cumsum(segments >= 0, axis=1) - 1, 0).astype(jnp.int32)


def pick_run(numbers: Int[Array, "B T"], key: jax.Array) -> Bool[Array, "B T"]:
    """One run of each row, drawn evenly; nothing where there are none."""
    count = numbers.max(1)
    drawn = 1 + jax.random.randint(key, count.shape, 0, jnp.maximum(count, 1))
    return (numbers > 0) & (numbers == drawn[:, None])
