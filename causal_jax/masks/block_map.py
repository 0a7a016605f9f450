"""The compiled form of a mask: for every row of tiles, the list of its live tiles.

A tile is live if it may hold an allowed entry.

Static masks are compiled on the host by numpy from `status`, in O(tiles) and never O(T S), once
per mask and shape. Masks with arrays are compiled on the device: the static factors of a product
give the list, the statuses of the others thin it out, and a stable sort on "dead" moves the live
tiles to the front of each row.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from causal_jax.errors import InputError
from causal_jax.masks.algebra import And, Full, HeadSplit, Index, Mask, Or, as_mask, check_grid
from causal_jax.masks.lookups import BlockList
from causal_jax.masks.tiles import EMPTY, FULL, PARTIAL, Tiles
from causal_jax.masks.values import namespace, pytree, shared_size
from causal_jax.shapes import Array

_CHUNK = 1 << 22  # statuses computed at once on the host


@pytree("cnt", "idx", "kind", "q_offset", "overflow")
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMap:
    """Live tiles per row: rows are tiles of queries, lists hold tiles of keys (or `transpose()`d).

    A tile of kind FULL (2) lies inside of T x S and needs no mask at all; a PARTIAL one (1) needs
    mask(b, h, i, j) and i < T, j < S: tiles that hang over an edge are never FULL. Static maps
    hold numpy arrays.

    Attributes:
        cnt: int32 [B|1, N|1, rows], number of live tiles of each row.
        idx: int32 [B|1, N|1, rows, Kmax], their indices, ascending; slots >= cnt repeat the last
            valid index.
        kind: int32, shape of idx; 1 partial, 2 full, 0 in slots >= cnt.
        q_offset: int32 [] or [B], absolute position of query 0.
        overflow: bool []; True if some row had more live tiles than Kmax and lost the last of
            them. Only possible with `max_blocks`; the result of attention is then wrong, and
            `check` says so.
        T, S, block_q, block_k: always of queries and keys, also after `transpose()`.
    """

    cnt: Any
    idx: Any
    kind: Any
    q_offset: Any
    overflow: Any
    T: int
    S: int
    block_q: int
    block_k: int
    transposed: bool = False

    @property
    def is_host(self) -> bool:
        """True if the lists are numpy arrays: known while tracing."""
        return namespace(self.cnt, self.idx, self.kind) is np

    @property
    def num_tiles(self) -> tuple[int, int]:
        """(tiles of queries, tiles of keys), live or not."""
        return -(-self.T // self.block_q), -(-self.S // self.block_k)

    @property
    def _columns(self) -> int:
        return self.num_tiles[0 if self.transposed else 1]

    @property
    def num_live(self) -> Any:
        """Number of live tiles, over all the sequences and heads that the map distinguishes."""
        total = self.cnt.sum()
        return int(total) if self.is_host else total

    @property
    def sparsity(self) -> Any:
        """Fraction of tiles that are skipped."""
        nq, nk = self.num_tiles
        return 1 - self.num_live / (self.cnt.shape[0] * self.cnt.shape[1] * nq * nk)

    def check(self) -> "BlockMap":
        """Itself, or InputError if a concrete map has overflowed."""
        if not isinstance(self.overflow, Tracer) and bool(np.any(self.overflow)):
            raise InputError(
                f"max_blocks={self.idx.shape[-1]}: "
                "a row of tiles has more live tiles: raise max_blocks"
            )
        return self

    def tiles(self) -> Any:
        """The statuses as a grid, int8 [B|1, N|1, nq, nk], or [.., nk, nq] if transposed."""
        if not self.is_host:
            return _tiles_on_device(self)
        grid = np.zeros((*self.cnt.shape, self._columns), np.int8)
        at = np.nonzero(self.kind)
        grid[(*at[:-1], self.idx[at])] = self.kind[at]
        return grid

    def to_dense(self) -> Any:
        """The live tiles as booleans [B|1, N|1, T, S]: covers the mask. For tests and pictures."""
        grid = self.tiles() > 0
        if self.transposed:
            grid = grid.swapaxes(-1, -2)
        grid = grid.repeat(self.block_q, -2).repeat(self.block_k, -1)
        return grid[..., : self.T, : self.S]

    def transpose(self, *, max_blocks: int | None = None) -> "BlockMap":
        """The same tiles by the other side: rows of keys that list tiles of queries (for dk, dv).

        Args:
            max_blocks: upper bound of the tiles per row, for traced maps; default: as many as
                there are.
        """
        turn = _transposed if self.is_host else _transposed_on_device
        return turn(self, max_blocks).check()

    def refine(self, mask: Any, *, max_blocks: int | None = None) -> "BlockMap":
        """The map of (this map's mask) & mask: asks `mask` about the listed tiles only."""
        mask = as_mask(mask)
        host = namespace(self.q_offset) is np and np.ndim(self.q_offset) == 0
        _ = check_grid(mask, self.T, self.S, int(self.q_offset) if host else 0)
        sizes = (1, 1) if mask._blind else (mask.batch, mask.heads)
        batch = shared_size("batch of map and mask", (self.cnt.shape[0], sizes[0]))
        heads = shared_size("heads of map and mask", (self.cnt.shape[1], sizes[1]))
        if batch != self.cnt.shape[0] and np.shape(self.q_offset) not in ((), (1,), (batch,)):
            raise InputError(
                f"batch {batch} of the mask: expected that of q_offset, {self.q_offset.shape[0]}"
            )
        if (mask.is_static or mask._blind) and self.is_host and host:
            return _refined(self, mask, batch, heads, max_blocks)
        return _refined_on_device(self, mask, batch, heads, max_blocks).check()

    def __and__(self, mask: Any) -> "BlockMap":
        return self.refine(mask)

    __array_ufunc__ = None


def _statuses(mask: Mask, m: BlockMap, batch: int, heads: int, i: Any, j: Any) -> Any:
    """Statuses of the tiles (i, j); a tile that hangs over the edge of T x S is never FULL."""
    b = np.arange(batch, dtype=np.int32).reshape(-1, 1, 1, 1)
    h = np.arange(heads, dtype=np.int32).reshape(1, -1, 1, 1)
    q0, k0 = i * m.block_q, j * m.block_k
    xp_q, xp_k = namespace(q0), namespace(k0)
    q1, k1 = xp_q.minimum(q0 + m.block_q, m.T), xp_k.minimum(k0 + m.block_k, m.S)
    over = (q0 + m.block_q > m.T) | (k0 + m.block_k > m.S)
    offset = m.q_offset.reshape(-1, 1, 1, 1) if np.ndim(m.q_offset) else m.q_offset
    extent = min(m.block_q, m.T), min(m.block_k, m.S)
    status = mask._tile_status(Tiles(b, h, q0 + offset, q1 + offset, k0, k1, extent))
    xp = namespace(status, over)
    return xp.where(over & (status == FULL), xp.int8(PARTIAL), status)


@jax.jit
def _tiles_on_device(m: BlockMap) -> Array:
    at = jnp.indices(m.idx.shape, sparse=True)[:3]
    grid = jnp.zeros((*m.cnt.shape, m._columns), jnp.int8)
    return grid.at[(*at, m.idx)].max(m.kind.astype(jnp.int8))


def _transposed(m: BlockMap, limit: int | None) -> BlockMap:
    grid = m.tiles().swapaxes(-1, -2)
    columns = np.arange(grid.shape[-1], dtype=np.int32).reshape(1, 1, 1, -1)
    lists = _compact(grid, columns, limit)
    lists["overflow"] = lists["overflow"] | m.overflow
    return dataclasses.replace(m, **lists, transposed=not m.transposed)


_transposed_on_device = jax.jit(_transposed, static_argnums=1)


def _refined(m: BlockMap, mask: Mask, batch: int, heads: int, limit: int | None) -> BlockMap:
    row = np.arange(m.idx.shape[2], dtype=np.int32).reshape(1, 1, -1, 1)
    i, j = (m.idx, row) if m.transposed else (row, m.idx)
    status = _statuses(mask, m, batch, heads, i, j)
    kind = namespace(status, m.kind).minimum(status, m.kind)
    lists = _compact(kind, m.idx, limit)
    lists["overflow"] = lists["overflow"] | m.overflow
    return dataclasses.replace(m, **lists)


_refined_on_device = jax.jit(_refined, static_argnums=(2, 3, 4))


def _compact(status: Any, columns: Any, limit: int | None) -> dict[str, Any]:
    """The lists cnt, idx, kind and overflow; `columns` [.., C] says which tile a slot is."""
    if namespace(status, columns) is np:
        return _compact_host(status, columns, limit)
    slots = status.shape[-1] if limit is None else min(limit, status.shape[-1])
    status = status.astype(jnp.int32)
    live = (status > EMPTY).sum(-1, dtype=jnp.int32)
    order = jnp.argsort(status == EMPTY, axis=-1, stable=True)[..., :slots]
    cnt = jnp.minimum(live, slots)
    slot = jnp.arange(slots, dtype=jnp.int32).reshape(1, 1, 1, -1)
    valid = slot < cnt[..., None]
    kind = jnp.where(valid, jnp.take_along_axis(status, order, -1), EMPTY)
    source = jnp.take_along_axis(order, jnp.minimum(slot, jnp.maximum(cnt - 1, 0)[..., None]), -1)
    idx = jnp.take_along_axis(jnp.broadcast_to(columns, status.shape), source, -1)
    return {
        "cnt": cnt,
        "idx": idx.astype(jnp.int32),
        "kind": kind,
        "overflow": jnp.any(live > slots),
    }


def _compact_host(status: np.ndarray, columns: np.ndarray, limit: int | None) -> dict[str, Any]:
    live = status > EMPTY
    cnt = live.sum(-1, dtype=np.int32)
    most = max(1, int(cnt.max(initial=0)))
    if limit is not None and most > limit:
        raise InputError(
            f"max_blocks={limit}: a row of tiles has {most} live tiles: raise max_blocks to {most}"
        )
    at = np.nonzero(live)
    starts = np.cumsum(cnt) - cnt.ravel()
    slot = np.arange(at[0].size) - np.repeat(starts, cnt.ravel())
    idx = np.zeros((*cnt.shape, most), np.int32)
    kind = np.zeros((*cnt.shape, most), np.int32)
    idx[(*at[:-1], slot)] = np.broadcast_to(columns, status.shape)[at]
    kind[(*at[:-1], slot)] = status[at]
    last = np.minimum(np.arange(most), np.maximum(cnt - 1, 0)[..., None])
    lists = {"cnt": cnt, "idx": np.take_along_axis(idx, last, -1), "kind": kind}
    for x in lists.values():
        x.setflags(write=False)  # maps are cached and shared
    return lists | {"overflow": np.False_}


def _blank(T: int, S: int, block_q: int, block_k: int, offset: Any) -> BlockMap:
    none = np.zeros((1, 1, 1), np.int32)
    return BlockMap(
        none, none[..., None], none[..., None], offset, np.False_, T, S, block_q, block_k
    )


@lru_cache(maxsize=256)
def _host_map(mask: Mask, T: int, S: int, block_q: int, block_k: int, offset: int) -> BlockMap:
    blank = _blank(T, S, block_q, block_k, np.int32(offset))
    nq, nk = blank.num_tiles
    j = np.arange(nk, dtype=np.int32).reshape(1, 1, 1, -1)
    grid = np.empty((mask.batch, mask.heads, nq, nk), np.int8)
    step = max(1, _CHUNK // (mask.batch * mask.heads * nk))
    for n in range(0, nq, step):
        i = np.arange(n, min(n + step, nq), dtype=np.int32).reshape(1, 1, -1, 1)
        grid[:, :, n : n + step] = _statuses(mask, blank, mask.batch, mask.heads, i, j)
    return dataclasses.replace(blank, **_compact_host(grid, j, None))


def build(
    mask: Mask,
    T: int,
    S: int,
    block_q: int,
    block_k: int,
    *,
    q_offset: Index = 0,
    max_blocks: int | None = None,
) -> BlockMap:
    """Compile a mask into the lists of its live tiles.

    Args:
        T, S: numbers of queries and keys; need not be multiples of the blocks.
        block_q, block_k: size of a tile.
        q_offset: absolute position of the first query; an array [B] makes a map per sequence on
            the device.
        max_blocks: upper bound of the live tiles of a row, which bounds the work of masks with
            arrays. Exceeding it is an error when it can be seen (static mask, concrete arrays),
            else `overflow` is set.

    Returns:
        BlockMap, of numpy arrays if the mask and q_offset are static.

    Raises:
        InputError: bad sizes, arrays of the mask too small for T and S, max_blocks exceeded.
    """
    for field, value in (("block_q", block_q), ("block_k", block_k), ("max_blocks", max_blocks)):
        if field == "max_blocks" and value is None:
            continue
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{field}={value!r}: expected an integer >= 1")
    sizes = int(T), int(S), int(block_q), int(block_k)
    offset, batch = check_grid(mask, T, S, q_offset)
    if isinstance(offset, int):
        fixed, rest = split_static(mask)
        bm = _host_map(fixed, *sizes, offset)
        if not isinstance(rest, Full):
            return bm.refine(rest, max_blocks=_least(max_blocks, _most_live(mask, bm)))
        if max_blocks is not None and bm.idx.shape[-1] > max_blocks:
            raise InputError(
                f"max_blocks={max_blocks}: a row of tiles has {bm.idx.shape[-1]} live tiles: "
                f"raise max_blocks to {bm.idx.shape[-1]}"
            )
        return bm
    blank = _blank(*sizes, offset.reshape(-1))
    limit = _least(max_blocks, _most_live(mask, blank))
    return _grid_on_device(blank, mask, batch, limit).check()


@partial(jax.jit, static_argnums=(2, 3))
def _grid_on_device(blank: BlockMap, mask: Mask, batch: int, limit: int) -> BlockMap:
    nq, nk = blank.num_tiles
    i = np.arange(nq, dtype=np.int32).reshape(1, 1, -1, 1)
    j = np.arange(nk, dtype=np.int32).reshape(1, 1, 1, -1)
    status = _statuses(mask, blank, batch, mask.heads, i, j)
    return dataclasses.replace(blank, **_compact(status, j, limit))


def _least(bound: int | None, other: int) -> int:
    return other if bound is None else min(bound, other)


def _most_live(mask: Mask, m: BlockMap) -> int:
    """An upper bound, known while tracing, of the live tiles of a row: it keeps the lists short."""
    nk = m.num_tiles[1]
    offset = int(m.q_offset) if namespace(m.q_offset) is np and np.ndim(m.q_offset) == 0 else None
    if mask.is_static and offset is not None and not mask._costly:
        return _host_map(mask, m.T, m.S, m.block_q, m.block_k, offset).idx.shape[-1]
    if isinstance(mask, And):
        return min(_most_live(p, m) for p in mask.parts)
    if isinstance(mask, Or):
        return min(nk, sum(_most_live(p, m) for p in mask.parts))
    if isinstance(mask, HeadSplit):
        return max(_most_live(p, m) for p in mask.parts)
    if isinstance(mask, BlockList):
        rows = _touched(m.block_q, mask.block_q, offset)
        per_block = _touched(mask.block_k, m.block_k, 0)
        return min(nk, rows * mask.slots * per_block)
    return nk


def _touched(side: int, size: int, offset: int | None) -> int:
    """How many blocks of `size` a tile of `side` touches at most, tiles starting at `offset`."""
    if (
        offset is not None
        and offset % min(side, size) == 0
        and max(side, size) % min(side, size) == 0
    ):
        return max(1, side // size)
    return (side + size - 2) // size + 1


def split_static(mask: Mask) -> tuple[Mask, Mask]:
    """(static, rest) with mask == static & rest: what the host schedules, what run time decides."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    static = [p for p in parts if p.is_static]
    rest = [p for p in parts if not p.is_static]
    return And.of(*static), And.of(*rest)
