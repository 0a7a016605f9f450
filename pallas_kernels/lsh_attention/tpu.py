"""The same for TPUs (Mosaic): one program per tile of queries, blocks fetched by a prefetched list.

The grid is (problems, tiles). The block that a tile attends to is read from scalar memory by the
index maps, so the next block is fetched while the present tile is multiplied. All S + R scores of a
tile fit into VMEM, transposed [keys, queries] so that statistics are rows:

    forward    s^T = k q^T, softmax over both lists, o = p v
    backward   p again from the lse; dq by tile; dk, dv stay in VMEM as long as tiles of the same
               block follow each other, those of the samples as long as the problem lasts

Nothing is added up by two programs: no atomics, and results are the same from run to run.

Checked without a TPU: in both interpreters and by compiling ahead of time. Never run or timed on a
real chip.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import pl, pltpu, tpu_call
from pallas_kernels.lsh_attention.problem import Problem

LANES = 128


class _Config(NamedTuple):
    scale: float
    interpret: Any


def tpu(x: Problem, scale: float, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """o [P, C, Q, V] in v's dtype and lse [P, C, Q] in float32, both differentiable.

    Tiles of one block must be neighbours in `x.block`.

    Args:
        scale: factor on q . k.
        interpret: False on a TPU; True or `pltpu.InterpretParams` elsewhere.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    reason = refusal(x)
    if reason:
        raise NotImplementedError(f"tpu: {reason}")
    Q = x.q.shape[2]
    bias_sample = _pad(x.bias_sample, 1, LANES, -jnp.inf)
    o, lse = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        _Config(float(scale), interpret),
        _pad(x.q, 2, LANES),
        _pad(x.k, 2, LANES),
        _pad(x.v, 2, LANES),
        _pad(x.k_sample, 1, LANES),
        _pad(x.v_sample, 1, LANES),
        x.block,
        _pad(x.block_sample, 1, LANES)[..., None],
        _pad(x.bias, 2, LANES, -jnp.inf)[..., None],
        bias_sample[..., None],
    )
    return o[:, :, :Q], lse[:, :, 0, :Q]


def refusal(x: Problem) -> str | None:
    """Why these kernels cannot serve a problem, or None."""
    if x.mask is not None:
        return "its kernel knows no mask beside causality"
    if x.q.dtype not in (jnp.float32, jnp.bfloat16) or len({x.q.dtype, x.k.dtype, x.v.dtype}) > 1:
        return f"it needs one type, float32 or bfloat16, not {x.q.dtype}, {x.k.dtype}, {x.v.dtype}"
    scores = 4 * x.q.shape[2] * (x.k.shape[2] + x.k_sample.shape[1])
    if scores > 8 * 2**20:
        return f"{scores / 2**20:.0f} MiB of scores per tile: at most 8, choose smaller blocks"
    return None


