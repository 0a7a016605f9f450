"""The growing text of one row: whole characters only, nothing that may yet become a stop string."""

from collections.abc import Iterable
from typing import SupportsInt

import numpy as np

from causal_jax.data.tokenizers import Tokenizer


class Watch:
    """What of a row's text is certain, and whether a stop string has come.

    Args:
        tokenizer: of the model.
        stop: strings that end the text.
        before: ids of the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], before: Iterable[SupportsInt] = ()
    ):
        self.stream, self.stop = tokenizer.decode_stream(), stop
        for token in before:  # a tokenizer may treat the beginning of a text differently
            self.stream.push(token)
        self.text, self.used, self.shown, self.stopped = "", 0, 0, False

    def push(self, tokens: np.ndarray) -> str:
        """The text that became certain with these ids."""
        for token in tokens:
            if self.stopped:
                break
            self.used += 1
            self._add(self.stream.push(int(token)))
        held = 0 if self.stopped else self._undecided()
        return self._show(len(self.text) - held)

    def flush(self) -> str:
        """The rest, when no more ids will come."""
        if not self.stopped:
            self._add(self.stream.flush())
        return self._show(len(self.text))

    def _add(self, new: str) -> None:
        before, self.text = len(self.text), self.text + new
        found = [self.text.find(s, max(0, before - len(s) + 1)) for s in self.stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        ends = [n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])]
        return max(ends, default=0)

    def _show(self, until: int) -> str:
        new, self.shown = self.text[self.shown : until], max(self.shown, until)
        return new
