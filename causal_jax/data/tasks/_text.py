"""Tasks in words: a prompt and its answer as text, rows through any tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from causal_jax.data.tasks._base import Rows, Task, rows, tasks, uniforms
from causal_jax.data.tokenizers import Bytes, Tokenizer


@dataclass(frozen=True)
class TextTask(Task):
    """Base of tasks whose rows are text; `_text` turns a row's uniform numbers into it.

    Args:
        length: bytes of prompt and answer together; with byte tokens and one in front of the text
            that opens it, the tokens of a row.
    """

    textual: ClassVar[bool] = True

    @property
    def vocab(self) -> int:
        """That of the byte tokenizer, which `batch` uses unless it is given another."""
        return Bytes().train(()).vocab

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
        """Prompt and answer from `draws` uniform numbers."""
        raise NotImplementedError


def last_bytes(parts: Sequence[str], room: int) -> str:
    """The end of the joined parts, `room` characters: lengths are exact, it opens in mid-word."""
    whole = "".join(parts)
    return whole[len(whole) - room :] if room else ""


def insert(text: str, piece: str, place: float) -> str:
    """`piece` between two sentences of `text`, at the boundary nearest to the fraction `place`."""
    bounds = np.array(
        [i + 2 for i in range(len(text) - 1) if text[i : i + 2] == ". "] or [len(text)]
    )
    at = int(bounds[np.argmin(np.abs(bounds - place * len(text)))])
    return text[:at] + piece + text[at:]
