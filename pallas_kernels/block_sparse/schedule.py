"""Which tiles of scores are computed, and how large they are. No kernel here: shared by kernels."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FULL = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the work.

    Attributes:
        block_q, block_k: queries and keys per tile (clipped to the lengths).
        entries: scores computed at once (batch x heads x tile); 0: all batch rows and heads.
        grain: a tile may start at any multiple of this many keys; 0: of block_k.
        lanes: tiles worked on side by side, each with products of its own, where 0 stands for one
            batch of products: XLA runs small products of a batch on one core of a CPU only.
    """

    block_q: int = 512
    block_k: int = 512
    entries: int = 0
    grain: int = 0
    lanes: int = 0

    def __post_init__(self):
        others = min(self.entries, self.grain, self.lanes)
        if self.block_q < 1 or self.block_k < 1 or others < 0:
            raise ValueError(f"tile sizes must be positive, got {self}")

    def clip(self, queries: int, keys: int) -> "Tiles":
        """The same, no larger than the problem."""
        return dataclasses.replace(
            self, block_q=min(self.block_q, queries), block_k=min(self.block_k, keys)
        )


class Schedule(NamedTuple):
    """Live tiles of each query tile: `idx[.., :full]` are full, `idx[.., full:count]` partial.

    The first two axes may be 1: the same for every batch row, every query head. numpy arrays if it
    is known on the host, else jax arrays.
    """

    full: Any  # [B|1, N|1, nq] int32
    count: Any  # [B|1, N|1, nq] int32
    idx: Any  # [B|1, N|1, nq, P] int32

    @classmethod
    def build(cls, cnt: Any, idx: Any, kind: Any) -> "Schedule":
        """From lists of live tiles: `cnt` valid entries of `idx`, `kind` 2 where full, else 1.

        A tile that hangs over the last key must not be called full.
        """
        xp: Any = np if all(isinstance(x, np.ndarray) for x in (cnt, idx, kind)) else jnp
        live = xp.arange(idx.shape[-1])[None, None, None] < cnt[..., None]
        full = live & (kind == FULL)
        order = xp.argsort(xp.where(full, 0, xp.where(live, 1, 2)), axis=-1, stable=True)
        idx = xp.take_along_axis(idx, order, axis=-1)
        return cls(full.sum(-1).astype(np.int32), cnt.astype(np.int32), idx.astype(np.int32))

    @classmethod
    def joined(cls, grid: Any) -> "Schedule":
        """One schedule for all batch rows and heads from the kinds of tiles [b, h, nq, nk].

        A tile is live if it is for somebody, full if it is for everybody. More work than lists of
        their own, but all rows and heads go through one set of loops and none is sliced out of an
        axis that may be sharded.
        """
        xp: Any = np if isinstance(grid, np.ndarray) else jnp
        live = (grid > 0).any((0, 1), keepdims=True)
        full = (grid == FULL).all((0, 1), keepdims=True)
        idx = xp.argsort(xp.where(full, 0, xp.where(live, 1, 2)), axis=-1, stable=True)
        return cls(*(x.astype(np.int32) for x in (full.sum(-1), live.sum(-1), idx)))

    @classmethod
    def spanned(cls, grid: np.ndarray, width: int) -> "Schedule":
        """Tiles `width` times as wide that begin at any column, from the kinds [b, h, nq, nk].

        Left to right, each begins at the first live tile not yet covered, and is full if all it
        covers are. The last one may hang over the edge. `Tiles.grain` is block_k / width.
        """
        start = np.zeros(grid.shape, bool)
        left = np.zeros(grid.shape[:3], np.int32)  # columns still covered by the last one
        for c in range(grid.shape[3]):
            start[..., c] = (grid[..., c] > 0) & (left == 0)
            left = np.where(start[..., c], width - 1, np.maximum(left - 1, 0))
        full = start & (grid == FULL)
        for ahead in range(1, width):
            full[..., :-ahead] &= grid[..., ahead:] == FULL
            full[..., -ahead:] = False
        idx = np.argsort(np.where(full, 0, np.where(start, 1, 2)), axis=-1, stable=True)
        most = max(1, int(start.sum(-1).max()))
        return cls(*(x.astype(np.int32) for x in (full.sum(-1), start.sum(-1), idx[..., :most])))

    @staticmethod
    def span(grid: np.ndarray) -> int:
        """Columns from the first live tile of a row to its last, the most of all rows."""
        live, columns = grid > 0, np.arange(grid.shape[3])
        first = np.where(live, columns, grid.shape[3]).min(-1)
        return max(1, int((np.where(live, columns, -1).max(-1) - first + 1).max()))

    def single(self) -> bool:
        """Is it known on the host that every tile of queries has exactly one tile of keys?"""
        return isinstance(self.count, np.ndarray) and bool((self.count == 1).all())

    def has(self) -> tuple[bool, bool]:
        """(some full tiles, some partial tiles); True where it is not known on the host."""
        if not isinstance(self.full, np.ndarray):
            return True, True
        return bool(self.full.any()), bool((self.count > self.full).any())
