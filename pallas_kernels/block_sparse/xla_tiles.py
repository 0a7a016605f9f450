"""Tiles of the XLA form: blocks of arrays, products, loops, scores and mask of a tile.

Heads go first in a tile, so that it is contiguous. Arrays are cut up where they lie if each tile is
read once (`Config.apart`), else the caller of `xla.py` has heads first there, too.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Config:
    """All that is static. Three axes: batch rows B, kv heads K, query heads per kv head G."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    grain: int
    keys: int
    sizes: tuple[int, int, int]  # B, K, G
    unit: tuple[int, int, int]  # how many of each are worked on at once
    has: tuple[bool, bool]  # full tiles, partial tiles
    single: bool  # every tile of queries has exactly one of keys
    rows: int  # tiles of queries worked on at once
    upcast: bool  # multiply in float32
    scaled: bool  # the scale goes into q before the product, else onto the product
    apart: bool  # one product per batch row and kv head, not one for all of a unit; in place

    @property
    def axis(self) -> int:
        """Of the queries: [B, T, K, G, ..] where they lie, else [B, K, G, T, ..]."""
        return 1 if self.apart else 3


def sum_type(x):
    """Sums are in float32 at least."""
    return jnp.promote_types(jnp.float32, x.dtype)


def dot(spec: str, a, b) -> jax.Array:
    """An einsum that sums in `sum_type`."""
    return jnp.einsum(spec, a, b, preferred_element_type=sum_type(a))


def times_t(a, b):
    """[b, k, .., h] [b, k, .., h] -> [b, k, .., ..]. XLA copies operands that have more axes."""
    flat = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return dot("bkmh,bknh->bkmn", *flat).reshape(*a.shape[:-1], *b.shape[2:-1])


def times(a, b, axes: int = 1):
    """[b, k, .., n] [b, k, n, ..] -> [b, k, .., ..]; n may be several axes."""
    left = a.reshape(*a.shape[:2], -1, math.prod(a.shape[-axes:]))
    right = b.reshape(*b.shape[:2], left.shape[-1], -1)
    out = dot("bkmn,bkno->bkmo", left, right)
    return out.reshape(*a.shape[:-axes], *b.shape[2 + axes :])


def take_block(x: Any, starts, sizes) -> Any:
    """A block of x; an axis of size 1 is shared, an axis taken whole is not sliced."""
    if x is None:
        return None
    for axis, (start, size) in enumerate(zip(starts, sizes)):
        if x.shape[axis] not in (1, size):
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def put_block(x, part, starts):
    """x with a block overwritten."""
    starts = (*starts, *(0,) * (x.ndim - len(starts)))
    starts = [jnp.asarray(s if n > 1 else 0, jnp.int32) for s, n in zip(starts, x.shape)]
    return lax.dynamic_update_slice(x, part.astype(x.dtype), starts)


def add_block(x, part, starts):
    """x with a block added; an axis that x shares is summed over."""
    shared = tuple(a for a, n in enumerate(x.shape) if n == 1 and part.shape[a] > 1)
    part = part.sum(shared, keepdims=True) if shared else part
    return put_block(x, take_block(x, starts, part.shape) + part, starts)


def not_finite(x):
    """0 for every vector, NaN for one that is not finite."""
    return jnp.where(jnp.isfinite(x).all(-1), 0.0, jnp.nan).astype(x.dtype)


def keys_not_finite(cfg: Config, x):
    """Those of keys or values, [B, K, S], if they are asked for."""
    if not cfg.has[1]:
        return None
    return not_finite(x).swapaxes(1, 2) if cfg.apart else not_finite(x)


def clean(x, flags):
    """x with a vector of zeros where one is not finite."""
    return jnp.where(jnp.isnan(flags)[..., None], 0, x)


