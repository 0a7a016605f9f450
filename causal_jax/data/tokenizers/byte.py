"""The byte tokenizer: 256 bytes and two marks. Nothing to train, nothing it cannot write."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, digest, tokenizers, utf8
from causal_jax.shapes import Int

BYTES = tuple(bytes([b]) for b in range(256))


class ByteTokenizer(Tokenizer):
    """id = byte value; bos 256, eos 257; vocabulary 258."""

    def __init__(self):
        self.pieces = (*BYTES, b"", b"")
        self.bos, self.eos = 256, 257

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def fingerprint(self) -> str:
        return digest("byte", *self.pieces)

    def spec(self) -> TokenizerSpec:
        return Bytes()


@tokenizers.register("byte")
@dataclass(frozen=True)
class Bytes(TokenizerSpec):
    """UTF-8 bytes as tokens."""

    def train(self, texts: Iterable[str]) -> ByteTokenizer:
        return ByteTokenizer()

    def _load(self, record: dict[str, Any]) -> ByteTokenizer:
        return ByteTokenizer()
