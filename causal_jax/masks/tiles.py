"""Whole tiles at a time: the three statuses, extremes of an array over ranges, plain evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.masks.values import broadcast, namespace

EMPTY, PARTIAL, FULL = 0, 1, 2
_CHUNK = 1 << 20  # entries evaluated at once


class Tiles(NamedTuple):
    """Broadcastable tiles [q0, q1) x [k0, k1) of one rank; `extent`: bounds of their sides."""

    b: Any
    h: Any
    q0: Any
    q1: Any
    k0: Any
    k1: Any
    extent: tuple[int | None, int | None]


def tri(empty: Any, full: Any) -> Any:
    """EMPTY where `empty`, else FULL where `full`, else PARTIAL."""
    xp = namespace(empty, full)
    return xp.where(empty, xp.int8(EMPTY), xp.where(full, xp.int8(FULL), xp.int8(PARTIAL)))


def extremes(x: Any, b: Any, lo: Any, hi: Any, extent: int | None) -> tuple[Any, Any]:
    """Minimum and maximum of x[b, lo:hi] for broadcastable ranges, with clamped reads.

    Doubling table: level l holds the extremes of all runs of 2^l entries; a range is covered by
    two runs of the largest level that fits. O(T log extent) for the table, O(1) per range.

    Args:
        x: [B, T] integers.
        b, lo, hi: broadcastable integers, lo < hi.
        extent: upper bound of hi - lo; None: not known.
    """
    T = x.shape[1]
    longest = T if extent is None else max(1, min(extent, T))
    xp = namespace(x, b, lo, hi)
    b = xp.clip(b, 0, x.shape[0] - 1)
    lo, last = xp.clip(lo, 0, T - 1), xp.clip(hi - 1, 0, T - 1)
    lows, highs = [x], [x]
    for level in range(longest.bit_length() - 1):
        shift = 1 << level
        for table, pick in ((lows, xp.minimum), (highs, xp.maximum)):
            part = table[-1]
            # A run that leaves the array is never asked for; its tail repeats to keep the shape.
            table.append(pick(part, xp.concatenate([part[:, shift:], part[:, :shift]], axis=1)))
    low, high = xp.stack(lows), xp.stack(highs)
    span, level = last - lo + 1, xp.zeros_like(last)
    for n in range(1, len(lows)):
        level = level + (span >= (1 << n))
    second = last - (xp.ones_like(level) << level) + 1
    return (
        xp.minimum(low[level, b, lo], low[level, b, second]),
        xp.maximum(high[level, b, lo], high[level, b, second]),
    )


def evaluate(allow: jax.tree_util.Partial, t: Tiles) -> Any:
    """Exact status of tiles by looking at every entry, a chunk of tiles at a time.

    PARTIAL throughout when the sides of the tiles are not known (both of their ends are traced).

    Args:
        allow: function of (b, h, i, j), with the mask bound as a pytree.
    """
    if t.extent[0] is None or t.extent[1] is None:
        return np.int8(PARTIAL)
    shape = np.broadcast_shapes(*(np.shape(x) for x in t[:6]))
    flat = tuple(broadcast(x, *t[:6]).reshape(-1) for x in t[:6])
    sides = max(1, t.extent[0]), max(1, t.extent[1])
    chunk = max(1, min(flat[0].size, _CHUNK // (sides[0] * sides[1])))
    if namespace(*flat) is np and not jax.tree.leaves(allow):
        parts = range(0, flat[0].size, chunk)
        out = [_look(allow, tuple(x[n : n + chunk] for x in flat), sides) for n in parts]
        return np.concatenate([np.zeros(0, np.int8), *out]).reshape(shape)
    total = flat[0].size
    rows = -(-total // chunk)
    padded = (jnp.pad(jnp.asarray(x), (0, rows * chunk - total), mode="edge") for x in flat)
    chunks = tuple(x.reshape(rows, chunk) for x in padded)
    out = jax.lax.map(lambda xs: _look(allow, xs, sides), chunks)
    return out.reshape(-1)[:total].reshape(shape)


def _look(allow: Any, tiles: tuple[Any, ...], sides: tuple[int, int]) -> Any:
    """Status of a list of tiles, all at once."""
    b, h, q0, q1, k0, k1 = (x.reshape(-1, 1, 1) for x in tiles)
    xp = namespace(q0, q1, k0, k1)
    di = np.arange(sides[0], dtype=np.int32).reshape(1, -1, 1)
    dj = np.arange(sides[1], dtype=np.int32).reshape(1, 1, -1)
    i, j = xp.minimum(q0 + di, q1 - 1), xp.minimum(k0 + dj, k1 - 1)  # repeats entries, adds none
    seen = broadcast(allow(b, h, i, j), b, h, i, j)
    return tri(~seen.any((1, 2)), seen.all((1, 2)))
