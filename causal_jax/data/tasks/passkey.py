"""Passkey retrieval as ids: a key behind a marker, dull filler around it, asked for at the end.

    f1 f2 f3 ... f8 f1 f2  M 4 0 7  f3 f4 ... f8 f1 ...  Q 4 0 7

The filler repeats one pattern of `period` tokens, so it says nothing and costs a recurrent state
nothing; with `noise` it is random, and all of it asks to be remembered. The rule is the same at any
length: train at one, test at others. `needle` is the same in words.

Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 4.2; as in LAWCAT (arXiv 2509.18467), section 4.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Task, tasks


@tasks.register("passkey")
@dataclass(frozen=True)
class Passkey(Task):
    """Find the key. Ids: the digits, the marker, the question, then the filler.

    Args:
        length: tokens of a row, the answer's last one not counted.
        digits: tokens of the key.
        symbols: different digits.
        period: tokens of the filler's pattern.
        noise: filler drawn at random from those tokens instead of in order.
        depth: where the key stands, as a fraction of the filler; None: anywhere, evenly.
    """

    length: int = 48
    digits: int = 3
    symbols: int = 10
    period: int = 8
    noise: bool = False
    depth: float | None = None

    def __post_init__(self):
        for name in ("digits", "period"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        self.need(self.symbols >= 2, "symbols", "at least 2")
        self.need(
            self.depth is None or 0 <= self.depth <= 1, "depth", "a fraction from 0 to 1, or None"
        )
        least = 2 * self.digits + 1
        self.need(self.length >= least, "length", f"key and question alone take {least} tokens")

    @property
    def vocab(self) -> int:
        """Digits, marker, question, filler."""
        return self.symbols + 2 + self.period

    @property
    def draws(self) -> int:
        """The place, the key, and one number per filler token where they are random."""
        return 1 + self.digits + (self.length if self.noise else 0)

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        rows, size = len(u), self.digits + 1
        room = self.length + 1 - 2 * size
        place = u[:, 0] if self.depth is None else np.full(rows, self.depth)
        at = np.minimum((place * (room + 1)).astype(np.int64), room)
        key = (u[:, 1:size] * self.symbols).astype(np.int64)
        kind = np.broadcast_to(np.arange(room) % self.period, (rows, room))
        if self.noise:
            kind = (u[:, size : size + room] * self.period).astype(np.int64)
        filler = self.symbols + 2 + kind
        marker, question = (np.full((rows, 1), self.symbols + i) for i in range(2))
        front = np.concatenate([filler, marker, key], 1)
        # stable: the filler's places, the key's between those in front of `at` and the others
        order = np.concatenate(
            [np.tile(np.arange(room), (rows, 1)) * 2, np.tile(2 * at[:, None] - 1, size)], 1
        )
        front = np.take_along_axis(front, np.argsort(order, axis=1, kind="stable"), 1)
        sequence = np.concatenate([front, question, key], 1)
        answer = np.zeros(sequence.shape, bool)
        answer[:, -self.digits :] = True
        return sequence, answer
