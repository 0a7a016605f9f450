"""Whole tiles at a time: the three statuses, extremes of an array over ranges, plain evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.masks.values import broadcast, namespace

EMPTY, PARTIAL, FULL = 0, 1, 2
_CHUNK = 1 << 20  # entries evaluated at once


class Tiles(NamedTuple):
    """Broadcastable, rank-aligned tiles [q0, q1) x [k0, k1); `extent`: upper bounds of their
    sides, if known.
    """

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
    one = xp.int8(PARTIAL)
    return xp.where(empty, xp.int8(EMPTY), xp.where(full, xp.int8(FULL), one))


def extremes(x: Any, b: Any, lo: Any, hi: Any, extent: int | None) -> tuple[Any, Any]:
    """Minimum and maximum of x[b, lo:hi] for broadcastable ranges of any place and length, with
    clamped reads.

    Doubling table: level l holds the extremes of all runs of 2^l entries; a range is covered by
        two runs of the
    largest level that fits. O(T log extent) work for the table, O(1) per range.

    Args:
        x: [B, T] integers.
        b, lo, hi: broadcastable integers, lo < hi.
        extent: upper bound of hi - lo; None: not known.
    """
    T = x.shape[1]
    xp = namespace(x, b, lo, hi)
    x = xp.asarray(x)
    b = xp.clip(b, 0, x.shape[0] - 1)
    lo, last = xp.clip(lo, 0, T - 1), xp.clip(hi - 1, 0, T - 1)
    longest = T if extent is None else max(1, min(extent, T))
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


def evaluate(allow: Callable[..., Any], t: Tiles) -> Any:
    """Exact status of tiles by looking at every entry, a chunk of tiles at a time.

    PARTIAL throughout when the sides of the tiles are not known (both of their ends are traced).
    """
    if t.extent[0] is None or t.extent[1] is None:
        return np.int8(PARTIAL)
    flat = [x.reshape(-1) for x in (broadcast(x, *t[:6]) for x in t[:6])]
    shape = np.broadcast_shapes(*(np.shape(x) for x in t[:6]))
    di = np.arange(max(1, t.extent[0]), dtype=np.int32).reshape(1, -1, 1)
    dj = np.arange(max(1, t.extent[1]), dtype=np.int32).reshape(1, 1, -1)

    def status(b, h, q0, q1, k0, k1):
        b, h, q0, q1, k0, k1 = (x.reshape(-1, 1, 1) for x in (b, h, q0, q1, k0, k1))
        xp = namespace(q0, q1, k0, k1)
        i, j = (
            xp.minimum(q0 + di, q1 - 1),
            xp.minimum(k0 + dj, k1 - 1),
        )  # repeats entries, adds none
        seen = broadcast(allow(b, h, i, j), b, h, i, j)
        return tri(~seen.any((1, 2)), seen.all((1, 2)))

    total = flat[0].size
    chunk = max(1, min(total, _CHUNK // (di.size * dj.size)))
    probe = allow(*(np.zeros((1, 1, 1), np.int32) for _ in range(4)))
    if total == 0:
        return np.zeros(shape, np.int8)
    if namespace(probe, *flat) is np:
        parts = [status(*(x[n : n + chunk] for x in flat)) for n in range(0, total, chunk)]
        return np.concatenate(parts).reshape(shape)
    rows = -(-total // chunk)
    padded = [jnp.pad(jnp.asarray(x), (0, rows * chunk - total), mode="edge") for x in flat]
    out = jax.lax.map(lambda xs: status(*xs), tuple(x.reshape(rows, chunk) for x in padded))
    return out.reshape(-1)[:total].reshape(shape)
