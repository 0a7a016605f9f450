"""Key-value recall beyond a window: pairs among noise first, questions at the very end.

    x k1 v1 x x k2 v2 x ... (first half) | x x x ... | k2 v2 k1 v1

Pairs stand at even places of the first half, in noise; all keys are asked for at the end in another
order. With a window shorter than the distance between, only a memory can carry the answers; the
same row may be of any length. Titans, arXiv 2501.00663 (this project's small setting of its claim
that memory recalls what attention no longer sees).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tasks._arranged import Arranged, written
from causal_jax.data.tasks._base import tasks


@tasks.register("key_value")
@dataclass(frozen=True)
class KeyValue(Arranged):
    """Pairs in the first half, questions at the end. Ids: keys, then values, then noise.

    Args:
        length: tokens of a row; the pairs fit into its first half, the questions into the second.
        pairs: key-value pairs, all of them asked for.
        keys, values, noise: different tokens of each kind.
    """

    length: int = 64
    pairs: int = 4
    keys: int = 16
    values: int = 16
    noise: int = 16

    def __post_init__(self):
        self.need(1 <= self.pairs <= self.keys, "pairs", f"1 to keys={self.keys}")
        self.need(min(self.values, self.noise) >= 1, "values", "at least one value and one noise")
        least = 4 * self.pairs
        self.need(self.length >= least, "length", f"{self.pairs} pairs need {least} or more")

    @property
    def vocab(self) -> int:
        """Keys, values and noise."""
        return self.keys + self.values + self.noise

    @property
    def draws(self) -> int:
        """Keys, values, places, the order of the questions, noise."""
        return self.keys + 2 * self.pairs + self.length // 4 + self.length + 1

    def arranged(self, u: Any, xp: Any) -> tuple[Any, Any]:
        """See `Arranged`."""
        n, slots = self.pairs, self.length // 4
        u_key, u_value, u_slot, u_order, u_noise = xp.split(
            u, np.cumsum([self.keys, n, slots, n]), axis=1
        )
        key = xp.argsort(u_key, axis=1)[:, :n]
        value = self.keys + xp.floor(u_value * self.values).astype(int)
        sequence = self.keys + self.values + xp.floor(u_noise * self.noise).astype(int)
        place = 2 * xp.argsort(u_slot, axis=1)[:, :n]
        asked = self.length + 1 - 2 * n + 2 * xp.argsort(u_order, axis=1)
        what = (place, key), (place + 1, value), (asked, key), (asked + 1, value)
        answers = asked[:, :, None] + 1 == np.arange(self.length + 1)[None, None]
        return written(sequence, what, xp), answers.any(1)
