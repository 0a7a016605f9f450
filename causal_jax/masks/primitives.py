"""The primitive masks. Each states its formula; i is the query's position, j the key's, both
absolute.

Many depend on the distance d = i - j only. A tile holds exactly the distances q0 - (k1 - 1) ...
(q1 - 1) - k0, which makes their status exact.
"""

import dataclasses
from typing import Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.masks.algebra import Mask
from causal_jax.masks.tiles import Tiles, tri
from causal_jax.masks.values import (
    Constant,
    as_field,
    check_array,
    constant,
    field_shape,
    namespace,
    pytree,
    read,
    set_size,
)


def _distances(t: Tiles) -> tuple[Any, Any]:
    """Smallest and largest i - j in the tile."""
    return t.q0 - t.k1 + 1, t.q1 - 1 - t.k0


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """j <= i + offset: the past and oneself (and `offset` further keys).

    EMPTY: k0 > q1 - 1 + offset. FULL: k1 - 1 <= q0 + offset.
    """

    offset: int = 0

    def __post_init__(self):
        set_size(self, "offset", None)

    def _allow(self, b, h, i, j):
        return j <= (i + self.offset if self.offset else i)

    def _status(self, t):
        low, high = _distances(t)
        return tri(high < -self.offset, low >= -self.offset)


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """i - left <= j <= i + right: `left` keys before self, `right` after; None: unbounded.

    EMPTY: k1 - 1 < q0 - left or k0 > q1 - 1 + right. FULL: k0 >= q1 - 1 - left and k1 - 1 <= q0 +
    right.
    """

    left: int | None
    right: int | None

    def __post_init__(self):
        set_size(self, "left", 0, optional=True)
        set_size(self, "right", 0, optional=True)

    def _allow(self, b, h, i, j):
        out = np.True_
        if self.left is not None:
            out = j >= i - self.left
        if self.right is not None:
            out = out & (j <= i + self.right)
        return out

    def _status(self, t):
        low, high = _distances(t)
        empty, full = np.False_, np.True_
        if self.left is not None:
            empty, full = low > self.left, high <= self.left
        if self.right is not None:
            empty, full = empty | (high < -self.right), full & (low >= -self.right)
        return tri(empty, full)


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sinks(Mask):
    """j < n: the first n keys (attention sinks, global tokens). EMPTY: k0 >= n. FULL: k1 <= n."""

    n: int

    def __post_init__(self):
        set_size(self, "n", 0)

    def _allow(self, b, h, i, j):
        return j < self.n

    def _status(self, t):
        return tri(t.k0 >= self.n, t.k1 <= self.n)


@pytree("length")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """j < length[b]: a prefix that everybody sees, per sequence; prefix-LM is `Causal() |
    Prefix(length)`.

    EMPTY: k0 >= length[b]. FULL: k1 <= length[b].

    Args:
        length: int (static), or integers [B].
    """

    length: Any

    def __post_init__(self):
        if isinstance(self.length, int | np.integer) and not isinstance(self.length, bool):
            if self.length < 0:
                raise InputError(f"Prefix: length={self.length}: expected an integer >= 0")
            object.__setattr__(self, "length", constant(np.int32(self.length)))
        check_array(self, "length", "integer", (0, 1), "[B] or an int")

    @property
    def batch(self) -> int:
        return field_shape(self.length, 1)[0]

    def _allow(self, b, h, i, j):
        return j < self._lengths(b)

    def _status(self, t):
        length = self._lengths(t.b)
        return tri(t.k0 >= length, t.k1 <= length)

    def _lengths(self, b: Any) -> Any:
        if isinstance(self.length, Constant) and self.length.value.ndim == 0:
            return int(self.length.value)
        return read(as_field(self.length, 1), b)


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Chunked(Mask):
    """i // size == j // size: diagonal blocks.

    EMPTY: disjoint intervals of chunks. FULL: one and the same chunk.
    """

    size: int

    def __post_init__(self):
        set_size(self, "size", 1)

    def _allow(self, b, h, i, j):
        return i // self.size == j // self.size

    def _status(self, t):
        qa, qz = t.q0 // self.size, (t.q1 - 1) // self.size
        ka, kz = t.k0 // self.size, (t.k1 - 1) // self.size
        return tri((qz < ka) | (kz < qa), (qa == qz) & (ka == kz) & (qa == ka))


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Strided(Mask):
    """(i - j) % stride == 0: every stride-th key, past and future.

    EMPTY: no multiple of stride among the tile's distances. FULL: stride 1, or a single distance
    that is one.
    """

    stride: int

    def __post_init__(self):
        set_size(self, "stride", 1)

    def _allow(self, b, h, i, j):
        return (i - j) % self.stride == 0

    def _status(self, t):
        low, high = _distances(t)
        empty = high - high % self.stride < low
        full = np.True_ if self.stride == 1 else low == high
        return tri(empty, full)


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dilated(Mask):
    """(i - j) % stride == 0 and 0 <= i - j < window * stride: self and earlier keys with gaps.

    EMPTY: no multiple of stride among the tile's distances within [0, window * stride). FULL: all
    distances within it and stride 1 or a single distance that is a multiple.
    """

    window: int
    stride: int

    def __post_init__(self):
        set_size(self, "window", 1)
        set_size(self, "stride", 1)

    def _allow(self, b, h, i, j):
        d = i - j
        return (d % self.stride == 0) & (d >= 0) & (d < self.window * self.stride)

    def _status(self, t):
        low, high = _distances(t)
        xp = namespace(low, high)
        reach = self.window * self.stride - 1
        top = xp.minimum(high, reach)
        empty = top - top % self.stride < xp.maximum(low, 0)
        full = (low >= 0) & (high <= reach)
        return tri(empty, full if self.stride == 1 else full & (low == high))
