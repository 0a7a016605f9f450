"""What differs between jax 0.10 and 0.12, in one place: kernels import Pallas from here."""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

JAX = tuple(int(x) for x in jax.__version__.split(".")[:2])


def tpu_call(
    kernel: Any,
    *,
    grid_spec: Any,
    out_shape: Any,
    semantics,
    interpret: Any,
    name: str,
    cost_estimate: Any = None,
):
    """`pl.pallas_call` for Mosaic TPU; parameters are always explicit (their default moves)."""
    params = pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=out_shape,
        compiler_params=params,
        cost_estimate=cost_estimate,
        interpret=interpret,
        name=name,
    )


VMEM_LIMIT = 64 * 2**20  # of 128 MiB on v5e and v6e


@functools.cache
def mosaic_gpu() -> Any:
    """`jax.experimental.pallas.mosaic_gpu`; raises NotImplementedError where jaxlib lacks it."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as e:
        raise NotImplementedError(f"this jaxlib has no Mosaic GPU: {e}") from e
    return mosaic_gpu


def transposed(ref: Any) -> Any:
    """A matrix in shared memory read the other way round."""
    return mosaic_gpu().transpose_ref(ref, (1, 0)) if JAX < (0, 11) else ref.transpose((1, 0))
