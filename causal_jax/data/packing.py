"""Documents to rows of one length: which (token, target) pairs share a row, and who belongs where.

A document of tokens t1..tn is stored as bos t1 .. tn eos and makes n+1 pairs

    token   bos  t1  t2 ..  tn
    target  t1   t2  t3 ..  eos

so every token and every eos is a target exactly once (bos never), first tokens included, and no
target lies in another document (a tokenizer without bos has eos in front, too). A packing decides
in which row a pair comes to stand; it never drops or repeats one.

    concat   all pairs in one line, cut every `context` pairs; only the last row has padding
    fit      whole documents, longest first, each into the fullest row that still holds it (best
             fit); one longer than a row is cut into rows first. Every row may have some padding

A row is a dict of tokens, targets, weights (1 for a pair, 0 for padding), segments (number of the
document inside the row, -1 for padding) and positions (from 0 in every segment). A document
continued from the row before starts again at position 0: what is not in the row cannot be attended
to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.shapes import Int

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Stream:
    """Tokens of many documents in one array, each document as bos t1 .. tn eos.

    Attributes:
        tokens: [T] any integer type, may be a memory map.
        starts: [documents + 1] int64, where each document begins; the last entry is T.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def pairs(self) -> int:
        """Number of (token, target) pairs: all tokens but one per document."""
        return int(self.starts[-1]) - self.documents


class Rows(Sequence[Row]):
    """Rows by number. A subclass makes many at once (`batch`) and knows how many there are."""

    def batch(self, indices: Sequence[int]) -> Row:
        """Rows `indices` as one batch: every array with a leading axis."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: value[0] for name, value in self.batch([index]).items()}


class ConcatRows(Rows):
    """Rows of the concatenated pairs.

    Args:
        stream: the documents.
        context: pairs per row.
        stride: pairs from one row's first pair to the next row's; less than `context` makes rows
            overlap, and the pairs that the row before already held get weight 0: context without
            being counted again.
    """

    def __init__(self, stream: Stream, context: int, stride: int | None = None):
        self.stream, self.context = stream, context
        self.stride = context if stride is None else stride
        if not 0 < self.stride <= context:
            raise ValueError(f"stride is {stride}; from 1 to the context {context}")
        # Document i's pairs begin at starts[i] - i: one pair fewer than tokens per document before
        # it.
        self._first = stream.starts - np.arange(stream.documents + 1)

    def __len__(self) -> int:
        behind = max(self.stream.pairs - self.context, 0)
        return 1 + -(-behind // self.stride) if self.stream.pairs else 0

    def batch(self, indices: Sequence[int], shifts: Sequence[int] | None = None) -> Row:
        """Rows `indices` as one batch.

        Args:
            indices: numbers of rows.
            shifts: for each row, move all cuts so many pairs back and close the line to a ring.
                Whatever the shift, rows 0..len-1 of one shift together hold every pair once. Only
                with stride == context.
        """
        n, index = self.stream.pairs, np.asarray(indices)[:, None]
        pairs = index * self.stride + np.arange(self.context)
        if shifts is not None:
            pairs = (pairs - np.asarray(shifts)[:, None]) % (len(self) * self.context)
        held = pairs < n
        pairs = np.where(held, pairs, 0)
        document = np.searchsorted(self._first, pairs, side="right") - 1
        new = np.ones(
            pairs.shape, bool
        )  # a pair that does not follow its neighbour opens a segment
        new[:, 1:] = (document[:, 1:] != document[:, :-1]) | (pairs[:, 1:] != pairs[:, :-1] + 1)
        before = self.context - self.stride  # pairs that the row before has counted
        counted = held & ((index == 0) | (np.arange(self.context) >= before))
        return _fill(self.stream.tokens, pairs + document, new, held, counted)


class FitRows(Rows):
    """Rows of whole documents, best fit, longest first; deterministic."""

    def __init__(self, stream: Stream, context: int):
        self.stream, self.context = stream, context
        begins, lengths = pieces(stream.starts, context)
        self._rows = best_fit(lengths, context)
        self._begins, self._lengths = begins, lengths

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> Row:
        rows = [self._row(i) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int) -> Row:
        at = np.zeros(self.context, np.int64)
        new, held = np.zeros(self.context, bool), np.zeros(self.context, bool)
        end = 0
        for piece in self._rows[index]:
            begin, n = int(self._begins[piece]), int(self._lengths[piece])
            at[end : end + n] = begin + np.arange(n)
            new[end], held[end : end + n] = True, True
            end += n
        return _fill(self.stream.tokens, at, new, held, held)


def _fill(
    tokens: np.ndarray, at: np.ndarray, new: np.ndarray, held: np.ndarray, counted: np.ndarray
) -> Row:
    """Arrays of a row or batch whose slots hold the pair at `at`; `new` where a segment begins."""
    new = new & held
    slots = np.broadcast_to(np.arange(at.shape[-1]), at.shape)
    began = np.maximum.accumulate(np.where(new, slots, 0), axis=-1)
    return {
        "tokens": np.where(held, tokens[at], 0).astype(np.int32),
        "targets": np.where(held, tokens[at + 1], 0).astype(np.int32),
        "weights": counted.astype(np.float32),
        "segments": np.where(held, np.cumsum(new, axis=-1) - 1, -1).astype(np.int32),
        "positions": np.where(held, slots - began, 0).astype(np.int32),
    }


def pieces(
    starts: Int[np.ndarray, "_"], context: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Where each piece begins in the stream and how many pairs it has: documents, long ones cut."""
    pairs = np.diff(starts) - 1
    per = np.maximum(-(-pairs // context), 0)  # pieces of each document
    document = np.repeat(np.arange(pairs.size), per)
    number = np.arange(document.size) - np.repeat(np.cumsum(per) - per, per)
    begins = starts[document] + number * context
    return begins, np.minimum(pairs[document] - number * context, context)


def best_fit(lengths: Int[np.ndarray, "P"], room: int) -> list[list[int]]:
    """Pieces into rows of `room`: longest first, each into the fullest row it fits (O(pieces)).

    At most 11/9 of the fewest possible rows, plus one (Johnson 1973 for best-fit decreasing).
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
    left = 0  # bit r is set when some row has r left
    for piece in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[piece])
        fits = left >> n
        if fits:
            r = n + (fits & -fits).bit_length() - 1
            row = open_rows[r].pop()
            if not open_rows[r]:
                left &= ~(1 << r)
        else:
            r, row = room, len(rows)
            rows.append([])
        rows[row].append(piece)
        if r > n:
            open_rows[r - n].append(row)
            left |= 1 << (r - n)
    return rows