def over_units(cfg: Config, body, carry) -> Any:
    """`carry = body(at, carry)` unit by unit; `at`: first batch row, kv head, head in the group."""
    counts = tuple(n // u for n, u in zip(cfg.sizes, cfg.unit))
    if math.prod(counts) == 1:  # nothing is sliced along batch and heads: they may be sharded
        return body((0, 0, 0), carry)

    def turn(n, carry):
        at = n // (counts[1] * counts[2]), n // counts[2] % counts[1], n % counts[2]
        return body(tuple(x * u for x, u in zip(at, cfg.unit)), carry)

    return lax.fori_loop(0, math.prod(counts), turn, carry)


def over_tiles(cfg: Config, schedule: Schedule, at, rows, step, state) -> Any:
    """`state = step(partial, starts, state)` for the live tiles of some rows.

    `starts` has the first key for each of the rows (its tile may hang over the last key); more than
    one row have one tile each. Full tiles come first, then partial ones. The first `state` is None
    if there is only one step.
    """
    b = at[0] if schedule.full.shape[0] > 1 else 0
    h = at[1] * cfg.sizes[2] + at[2] if schedule.full.shape[1] > 1 else 0
    if cfg.single:
        starts = [schedule.idx[b, h, row, 0] * cfg.grain for row in rows]
        return step(cfg.has[1], starts, state)
    full, count, idx = (x[b, h, rows[0]] for x in schedule)

    def visit(partial, n, state):
        return step(partial, [idx[n] * cfg.grain], state)

    if cfg.has[0]:
        state = lax.fori_loop(0, full, functools.partial(visit, False), state)
    if cfg.has[1]:
        state = lax.fori_loop(full, count, functools.partial(visit, True), state)
    return state


class Part(NamedTuple):
    """Some batch rows, kv heads and heads of a group, whose products are one."""

    at: tuple[Any, Any, Any]
    sizes: tuple[int, int, int]
    spot: tuple[int, int] | None  # within the unit; None: all of it

    def of(self, x):
        """Its share of a tile made for the unit."""
        for axis, n in enumerate(self.spot or ()):
            if x.shape[axis] > 1:
                x = lax.slice_in_dim(x, n, n + 1, axis=axis)
        return x


class Unit:
    """What forward and backward share for one unit of work: operands, scores and mask of a tile.

    Tiles of scores are [b, k, g, queries, keys] forward and [b, k, keys, g, queries] backward: so
    every product contracts the last axis of its left and the second of its right factor, which
    spares transposing tiles of scores.
    """

    def __init__(self, cfg: Config, mask, offset, at):
        self.cfg, self.mask, self.at = cfg, mask, at
        self.inside = cfg.keys % cfg.grain == 0 and cfg.grain == cfg.block_k
        ub, uk, ug = cfg.unit
        self.b = (at[0] + jnp.arange(ub)).reshape(-1, 1, 1, 1, 1)
        h = (at[1] + jnp.arange(uk))[:, None] * cfg.sizes[2] + (at[2] + jnp.arange(ug))[None]
        self.h = h.reshape(1, uk, ug, 1, 1)
        self.first = lax.dynamic_slice_in_dim(offset, at[0], ub).reshape(-1, 1, 1, 1, 1)
        self.parts = [Part(at, cfg.unit, None)]
        if cfg.apart:
            spots = [(b, k) for b in range(ub) for k in range(uk)]
            self.parts = [Part((at[0] + b, at[1] + k, at[2]), (1, 1, ug), (b, k)) for b, k in spots]

    def queries(self, x, part: Part, i0) -> Any:
        """A tile [b, k, g, queries, ..] of x."""
        sizes = self._in_order(*part.sizes, self.cfg.block_q)
        tile = take_block(x, self._in_order(*part.at, i0), sizes)
        return self._operand(jnp.moveaxis(tile, self.cfg.axis, 3))

    def put(self, x, tile, part: Part, i0):
        """x with a tile of queries overwritten."""
        return put_block(x, jnp.moveaxis(tile, 3, self.cfg.axis), self._in_order(*part.at, i0))

    def _in_order(self, b, k, g, i):
        return (b, i, k, g) if self.cfg.apart else (b, k, g, i)

    def keys(self, x, part: Part, j0) -> Any:
        """A tile [b, k, keys, ..] of x."""
        if not self.cfg.apart:
            return self._operand(self.flags(x, part, j0))
        (b, k, _), (ub, uk, _) = part.at, part.sizes
        return self._operand(take_block(x, (b, j0, k), (ub, self.cfg.block_k, uk)).swapaxes(1, 2))

    def add(self, x, tile, j0):
        """x with a tile of keys added, that of all parts."""
        if not self.cfg.apart:
            return add_block(x, tile, (*self.at[:2], j0))
        return add_block(x, tile.swapaxes(1, 2), (self.at[0], j0, self.at[1]))

    def flags(self, x, part: Part, j0) -> Any:
        """A tile [b, k, keys] of x [B, K, S]"""
        return take_block(x, (*part.at[:2], j0), (*part.sizes[:2], self.cfg.block_k))

    def whole(self, tiles):
        """Tiles of all parts [b, k, ..] as one of the unit."""
        uk = self.cfg.unit[1]
        rows = [tiles[n : n + uk] for n in range(0, len(tiles), uk)]
        rows = [jnp.concatenate(row, 1) if len(row) > 1 else row[0] for row in rows]
        return jnp.concatenate(rows) if len(rows) > 1 else rows[0]

    def first_key(self, start):
        """Where the tile that covers the keys from `start` on begins."""
        return start if self.inside else jnp.minimum(start, self.cfg.keys - self.cfg.block_k)

    def _operand(self, x):
        return x.astype(sum_type(x)) if self.cfg.upcast else x

    def scores(self, s, bias):
        """(s, ds / d(scale q k^T) or None) from the raw products, before score_mod and the mask."""
        slope = None
        if not self.cfg.scaled:
            s = s * self.cfg.scale
        if self.cfg.soft_cap is not None:
            t = jnp.tanh(s / self.cfg.soft_cap)
            s, slope = self.cfg.soft_cap * t, 1 - t * t
        return (s if bias is None else s + bias.astype(s.dtype)), slope

    def index(self, i0, j0, backward=False) -> tuple[Any, ...]:
        """b, h, i, j of a tile, in the layout of its scores."""
        i = self.first + (i0 + jnp.arange(self.cfg.block_q)).reshape(1, 1, 1, -1, 1)
        j = (j0 + jnp.arange(self.cfg.block_k)).reshape(1, 1, 1, 1, -1)
        index = (self.b, self.h, i, j)
        return tuple(x.transpose(0, 1, 4, 2, 3) for x in index) if backward else index

    def modified(self, mod, s, part: Part, i0, j0, backward=False):
        """(score_mod(s), its pullback to (ds, gradient of its leaves)); forward: (.., None)."""
        if mod is None:
            return s, None
        index = tuple(part.of(x) for x in self.index(i0, j0, backward))
        if not backward:
            return mod(s, *index).astype(s.dtype), None
        return jax.vjp(lambda s, mod: mod(s, *index).astype(s.dtype), s, mod)

    def allowed(self, i0, start, backward=False):
        """The mask on a tile, in the layout of its scores."""
        index = self.index(i0, self.first_key(start), backward)
        ok = self.mask(*index)
        ok = ok if self.inside else ok & (index[3] >= start)
        # So that it is read and not made anew by every pass (XLA may still, head by head).
        return lax.optimization_barrier(ok) if self.cfg.upcast else ok
