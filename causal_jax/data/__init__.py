"""Text in, batches out: `prepare(Data(source=..., tokenizer=..., context=..., batch=...), folder)`."""

from causal_jax.data.pipeline import Data, Prepared, prepare
from causal_jax.data.sources import Code, Corpus, Source, Task, Text, Tfds, sources
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
    "Bytes",
    "Code",
    "Corpus",
    "Data",
    "Ids",
    "Prepared",
    "Source",
    "Task",
    "Text",
    "Tfds",
    "Tokenizer",
    "TokenizerSpec",
    "load_tokenizer",
    "prepare",
    "sources",
    "tokenizers",
]