def _pad(a, axis: int, multiple: int, value: float = 0):
    """At the end of an axis, to a multiple and at least one."""
    extra = -a.shape[axis] % multiple if a.shape[axis] else multiple
    widths = [(0, extra * (n == axis)) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if extra else a


def _dot(a, b, contract: tuple[int, int]) -> jax.Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scores(scale, own, q, k, k_sample, block_sample, bias, bias_sample):
    """Transposed scores [S, Q] of the block and [R, Q] of the samples."""
    shared = jnp.where(block_sample == own, -jnp.inf, bias_sample)
    return scale * _dot(k, q, (1, 1)) + bias, scale * _dot(k_sample, q, (1, 1)) + shared


def _forward_kernel(scale, tiles, block, q, k, v, ks, vs, block_sample, bias, bias_sample, o, lse):
    own = block[pl.program_id(0) * tiles + pl.program_id(1)]
    s, s_sample = _scores(
        scale, own, q[0, 0], k[0, 0], ks[0], block_sample[0], bias[0, 0], bias_sample[0]
    )
    top = jnp.maximum(s.max(0, keepdims=True), s_sample.max(0, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    p, p_sample = jnp.exp(s - top), jnp.exp(s_sample - top)
    total = p.sum(0, keepdims=True) + p_sample.sum(0, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    own_o, sample_o = (
        _dot((w / total).astype(x.dtype), x, (0, 0)) for w, x in ((p, v[0, 0]), (p_sample, vs[0]))
    )
    o[0, 0] = (own_o + sample_o).astype(o.dtype)
    lse[0, 0] = jnp.where(nothing, -jnp.inf, top + jnp.log(total))


def _backward_kernel(
    scale, tiles, block, q, k, v, ks, vs, block_sample, bias, bias_sample, do, far, delta,
    dq, dk, dv, dks, dvs,
):  # fmt: skip
    c = pl.program_id(1)
    at = pl.program_id(0) * tiles + c
    own = block[at]

    @pl.when((c == 0) | (own != block[jnp.maximum(at - 1, 0)]))
    def _():
        dk[0, 0], dv[0, 0] = jnp.zeros(dk.shape[2:], dk.dtype), jnp.zeros(dv.shape[2:], dv.dtype)

    @pl.when(c == 0)
    def _():
        dks[0], dvs[0] = jnp.zeros(dks.shape[1:], dks.dtype), jnp.zeros(dvs.shape[1:], dvs.dtype)

    qi, doi = q[0, 0], do[0, 0]
    both = _scores(scale, own, qi, k[0, 0], ks[0], block_sample[0], bias[0, 0], bias_sample[0])
    sums = []
    for s, keys, values in zip(both, (k[0, 0], ks[0]), (v[0, 0], vs[0])):
        p = jnp.exp(s - far[0, 0])
        ds = p * (_dot(values, doi, (1, 1)) - delta[0, 0])
        p, ds = p.astype(doi.dtype), (scale * ds).astype(qi.dtype)
        sums.append((_dot(ds, keys, (0, 0)), _dot(ds, qi, (1, 0)), _dot(p, doi, (1, 0))))
    (dq_own, dk_own, dv_own), (dq_sample, dk_sample, dv_sample) = sums
    dq[0, 0] = (dq_own + dq_sample).astype(dq.dtype)
    dk[0, 0] += dk_own
    dv[0, 0] += dv_own
    dks[0] += dk_sample
    dvs[0] += dv_sample


def _specs(C: int, arrays, kinds: str) -> list[Any]:
    """Block specs by what an array is cut by: "t" tile, "b" the tile's block, "p" problem."""
    maps = {
        "t": lambda p, c, block: (p, c, 0, 0),
        "b": lambda p, c, block: (p, block[p * C + c], 0, 0),
        "p": lambda p, c, block: (p, 0, 0),
    }
    return [
        pl.BlockSpec((1, *((1,) if kind != "p" else ()), *a.shape[-2:]), maps[kind])
        for a, kind in zip(arrays, kinds)
    ]


def _call(cfg: _Config, kernel, name: str, block, inputs, kinds: str, outputs, out_kinds: str):
    P, C = block.shape
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(P, C),
        in_specs=_specs(C, inputs, kinds),
        out_specs=_specs(C, outputs, out_kinds),
    )
    run = tpu_call(
        functools.partial(kernel, cfg.scale, C),
        grid_spec=grid,
        out_shape=outputs,
        semantics=("parallel", "arbitrary"),
        interpret=cfg.interpret,
        name=name,
    )
    return run(block.reshape(-1), *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg: _Config, q, k, v, ks, vs, block, block_sample, bias, bias_sample):
    (P, C, Q), V = q.shape[:3], v.shape[-1]
    outputs = [
        jax.ShapeDtypeStruct((P, C, Q, V), v.dtype),
        jax.ShapeDtypeStruct((P, C, 1, Q), jnp.float32),
    ]
    inputs = (q, k, v, ks, vs, block_sample, bias, bias_sample)
    name = "lsh_attention_forward"
    return tuple(_call(cfg, _forward_kernel, name, block, inputs, "tbbpppbp", outputs, "tt"))


def _attend_fwd(cfg, *args):
    o, lse = _attend(cfg, *args)  # pyright: ignore[reportGeneralTypeIssues]
    return (o, lse), (*args, o, lse)


def _attend_bwd(cfg: _Config, saved, grads):
    q, k, v, ks, vs, block, block_sample, bias, bias_sample, o, lse = saved
    do, dlse = grads
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)[:, :, None] - dlse
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    inputs = (q, k, v, ks, vs, block_sample, bias, bias_sample, do, far, delta)
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    outputs += [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (k, v, ks, vs)]
    name = "lsh_attention_backward"
    dq, dk, dv, dks, dvs = _call(
        cfg, _backward_kernel, name, block, inputs, "tbbpppbpttt", outputs, "tbbpp"
    )
    P, M = k.shape[:2]
    used = jnp.zeros((P, M), bool).at[jnp.arange(P)[:, None], block].set(True)[..., None, None]
    dk, dv = (jnp.where(used, g, 0) for g in (dk, dv))  # others were never written
    sums = (g.astype(a.dtype) for g, a in zip((dk, dv, dks, dvs), (k, v, ks, vs)))
    return dq, *sums, None, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
