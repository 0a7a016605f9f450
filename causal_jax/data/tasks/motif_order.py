"""Order of motifs in DNA-like strings: two classes with the same letters and motifs, told by order.

    ..ACGT TATAAA GCA ... CCTG TCAGTT AAC.. ? +      a box, then the start signal: a promoter
    ..ACGT TCAGTT GCA ... CCTG TATAAA AAC.. ? -      the other way round: none

Every letter of a motif is replaced by a random one with probability `mutation`, the rest is random:
neither counts of letters nor the presence of a motif tells the class, only what came first. A small
synthetic stand-in for the classification of regulatory elements (GenomicsBenchmarks) on which
Titans is measured, arXiv 2501.00663, section 5.6.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tasks._arranged import Arranged
from causal_jax.data.tasks._base import tasks

_LETTERS = "ACGT"
_BOX, _START = (np.array([_LETTERS.index(c) for c in word]) for word in ("TATAAA", "TCAGTT"))


@tasks.register("motif_order")
@dataclass(frozen=True)
class MotifOrder(Arranged):
    """Which of two motifs comes first. Ids: A, C, G, T, the question, no, yes.

    Args:
        length: tokens of a row: the letters and the question.
        mutation: probability that a letter of a motif is drawn anew.
    """

    length: int = 96
    mutation: float = 0.1

    def __post_init__(self):
        least = 4 * len(_BOX) + 1
        self.need(self.length >= least, "length", f"two motifs and room around them take {least}")
        self.need(0 <= self.mutation <= 1, "mutation", "a probability")

    @property
    def vocab(self) -> int:
        """Letters, question, two answers."""
        return 7

    @property
    def draws(self) -> int:
        """Class, two places, letters, mutations."""
        return 3 + (self.length - 1) + 2 * len(_BOX)

    def arranged(self, u: Any, xp: Any) -> tuple[Any, Any]:
        """See `Arranged`."""
        size, n = len(_BOX), self.length - 1
        label = u[:, :1] < 0.5
        letters = xp.floor(u[:, 3 : 3 + n] * 4).astype(int)
        half = n // 2  # one motif in each half: neither place nor distance tells the class
        room = np.array([half - size + 1, n - half - size + 1])
        place = xp.floor(u[:, 1:3] * room[None]).astype(int) + np.array([[0, half]])
        kept = u[:, 3 + n :].reshape(-1, 2, size) >= self.mutation
        first = xp.where(label, _BOX[None], _START[None])
        second = xp.where(label, _START[None], _BOX[None])
        at = np.arange(n)[None]
        for i, word in enumerate((first, second)):
            for j in range(size):
                here = (at == place[:, i : i + 1] + j) & kept[:, i, j : j + 1]
                letters = xp.where(here, word[:, j : j + 1], letters)
        asked = xp.full_like(letters[:, :1], 4)
        sequence = xp.concatenate([letters, asked, 5 + label.astype(int)], 1)
        answer = np.arange(self.length + 1)[None] == self.length
        return sequence, xp.broadcast_to(answer, sequence.shape)
