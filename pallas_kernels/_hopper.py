"""What the Mosaic GPU kernels for Hopper share: TMA copies, WGMMA products, layouts.

`cfg` is any static configuration that says `interpret`: the interpreter knows no layouts, and its
WGMMA reads no transposed buffers.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels._compat import mosaic_gpu, transposed


def kernel(body: Any, cfg: Any, grid, out_type, scratch, threads: int = 1) -> Any:
    """A kernel over (heads, tiles, batch); `threads` warpgroups, the axis `wg`."""
    plgpu = mosaic_gpu()
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=threads,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=False),
        interpret=cfg.interpret,
    )


def buffer(rows: int, width: int, dtype: Any, copies: tuple[int, ...] = ()) -> Any:
    """Shared memory in the layout that WGMMA reads."""
    plgpu = mosaic_gpu()
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*copies, rows, width), dtype, transforms=transforms)


def product(cfg: Any, a, b, shape, flip: bool = False) -> Any:
    """a b (or a b^T when flipped) in float32; a in registers or shared memory, b in the latter."""
    plgpu = mosaic_gpu()
    if cfg.interpret:
        a, b = a[...], b[...]
        contract = (((1,), (1 if flip else 0,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def run(acc):
        plgpu.wgmma(acc, a, transposed(b) if flip else b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def fetch(pairs, barrier) -> None:
    """Copy to shared memory, and wait for all of it."""
    plgpu = mosaic_gpu()
    for n, (source, target) in enumerate(pairs):
        plgpu.copy_gmem_to_smem(source, target, barrier.at[n])
    for n in range(len(pairs)):
        plgpu.barrier_wait(barrier.at[n])


def loaded(cfg: Any, ref, layout: Any) -> Any:
    """What stands in memory, in registers of a layout."""
    return ref[...] if cfg.interpret else mosaic_gpu().load(ref, (), layout=layout, optimized=False)
