"""The same for TPUs (Mosaic): reading and writing of a chunk in one program, the state in VMEM.

The grid is (rows and heads, chunks); the chunks of a head follow one another, and what it remembers
(M and S, or the leaves of a deep memory) stays in float32 scratch from its first chunk to its last.
No coefficient matrix ever leaves the chip: decay, the inverse of I + T, scores and surprises are
made from a chunk's tokens and gates, by the lines that the XLA path runs.

    forward    y, the state after the last chunk; for a gradient also the state before each
    backward   chunks in reverse: a chunk is made again from the state before it and pulled back,
               the state's cotangent in scratch; gradients of M_0 stay in VMEM for the whole head

Nothing is added up by two programs: results are the same bit for bit from run to run.

Without a TPU: tests interpret the programs and compile them ahead of time for v5e, v5p and v6e.
Never run or timed on a real chip.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._compat import VMEM_LIMIT, pl, pltpu, tpu_call
from pallas_kernels.memory_chunk.decay import inverse_by_masks, sums_by_product
from pallas_kernels.memory_chunk.deep import Form, Leaves, anchored_chunk
from pallas_kernels.memory_chunk.linear import Tokens, advance, prepare

GATES = ("theta", "log_a", "log_eta", "stored", "document", "new", "weight")  # rows of a tile of 8


@dataclasses.dataclass(frozen=True)
class LinearStep:
    """A chunk of the exact linear form: state ([M | S],), constants (M_0,)."""

    gates: tuple[str, ...]
    to_init: bool
    read_at: str

    def __call__(self, x: tuple, rows: jax.Array, state: list, constants: list):
        """(y, state after the chunk)."""
        tokens, _, document = _tokens(x, rows, self.gates)
        p = prepare(
            tokens, to_init=self.to_init, read_at=self.read_at, document=document,
            sums=sums_by_product, inverse=inverse_by_masks,
        )  # fmt: skip
        y, _, after = advance(p, tokens, state[0], constants[0])
        return y, [after]


@dataclasses.dataclass(frozen=True)
class DeepStep:
    """A chunk of a deep memory: state (W .., S ..), constants (W_0 .., slow gamma)."""

    gates: tuple[str, ...]
    form: Form
    fast: tuple[str, ...]
    momentum: bool

    def __call__(self, x: tuple, rows: jax.Array, state: list, constants: list):
        """(y, state after the chunk)."""
        tokens, weight, document = _tokens(x, rows, self.gates)
        n = len(self.fast)
        W, S = dict(zip(self.fast, state[:n])), dict(zip(self.fast, state[n:])) or None
        initial = dict(zip(self.fast, constants[:n]))
        gamma = constants[n] if len(constants) > n else None
        y, _, W, S = anchored_chunk(
            self.form, W, S, W, initial, gamma, tokens, weight, document, sums_by_product,
            remat=lambda f: f,
        )  # fmt: skip
        return y, [W[n] for n in self.fast] + ([] if S is None else [S[n] for n in self.fast])


def _tokens(x: tuple, rows: jax.Array, gates: tuple[str, ...]):
    """Tokens in float32, and the rows of what has no place in them."""
    row = {n: rows[i : i + 1] for i, n in enumerate(GATES) if n in gates}
    q, k, v = (a.astype(jnp.float32) for a in x)
    new = row["new"] > 0.5 if "new" in row else None
    tokens = Tokens(
        q, k, v, row["theta"], row.get("log_a"), row.get("log_eta"), row["stored"] > 0.5, new
    )
    return tokens, row.get("weight"), row.get("document")


@dataclasses.dataclass(frozen=True)
class _Config:
    step: Any
    chunk: int
    heads: int
    precision: str
    interpret: Any


def linear(
    x: Tokens, state: jax.Array, initial: jax.Array, *, to_init: bool, read_at: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The exact linear form over n chunks, differentiable.

    Args:
        x: tokens [n, B, N, C, H], float32 or bfloat16; what is padding is not stored.
        state: [M | S] (M alone without momentum) before the first, [B, N, H, 2 V], float32.
        initial: M_0, [N, H, V].
        to_init, read_at: as in `xla.linear`.
        interpret: False on a TPU; True or `pltpu.InterpretParams` elsewhere.

    Returns:
        y [n, B, N, C, V] in v's dtype, and [M | S] after the last chunk.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    step = LinearStep(_gates_of(x, None), to_init, read_at)
    y, (after,) = _run(step, x, None, [state], [initial], interpret)
    return y, after


def deep(
    form: Form, x: Tokens, W: Leaves, S: Leaves | None, initial: Leaves, gamma: jax.Array | None,
    *, weight: jax.Array | None = None, interpret: Any = False,
) -> tuple[jax.Array, Leaves, Leaves | None]:  # fmt: skip
    """Chunks of a deep memory, each with its own anchor, differentiable.

    Args:
        form: the static side.
        x: tokens [n, B, N, C, H]; a chunk is an anchor.
        W, S: leaves [B, N, .., ..] before the first chunk.
        initial: where a document begins, [N, .., ..].
        gamma: the slow scale of the norm [N, 1, H], or None.
        weight: of the Omega rule, rows [n, B, N, 1, C].
        interpret: as in `linear`.

    Returns:
        y [n, B, N, C, H] in v's dtype, W and S after the last chunk.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    names = tuple(W)
    step = DeepStep(_gates_of(x, weight), form, names, S is not None)
    state = [W[n] for n in names] + ([] if S is None else [S[n] for n in names])
    constants = [initial[n] for n in names] + ([] if gamma is None else [gamma])
    y, after = _run(step, x, weight, state, constants, interpret)
    W = dict(zip(names, after))
    return y, W, None if S is None else dict(zip(names, after[len(names) :]))


