"""Interpolated Witten-Bell n-gram models over bytes: the baseline a language model has to beat.

    p_n(c | h) = (count(hc) + T(h) p_{n-1}(c | h')) / (count(h) + T(h)),    p_0 = 1/256

where h is the last n-1 bytes, h' drops its oldest byte, count(h) is how often h was followed by
anything and T(h) by how many *different* bytes: the more varied the company, the more mass goes to
the shorter context. A context never seen passes its question on unchanged (0/0 reads as p_{n-1}).

Documents: contexts do not cross them. In front of each stand n-1 boundary symbols, which are
context only and never predicted, as a language model sees its beginning-of-text token. So every
byte of every document is predicted exactly once, and the sum of -log2 p over the number of bytes
is comparable with a model's bits per byte on the same documents. One `bytes` is one document.

Witten & Bell 1991 (estimator C); interpolated form as in Chen & Goodman 1998, section 2.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from causal_jax.errors import InputError

_SYMBOLS = 257  # 256 bytes and the boundary, which only ever stands in contexts
_MAX_ORDER = 7  # 257**7 < 2**63: a whole n-gram fits one int64

Documents = bytes | Sequence[bytes]


@dataclass(frozen=True)
class WittenBell:
    """Settings of a byte n-gram model; `fit` makes a `ByteNgram`.

    Args:
        order: the longest n; the context is n-1 bytes. 1 to 7.
    """

    order: int = 5

    def __post_init__(self):
        if not 1 <= self.order <= _MAX_ORDER:
            raise InputError(f"order {self.order}: an n-gram order is between 1 and {_MAX_ORDER}")

    def fit(self, documents: Documents) -> "ByteNgram":
        """Count all n-grams up to the order.

        Args:
            documents: bytes of one document or of several.

        Raises:
            InputError: there is not one byte to count.
        """
        grams = _grams(documents, self.order)
        if grams.shape[1] == 0:
            raise InputError("documents hold no bytes: an n-gram model needs at least one to fit")
        return ByteNgram(self.order, tuple(_count(codes) for codes in grams))


@dataclass(frozen=True)
class _Counts:
    """What one order needs: sorted n-grams with counts, sorted contexts with totals and types."""

    grams: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]
    contexts: Int[np.ndarray, " c"]
    totals: Int[np.ndarray, " c"]
    types: Int[np.ndarray, " c"]


@dataclass(frozen=True)
class ByteNgram:
    """A fitted model of all orders 1..`order`."""

    order: int
    tables: tuple[_Counts, ...]

    def bits_per_byte(self, documents: Documents) -> tuple[float, ...]:
        """Mean -log2 p per byte, for every order in one pass.

        Args:
            documents: held-out bytes, one document or several.

        Returns:
            `order` numbers in bits per byte: order 1 first.

        Raises:
            InputError: there is not one byte to measure.
        """
        p = self.probabilities(documents)
        if p.shape[1] == 0:
            raise InputError("documents hold no bytes: nothing to measure")
        return tuple(float(b) for b in -np.log2(p).mean(axis=1))

    def probabilities(self, documents: Documents) -> Float[np.ndarray, "order n"]:
        """The probability each order gave to each byte, in the order of the documents.

        Returns:
            float64 [order, number of bytes].
        """
        return self._interpolate(_grams(documents, self.order))

    def next_byte(self, context: bytes) -> Float[np.ndarray, "order 256"]:
        """The distribution over the byte after `context` (the beginning of a document).

        Returns:
            float64 [order, 256]; each row sums to 1.
        """
        return self._interpolate(_grams([context + bytes([c]) for c in range(256)], self.order, 1))

    def _interpolate(self, grams: Int[np.ndarray, "order n"]) -> Float[np.ndarray, "order n"]:
        p = np.full(grams.shape[1], 1 / 256)
        rows = []
        for codes, table in zip(grams, self.tables, strict=True):
            count = _look_up(table.grams, table.counts, codes)
            total = _look_up(table.contexts, table.totals, codes // _SYMBOLS)
            types = _look_up(table.contexts, table.types, codes // _SYMBOLS)
            seen = total > 0
            p = np.where(seen, (count + types * p) / np.where(seen, total + types, 1), p)
            rows.append(p)
        return np.stack(rows)


def _grams(documents: Documents, order: int, last: int | None = None) -> np.ndarray:
    """Codes of the 1..order-grams that end at each byte (or the `last` ones) of each document."""
    documents = [documents] if isinstance(documents, bytes) else documents
    boundary = np.full(order - 1, _SYMBOLS - 1, np.int64)
    parts, predicted = [boundary[:0]], [np.zeros(0, bool)]
    for document in documents:
        text = np.frombuffer(document, np.uint8)
        wanted = np.arange(len(text)) >= (0 if last is None else len(text) - last)
        parts += [boundary, text.astype(np.int64)]
        predicted += [boundary < 0, wanted]
    symbols, ends = np.concatenate(parts), np.flatnonzero(np.concatenate(predicted))
    rows, codes = [], np.zeros(len(ends), np.int64)
    for n in range(order):  # the symbol n places back is the next higher digit
        codes = codes + symbols[ends - n] * _SYMBOLS**n
        rows.append(codes)
    return np.stack(rows)


def _count(codes: np.ndarray) -> _Counts:
    grams, counts = np.unique(codes, return_counts=True)
    # Grams are sorted, so those of one context lie side by side.
    contexts, first, types = np.unique(grams // _SYMBOLS, return_index=True, return_counts=True)
    return _Counts(grams, counts, contexts, np.add.reduceat(counts, first), types)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
