"""Segmented recall: pairs in different segments of a row, all asked for in the last one.

    x k1 v1 x | x x x x | k2 v2 x x | ... | x x .. k2 v2 k1 v1        segments of `segment` tokens

No pair straddles a border. A model that reads segment after segment answers only by what it carries
over: a state that has seen a value beside its key, kept among many others. Fillers follow Zipf's
law; so do keys, with `skew`. This project's problem for contextual memory reweaving (arXiv
2502.02046, which names none).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tasks._arranged import Arranged, written
from causal_jax.data.tasks._base import tasks


@tasks.register("segmented_recall")
@dataclass(frozen=True)
class SegmentedRecall(Arranged):
    """Pairs in the first segments, questions in the last. Ids: keys, then values, then fillers.

    Args:
        length: tokens of a row, a multiple of segment.
        segment: tokens of a segment.
        pairs: at most one per segment, all of them asked for.
        keys, values, fillers: different tokens of each kind.
        skew: exponent of Zipf's law for keys; 0: all equally often.
    """

    length: int = 256
    segment: int = 32
    pairs: int = 4
    keys: int = 32
    values: int = 32
    fillers: int = 64
    skew: float = 0.0

    def __post_init__(self):
        self.need(self.length % self.segment == 0, "length", f"a multiple of {self.segment}")
        self.need(1 <= self.pairs <= self.keys, "pairs", f"1 to keys={self.keys}")
        self.need(min(self.values, self.fillers) >= 1, "values", "at least one value and filler")
        self.need(
            self.pairs < self.segments, "pairs", f"fewer than the {self.segments} segments of a row"
        )
        self.need(self.segment >= 2 * self.pairs, "segment", "room for the questions")
        self.need(self.skew >= 0, "skew", "0 or more")

    @property
    def segments(self) -> int:
        """Of a row."""
        return self.length // self.segment

    @property
    def vocab(self) -> int:
        """Keys, values and fillers."""
        return self.keys + self.values + self.fillers

    @property
    def draws(self) -> int:
        """Keys, values, segments, places, the order of the questions, fillers."""
        return self.keys + 3 * self.pairs + self.segments - 1 + self.length + 1

    def distances(self, sequence: Any, xp: Any = np) -> Any:
        """[B, T + 1]: how many segments before the last one each token's pair stands, seen from
        its answer; elsewhere without meaning."""
        asked = xp.concatenate([sequence[:, :1], sequence[:, :-1]], 1)  # the key in front
        first = (sequence[:, None, :] == asked[:, :, None]).argmax(-1)
        return self.segments - 1 - first // self.segment

    def arranged(self, u: Any, xp: Any) -> tuple[Any, Any]:
        """See `Arranged`."""
        n, C = self.pairs, self.segment
        parts = np.cumsum([self.keys, n, self.segments - 1, n, n])
        u_key, u_value, u_segment, u_place, u_order, u_filler = xp.split(u, parts, axis=1)
        # the smallest of -log(u) / w: a draw without replacement with weights w
        weight = np.arange(1, self.keys + 1)[None] ** -self.skew
        key = xp.argsort(-xp.log1p(-u_key) / weight, axis=1)[:, :n]
        value = self.keys + xp.floor(u_value * self.values).astype(int)
        law = np.cumsum(1 / np.arange(1, self.fillers + 1))
        rank = (u_filler[..., None] >= (law / law[-1])[:-1][None, None]).sum(-1)
        sequence = self.keys + self.values + rank
        place = C * xp.argsort(u_segment, axis=1)[:, :n]
        place = place + xp.floor(u_place * (C - 1)).astype(int)
        asked = self.length + 1 - 2 * n + 2 * xp.argsort(u_order, axis=1)
        what = (place, key), (place + 1, value), (asked, key), (asked + 1, value)
        answers = asked[:, :, None] + 1 == np.arange(self.length + 1)[None, None]
        return written(sequence, what, xp), answers.any(1)
