"""Copying: repeat what stood before the separator.

    a b c d . . . . | a b c d          plain (with a delay where length > 2*data)
    . a . . b . c d | a b c d          selective: scattered among blanks, which must be passed over

The plain form asks for memory of known places, the selective one for a decision at each token
whether it is to be remembered. Hochreiter & Schmidhuber 1997 / Arjovsky et al. 2016 (copy memory);
Jing et al. 2019 and Gu & Dao 2023 (selective copying, arXiv 2312.00752).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from causal_jax.data.tasks._base import Task, pick, tasks


@tasks.register("copying")
@dataclass(frozen=True)
class Copying(Task):
    """Copy the data tokens behind a separator. Ids: 0 blank, 1 separator, 2.. the symbols.

    Args:
        length: tokens of a row; at least 2*data. What is beyond is blanks between data and copy.
        data: tokens to copy.
        symbols: different data tokens.
        selective: scatter the data among the blanks.
    """

    length: int = 64
    data: int = 16
    symbols: int = 16
    selective: bool = False

    def __post_init__(self):
        self.need(self.data >= 1, "data", "at least one token has to be copied")
        self.need(self.symbols >= 1, "symbols", "at least one symbol is needed")
        least = 2 * self.data
        self.need(
            self.length >= least,
            "length",
            f"{self.data} data tokens and their copy need {least} or more",
        )

    @property
    def vocab(self) -> int:
        """Blank, separator and symbols."""
        return 2 + self.symbols

    @property
    def draws(self) -> int:
        """One number per data token, one per place."""
        return self.data + self.length - self.data

    def sequences(
        self, u: Float[np.ndarray, "B draws"]
    ) -> tuple[Int[np.ndarray, "B T1"], Bool[np.ndarray, "B T1"]]:
        """See `Task.sequences`."""
        data = 2 + np.floor(u[:, : self.data] * self.symbols).astype(np.int64)
        places = np.broadcast_to(np.arange(self.data), data.shape)
        if self.selective:
            places = np.sort(pick(u[:, self.data :], self.data), axis=1)
        sequence = np.zeros((len(u), self.length + 1), np.int64)
        answer = np.zeros(sequence.shape, bool)
        np.put_along_axis(sequence, places, data, axis=1)
        sequence[:, self.length - self.data] = 1
        sequence[:, -self.data :] = data
        answer[:, -self.data :] = True
        return sequence, answer
