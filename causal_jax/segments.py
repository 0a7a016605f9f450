"""Prompts of a prefix, documents without an order, and a suffix: where everything stands.

    [ padding | P | D_1 ... D_M | S ]        S: the rest, and what is generated behind it

Slots are places in the array, positions count from the first token after the padding. The documents
lie one after the other without anything in between; p + sum_j n_j = E is the suffix's first
position. Several readings of one such prompt:

    visible           documents see each other, each is causal inside; all else is causal
    apart             causal, and no document sees another
    shared_positions  every document begins at position p, the suffix behind the longest

PINE (arXiv 2407.01100); `apart` with ordinary positions is its baseline NIA, with shared ones
parallel context windows (arXiv 2212.10947).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from causal_jax.errors import InputError
from causal_jax.masks import Causal, Documents, Keys, Mask, Prefix, Queries
from causal_jax.shapes import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DocLayout:
    """Where the prefix and the M documents of each row are; make it by `doc_layout`.

    Attributes:
        start: slots of padding in front.
        prefix: tokens of the prefix, p.
        lengths: tokens of each document, n_j; 0: no document (rows with fewer than M).
        keys: hash of each document's tokens: tells equally important documents apart without
            looking at their order.
    """

    start: Int[Array, "B"]
    prefix: Int[Array, "B"]
    lengths: Int[Array, "B M"]
    keys: Int[Array, "B M"]

    @property
    def documents(self) -> int:
        """M."""
        return self.lengths.shape[1]

    @property
    def end(self) -> Int[Array, "B"]:
        """E, the position of the first token of the suffix."""
        return self.prefix + self.lengths.sum(-1)

    def document(self, slots: Int[Array, "#B T"]) -> Int[Array, "B T"]:
        """The document of each slot, 0 ... M - 1; M: none."""
        at = slots - (self.start + self.prefix)[:, None]
        which = (at[..., None] >= jnp.cumsum(self.lengths, -1)[:, None]).sum(-1, dtype=jnp.int32)
        return jnp.where(at < 0, self.documents, which)

    def offset(self, slots: Int[Array, "#B T"]) -> Int[Array, "B T"]:
        """Tokens before it in its document; for a slot of no document its position."""
        position = slots - self.start[:, None]
        before = jnp.cumsum(self.lengths, -1) - self.lengths + self.prefix[:, None]
        before = jnp.concatenate([before, jnp.zeros_like(before, shape=(len(before), 1))], -1)
        return position - jnp.take_along_axis(before, self.document(slots), -1)

    def visible(self, slots: int) -> Mask:
        """Who sees whom among the first `slots` slots, bidirectional between documents."""
        inside, apart = self._parts(slots)
        return (Causal() | (Queries(inside) & Keys(inside) & apart)) & ~Prefix(self.start)

    def apart(self, slots: int) -> Mask:
        """Causal, and no document sees another."""
        inside, apart = self._parts(slots)
        return Causal() & ~(Queries(inside) & Keys(inside) & apart) & ~Prefix(self.start)

    def shared_positions(self, slots: int) -> Int[Array, "B T"]:
        """Positions in which all documents begin together: p + offset, the suffix at p + max n_j.

        Padding has positions below 0.
        """
        at = jnp.arange(slots)[None]
        longest = self.lengths.max(-1, initial=0)
        behind = at - self.start[:, None] - (self.end - self.prefix - longest)[:, None]
        inside = self.document(at) < self.documents
        position = jnp.where(inside, self.prefix[:, None] + self.offset(at), behind)
        in_front = at < (self.start + self.prefix)[:, None]
        return jnp.where(in_front, at - self.start[:, None], position)

    def _parts(self, slots: int) -> tuple[Array, Mask]:
        which = self.document(jnp.arange(slots)[None])
        return which < self.documents, ~Documents(which)


def doc_layout(
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    prefix: Int[Array, "B"] | Int[np.ndarray, "B"] | Sequence[int] | int,
    lengths: Int[Array, "B M"] | Int[np.ndarray, "B M"] | Sequence[int] | Sequence[Sequence[int]],
    *,
    start: Int[Array, "B"] | Int[np.ndarray, "B"] | Sequence[int] | int = 0,
) -> DocLayout:
    """The layout of a batch of prompts.

    Args:
        tokens: ids, for the documents' hashes.
        prefix: tokens before the first document: of each row, or one number for all.
        lengths: tokens of each document: of each row, or [M] for all.
        start: padding in front.

    Raises:
        InputError: shapes that do not fit; known lengths below 0 or beyond the row.
    """
    tokens = jnp.asarray(tokens)
    B, T = tokens.shape
    start, prefix = (_rows(n, x, B) for n, x in (("start", start), ("prefix", prefix)))
    given = jnp.asarray(lengths, jnp.int32)
    if given.ndim not in (1, 2) or given.shape[:-1] not in ((), (B,)):
        raise InputError(f"lengths of shape {list(given.shape)}: expected [{B}, M] or [M]")
    given = jnp.broadcast_to(given, (B, given.shape[-1]))
    bare = DocLayout(start, prefix, given, jnp.zeros_like(given))
    if not any(isinstance(x, Tracer) for x in (given, start, prefix)):
        used = np.asarray(start + bare.end) if B else np.zeros(1)
        if np.min(given, initial=0) < 0 or used.max() > T:
            raise InputError(
                f"lengths={np.asarray(given).tolist()}, prefix={np.asarray(prefix).tolist()}: "
                f"expected numbers >= 0 that fit into the {T} slots of a row"
            )
    slots = jnp.arange(T)[None]
    mixed = _mix(_mix(bare.offset(slots).astype(jnp.uint32)) ^ tokens.astype(jnp.uint32))
    one_hot = bare.document(slots)[..., None] == jnp.arange(bare.documents)[None, None]
    total = jnp.sum(jnp.where(one_hot, mixed[..., None], jnp.uint32(0)), 1, dtype=jnp.uint32)
    return dataclasses.replace(bare, keys=jax.lax.bitcast_convert_type(total, jnp.int32))


def _rows(name: str, value, B: int) -> Array:
    value = jnp.asarray(value, jnp.int32)
    if value.shape not in ((), (B,)):
        raise InputError(f"{name} of shape {list(value.shape)}: expected [{B}] or one number")
    return jnp.broadcast_to(value, (B,))


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words that spreads every bit (Murmur3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
