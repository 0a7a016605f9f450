"""`bench memory`: memories beside titans-pytorch and beside their own token recurrence.

    parity    titans-pytorch's `NeuralMemory` and the same arithmetic here, forward, and forward
              with the gradients of all parameters and inputs; `--rss` adds peak host memory
    tokens    the exact linear memory in tiles beside its token scan, at the last of `--seq`, with
              the heads asked for and with one head of the same width; forward, and with gradients
    lengths   the tiles at all of `--seq`: is time proportional to the length?
    layer     a MAG layer beside a layer of exact causal attention of equal width, `--length` tokens
    decode    one token of a MAG layer, and its state, at positions up to `--last`

"of floor": time that 12 operations per weight of M and token (36 with gradients) take at the rate
of a plain matrix product measured in the same turns, over the time taken. titans-pytorch's rule
needs only 7, so that its forward pass can lie above 100 %.
"""

import argparse
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.bench import memory_layers, peers
from causal_jax.bench.options import positive, words
from causal_jax.bench.report import Record, Writer, add_ratios, case_table, proportionality
from causal_jax.bench.timing import Candidate, jax_candidate, matmul, matmul_flops, measure
from causal_jax.errors import InputError
from causal_jax.memory import Deep, Delta
from causal_jax.memory.parity import parity_memory, parity_params, parity_spec

PARTS = ("parity", "tokens", "lengths", "layer", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--parts", default="all", metavar="LIST", help=", ".join(PARTS))
    parser.add_argument("--dim", type=int, default=256, help="width of the parity case")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the parity case")
    parser.add_argument("--chunk", type=int, default=64, help="chunk and tile")
    parser.add_argument("--heads", default="4x64", metavar="NxH", help="of the linear memory")
    parser.add_argument("--seq", default="1024,2048,4096", metavar="LIST", help="its lengths")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the layers")
    parser.add_argument("--last", type=int, default=65536, help="last position of decoding")


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time the chosen parts."""
    if args.baseline or args.config or args.overrides:
        raise InputError("--baseline, --config: the group memory has its own baselines, no model")
    parts = words(args.parts, "parts", lambda: list(PARTS))
    if unknown := [p for p in parts if p not in PARTS]:
        raise InputError(f"--parts {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if "parity" in parts:
        for backward in (False, True):
            records = parity(args, backward)
            writer.add(records)
            print(f"\nparity, dim {args.dim}, {args.tokens} tokens, chunk {args.chunk}, "
                  f"{'forward and backward' if backward else 'forward'}")  # fmt: skip
            print(_table(records, ["titans-pytorch"]), flush=True)
    lengths = [positive(n, "seq") for n in words(args.seq, "seq")]
    N, _, H = args.heads.partition("x")
    heads = positive(N, "heads"), positive(H, "heads")
    if "tokens" in parts:
        for backward in (False, True):
            for N, H in dict.fromkeys([heads, (1, heads[0] * heads[1])]):
                records = tokens(args, lengths[-1], N, H, backward)
                writer.add(records)
                print(f"\nexact linear memory, {N}x{H}, {lengths[-1]} tokens, tile {args.chunk}, "
                      f"{'forward and backward' if backward else 'forward'}")  # fmt: skip
                print(_table(records, ["token scan"]), flush=True)
    if "lengths" in parts:
        records = by_length(args, lengths, *heads)
        writer.add(records)
        print(f"\nexact linear memory, {args.heads} heads, by length")
        print(_table(records, []), flush=True)
        if fit := proportionality([(r["tokens"], r["min_s"]) for r in records]):
            print(f"seconds = {fit['intercept']:.2e} + {fit['slope']:.2e} n, r2 {fit['r2']:.4f}")
    if "layer" in parts:
        records = memory_layers.layer(args, args.length, *heads)
        add_ratios(records, ["exact attention"])
        writer.add(records)
        print(f"\nlayers of width {heads[0] * heads[1]}, {args.length} tokens, forward")
        print(case_table(records, ["exact attention"]), flush=True)
    if "decode" in parts:
        positions = [p for p in (64, 1024, 16384, args.last) if p <= args.last]
        records = memory_layers.decode(args, list(dict.fromkeys(positions)), *heads)
        writer.add(records)
        print("\none token of a MAG layer; bytes of its state: "
              + ", ".join(f"{r['state_bytes']:,}" for r in records))  # fmt: skip
        print(case_table(records, []), flush=True)


def parity(args: argparse.Namespace, backward: bool) -> list[Record]:
    """titans-pytorch's module and ours on its parameters, in turns."""
    D, T, refused = args.dim, args.tokens, []
    x = np.random.default_rng(args.seed).standard_normal((1, T, D)).astype(np.float32)
    try:
        theirs, state = _torch_memory(args, x, backward)
        params, candidates = parity_params(state), [theirs]
    except NotImplementedError as e:
        refused = [{"name": "titans-pytorch", "note": str(e)}]
        params, candidates = _random_parameters(args), []
    spec = parity_spec(chunk=args.chunk)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return parity_memory(spec, params, x)[0]

    def both(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(forward(p, x))), argnums=(0, 1))(params, x)

    def collect(out: Any) -> list[np.ndarray]:
        return [np.asarray(out[1] if backward else out)]

    program = both if backward else forward
    candidates.append(jax_candidate("causal_jax", program, params, jnp.asarray(x), collect=collect))
    records = _timed(candidates, args, spec.cost(T, 1, D) * (3 if backward else 1), T)
    common = {"part": "parity", "dim": D, "chunk": args.chunk, "backward": backward}
    if len(candidates) == 2:
        ours, other = (c.collect(c.call())[0] for c in reversed(candidates))  # pyright: ignore
        records[1]["max_diff"] = float(np.abs(ours - other).max())
    records = [common | r for r in [*refused, *records]]
    add_ratios(records, ["titans-pytorch"])
    return records


