"""Multi-query associative recall (MQAR): look up, many times over, what a key was bound to.

    k1 v1 k2 v2 ... kD vD | . . k2 v2 . . . . k1 v1 . . ...

First D key-value pairs, then each key once more, at even places of the rest; the answer is the
value that follows it. How far away the question comes follows a power law,
p(slot) ~ slot^(power-1): most come soon, some very late. A model that keeps all keys apart in its
state solves it; one with too small a state cannot, which is what the task is for.

Deviation: in the source the place behind a question holds filler and only the label is the value;
here the value stands there, so that targets are the shifted tokens and a row can be generated.
Every key is asked once, so nothing leaks. Arora et al. 2023 (Zoology, arXiv 2312.04927), section 3
and appendix on synthetic data.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Task, pick, tasks


@tasks.register("recall")
@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall. Ids: 0 filler, 1..keys the keys, then the values.

    Args:
        length: tokens of a row; at least 4*pairs - 1.
        pairs: key-value pairs to remember, D; also the number of answers.
        keys: different keys that exist; a row uses `pairs` of them.
        values: different values that exist.
        power: exponent of the distances (0.01 in the source; 1 is uniform).
        noise: filler is random values instead of 0.
    """

    length: int = 64
    pairs: int = 8
    keys: int = 32
    values: int = 32
    power: float = 0.01
    noise: bool = False

    def __post_init__(self):
        self.need(self.pairs >= 1, "pairs", "at least one pair is needed")
        self.need(self.pairs <= self.keys, "pairs", f"there are only {self.keys} keys")
        self.need(self.pairs <= self.values, "pairs", f"there are only {self.values} values")
        least = 4 * self.pairs - 1
        self.need(
            self.length >= least, "length", f"{self.pairs} pairs need {least} or more (4*pairs-1)"
        )
        self.need(self.power > 0, "power", "the exponent of the distances is positive")

    @property
    def vocab(self) -> int:
        """Filler, keys and values."""
        return 1 + self.keys + self.values

    @property
    def _slots(self) -> int:
        return (self.length + 1 - 2 * self.pairs) // 2

    @property
    def draws(self) -> int:
        """One number per key, per value, per slot, and per filler token."""
        return self.keys + self.values + self._slots + self.length + 1

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        ends = np.cumsum([self.keys, self.values, self._slots])
        u_key, u_value, u_slot, u_fill = np.split(u, ends, axis=1)
        keys = 1 + pick(u_key, self.pairs)
        values = 1 + self.keys + pick(u_value, self.pairs)
        # The smallest of u**(1/w), in exponential form: a draw without replacement with weights w.
        weight = np.arange(1, self._slots + 1)[None] ** (self.power - 1.0)
        slots = pick(-np.log1p(-u_slot) / weight, self.pairs)
        fill = 1 + self.keys + np.floor(u_fill * self.values).astype(np.int64)
        sequence = fill if self.noise else np.zeros_like(fill)
        answer = np.zeros(sequence.shape, bool)
        sequence[:, 0 : 2 * self.pairs : 2] = keys
        sequence[:, 1 : 2 * self.pairs : 2] = values
        asked = 2 * self.pairs + 2 * slots
        np.put_along_axis(sequence, asked, keys, axis=1)
        np.put_along_axis(sequence, asked + 1, values, axis=1)
        np.put_along_axis(answer, asked + 1, True, axis=1)
        return sequence, answer
