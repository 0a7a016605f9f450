"""A sum with a hint: add two digits that stand somewhere, and do not trust the third.

    . A 3 . . C 9 . . . B 6 . . =  ->  9          (a + b) mod 10, "." any of the filler tokens

The hint c is the answer with probability `rho`, otherwise one of the nine other digits. A model
trained at high rho copies the hint; at rho 0.1 the hint says nothing. Which tokens mislead is
known, so methods that look for them can be judged (LeaF, arXiv 2506.07851).

Ids: 0 padding, 1 "=", 2 to 4 the tags A, B, C, 5 to 14 the digits, then the filler.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Rows, Task, rows, tasks, uniforms

TAGS = (2, 3, 4)
DIGIT = 5
FILLER = 15


@tasks.register("hinted_sum")
@dataclass(frozen=True)
class HintedSum(Task):
    """Rows of tagged digits and filler.

    Args:
        length: tokens of a row: three slots of two, the filler, and "=".
        rho: probability that the hint is the answer.
        absent: probability that the hint's slot is left out (the row is then padded behind).
        kinds: different filler tokens.
    """

    length: int = 17
    rho: float = 0.97
    absent: float = 0.0
    kinds: int = 6

    def __post_init__(self):
        self.need(self.length >= 8, "length", "three slots, '=' and filler need at least 8")
        for name in ("rho", "absent"):
            self.need(0 <= getattr(self, name) <= 1, name, "a probability")
        self.need(self.kinds >= 1, "kinds", "at least 1")

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return FILLER + self.kinds

    @property
    def filler(self) -> int:
        """Filler tokens of a row."""
        return self.length - 7

    @property
    def draws(self) -> int:
        """Three digits, two decisions, an order and the filler."""
        return 5 + (3 + self.filler) + self.filler

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        made, answer, _ = self._made(u)
        return made, answer

    def batch(self, seed: int, indices) -> Rows:
        """As of every task, with `span`, 1 where a token may be pruned (all but "=" and padding),
        and `hint`, 1 on the two tokens of the hint."""
        u = uniforms("hinted_sum", seed, indices, self.draws)
        made, answer, hint = self._made(u)
        made_rows = rows(made, answer)
        asked = np.cumsum(answer, axis=1)[:, 1:] > 0  # where the answer is predicted, and behind
        span = (~asked & (made_rows["tokens"] > 1)).astype(np.int32)
        return made_rows | {"span": span, "hint": hint[:, :-1].astype(np.int32)}

    def _made(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = (np.floor(10 * u[:, i]).astype(np.int64) for i in range(2))
        total = (a + b) % 10
        wrong = (total + 1 + np.floor(9 * u[:, 2]).astype(np.int64)) % 10
        c = np.where(u[:, 3] < self.rho, total, wrong)
        absent = u[:, 4] < self.absent
        order, fill = np.split(u[:, 5:], [3 + self.filler], axis=1)
        fill = FILLER + np.floor(fill * self.kinds).astype(np.int64)
        sequence = np.zeros((len(u), self.length + 1), np.int64)
        hint = np.zeros(sequence.shape, bool)
        answer = np.zeros(sequence.shape, bool)
        for row, places in enumerate(np.argsort(order, axis=1, kind="stable")):
            line: list[int] = []
            for unit in places:
                if unit > 2:
                    line.append(fill[row, unit - 3])
                elif unit < 2 or not absent[row]:
                    hint[row, len(line) : len(line) + 2] = unit == 2
                    line += [TAGS[unit], DIGIT + (a, b, c)[unit][row]]
            line += [1, DIGIT + total[row]]
            sequence[row, : len(line)] = line
            answer[row, len(line) - 1] = True
        return sequence, answer, hint
