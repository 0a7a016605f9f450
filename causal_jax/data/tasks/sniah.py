"""S-NIAH 1-3: one needle in a haystack of text, found by its word.

    pk   a number among sentences that repeat for ever      (RULER's single 1; S-NIAH-PK)
    n    a number among prose                               (single 2; S-NIAH-N)
    w    a long identifier among prose                      (single 3, UUIDs; S-NIAH-W)

    ... One of the special magic numbers for quiet-harbor is: 4082617. ... What is the special magic
    number for quiet-harbor mentioned in the text? The special magic number for quiet-harbor is
    4082617

RULER, arXiv 2404.06654, appendix B. Deviation: the prose is made of a small grammar, not of essays,
so that a row is the same everywhere; keys are two words out of 40 x 40; the task's instruction in
front is left out; the haystack opens in mid-sentence, so that lengths are exact.
"""

from dataclasses import dataclass

import numpy as np

from causal_jax.data.tasks._base import tasks
from causal_jax.data.tasks._text import TextTask, insert, last_bytes

_REPEAT = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_ADJECTIVES_LINE = (
    "quiet bright early silver narrow gentle hidden ancient broken curious distant eager faded "
    "golden hollow idle jolly keen little modest noble open patient rapid sandy tender upper "
    "velvet warm yellow young bitter calm dusty empty frozen grey heavy inner lonely"
)
_NOUNS_LINE = (
    "harbor meadow lantern window garden letter bridge market island forest mirror ladder river "
    "village teacher sailor painter basket orchard engine castle kettle shadow barrel compass "
    "valley tower blanket hammer temple farmer needle pocket saddle ticket whistle carpet "
    "candle feather statue"
)
_VERBS_LINE = (
    "follows finds leaves carries crosses watches repairs remembers passes paints guards hides "
    "measures visits borrows describes"
)
_ADJECTIVES, _NOUNS, _VERBS = (
    tuple(line.split()) for line in (_ADJECTIVES_LINE, _NOUNS_LINE, _VERBS_LINE)
)
_FORMS = ("The {} {} {} the {} {}. ", "Every {} {} {} some {} {}. ", "No {} {} {} this {} {}. ")


@tasks.register("sniah")
@dataclass(frozen=True)
class Sniah(TextTask):
    """Find the value of a word.

    Args:
        length: bytes of prompt and answer together.
        kind: "pk", "n" or "w".
        depth: where the needle stands, as a fraction of the haystack; None: anywhere, evenly.
        digits: of the number; an identifier is 32 hexadecimal digits in five groups.
    """

    length: int = 512
    kind: str = "pk"
    depth: float | None = None
    digits: int = 7

    def __post_init__(self):
        self.need(self.kind in ("pk", "n", "w"), "kind", "pk, n or w")
        self.need(1 <= self.digits <= 15, "digits", "a number has 1 to 15 digits")
        self.need(
            self.depth is None or 0 <= self.depth <= 1, "depth", "a fraction from 0 to 1, or None"
        )
        least = self._longest
        self.need(self.length >= least, "length", f"needle and question can take {least} bytes")

    @property
    def draws(self) -> int:
        """Depth, word, value, and what the haystack is made of."""
        return 3 + 32 + self._sentences * (0 if self.kind == "pk" else 6)

    @property
    def _sentences(self) -> int:
        return self.length // 20 + 1  # the shortest sentence has more than 20 bytes

    @property
    def _longest(self) -> int:
        longest = max(map(len, _ADJECTIVES)) + 1 + max(map(len, _NOUNS))
        value = 36 if self.kind == "w" else self.digits
        needle, question, answer = self._parts("k" * longest, "0" * value)
        return len(needle) + len(question) + len(answer)

    def _parts(self, word: str, value: str) -> tuple[str, str, str]:
        what = "uuid" if self.kind == "w" else "number"
        needle = f"One of the special magic {what}s for {word} is: {value}. "
        question = f"What is the special magic {what} for {word} mentioned in the text? "
        return needle, question + f"The special magic {what} for {word} is", f" {value}"

    def _text(self, u: np.ndarray) -> tuple[str, str]:
        word = f"{_one(_ADJECTIVES, u[1])}-{_one(_NOUNS, u[2])}"
        if self.kind == "w":
            x = "".join(f"{int(d * 16):x}" for d in u[3:35])
            value = "-".join((x[:8], x[8:12], x[12:16], x[16:20], x[20:]))
        else:
            value = f"{int(u[3] * 10**self.digits):0{self.digits}d}"
        needle, question, answer = self._parts(word, value)
        room = self.length - len(needle) - len(question) - len(answer)
        if self.kind == "pk":
            hay = [_REPEAT] * (room // len(_REPEAT) + 1)
        else:
            lists = (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS)
            hay = [
                _one(_FORMS, d[5]).format(*map(_one, lists, d[:5])) for d in u[35:].reshape(-1, 6)
            ]
        hay = last_bytes(hay, room)
        return insert(hay, needle, u[0] if self.depth is None else self.depth) + question, answer


def _one(words: tuple[str, ...], u: float) -> str:
    return words[int(u * len(words))]
