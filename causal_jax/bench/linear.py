"""`bench linear`: gated linear attention beside exact attention and a plain torch recurrence.

    lawcat     a LAWCAT layer's mixing: convolutions, features, gates, the chunked recurrence
    chunked    the recurrence alone
    dense      our exact causal attention on the same heads; with projections, as lawcat and sdpa
    sdpa       torch's scaled_dot_product_attention
    naive      the recurrence token by token in torch, as flash-linear-attention's `naive` has it

Prefill times by length, then time and state bytes of one decode step after different pasts.
"time ratio" is t(4 n) / t(n) of the chunked form: 4 where time is linear.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax import masks
from causal_jax.attention import dense_attention
from causal_jax.attention.gated_linear import hedgehog
from causal_jax.bench.report import Writer, milliseconds, table
from causal_jax.bench.timing import Candidate, jax_candidate, measure
from causal_jax.errors import InputError
from causal_jax.nn.attention import Rotations
from causal_jax.nn.lawcat import Lawcat
from causal_jax.taps import OFF
from pallas_kernels.gated_linear import gated_linear_chunked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--seq", default="1024,4096", help="lengths; default 1024,4096")
    parser.add_argument("--heads", type=int, default=8, help="query and key heads; default 8")
    parser.add_argument("--head-dim", type=int, default=64, help="width of a head; default 64")
    parser.add_argument("--naive", type=int, default=1024, help="longest length of the torch loop")


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time prefill by length, then one decode step by past."""
    if args.baseline or args.rss:
        raise InputError("--baseline, --rss: this group has fixed candidates and no memory column")
    try:
        lengths = [int(n) for n in args.seq.split(",")]
    except ValueError as e:
        raise InputError(f"--seq {args.seq}: expected numbers with commas between") from e
    if min(lengths) < 8 or args.heads < 1 or args.head_dim < 2 or args.head_dim % 2:
        raise InputError("--seq at least 8, --heads at least 1, --head-dim even")
    records, rows = [], []
    for n in lengths:
        candidates, error = prefill(n, args.heads, args.head_dim, n <= args.naive, args.seed)
        found = {t.name: t for t in measure(candidates, repeats=args.repeats)}
        for name, t in found.items():
            records.append({"group": "linear", "length": n, "naive_error": error} | t.record())
            ratio = t.median / found["lawcat"].median
            again = [r for r in records if r["name"] == name and r["length"] * 4 == n]
            grown = f"{t.median / again[0]['median_s']:.2f}" if again else ""
            rows.append([str(n), name, milliseconds(t.median), f"{ratio:.2f}", grown])
        if error is not None:
            print(f"{n} tokens: largest difference to the torch recurrence {error:.1e}")
    writer.add(records)
    print(table(["tokens", "", "ms", "over lawcat", "t(4n)/t(n)"], rows), flush=True)
    steps = []
    for past in lengths:
        candidate, size = decode(past, args.heads, args.head_dim)
        (t,) = measure([candidate], repeats=args.repeats)
        steps.append([str(past), milliseconds(t.median), str(size)])
        writer.add([{"group": "linear", "past": past, "state_bytes": size} | t.record()])
    print(table(["past", "decode step ms", "state bytes"], steps), flush=True)


def prefill(n: int, N: int, H: int, naive: bool, seed: int) -> tuple[list[Candidate], float | None]:
    """Candidates for n tokens, and how far the torch recurrence is from the chunks."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, N, H)), jnp.float32) for _ in range(3))
    x = jnp.asarray(rng.standard_normal((1, n, N * H)), jnp.float32)
    g = jnp.asarray(-rng.uniform(0, 0.1, (1, n, N, H)), jnp.float32)
    phi_q, phi_k = (
        hedgehog(y, jnp.broadcast_to(jnp.eye(H, H // 2), (N, H, H // 2))) for y in (q, k)
    )
    graph, params, rotations = _layer(N, H)

    def lawcat(params, x):
        layer = nnx.merge(graph, params)
        return layer._mix(x, None, 0, masks.Causal(), rotations, OFF)[0]

    def dense(params, x):  # projections too, as the LAWCAT layer has them
        a, b, c = nnx.merge(graph, params)._heads_of(x)
        return dense_attention(a, b, c, mask=masks.Causal())

    def chunked(q, k, v, g):
        return gated_linear_chunked(q, k, v, g, jnp.zeros((1, N, H, H)))[0]

    attention = nnx.merge(graph, params)
    kernels = [getattr(attention, name).kernel[...] for name in "qkv"]
    out = [
        jax_candidate("lawcat", lawcat, params, x),
        jax_candidate("dense", dense, params, x),
        jax_candidate("chunked", chunked, phi_q, phi_k, v, g),
        _torch(
            "sdpa", functools.partial(_sdpa, H), x[:, :, None], *(w[None, :, None] for w in kernels)
        ),
    ]
    if not naive:
        return out, None
    peer = _torch("naive", _recurrent, phi_q, phi_k, v, g)
    theirs, ours = peer.call(), out[2].call()
    return [*out, peer], float(np.abs(np.asarray(ours) - theirs.transpose(1, 2).numpy()).max())


def decode(past: int, N: int, H: int) -> tuple[Candidate, int]:
    """One step after `past` tokens, and the bytes of what is remembered."""
    graph, params, rotations = _layer(N, H)
    layer = nnx.merge(graph, params)
    cache = layer.init_cache(1, 1, past, jnp.dtype("float32"))
    x = jnp.ones((1, 1, N * H))

    def step(params, x, cache):
        return nnx.merge(graph, params).extend(
            x, cache, 0, length=jnp.int32(past), mask=masks.Causal(), rotations=rotations
        )

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    return jax_candidate("decode", step, params, x, cache), size


def _layer(N: int, H: int) -> tuple[Any, Any, Rotations]:
    layer = Lawcat().build(
        width=N * H, heads=N, kv_heads=N, head_dim=H, rotary=None, rngs=nnx.Rngs(0)
    )
    return *nnx.split(layer), Rotations({})


def _torch(name: str, f: Callable, *arrays: jax.Array) -> Candidate:
    import torch

    heads_first = [torch.from_numpy(np.array(a.transpose(0, 2, 1, 3))) for a in arrays]

    def call():
        with torch.no_grad():
            return f(*heads_first)

    return Candidate(name, call, lambda out: out)


def _sdpa(width: int, x: Any, *kernels: Any) -> Any:
    """Projections and attention, [B, 1, T, D] and [1, 1, D, D]; heads of `width`."""
    import torch

    q, k, v = ((x[:, 0] @ w[0, 0]).unflatten(-1, (-1, width)).transpose(1, 2) for w in kernels)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _recurrent(q: Any, k: Any, v: Any, g: Any) -> Any:
    """S = exp(g_t) S + k_t v_t^T, o_t = q_t S: one token after another, [B, N, T, ...]."""
    import torch

    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = torch.empty_like(v)
    for t in range(q.shape[2]):
        state = state * g[:, :, t, :, None].exp() + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (q[:, :, t, :, None] * state).sum(-2)
    return out
