"""Exact attention over the live tiles of a mask: tiles that allow nothing are never computed."""

from pallas_kernels.block_sparse import gpu, tpu
from pallas_kernels.block_sparse.schedule import Schedule, Tiles
from pallas_kernels.block_sparse.xla import block_sparse_attention

__all__ = ["Schedule", "Tiles", "block_sparse_attention", "gpu", "tpu"]
