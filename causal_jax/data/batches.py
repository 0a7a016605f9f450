"""Rows to batches: the endless training iterator, and validation in a fixed order."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from causal_jax.data.packing import Row, Rows
from causal_jax.errors import InputError


def training_batches(
    rows: Sequence[Any],
    make: Callable[[Sequence[tuple[int, int]]], Row],
    *,
    batch: int,
    process: tuple[int, int],
    seed: int | None,
    threads: int,
) -> Any:
    """A grain `IterDataset` of this process's part of each batch, epoch after epoch.

    Row i of the run (i = step * batch + place in the batch) is row (epoch, number) of
    `make`, with epoch = i // len(rows), whatever the number of processes; process p of P makes the
    p-th contiguous P-th of every batch. Row numbers are global and cheap; only its own rows are
    made.

    Args:
        rows: what an epoch consists of; only its length is used.
        make: a list of (epoch, row number) to a batch of these rows.
        batch: rows over all processes.
        process: (index, count).
        seed: of the order, another one every epoch; None keeps rows in their order.
        threads: that make batches ahead.
    """
    import grain

    n, (index, count) = len(rows), process
    mine = slice(index * batch // count, (index + 1) * batch // count)
    order = grain.MapDataset.range(n)
    if seed is not None:
        order = order.shuffle(seed=seed)
    order = order.repeat().map_with_index(lambda i, row: (i // n, row))
    numbers = order.batch(batch, drop_remainder=True, batch_fn=list)
    batches = numbers.map(lambda items: make(items[mine]))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return batches.to_iter_dataset(options)


class Batches(Sequence[Row]):
    """Validation batches of this process, in a fixed order, all of one shape.

    The last one is filled up with rows of weight 0 (tokens 0, segments -1).

    Args:
        rows: all rows, of all processes.
        batch: rows per batch over all processes.
        process: (index, count).
        limit: at most this many batches.
        sizes: [V] UTF-8 bytes of every token, or None where the tokens are no text.
    """

    def __init__(
        self,
        rows: Rows,
        batch: int,
        process: tuple[int, int] = (0, 1),
        limit: int | None = None,
        sizes: np.ndarray | None = None,
    ):
        whole = -(-len(rows) // batch)
        self._rows, self._batch, self._limit, self._sizes = rows, batch, limit, sizes
        self._index, self._count = process
        self._length = whole if limit is None else min(limit, whole)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        local = self._batch // self._count
        first = (index % len(self)) * self._batch + self._index * local
        there = range(min(first, len(self._rows)), min(first + local, len(self._rows)))
        if len(there) == local:
            return self._rows.batch(there)
        # One row more than there are gives shapes and dtypes even when this process has none.
        rows = self._rows.batch([*there, 0])
        return {name: _filled(name, value, local) for name, value in rows.items()}

    @functools.cached_property
    def _totals(self) -> tuple[int, int]:
        stream = getattr(self._rows, "stream", None)
        if stream is not None and self._limit is None:  # every pair once: no need to make the rows
            size = 0 if self._sizes is None else int(self._sizes[stream.tokens].sum(dtype=np.int64))
            return stream.pairs, size
        targets = size = 0
        end = min(len(self) * self._batch, len(self._rows))
        for first in range(0, end, self._batch):
            rows = self._rows.batch(range(first, min(first + self._batch, end)))
            counted = rows["targets"][rows["weights"] > 0]
            targets += counted.size
            size += 0 if self._sizes is None else int(self._sizes[counted].sum())
        return targets, size

    @property
    def targets(self) -> int:
        """How many targets have weight 1, over all batches and processes."""
        return self._totals[0]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes that the weighted targets stand for, over all batches and processes.

        Every byte of the text counts once, the first of a document included (bos stands before it).
        The end mark of a document is a target, so its nats are spent, but it is no byte of the
        text: set beside a compressor or an n-gram model of the same bytes, `bits_per_byte` errs, if
        at all, against this model. 0 for a task.
        """
        return self._totals[1]

    def bits_per_byte(self, nats: float) -> float:
        """nats / ln 2 / bytes, from the summed nats of all weighted targets."""
        if not self.bytes:
            raise InputError("bits per byte: a task's rows are no text and have no bytes")
        return nats / math.log(2) / self.bytes


def _filled(name: str, value: np.ndarray, rows: int) -> np.ndarray:
    """All but the last row of `value`, then padding up to `rows` rows."""
    value = value[:-1]
    padding = np.full((rows - len(value), *value.shape[1:]), -1 if name == "segments" else 0)
    return np.concatenate([value, padding.astype(value.dtype)])
