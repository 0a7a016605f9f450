"""Which tiles of scores the XLA form of attention visits: measured on two AVX2 cores.

Tall tiles of 512 x 256 stay in the second-level cache and do most per second. What they cover of
pairs that are not allowed is wasted, though, and a tile that is not allowed as a whole asks the
mask for every pair: windows and blocks here and there are better served by other sides.
"""

from typing import Any

import numpy as np

from causal_jax.hardware import target
from causal_jax.masks import BlockList, Mask, parts_of
from pallas_kernels.block_sparse import Schedule, Tiles

NARROW = 1536  # keys per query up to which narrow tiles are considered
SMALL = 2.5  # time per area of tiles of 64 x 64 or 64 x 128, in that of 512 x 256 (2 to 3)


def choose_tiles(mask: Mask, T: int, S: int, q_offset: Any) -> tuple[Tiles, Schedule]:
    """The sides of the tiles and the list of those that are live."""
    tiles = _tall(T, S).clip(T, S)
    if target() != "cpu":
        live = mask.block_map(T, S, tiles.block_q, tiles.block_k, q_offset=q_offset)
        return tiles, Schedule.joined(live.tiles())
    tall = _lists(tiles, mask, T, S, q_offset)
    if not min(T, S) >= tiles.block_q == 2 * tiles.block_k:  # short
        return tall
    if isinstance(tall[1].count, np.ndarray):  # known on the host
        return _closest(tall, mask, T, S, q_offset)
    if listed := next((p for p in parts_of(mask) if isinstance(p, BlockList)), None):
        # Which blocks is known at run time only, but tiles within them need not ask for pairs.
        rows, columns = (_side(x, tiles.block_k // 4) for x in (listed.block_q, listed.block_k))
        return _lists(Tiles(rows, columns, tiles.entries), mask, T, S, q_offset)
    return tall


def _tall(T: int, S: int) -> Tiles:
    """2 MB of scores at once."""
    if target() != "cpu":
        return Tiles(512, 512)
    return Tiles(256 if max(T, S) <= 1024 else 512, 256, entries=2**19)


def _side(block: int, least: int) -> int:
    """Of tiles that lie within blocks of this side, if it is not too small for products."""
    return block if least < block <= 2 * least and block % least else least


def _lists(tiles: Tiles, mask: Mask, T: int, S: int, q_offset: Any) -> tuple[Tiles, Schedule]:
    """On the host for a static mask (also while tracing), else a program that makes them."""
    live = mask.block_map(T, S, tiles.block_q, tiles.block_k, q_offset=q_offset)
    return tiles, Schedule.build(live.cnt, live.idx, live.kind)


def _closest(
    tall: tuple[Tiles, Schedule], mask: Mask, T: int, S: int, q_offset: Any
) -> tuple[Tiles, Schedule]:
    """The tiles that cover least of what is not allowed, where that is worth it.

    A window of 256 keys covers 768 keys per query in tiles of 512 x 256; 512 in flat ones of
    256 x 512 that begin at any column; 384 or 320 in narrow ones of 128 x 384 or 64 x 320, one for
    each tile of queries, whose products are so small that XLA runs them on one core unless they are
    kept apart (their cost is measured, in keys per query of tall tiles). Blocks here and there,
    such as BigBird's 64 x 64, touch many tall tiles: small ones take SMALL times as long for their
    area.
    """
    best, (tiles, schedule) = tall, tall
    side, entries = tiles.block_k, tiles.entries
    columns = side * schedule.count.mean()  # per query
    flat = Schedule.spanned(mask.block_map(T, S, side, side, q_offset=q_offset).tiles(), 2)
    if 1.1 * 2 * side * flat.count.mean() < columns:
        best = Tiles(side, 2 * side, entries, grain=side), flat
        columns = 2 * side * flat.count.mean()
    if columns > NARROW:
        if 2 * schedule.full.sum() > schedule.count.sum():  # most of it is allowed
            return best
        for width in (side // 2, side // 4):
            small = _lists(Tiles(side // 4, width, entries), mask, T, S, q_offset)
            area = SMALL * width * small[1].count.mean()
            if area < columns:
                best, columns = small, area
        return best
    for narrow, start, slope in ((side // 2, 480, 0.43), (side // 4, 0, 1.5)):
        grid = mask.block_map(T, S, narrow, narrow, q_offset=q_offset).tiles()
        width = Schedule.span(grid)
        cost = start + slope * narrow * width
        if cost < columns:
            tiles = Tiles(narrow, narrow * width, entries, grain=narrow, lanes=16)
            best, columns = (tiles, Schedule.spanned(grid, width)), cost
    return best
