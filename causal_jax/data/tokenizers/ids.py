"""The tokenizer of number sequences, for synthetic tasks: "3 17 5" is three tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, digest, tokenizers
from causal_jax.errors import InputError
from causal_jax.shapes import Int


class IdTokenizer(Tokenizer):
    """Decimal numbers, each with a space after it; no marks (bos and eos are None)."""

    def __init__(self, vocab: int):
        self.pieces = tuple(f"{i} ".encode() for i in range(vocab))
        self.bos = self.eos = None

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        ids = []
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.vocab:
                raise InputError(
                    f"text: {word!r} is no id of this model; write numbers from 0 to "
                    f"{self.vocab - 1} with spaces between"
                )
            ids.append(int(word))
        return np.array(ids, np.int32)

    def fingerprint(self) -> str:
        return digest("ids", str(self.vocab))

    def spec(self) -> TokenizerSpec:
        return Ids(self.vocab)


@tokenizers.register("ids")
@dataclass(frozen=True)
class Ids(TokenizerSpec):
    """Numbers 0..vocab-1 as tokens (a task source brings its own)."""

    vocab: int = 256

    def __post_init__(self):
        if self.vocab < 1:
            raise InputError(f"Ids.vocab is {self.vocab}; at least 1")

    def train(self, texts: Iterable[str]) -> IdTokenizer:
        return IdTokenizer(self.vocab)

    def _load(self, record: dict[str, Any]) -> IdTokenizer:
        return IdTokenizer(self.vocab)