def refusal(x: Tokens, state: list, constants: list) -> str | None:
    """Why these kernels cannot serve such arrays, or None."""
    if x.q.dtype not in (jnp.float32, jnp.bfloat16) or len({x.q.dtype, x.k.dtype, x.v.dtype}) > 1:
        return f"it needs one type, float32 or bfloat16, not {x.q.dtype}, {x.k.dtype}, {x.v.dtype}"
    C = x.q.shape[-2]
    if C % 8:
        return f"chunks of {C} tokens: expected a multiple of 8"
    widest = max(a.shape[-1] for a in (*state, *constants, x.q, x.v))
    # state, its cotangent, blocks that come and go twice, and a chunk's own arrays, made twice over
    leaves = 4 * sum(math.prod(a.shape[-2:]) for a in (*state, *constants))
    needed = 8 * leaves + 4 * (24 * C * C + 24 * C * max(128, widest))
    if needed > VMEM_LIMIT:
        return f"about {needed / 2**20:.0f} MiB of state and chunk: {VMEM_LIMIT / 2**20:.0f} fit"
    return None


def _gates_of(x: Tokens, weight: jax.Array | None) -> tuple[str, ...]:
    there = {
        "log_a": x.log_a, "log_eta": x.log_eta, "new": x.new, "document": x.new, "weight": weight
    }  # fmt: skip
    return tuple(n for n in GATES if there.get(n, 0) is not None)


def _run(step, x: Tokens, weight, state: list, constants: list, interpret):
    reason = refusal(x, state, constants)
    if reason:
        raise NotImplementedError(f"tpu: {reason}")
    n, B, N, C = x.q.shape[:4]
    flat = lambda a: jnp.moveaxis(a, 0, 2).reshape(B * N, n * C, a.shape[-1])  # noqa: E731
    document = None if x.new is None else jnp.cumsum(x.new, -1)
    gates = dict(zip(GATES, (x.theta, x.log_a, x.log_eta, x.stored, document, x.new, weight)))
    nothing = jnp.zeros((n, B, N, 1, C), jnp.float32)
    wide = [nothing if g is None else nothing + g.astype(jnp.float32) for g in gates.values()]
    rows = jnp.concatenate([*wide, nothing], -2)
    rows = jnp.moveaxis(rows, 0, 2).reshape(B * N, n, len(GATES) + 1, C)
    precision = "highest" if x.q.dtype == jnp.float32 else "default"
    y, after = _scan(  # pyright: ignore[reportGeneralTypeIssues]
        _Config(step, C, N, precision, interpret),
        tuple(flat(a) for a in (x.q, x.k, x.v)),
        rows,
        [a.astype(jnp.float32).reshape(B * N, *a.shape[2:]) for a in state],
        [a.astype(jnp.float32) for a in constants],
    )
    y = jnp.moveaxis(y.reshape(B, N, n, C, -1), 2, 0)
    return y, [a.reshape(B, N, *a.shape[1:]) for a in after]


