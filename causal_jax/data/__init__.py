"""Text in, batches out: `prepare(Data(source=..., tokenizer=..., context=...), folder)`."""

from causal_jax.data.batches import Batches
from causal_jax.data.pipeline import Data, Prepared, prepare
from causal_jax.data.sources import Code, Corpus, Source, Synthetic, Text, Tfds, sources
from causal_jax.data.tokenizers import (
    BPE,
    Bytes,
    Ids,
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    tokenizers,
)

__all__ = [
    "BPE",
    "Batches",
    "Bytes",
    "Code",
    "Corpus",
    "Data",
    "Ids",
    "Prepared",
    "Source",
    "Synthetic",
    "Text",
    "Tfds",
    "Tokenizer",
    "TokenizerSpec",
    "load_tokenizer",
    "prepare",
    "sources",
    "tokenizers",
]
