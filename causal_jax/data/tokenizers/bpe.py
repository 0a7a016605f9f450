"""Byte-level byte-pair encoding (the `tokenizers` package), without loss: no normaliser, no added
space.

The text is cut by GPT-2's expression, each piece is a string of bytes, and the most frequent
adjacent pair is merged again and again (Sennrich et al. 2016, arXiv 1508.07909; on bytes: Radford
et al. 2019). The marks bos and eos are numbered *after* the vocabulary and are unknown to the
encoder, so a text that happens to contain the letters of a mark is still only text.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causal_jax.data.tokenizers._base import Tokenizer, TokenizerSpec, digest, tokenizers, utf8
from causal_jax.errors import InputError
from causal_jax.shapes import Int


def tokenizers_library():
    """The package `tokenizers`, or an InputError that says how to get it."""
    try:
        import tokenizers as library
    except ImportError:
        raise InputError(
            'a BPE tokenizer needs the package tokenizers: pip install "causal_jax[data]"'
        ) from None
    return library


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte in its vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # printable in latin-1
    table, extra = {chr(b): b for b in plain}, 0
    for b in range(256):
        if b not in plain:
            table[chr(256 + extra)] = b
            extra += 1
    return table


class BPETokenizer(Tokenizer):
    """A trained byte-level BPE; bos and eos are the two last ids.

    Args:
        model: a `tokenizers.Tokenizer` with a BPE model and byte-level pre-tokenizer, no special
            tokens.
        spec: what it was made from.
    """

    def __init__(self, model: Any, spec: "BPE"):
        self._model, self._spec = model, spec
        letters = byte_letters()
        vocab = sorted(model.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in vocab] != list(range(len(vocab))):
            raise ValueError("the ids of a BPE vocabulary must be 0..n-1")
        table = tuple(bytes(letters[c] for c in word) for word, _ in vocab)
        self.pieces = (*table, b"", b"")
        self.bos, self.eos = len(table), len(table) + 1

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        utf8(text)
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_documents(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        for t in texts:
            utf8(t)
        coded = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(c.ids, np.int32) for c in coded]

    def fingerprint(self) -> str:
        merges = json.loads(self._model.to_str())["model"]["merges"]
        return digest("bpe", json.dumps(merges), *self.pieces)

    def spec(self) -> TokenizerSpec:
        return self._spec

    def _payload(self) -> dict[str, Any]:
        return {"model": json.loads(self._model.to_str())}


@tokenizers.register("bpe")
@dataclass(frozen=True)
class BPE(TokenizerSpec):
    """Byte-level BPE trained on the training documents.

    Args:
        vocab: ids in all: 256 bytes + merges + 2 marks. A small text may not offer so many merges;
            the tokenizer's own `.vocab` then is smaller.
        min_count: a pair is merged only if it occurs this often.
    """

    vocab: int = 1024
    min_count: int = 2

    def __post_init__(self):
        if self.vocab < 258:
            raise InputError(f"BPE.vocab is {self.vocab}; at least 258 (256 bytes and bos, eos)")
        if self.min_count < 1:
            raise InputError(f"BPE.min_count is {self.min_count}; at least 1")

    def train(self, texts: Iterable[str]) -> BPETokenizer:
        lib = tokenizers_library()
        model = lib.Tokenizer(lib.models.BPE())
        model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=self.vocab - 2,
            min_frequency=self.min_count,
            show_progress=False,
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
        )
        model.train_from_iterator(_checked(texts), trainer)
        return BPETokenizer(model, self)

    def _load(self, record: dict[str, Any]) -> BPETokenizer:
        lib = tokenizers_library()
        return BPETokenizer(lib.Tokenizer.from_str(json.dumps(record["model"])), self)


def _checked(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        utf8(text)
        yield text