def _specs(cfg: _Config, x, rows, state, constants, chunk_of):
    """Block specs of tokens, rows, state (one per head) and constants (one per head of any row)."""
    C = cfg.chunk
    whole = lambda a, f: pl.BlockSpec((1, *a.shape[1:]), f)  # noqa: E731
    return (
        tuple(pl.BlockSpec((1, C, a.shape[-1]), lambda p, c: (p, chunk_of(c), 0)) for a in x),
        pl.BlockSpec((1, 1, *rows.shape[2:]), lambda p, c: (p, chunk_of(c), 0, 0)),
        [whole(a, lambda p, c: (p, 0, 0)) for a in state],
        [whole(a, lambda p, c: (jax.lax.rem(p, cfg.heads), 0, 0)) for a in constants],
    )


def _forward(cfg: _Config, x, rows, state, constants, keep: bool):
    """(y, state after, states before every chunk if `keep`)."""
    P, n = rows.shape[:2]
    specs = _specs(cfg, x, rows, state, constants, lambda c: c)
    shape = jax.ShapeDtypeStruct
    starts = [shape((P, n, *a.shape[1:]), a.dtype) for a in state] if keep else []
    out = (shape(x[2].shape, x[2].dtype), [shape(a.shape, a.dtype) for a in state], starts)
    before = [pl.BlockSpec((1, 1, *a.shape[2:]), lambda p, c: (p, c, 0, 0)) for a in starts]

    def kernel(*refs):
        x, rows, state, constants, y, after, starts, *scratch = refs
        c = pl.program_id(1)

        @pl.when(c == 0)
        def _():
            for s, a in zip(scratch, state):
                s[...] = a[0]

        here = [s[...] for s in scratch]
        for ref, a in zip(starts, here):
            ref[0, 0] = a
        with jax.default_matmul_precision(cfg.precision):
            out, new = cfg.step(tuple(a[0] for a in x), rows[0, 0], here, [a[0] for a in constants])
        y[0] = out.astype(y.dtype)
        for s, a in zip(scratch, new):
            s[...] = a

        @pl.when(c == n - 1)
        def _():
            for ref, a in zip(after, new):
                ref[0] = a

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=(P, n),
        in_specs=specs,
        out_specs=(specs[0][2], specs[2], before),
        scratch_shapes=[pltpu.VMEM(a.shape[1:], jnp.float32) for a in state],
    )
    return tpu_call(
        kernel,
        grid_spec=grid, out_shape=out, semantics=("parallel", "arbitrary"),
        interpret=cfg.interpret, name="memory_chunk",
        cost_estimate=_cost(cfg, x, rows, state, constants, out, times=1),
    )(x, rows, state, constants)  # fmt: skip


