"""Passkey retrieval: one number somewhere in a long, dull text, asked for at its end.

    ...The sky is blue. Here we go. The pass key is 31415. Remember it. The sun is yellow. ...
    What is the pass key? The pass key is 31415

`depth` says how far into the filler the number stands (0 the beginning, 1 the end), `length` how
long all of it is. Text, so any tokenizer will do: `text` gives prompt and answer, `batch` rows. The
filler opens in mid-sentence, as a piece cut from something longer, so that lengths are exact.

Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 4.2. Deviation: the sentences of the filler come
in random order, not in a loop, and there are more of them.
"""

from dataclasses import dataclass

import numpy as np

from causal_jax.data.tasks._base import tasks
from causal_jax.data.tasks._text import TextTask, insert, last_bytes

_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    "The river is wide. The road is long. The night is dark. The snow is white. It rains today. "
    "The wind blows. The bread is warm. The door is open. Nothing happens here. "
)
_SENTENCES = tuple(s + ". " for s in _FILLER.strip().rstrip(".").split(". "))
_NEEDLE = "The pass key is {}. Remember it. "
_QUESTION = "What is the pass key? The pass key is"


@tasks.register("needle")
@dataclass(frozen=True)
class Needle(TextTask):
    """Find the pass key in the filler.

    Args:
        length: bytes of prompt and answer together; with byte tokens and one in front of the text
            that opens it, the tokens of a row.
        depth: where the key stands, as a fraction of the filler; None: anywhere, evenly.
        digits: digits of the key.
    """

    length: int = 256
    depth: float | None = None
    digits: int = 5

    def __post_init__(self):
        self.need(1 <= self.digits <= 15, "digits", "a key has 1 to 15 digits")
        self.need(
            self.depth is None or 0 <= self.depth <= 1, "depth", "a fraction from 0 to 1, or None"
        )
        least = self._fixed
        self.need(
            self.length >= least, "length", f"key, question and answer alone take {least} bytes"
        )

    @property
    def _fixed(self) -> int:
        return len(_NEEDLE.format("")) + len(_QUESTION) + 1 + 2 * self.digits

    @property
    def draws(self) -> int:
        """The key, the depth, and one number per sentence of filler."""
        return 2 + (self.length - self._fixed) // min(map(len, _SENTENCES)) + 1

    def _text(self, u: np.ndarray) -> tuple[str, str]:
        key = f"{int(u[0] * 10**self.digits):0{self.digits}d}"
        room = self.length - self._fixed
        filler = last_bytes([_SENTENCES[int(x * len(_SENTENCES))] for x in u[2:]], room)
        depth = u[1] if self.depth is None else self.depth
        return insert(filler, _NEEDLE.format(key), depth) + _QUESTION, f" {key}"
