"""The mask algebra: what a mask is, and how `& | ~` and a choice per head combine masks.

A mask answers "may query i of head h in sequence b attend to key j?" in two ways:

    mask(b, h, i, j)                      -> bool, element by element, for broadcastable indices
    mask.status(b, h, q0, q1, k0, k1)     -> EMPTY, PARTIAL or FULL for the tile [q0, q1) x [k0, k1)

The second is what makes sparsity cheap: kernels skip EMPTY tiles and need no mask in FULL ones. It
is *sound*: EMPTY only if no entry is allowed, FULL only if all are. PARTIAL is always a correct
answer.

    status(a & b) = min(status a, status b)      EMPTY = 0 < PARTIAL = 1 < FULL = 2
    status(a | b) = max(status a, status b)
    status(~a)    = 2 - status a

Masks are pytrees. Sizes are static, arrays are leaves. A mask without leaves is *static*:
hashable, equal by value, and evaluated by numpy when the indices are numpy, even while jax is
tracing, so that a schedule of tiles can be made at trace time. Indices are absolute positions;
heads are query heads.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.masks.tiles import EMPTY, FULL, Tiles
from causal_jax.masks.values import aligned, broadcast, namespace, pytree, shared_size
from causal_jax.shapes import Array, Bool

Index = int | np.integer | np.ndarray | Array


class Mask:
    """Base of all masks; see the module's docstring. Subclasses define `_allow` and `_status`."""

    __array_ufunc__ = None  # numpy_array & mask is left to __rand__
    # Statuses that are found by looking at every entry are asked for last, on what others leave
    # undecided.
    _costly = False
    # Every tile is PARTIAL, whatever the arrays hold: no list per head, nothing to compute.
    _blind = False

    def _allow(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        raise NotImplementedError

    def _status(self, t: Tiles) -> Any:
        raise NotImplementedError

    def _require(self, rows: int, cols: int) -> None:
        """Refuse to be read at query >= rows of own arrays or key >= cols of them."""

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Any:
        """May query i of head h in sequence b attend to key j?

        Args:
            b, h, i, j: broadcastable integer indices, numpy or jax; absolute positions. Reads
                outside of the arrays of a mask are clamped to their last entry.

        Returns:
            booleans of the broadcast shape; numpy if the mask is static and all indices are numpy.
        """
        index = aligned(b, h, i, j)
        return broadcast(self._allow(*index), *index)

    def status(self, b: Index, h: Index, q0: Index, q1: Index, k0: Index, k1: Index) -> Any:
        """EMPTY, PARTIAL or FULL for the tiles [q0, q1) x [k0, k1), which hold at least one entry.

        Args:
            b, h, q0, q1, k0, k1: broadcastable integers, numpy or jax.

        Returns:
            int8 of the broadcast shape; numpy if the mask is static and all arguments are numpy.
        """
        b, h, q0, q1, k0, k1 = aligned(b, h, q0, q1, k0, k1)
        extent = _longest(q0, q1), _longest(k0, k1)
        if self.is_static and namespace(b, h, q0, q1, k0, k1) is np:
            return self._tile_status(Tiles(b, h, q0, q1, k0, k1, extent))
        return _status_on_device(self, (b, h, q0, q1, k0, k1), extent)

    def _tile_status(self, t: Tiles) -> Any:
        return broadcast(self._status(t), *t[:6]).astype(np.int8)

    @property
    def is_static(self) -> bool:
        """True if the mask holds no arrays: hashable, and evaluated on the host."""
        return not jax.tree.leaves(self)

    @property
    def batch(self) -> int:
        """Number of sequences the mask distinguishes; 1: the same for all."""
        return 1

    @property
    def heads(self) -> int:
        """Number of query heads the mask distinguishes; 1: the same for all."""
        return 1

    def to_dense(
        self, T: int, S: int | None = None, *, q_offset: Index = 0
    ) -> Bool[Array, "B N T S"]:
        """The mask as booleans, B and N being 1 where it does not depend on them. Costs B N T S.

        Args:
            T, S: numbers of queries and keys (S: T by default).
            q_offset: absolute position of the first query, one for all or one per sequence.

        Raises:
            InputError: an array of the mask is too small for T and S.
        """
        S = T if S is None else S
        offset, batch = check_grid(self, T, S, q_offset)
        return _dense(self, batch, T, S, offset)

    def block_map(
        self,
        T: int,
        S: int,
        block_q: int,
        block_k: int,
        *,
        q_offset: Index = 0,
        max_blocks: int | None = None,
    ) -> "BlockMap":
        """The live tiles of every row of tiles: see `causal_jax.masks.block_map.build`."""
        from causal_jax.masks import block_map

        return block_map.build(
            self, T, S, block_q, block_k, q_offset=q_offset, max_blocks=max_blocks
        )

    def __and__(self, other: Any) -> "Mask":
        return And.of(self, other)

    def __rand__(self, other: Any) -> "Mask":
        return And.of(other, self)

    def __or__(self, other: Any) -> "Mask":
        return Or.of(self, other)

    def __ror__(self, other: Any) -> "Mask":
        return Or.of(other, self)

    def __invert__(self) -> "Mask":
        return self.part if isinstance(self, Not) else Not(self)

    def __repr__(self) -> str:
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({', '.join(map(_short, fields))})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return False
        mine, its = jax.tree.flatten(self), jax.tree.flatten(other)
        return mine[1] == its[1] and all(a is b for a, b in zip(mine[0], its[0]))

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        if leaves:
            raise TypeError(
                f"unhashable mask {type(self).__name__}: it holds {len(leaves)} array(s); "
                "pass it as an argument of the jitted function, not as a static one"
            )
        return hash(structure)


def _short(x: Any) -> str:
    """dtype[shape] for arrays, the name of a function, else repr."""
    if isinstance(x, tuple):
        return f"({', '.join(map(_short, x))}{',' * (len(x) == 1)})"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return getattr(x, "__name__", repr(x))


def _nested(x: Mask) -> str:
    return f"({x!r})" if isinstance(x, And | Or) else repr(x)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(mask: Mask, batch: int, T: int, S: int, offset: Any) -> Array:
    b = jnp.arange(batch).reshape(-1, 1, 1, 1)
    h = jnp.arange(mask.heads).reshape(1, -1, 1, 1)
    i = jnp.arange(T).reshape(1, 1, T, 1) + offset
    return mask(b, h, i, jnp.arange(S).reshape(1, 1, 1, S))


@partial(jax.jit, static_argnums=2)
def _status_on_device(mask: Mask, tiles: tuple, extent: tuple[int | None, int | None]) -> Array:
    b, h, q0, q1, k0, k1 = tiles
    return mask._tile_status(Tiles(b, h, q0, q1, k0, k1, extent))


def _longest(lo: Any, hi: Any) -> int | None:
    return None if namespace(lo, hi) is jnp else int(np.max(hi - lo, initial=0))


def check_grid(mask: Mask, T: int, S: int, q_offset: Any) -> tuple[Any, int]:
    """(q_offset as int or [B, 1, 1, 1], number of sequences) for a grid of T x S, or InputError."""
    for field, value in (("T", T), ("S", S)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{field}={value!r}: expected an integer >= 1")
    if isinstance(q_offset, int | np.integer):
        if q_offset < 0:
            raise InputError(f"q_offset={q_offset}: expected a position >= 0")
        mask._require(T + int(q_offset), S)
        return int(q_offset), mask.batch
    if not jnp.issubdtype(q_offset.dtype, jnp.integer) or q_offset.ndim > 1:
        raise InputError(
            f"q_offset of {q_offset.dtype}{list(q_offset.shape)}: "
            "expected an int or integers of shape [B]"
        )
    mask._require(T, S)
    offset = jnp.asarray(q_offset).reshape(-1, 1, 1, 1)
    return offset, shared_size("batch of mask and q_offset", (mask.batch, offset.shape[0]))


@pytree()
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Full(Mask):
    """True: everybody sees everything. Neutral in `&`, absorbing in `|`; `~Full()` is nothing."""

    def _allow(self, b, h, i, j):
        return np.True_

    def _status(self, t):
        return np.int8(FULL)


class _Combination(Mask):
    parts: tuple[Mask, ...]

    @property
    def batch(self) -> int:
        return shared_size("batch", tuple(p.batch for p in self.parts))

    @property
    def heads(self) -> int:
        return shared_size("heads", tuple(p.heads for p in self.parts))

    def _require(self, rows, cols):
        for part in self.parts:
            part._require(rows, cols)

    @property
    def _costly(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(p._costly for p in self.parts)

    @property
    def _blind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(p._blind for p in self.parts)

    def _decide(self, t: Tiles, settled: int, combine: str) -> Any:
        """Combine the statuses of the parts; no further part can change the value `settled`."""
        out: Any = None
        for part in sorted(self.parts, key=lambda p: p._costly):
            if out is None:
                out = part._tile_status(t)
            elif part._costly and part.is_static and namespace(out, *t[:6]) is np:
                out = np.array(broadcast(out, *t[:6]))
                open_ = out != settled
                rest = (broadcast(x, out)[open_] for x in t[:6])
                status = part._tile_status(Tiles._make((*rest, t.extent)))
                out[open_] = getattr(np, combine)(out[open_], status)
            else:
                status = part._tile_status(t)
                out = getattr(namespace(out, status), combine)(out, status)
        return out


def _parts(cls: type, masks: tuple[Any, ...]) -> Iterator[Mask]:
    for m in map(as_mask, masks):
        yield from m.parts if isinstance(m, cls) else (m,)  # pyright: ignore[reportAttributeAccessIssue]


@pytree("parts")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class And(_Combination):
    """Allowed by all parts. Tile status: the minimum. Made by `a & b`."""

    parts: tuple[Mask, ...]

    def __post_init__(self):
        _ = self.batch, self.heads

    @classmethod
    def of(cls, *masks: Any) -> Mask:
        parts = tuple(m for m in _parts(cls, masks) if not isinstance(m, Full))
        return cls(parts) if len(parts) > 1 else parts[0] if parts else Full()

    def __repr__(self) -> str:
        return " & ".join(map(_nested, self.parts))

    def _allow(self, b, h, i, j):
        return reduce(lambda x, y: x & y, (p._allow(b, h, i, j) for p in self.parts))

    def _status(self, t):
        return self._decide(t, EMPTY, "minimum")


def parts_of(mask: Mask) -> tuple[Mask, ...]:
    """What is and-ed together in a mask."""
    return mask.parts if isinstance(mask, And) else (mask,)


@pytree("parts")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Or(_Combination):
    """Allowed by some part. Tile status: the maximum. Made by `a | b`."""

    parts: tuple[Mask, ...]

    def __post_init__(self):
        _ = self.batch, self.heads

    @classmethod
    def of(cls, *masks: Any) -> Mask:
        parts = tuple(_parts(cls, masks))
        return Full() if any(isinstance(m, Full) for m in parts) else cls(parts)

    def __repr__(self) -> str:
        return " | ".join(map(_nested, self.parts))

    def _allow(self, b, h, i, j):
        return reduce(lambda x, y: x | y, (p._allow(b, h, i, j) for p in self.parts))

    def _status(self, t):
        return self._decide(t, FULL, "maximum")


@pytree("part")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Allowed where `part` is not. Tile status: EMPTY and FULL swap. Made by `~a`."""

    part: Mask

    def __post_init__(self):
        object.__setattr__(self, "part", as_mask(self.part))

    @property
    def batch(self) -> int:
        return self.part.batch

    @property
    def heads(self) -> int:
        return self.part.heads

    @property
    def _costly(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.part._costly

    def _require(self, rows, cols):
        self.part._require(rows, cols)

    def __repr__(self) -> str:
        return f"~{_nested(self.part)}"

    def _allow(self, b, h, i, j):
        return ~self.part._allow(b, h, i, j)

    def _status(self, t):
        return 2 - self.part._tile_status(t)


@pytree("parts")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadSplit(_Combination):
    """Query head h uses parts[h]: `HeadSplit((Window(64, 0),) * 6 + (Full(),) * 2)`.

    Raises:
        InputError: no parts, or a part that distinguishes another number of heads itself.
    """

    parts: tuple[Mask, ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(map(as_mask, self.parts)))
        if not self.parts:
            raise InputError("HeadSplit: parts=(): expected one mask per query head")
        for h, part in enumerate(self.parts):
            if part.heads not in (1, len(self.parts)):
                raise InputError(
                    f"HeadSplit: part {h} distinguishes {part.heads} heads: "
                    f"expected 1 or {len(self.parts)}"
                )
        _ = self.batch

    @property
    def heads(self) -> int:
        return len(self.parts)

    def _select(self, h: Any, value: Callable[[Mask], Any]) -> Any:
        if isinstance(h, np.ndarray) and h.size == 1:
            return value(self.parts[int(np.clip(h.item(), 0, len(self.parts) - 1))])
        groups: list[tuple[Mask, list[int]]] = []  # equal parts are evaluated once
        for n, part in enumerate(self.parts):
            for known, members in groups:
                if known == part:
                    members.append(n)
                    break
            else:
                groups.append((part, [n]))
        h = namespace(h).clip(h, 0, len(self.parts) - 1)
        out = value(groups[0][0])
        for part, members in groups[1:]:
            mine, other = reduce(lambda x, y: x | y, (h == n for n in members)), value(part)
            out = namespace(h, out, other).where(mine, *aligned(other, out))
        return out

    def _allow(self, b, h, i, j):
        return self._select(h, lambda part: part._allow(b, h, i, j))

    def _status(self, t):
        return self._select(t.h, lambda part: part._tile_status(t))


def as_mask(x: Any) -> Mask:
    """None -> Full(), a mask -> itself, a boolean array or `Constant` -> Dense."""
    from causal_jax.masks.lookups import Dense

    if x is None:
        return Full()
    return x if isinstance(x, Mask) else Dense(x)
