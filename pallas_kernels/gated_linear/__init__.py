"""Gated linear attention in chunks: a decaying state per head, matrix products inside a chunk.

gated_linear_recurrent    the recurrence as it is written (the reference)
gated_linear_chunked      plain XLA, fast anywhere
gated_linear_tpu          Mosaic TPU; tpu.refusal(q, k, v) says why not
gated_linear_gpu          Mosaic GPU (Hopper); gpu.refusal(q, k, v) says why not
"""

from pallas_kernels.gated_linear import gpu, tpu
from pallas_kernels.gated_linear.gpu import gated_linear_gpu
from pallas_kernels.gated_linear.reference import gated_linear_recurrent
from pallas_kernels.gated_linear.tpu import gated_linear_tpu
from pallas_kernels.gated_linear.xla import gated_linear_chunked

__all__ = [
    "gated_linear_chunked",
    "gated_linear_gpu",
    "gated_linear_recurrent",
    "gated_linear_tpu",
    "gpu",
    "tpu",
]
