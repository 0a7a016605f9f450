"""Gated linear attention in chunks: a decaying state per head, matrix products inside a chunk."""

from pallas_kernels.gated_linear.xla import gated_linear_chunked

__all__ = ["gated_linear_chunked"]
