"""Where text comes from. One file per kind; `sources` is the registry."""

from causal_jax.data.sources._base import Source, hold_out, sources
from causal_jax.data.sources.code import Code
from causal_jax.data.sources.corpus import Corpus
from causal_jax.data.sources.task import Synthetic
from causal_jax.data.sources.text import Text
from causal_jax.data.sources.tfds import Tfds

__all__ = ["Code", "Corpus", "Source", "Synthetic", "Text", "Tfds", "hold_out", "sources"]
