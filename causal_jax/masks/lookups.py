"""Masks that look something up: lists of blocks, document ids, chosen tokens, dense arrays, any
function.

i is the query's position, j the key's, both absolute. Reads outside of an array are clamped to its
last entry.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from causal_jax.errors import InputError
from causal_jax.masks.algebra import Mask
from causal_jax.masks.tiles import PARTIAL, Tiles, evaluate, extremes, tri
from causal_jax.masks.values import (
    Constant,
    aligned,
    as_field,
    check_array,
    constant,
    field_shape,
    namespace,
    pad_rank,
    pytree,
    read,
    set_size,
    shared_size,
    unwrap,
)


def _enough(mask: Mask, field: str, have: int, need: int, what: str) -> None:
    if have < need:
        raise InputError(
            f"{type(mask).__name__}: {field} covers {have} {what}, but {need} are asked for: "
            f"give an array of at least {need}"
        )


@pytree("idx")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockList(Mask):
    """j // block_k in idx[b, h, i // block_q, :]: each block of queries lists its blocks of keys.

    The status is exact for any tile: it looks at the blocks that the tile touches.

    Args:
        idx: integers [B|1, N|1, nq, K] or [nq, K]; negative: no block. A numpy array (or nested
            tuples) is part of the program (static mask), a jax array is an argument. Duplicates do
            no harm.
        block_q, block_k: numbers of queries and keys of a block.
    """

    idx: Any
    block_q: int
    block_k: int
    _costly = True

    def __post_init__(self):
        set_size(self, "block_q", 1)
        set_size(self, "block_k", 1)
        if isinstance(self.idx, list | tuple | np.ndarray):
            object.__setattr__(self, "idx", constant(self.idx))
        check_array(self, "idx", "integer", (2, 4), "[B|1, N|1, nq, K] or [nq, K]")

    @property
    def batch(self) -> int:
        return field_shape(self.idx, 4)[0]

    @property
    def heads(self) -> int:
        return field_shape(self.idx, 4)[1]

    @property
    def slots(self) -> int:
        """K, the length of a row's list."""
        return field_shape(self.idx, 4)[3]

    def _require(self, rows, cols):
        have = field_shape(self.idx, 4)[2] * self.block_q
        _enough(self, "idx", have, rows, "queries")

    def _allow(self, b, h, i, j):
        return self._listed(b, h, i // self.block_q, j // self.block_k)

    def _listed(self, b, h, row, col):
        """Is block `col` listed in row of blocks `row`?"""
        listed, col = aligned(read(as_field(self.idx, 4), b, h, row), col[..., None])
        if namespace(listed, col) is jnp:
            return (listed == col).any(-1)
        out = np.False_  # slot by slot: numpy would hold all of them at once
        for slot in range(listed.shape[-1]):
            out = out | (listed[..., slot] == col[..., 0])
        return out

    def _status(self, t):
        q0, q1 = t.q0 // self.block_q, (t.q1 - 1) // self.block_q + 1
        k0, k1 = t.k0 // self.block_k, (t.k1 - 1) // self.block_k + 1
        sides = (
            _blocks_touched(t.q0, t.extent[0], self.block_q),
            _blocks_touched(t.k0, t.extent[1], self.block_k),
        )
        return evaluate(Partial(BlockList._listed, self), Tiles(t.b, t.h, q0, q1, k0, k1, sides))


def _blocks_touched(lo: Any, side: int | None, size: int) -> int | None:
    """Upper bound of the number of blocks that a run of `side` positions from `lo` touches."""
    if side is None:
        return None
    if isinstance(lo, np.ndarray) and lo.size:
        return int(np.max((lo + max(side, 1) - 1) // size - lo // size)) + 1
    return (max(side, 1) + size - 2) // size + 1


@pytree("q_ids", "kv_ids")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """q_ids[b, i] == kv_ids[b, j]: packed documents do not see each other. Ids need no order.

    Padding has an id of its own (-1 by convention) and so attends to padding only.
    EMPTY: the intervals [min, max] of the ids in the tile's queries and keys are disjoint.
    FULL: all four extremes are equal. Conservative for unsorted ids, exact for sorted ones, where
    negative ids count as the largest.

    Args:
        q_ids: integers [B, T] or [T].
        kv_ids: integers [B, S] or [S]; the same as q_ids by default.
    """

    q_ids: Any
    kv_ids: Any = None

    def __post_init__(self):
        check_array(self, "q_ids", "integer", (1, 2), "[B, T] or [T]")
        if self.kv_ids is not None:
            check_array(self, "kv_ids", "integer", (1, 2), "[B, S] or [S]")
        _ = self.batch

    def _ids(self) -> tuple[Any, Any]:
        q = as_field(self.q_ids, 2)
        return q, q if self.kv_ids is None else as_field(self.kv_ids, 2)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kv = self.q_ids if self.kv_ids is None else self.kv_ids
        return field_shape(self.q_ids, 2), field_shape(kv, 2)

    @property
    def batch(self) -> int:
        q, kv = self._shapes()
        return shared_size("Documents: batch of q_ids and kv_ids", (q[0], kv[0]))

    def _require(self, rows, cols):
        q, kv = self._shapes()
        _enough(self, "q_ids", q[1], rows, "queries")
        _enough(self, "q_ids" if self.kv_ids is None else "kv_ids", kv[1], cols, "keys")

    def _allow(self, b, h, i, j):
        q, kv = self._ids()
        return read(q, b, i) == read(kv, b, j)

    def _status(self, t):
        q, kv = (_unsigned(unwrap(x)) for x in self._ids())
        q_low, q_high = extremes(q, t.b, t.q0, t.q1, t.extent[0])
        k_low, k_high = extremes(kv, t.b, t.k0, t.k1, t.extent[1])
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return tri((q_high < k_low) | (k_high < q_low), same)


def _unsigned(ids: Any) -> Any:
    """Any order serves the interval test; this one puts -1 last, where packing puts padding."""
    return ids.astype(f"uint{8 * ids.dtype.itemsize}")


class _Chosen(Mask):
    """Membership in a set of positions: sorted static positions, or booleans [B, T]."""

    tokens: Any

    def __post_init__(self):
        tokens = self.tokens.value if isinstance(self.tokens, Constant) else self.tokens
        if isinstance(tokens, range | list | tuple | set | frozenset):
            tokens = np.asarray(list(tokens) or np.zeros(0, np.int32))
        positions = (
            isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu" and tokens.ndim == 1
        )
        if not positions:
            object.__setattr__(self, "tokens", tokens)
            check_array(self, "tokens", "boolean", (1, 2), "[B, T] or [T], or positions in a tuple")
        elif tokens.size and tokens.min() < 0:
            raise InputError(f"{type(self).__name__}: position {tokens.min()}: expected >= 0")
        else:
            object.__setattr__(self, "tokens", constant(np.unique(tokens).astype(np.int32)))

    @property
    def batch(self) -> int:
        return 1 if isinstance(self.tokens, Constant) else field_shape(self.tokens, 2)[0]

    def _member(self, b: Any, x: Any) -> Any:
        if not isinstance(self.tokens, Constant):
            return read(pad_rank(self.tokens, 2), b, x)
        out = np.False_
        for first, end in self._runs():
            out = out | ((x >= first) & (x < end))
        return out

    def _runs(self) -> list[tuple[int, int]]:
        positions = self.tokens.value
        breaks = np.flatnonzero(np.diff(positions) > 1) + 1
        return [(int(r[0]), int(r[-1]) + 1) for r in np.split(positions, breaks) if r.size]

    def _range_status(self, b: Any, lo: Any, hi: Any, extent: int | None) -> Any:
        if not isinstance(self.tokens, Constant):
            flags = pad_rank(self.tokens, 2).astype(jnp.int32)
            low, high = extremes(flags, b, lo, hi, extent)
            return tri(high == 0, low == 1)
        xp = namespace(lo, hi)
        count: Any = np.int32(0)
        for first, end in self._runs():
            count = count + xp.clip(xp.minimum(hi, end) - xp.maximum(lo, first), 0, None)
        return tri(count == 0, count == hi - lo)

    def _covers(self, need: int, what: str) -> None:
        if not isinstance(self.tokens, Constant):
            _enough(self, "tokens", field_shape(self.tokens, 2)[1], need, what)


@pytree("tokens")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Keys(_Chosen):
    """j in tokens: keys that everybody sees (global columns, valid keys). Status exact.

    Args:
        tokens: positions (tuple, range, set: static), or booleans [B, S] or [S].
    """

    tokens: Any

    def _require(self, rows, cols):
        self._covers(cols, "keys")

    def _allow(self, b, h, i, j):
        return self._member(b, j)

    def _status(self, t):
        return self._range_status(t.b, t.k0, t.k1, t.extent[1])


@pytree("tokens")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Queries(_Chosen):
    """i in tokens: queries that see everything (global rows). Status exact.

    Args:
        tokens: positions (tuple, range, set: static), or booleans [B, T] or [T].
    """

    tokens: Any

    def _require(self, rows, cols):
        self._covers(rows, "queries")

    def _allow(self, b, h, i, j):
        return self._member(b, i)

    def _status(self, t):
        return self._range_status(t.b, t.q0, t.q1, t.extent[0])


@pytree("array")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """array[b, h, i, j]: any mask, written out. Status: any / all of the tile.

    Args:
        array: booleans [T, S] or [B|1, N|1, T|1, S|1], axes of size 1 being shared;
            `constant(array)` makes the mask static.
    """

    array: Any
    _costly = True

    def __post_init__(self):
        check_array(self, "array", "boolean", (2, 4), "[T, S] or [B|1, N|1, T, S]")

    @property
    def batch(self) -> int:
        return field_shape(self.array, 4)[0]

    @property
    def heads(self) -> int:
        return field_shape(self.array, 4)[1]

    def _require(self, rows, cols):
        have_rows, have_cols = field_shape(self.array, 4)[2:]
        if have_rows != 1:
            _enough(self, "array", have_rows, rows, "queries")
        if have_cols != 1:
            _enough(self, "array", have_cols, cols, "keys")

    def _allow(self, b, h, i, j):
        return read(as_field(self.array, 4), b, h, i, j)

    def _status(self, t):
        if not isinstance(self.array, Constant) or namespace(*t[:6]) is jnp:
            return evaluate(Partial(Dense._allow, self), t)
        counts = _counts(as_field(self.array, 4))
        B, N = counts.shape[:2]
        T, S = counts.shape[2] - 1, counts.shape[3] - 1
        b, h = np.clip(t.b, 0, B - 1), np.clip(t.h, 0, N - 1)
        q0, q1 = np.clip(t.q0, 0, T - 1), np.clip(t.q1 - 1, 0, T - 1) + 1
        k0, k1 = np.clip(t.k0, 0, S - 1), np.clip(t.k1 - 1, 0, S - 1) + 1
        inside = counts[b, h, q1, k1] - counts[b, h, q0, k1] - counts[b, h, q1, k0]
        inside = inside + counts[b, h, q0, k0]
        return tri(inside == 0, inside == (q1 - q0) * (k1 - k0))


@lru_cache(maxsize=4)
def _counts(array: Constant) -> np.ndarray:
    """Number of allowed entries before row i and column j, [B, N, T + 1, S + 1]."""
    B, N, T, S = array.value.shape
    out = np.zeros((B, N, T + 1, S + 1), np.int32)
    np.cumsum(array.value, axis=3, dtype=np.int32, out=out[:, :, 1:, 1:])
    np.cumsum(out, axis=2, out=out)
    return out


@pytree("aux")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FromFn(Mask):
    """fn(b, h, i, j, *aux): see `from_fn`."""

    fn: Callable[..., Any]
    aux: tuple[Any, ...] = ()
    status_fn: Callable[..., Any] | None = None
    evaluate: bool = True
    sizes: tuple[int, int] = (1, 1)

    @property
    def _costly(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.status_fn is None and self.evaluate

    @property
    def _blind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.status_fn is None and not self.evaluate

    @property
    def batch(self) -> int:
        return self.sizes[0]

    @property
    def heads(self) -> int:
        return self.sizes[1]

    def _call(self, fn: Callable[..., Any], *index: Any) -> Any:
        aux = jax.tree.map(unwrap, self.aux, is_leaf=lambda x: isinstance(x, Constant))
        if self.is_static and namespace(*index) is np:
            with (
                jax.ensure_compile_time_eval()
            ):  # fn may use jax.numpy, and we may be inside a trace
                return np.asarray(fn(*index, *aux))
        return fn(*index, *aux)

    def _allow(self, b, h, i, j):
        out = self._call(self.fn, b, h, i, j)
        if getattr(out, "dtype", None) != np.bool_:
            raise InputError(
                f"from_fn: {getattr(self.fn, '__name__', self.fn)} returned "
                f"{getattr(out, 'dtype', type(out))}: expected booleans"
            )
        return out

    def _status(self, t):
        if self.status_fn is not None:
            return self._call(self.status_fn, *t[:6])
        return evaluate(Partial(FromFn._allow, self), t) if self.evaluate else np.int8(PARTIAL)


def from_fn(
    fn: Callable[..., Any],
    *aux: Any,
    batch: int = 1,
    heads: int = 1,
    status: Callable[..., Any] | None = None,
    evaluate: bool = True,
) -> FromFn:
    """Any pure function fn(b, h, i, j, *aux) -> bool of broadcastable indices as a mask.

    Args:
        fn: uses operators or jax.numpy, is elementwise in its indices, and is a module-level
            function or kept by the caller: masks compare it by identity, so that a new lambda each
                time compiles each time.
        aux: arrays (pytrees) that fn needs; they become leaves. Reads outside of them are fn's
            affair.
        batch, heads: how many sequences and query heads fn distinguishes (1: does not look at b or
            h).
        status: closed form status(b, h, q0, q1, k0, k1, *aux) -> 0, 1 or 2 if there is one.
        evaluate: without `status`, find statuses by looking at every entry (costs T S evaluations
            of fn where the other factors of a product leave it open); False: PARTIAL throughout.
    """
    for field, value in (("batch", batch), ("heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"from_fn: {field}={value!r}: expected an integer >= 1")
    return FromFn(fn, aux, status, evaluate, (batch, heads))
