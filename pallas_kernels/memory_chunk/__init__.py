"""Memories that learn while they read, chunk by chunk: read and write in one pass.

`tpu` is a module of its own: Pallas takes a while to import.
"""

from pallas_kernels.memory_chunk import gpu, reference
from pallas_kernels.memory_chunk.deep import Form, anchored_chunk, surprises
from pallas_kernels.memory_chunk.linear import Tokens
from pallas_kernels.memory_chunk.xla import linear

__all__ = ["Form", "Tokens", "anchored_chunk", "gpu", "linear", "reference", "surprises"]
