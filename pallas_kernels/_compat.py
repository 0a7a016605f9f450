"""What differs between jax 0.10 and 0.12, in one place: kernels import Pallas from here."""

import functools
import os
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


def tpu_topology(name: str, **settings: Any) -> Any:
    """A TPU slice that need not exist, to compile for (needs libtpu).

    Args:
        settings: for `get_topology_desc`.
    """
    from jax.experimental import topologies

    # No cloud metadata are asked for, processes may share the library, no host names are missed.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # With its first program it reads XLA_FLAGS and ends the process at a flag that it does not
    # know, such as those of the CPU's compiler.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if not f.startswith("--xla_cpu_"))
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
