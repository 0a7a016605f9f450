"""Attention of tiles of queries to one block of keys each, and to sampled keys that all share."""

from pallas_kernels.lsh_attention.gpu import gpu
from pallas_kernels.lsh_attention.problem import Places, Problem
from pallas_kernels.lsh_attention.reference import reference
from pallas_kernels.lsh_attention.tpu import tpu
from pallas_kernels.lsh_attention.xla import xla

__all__ = ["Places", "Problem", "gpu", "reference", "tpu", "xla"]