def _backward_call(cfg: _Config, x, rows, starts, constants, dy, dafter):
    P, n = rows.shape[:2]
    last = n - 1
    specs = _specs(cfg, x, rows, dafter, constants, lambda c: last - c)
    before = [pl.BlockSpec((1, 1, *a.shape[2:]), lambda p, c: (p, last - c, 0, 0)) for a in starts]
    shape = jax.ShapeDtypeStruct
    of_head = [shape((P, *a.shape[1:]), jnp.float32) for a in constants]
    out = (
        tuple(shape(a.shape, a.dtype) for a in x), shape(rows.shape, rows.dtype),
        [shape(a.shape, a.dtype) for a in dafter], of_head,
    )  # fmt: skip
    own = [pl.BlockSpec((1, *a.shape[1:]), lambda p, c: (p, 0, 0)) for a in of_head]

    def kernel(*refs):
        x, rows, starts, constants, dy, dafter, dx, drows, dstate, dconstants, *scratch = refs
        c = pl.program_id(1)

        @pl.when(c == 0)
        def _():
            for s, a in zip(scratch, dafter):
                s[...] = a[0]
            for ref in dconstants:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        with jax.default_matmul_precision(cfg.precision):
            args = tuple(a[0] for a in x), rows[0, 0], [a[0, 0] for a in starts]
            _, pull = jax.vjp(cfg.step, *args, [a[0] for a in constants])
            gx, grows, gstate, gconstants = pull(
                (dy[0].astype(jnp.float32), [s[...] for s in scratch])
            )
        for ref, g in zip(dx, gx):
            ref[0] = g.astype(ref.dtype)
        drows[0, 0] = grows
        for s, g in zip(scratch, gstate):
            s[...] = g
        for ref, g in zip(dconstants, gconstants):
            ref[0] += g

        @pl.when(c == last)
        def _():
            for ref, g in zip(dstate, gstate):
                ref[0] = g

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=(P, n),
        in_specs=(specs[0], specs[1], before, specs[3], specs[0][2], specs[2]),
        out_specs=(specs[0], specs[1], specs[2], own),
        scratch_shapes=[pltpu.VMEM(a.shape[1:], jnp.float32) for a in dafter],
    )
    return tpu_call(
        kernel,
        grid_spec=grid, out_shape=out, semantics=("parallel", "arbitrary"),
        interpret=cfg.interpret, name="memory_chunk_backward",
        cost_estimate=_cost(cfg, x, rows, starts, constants, out, times=3),
    )(x, rows, starts, constants, dy, dafter)  # fmt: skip


def _cost(cfg: _Config, x, rows, state, constants, out, times: int) -> pl.CostEstimate:
    """Of products, counted as the chunk's own lines make them; `times` 3: with the pulling back."""
    P, n, C = rows.shape[0], rows.shape[1], cfg.chunk
    cut = lambda a: jnp.zeros(a.shape[-2:], jnp.float32)  # noqa: E731
    shapes = jax.eval_shape(
        lambda: (tuple(jnp.zeros((C, a.shape[-1]), a.dtype) for a in x), cut(rows),
                 [cut(a) for a in state], [cut(a) for a in constants])
    )  # fmt: skip
    flops = times * P * n * _products(jax.make_jaxpr(cfg.step)(*shapes).jaxpr)
    arrays = jax.tree.leaves((x, rows, state, constants, out))
    moved = sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=times * P * n * 2 * C * C,
                           bytes_accessed=moved)  # fmt: skip


def _products(jaxpr: Any) -> int:
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (left, _), _ = e.params["dimension_numbers"]
            width = math.prod(e.invars[0].aval.shape[i] for i in left)
            total += 2 * width * math.prod(e.outvars[0].aval.shape)
        for value in e.params.values():
            inner = getattr(value, "jaxpr", None)
            total += 0 if inner is None else _products(inner)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(cfg: _Config, x, rows, state, constants):
    return _forward(cfg, x, rows, state, constants, False)[:2]


def _scan_fwd(cfg: _Config, x, rows, state, constants):
    y, after, starts = _forward(cfg, x, rows, state, constants, True)
    return (y, after), (x, rows, starts, constants)


def _scan_bwd(cfg: _Config, saved: Any, grads: Any):
    x, rows, starts, constants = saved
    dx, drows, dstate, dconstants = _backward_call(cfg, x, rows, starts, constants, *grads)
    shared = [g.reshape(-1, cfg.heads, *g.shape[1:]).sum(0) for g in dconstants]
    return dx, drows, dstate, shared


_scan.defvjp(_scan_fwd, _scan_bwd)
