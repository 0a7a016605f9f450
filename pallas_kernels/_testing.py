"""Kernels without their hardware: two interpreters, compilation ahead of time, GPU lowering.

interpret=True                 plain XLA: values
interpret=tpu_interpreter()    simulated memory spaces, semaphores and copies; finds races
compile_for_tpu(f, *shapes)    the real compiler for a chip that is elsewhere (needs libtpu)
lower_for_gpu(f, *shapes)      Mosaic GPU down to its module: types, layouts, barriers
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def tpu_interpreter(**options: Any) -> Any:
    """The interpreter that simulates a TPU: races are errors, what was not written is NaN."""
    options = {"detect_races": True, "uninitialized_memory": "nan"} | options
    return pltpu.InterpretParams(**options)


def races_found() -> bool:
    """Did the last program run by `tpu_interpreter()` have a race?"""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    return bool(found is not None and found.races_found)


def no_tpu_compiler() -> str | None:
    """Why `compile_for_tpu` cannot work here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install libtpu)"
    return None


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


def compile_for_tpu(f: Callable, *shapes: Any, topology: str = "v5e:2x2") -> Any:
    """`jit(f)` compiled for one chip of a topology; `memory_analysis()` and more hang on it.

    Args:
        shapes: `jax.ShapeDtypeStruct`s.
    """
    here = jax.sharding.SingleDeviceSharding(tpu_topology(topology).devices[0])
    placed = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes)
    return jax.jit(f).lower(*placed).compile()


def lower_for_gpu(f: Callable, *shapes: Any) -> str:
    """The text of `jit(f)` lowered for CUDA."""
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def gpu_interpreter() -> Any:
    """The interpreter of Mosaic GPU programs: global and shared memory, copies, barriers."""
    try:
        from jax.experimental.pallas.mosaic_gpu import (
            InterpretGPUParams,  # pyright: ignore[reportAttributeAccessIssue]
        )
    except ImportError:  # jax 0.10 has it, but does not export it
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
