"""Text to ids and back, without loss. One file per kind; `tokenizers` is the registry of specs."""

from causal_jax.data.tokenizers._base import (
    DecodeStream,
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    tokenizers,
)
from causal_jax.data.tokenizers.bpe import BPE, BPETokenizer
from causal_jax.data.tokenizers.byte import Bytes, ByteTokenizer
from causal_jax.data.tokenizers.ids import Ids, IdTokenizer
from causal_jax.data.tokenizers.pretrained import Pretrained, PretrainedTokenizer

__all__ = [
    "BPE",
    "BPETokenizer",
    "ByteTokenizer",
    "Bytes",
    "DecodeStream",
    "IdTokenizer",
    "Ids",
    "Pretrained",
    "PretrainedTokenizer",
    "Tokenizer",
    "TokenizerSpec",
    "load_tokenizer",
    "tokenizers",
]
