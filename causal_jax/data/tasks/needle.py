"""Passkey retrieval: one number somewhere in a long, dull text, asked for at its end.

    ...The sky is blue. Here we go. The pass key is 31415. Remember it. The sun is yellow. ...
    What is the pass key? The pass key is 31415

`depth` says how far into the filler the number stands (0 the beginning, 1 the end), `length` how
long all of it is. Text, so any tokenizer will do: `text` gives prompt and answer, `batch` rows. The
filler opens in mid-sentence, as a piece cut from something longer, so that lengths are exact.

Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 4.2. Deviation: the sentences of the filler come
in random order, not in a loop, and there are more of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from causal_jax.data.tasks._base import Rows, Task, rows, tasks, uniforms
from causal_jax.data.tokenizers import Bytes, Tokenizer

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
class Needle(Task):
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

    textual: ClassVar[bool] = True

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
    def vocab(self) -> int:
        """That of the byte tokenizer, which `batch` uses unless it is given another."""
        return Bytes().train(()).vocab

    @property
    def _fixed(self) -> int:
        return len(_NEEDLE.format("")) + len(_QUESTION) + 1 + 2 * self.digits

    @property
    def draws(self) -> int:
        """The key, the depth, and one number per sentence of filler."""
        return 2 + (self.length - self._fixed) // min(map(len, _SENTENCES)) + 1

    def text(self, seed: int, index: int) -> tuple[str, str]:
        """Prompt and answer of one row; the answer opens with a space."""
        return self.texts(seed, [index])[0]

    def texts(self, seed: int, indices: Sequence[int]) -> list[tuple[str, str]]:
        """Prompts and answers of many rows."""
        return [self._text(u) for u in uniforms(tasks.name_of(self), seed, indices, self.draws)]

    def batch(self, seed: int, indices: Sequence[int], tokenizer: Tokenizer | None = None) -> Rows:
        """Rows, with a beginning-of-text token in front.

        Args:
            tokenizer: None means bytes, which fill a row exactly. With another, rows are padded
                behind the answer to the longest one (weight 0, segment -1).

        Returns:
            as `Task.batch`; [B, length] for bytes.
        """
        tokenizer = Bytes().train(()) if tokenizer is None else tokenizer
        sequences = []
        for prompt, answer in self.texts(seed, indices):
            front = [] if tokenizer.bos is None else [tokenizer.bos]
            prompt_ids = np.concatenate([np.array(front, np.int32), tokenizer.encode(prompt)])
            sequences.append((prompt_ids, tokenizer.encode(answer)))
        longest = max((len(p) + len(a) for p, a in sequences), default=1)
        whole = np.zeros((len(sequences), longest), np.int32)
        answers, padding = np.zeros(whole.shape, bool), np.ones(whole.shape, bool)
        for row, (prompt, answer) in enumerate(sequences):
            end = len(prompt) + len(answer)
            whole[row, :end] = np.concatenate([prompt, answer])
            answers[row, len(prompt) : end] = True
            padding[row, :end] = False
        out = rows(whole, answers)
        return out | {"segments": np.where(padding[:, 1:], -1, 0).astype(np.int32)}

    def _text(self, u: np.ndarray) -> tuple[str, str]:
        key = f"{int(u[0] * 10**self.digits):0{self.digits}d}"
        room = self.length - self._fixed
        chosen = "".join(_SENTENCES[int(x * len(_SENTENCES))] for x in u[2:])
        filler = chosen[len(chosen) - room :] if room else ""
        # The key goes between two sentences: at the boundary nearest to the depth.
        bounds = np.array([i + 2 for i in range(room - 1) if filler[i : i + 2] == ". "] or [room])
        depth = u[1] if self.depth is None else self.depth
        at = int(bounds[np.argmin(np.abs(bounds - depth * room))])
        return filler[:at] + _NEEDLE.format(key) + filler[at:] + _QUESTION, f" {key}"