def tokens(args: argparse.Namespace, T: int, N: int, H: int, backward: bool) -> list[Record]:
    """The linear memory in tiles and token after token."""
    spec = Delta(tile=args.chunk)
    inputs = _linear_inputs(spec, args.seed, T, N, H)

    def both(implementation: str) -> Any:
        forward = _linear(spec, implementation)

        def total(*inputs: Any) -> jax.Array:
            return jnp.sum(jnp.sin(forward(*inputs)[0]))

        return jax.grad(total, argnums=(2, 3, 4, 5)) if backward else forward

    candidates = [
        jax_candidate(name, both(implementation), *inputs, collect=_first)
        for name, implementation in (("token scan", "reference"), ("tiles", "chunked"))
    ]
    records = _timed(candidates, args, spec.cost(T, N, H) * (3 if backward else 1), T)
    scan, tiles = (c.collect(c.call())[0] for c in candidates)  # pyright: ignore
    records[1]["max_diff"] = float(np.abs(scan - tiles).max())
    records = [
        {"part": "tokens", "heads": N, "head_dim": H, "tile": args.chunk, "backward": backward} | r
        for r in records
    ]
    add_ratios(records, ["token scan"])
    return records


def by_length(args: argparse.Namespace, lengths: list[int], N: int, H: int) -> list[Record]:
    """The tiles at several lengths."""
    spec, records = Delta(tile=args.chunk), []
    for T in lengths:
        inputs = _linear_inputs(spec, args.seed, T, N, H)
        candidate = jax_candidate(f"{T} tokens", _linear(spec, "chunked"), *inputs)
        found = _timed([candidate], args, spec.cost(T, N, H), T)
        records += [{"part": "lengths", "heads": N, "head_dim": H, "tokens": T} | r for r in found]
    return records


def _timed(candidates: list[Candidate], args, flops: float, T: int) -> list[Record]:
    *timings, top = measure([*candidates, matmul("float32")], repeats=args.repeats, rss=args.rss)
    rate = matmul_flops() / min(top.seconds)
    records = []
    for timing in timings:
        r = timing.record() | {"flops": flops, "matmul_flops_per_s": rate}
        r["flops_per_s"] = flops / timing.median
        r["of_floor"] = flops / rate / min(timing.seconds)
        r["tokens_per_s"] = T / timing.median
        records.append(r)
    return records


def _table(records: list[Record], baselines: list[str]) -> str:
    floors = [f"{r['name']} {100 * r['of_floor']:.0f} %" for r in records if "of_floor" in r]
    return case_table(records, baselines) + f"\nof floor (least times): {', '.join(floors)}"


def _linear_inputs(spec: Delta, seed: int, T: int, N: int, H: int) -> tuple[Any, ...]:
    params = spec.init(jax.random.key(seed), width=N * H, heads=N)
    keys = jax.random.split(jax.random.key(seed + 1), 4)
    q, k, v = (jax.random.normal(key, (1, T, N, H)) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    logits = jax.random.normal(keys[3], (3, 1, T, N))
    return params["memory"], spec.init_state(params), q, k, v, logits


def _linear(spec: Delta, implementation: str) -> Any:
    from causal_jax.memory import Gates

    def forward(leaves, state, q, k, v, logits):
        theta, a, eta = logits
        gates = Gates(jax.nn.sigmoid(theta), -jax.nn.softplus(a - 5), jax.nn.log_sigmoid(eta))
        return spec.run(leaves, state, q, k, v, gates, implementation=implementation)

    return forward


def _first(out: Any) -> list[np.ndarray]:
    return [np.asarray(out[0])]


def _random_parameters(args: argparse.Namespace) -> dict[str, Any]:
    D, memory = args.dim, Deep(conv=0, output_gate=False, gate_chunk=args.chunk, anchor=None)
    params = memory.init(jax.random.key(args.seed), width=D, heads=1)
    return params | {"store_norm": jnp.ones(D), "read_norm": jnp.ones(D)}


def _torch_memory(args, x: np.ndarray, backward: bool) -> tuple[Candidate, dict[str, Any]]:
    torch = peers.need_torch()
    if importlib.util.find_spec("titans_pytorch") is None:
        raise NotImplementedError('not installed: pip install "causal_jax[bench]"')
    from titans_pytorch import NeuralMemory  # pyright: ignore[reportMissingImports]

    if peers.torch_device(torch).type != "cpu":
        raise NotImplementedError("measured beside titans-pytorch on a CPU only")
    torch.manual_seed(args.seed)
    memory = NeuralMemory(args.dim, chunk_size=args.chunk)
    given = torch.from_numpy(x)

    def forward() -> Any:
        with torch.no_grad():
            return memory(given)[0]

    def both() -> Any:
        leaf = given.clone().requires_grad_()
        memory.zero_grad()
        torch.sin(memory(leaf)[0]).sum().backward()
        return leaf.grad

    state = {n: w.detach().numpy() for n, w in memory.state_dict().items() if n != "zero"}
    call = both if backward else forward
    candidate = Candidate(
        "titans-pytorch", call, lambda out: out, collect=lambda out: [out.detach().numpy()]
    )
    return candidate, state
