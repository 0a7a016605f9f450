"""The live tiles of a mask as one flat list of steps, each a word that scalar memory can hold.

A kernel whose grid runs over steps spends nothing on dead tiles: not even an empty turn. From low
to high bits a word holds

    kind (2)   first step of its output tile (1)   last one (1)   inner tile   outer tile   group

For o and dq the outer tile is one of queries and the inner one of keys; for dk and dv it is the
other way round, and all query heads of a group follow one another. Every outer tile has at least
one step, be it of kind 0, so that its output is initialised and written.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

PARTIAL, FULL = 1, 2
WORDS = 192 * 1024  # of 4 bytes: what is taken of the 1 MiB of scalar memory


@dataclasses.dataclass(frozen=True)
class Packing:
    """How many bits the fields of a word take."""

    inner: int
    outer: int

    @classmethod
    def of(cls, inner: int, outer: int, groups: int) -> "Packing":
        """For so many tiles and query heads per kv head."""
        bits = cls((inner - 1).bit_length(), (outer - 1).bit_length())
        if 4 + bits.inner + bits.outer + (groups - 1).bit_length() > 31:
            raise NotImplementedError(
                f"{outer} x {inner} tiles for {groups} heads: more than a step's 31 bits can name; "
                "take larger tiles"
            )
        return bits

    def word(self, kind: Any, first: Any, last: Any, inner: Any, outer: Any, group: Any) -> Any:
        """All fields in one integer."""
        high = (group << self.outer | outer) << self.inner | inner
        return high << 4 | last << 3 | first << 2 | kind

    def tiles(self, word: Any) -> tuple[Any, Any, Any]:
        """(inner, outer, group) of a word."""
        high = word >> 4
        inner, high = high & ((1 << self.inner) - 1), high >> self.inner
        return inner, high & ((1 << self.outer) - 1), high >> self.outer


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The list.

    Attributes:
        words: int32 [b, h, n]; b and h are 1 where all batch rows or heads share it.
        count: how many steps the longest list has; an int if it is known on the host.
        packing: reads the words.
        stored: int32 like words: which of the partial tiles this is (in the order of the grid).
    """

    words: Any
    count: Any
    packing: Packing
    stored: Any


def by_query_tile(grid: Any, room: int = WORDS) -> Steps:
    """Steps for o and dq from the kinds of all tiles, int8 [b, h, nq, nk]; at most `room` words."""
    return _flatten(grid, number(grid), 1, room)


def by_key_tile(grid: Any, groups: int, room: int = WORDS) -> Steps:
    """Steps for dk and dv; per kv head, its `groups` query heads one after another."""
    xp: Any = np if isinstance(grid, np.ndarray) else jnp
    b, h, nq, nk = grid.shape

    def turned(x):
        x = x.reshape(b, max(1, h // groups), groups if h > 1 else 1, nq, nk)
        x = xp.broadcast_to(x, (*x.shape[:2], groups, nq, nk)).transpose(0, 1, 4, 2, 3)
        return x.reshape(*x.shape[:2], nk, groups * nq)

    return _flatten(turned(grid), turned(number(grid)), groups, room)


def partial_tiles(grid: Any) -> tuple[Any, Any]:
    """(row, column) of the partial tiles, [b, h, P], in the order of the grid; P is the most that
    some batch row and head has, or all where that is not known on the host."""
    xp: Any = np if isinstance(grid, np.ndarray) else jnp
    flat = (grid == PARTIAL).reshape(*grid.shape[:2], -1)
    most = max(1, int(flat.sum(-1).max())) if xp is np else flat.shape[-1]
    at = _front(flat, most)
    return at // grid.shape[3], at % grid.shape[3]


def number(grid: Any) -> Any:
    """0, 1, ... for the partial tiles of a batch row and head; anything else for others."""
    flat = (grid == PARTIAL).reshape(*grid.shape[:2], -1).astype(np.int32)
    return (flat.cumsum(-1) - 1).clip(0).reshape(grid.shape)


def _front(flags: Any, slots: int) -> Any:
    """The places where flags [b, h, n] are set, in order: int32 [b, h, slots]; then anything."""
    if isinstance(flags, np.ndarray):
        return np.argsort(~flags, axis=-1, stable=True)[..., :slots].astype(np.int32)
    # Not a sort: the TPU compiler takes minutes over one of 65536 entries.
    b, h = (jnp.arange(n) for n in flags.shape[:2])
    to = jnp.where(flags, jnp.cumsum(flags, -1) - 1, slots)
    places = jnp.arange(flags.shape[-1], dtype=jnp.int32)[None, None]
    out = jnp.zeros((*flags.shape[:2], slots), jnp.int32)
    return out.at[b[:, None, None], h[None, :, None], to].set(places, mode="drop")


def _flatten(kind: Any, numbers: Any, groups: int, room: int) -> Steps:
    """From kinds and numbers [b, h, outer, groups * inner]."""
    xp: Any = np if isinstance(kind, np.ndarray) else jnp
    b, h, outer, wide = kind.shape
    packing = Packing.of(wide // groups, outer, groups)
    kind = kind.astype(np.int32)
    at = np.arange(wide, dtype=np.int32).reshape(1, 1, 1, -1)
    idle = (kind == 0).all(-1, keepdims=True) & (at == 0)
    visit = (kind > 0) | idle
    first = visit & (xp.cumsum(visit, -1) == 1)
    last = visit & (xp.cumsum(visit[..., ::-1], -1)[..., ::-1] == 1)
    words = packing.word(
        kind,
        first.astype(np.int32),
        last.astype(np.int32),
        at % (wide // groups),
        np.arange(outer, dtype=np.int32).reshape(1, 1, -1, 1),
        at // (wide // groups),
    ).reshape(b, h, -1)
    visit = visit.reshape(b, h, -1)
    count = visit.sum(-1).astype(np.int32)
    slots = int(count.max()) if xp is np else outer * wide
    if b * h * slots > room:
        raise NotImplementedError(
            f"the schedule has {b * h} lists of {slots} steps: more than the {room} that scalar "
            "memory holds; take larger tiles"
        )
    order = _front(visit, slots)
    slot = np.arange(slots, dtype=np.int32).reshape(1, 1, -1)
    order = xp.take_along_axis(order, xp.minimum(slot, count[..., None] - 1), -1)
    words = xp.take_along_axis(words, order, -1)
    # A list shorter than the longest ends with turns on its last tile that do nothing.
    words = xp.where(slot < count[..., None], words, words & ~15).astype(np.int32)
    stored = xp.take_along_axis(numbers.reshape(b, h, -1), order, -1).astype(np.int32)
    return Steps(words, slots if xp is np else count.max(), packing, stored)
