"""`bench compile`: our TPU kernels through the real compiler for chips that are not here.

One row per kernel, chip, head width, length and direction: did it compile, how long did that take,
how much of the chip's vector memory (VMEM) each kernel claims, and the program's temporaries in
main memory. Nothing is run or timed, no TPU is needed, only the package libtpu.

What the compiled program tells: the VMEM set aside for each kernel (blocks in flight, scratch, and
whatever the compiler puts there itself); a kernel that needs more than the limit does not compile.
What it does not tell: how much of it are spilled registers.
"""

import argparse
import functools
import importlib.metadata
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.bench.options import pick, positive, words
from causal_jax.bench.report import Record, Writer, table
from causal_jax.errors import InputError
from causal_jax.masks import Causal
from pallas_kernels import _testing
from pallas_kernels._compat import VMEM_LIMIT
from pallas_kernels.block_sparse import Tiles, tpu
from pallas_kernels.lsh_attention import Problem
from pallas_kernels.lsh_attention import tpu as lsh_tpu

KERNELS = ("block_sparse", "lsh_attention")
DIRECTIONS = ("forward", "forward+backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--names", default="all", metavar="LIST", help=", ".join(KERNELS))
    parser.add_argument("--topologies", default="v5e:2x2,v6e:2x2", metavar="LIST")
    parser.add_argument("--head_dims", default="64,128,192,256", metavar="LIST")
    parser.add_argument("--seq", default="4096,32768,131072", metavar="LIST", help="lengths")
    parser.add_argument("--directions", default="all", metavar="LIST", help=", ".join(DIRECTIONS))
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: as heads)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--block", type=int, default=512, help="side of a tile (block_sparse)")
    parser.add_argument("--block_size", type=int, default=256, help="keys of a block (lsh)")
    parser.add_argument("--sample_size", type=int, default=256, help="sampled keys (lsh)")


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Compile everything and print one table; a program that fails has its reason in it."""
    reason = _testing.no_tpu_compiler()
    if reason:
        raise InputError(f"bench compile: {reason}")
    names = words(args.names, "names", lambda: list(KERNELS))
    pick(names, KERNELS, "kernel")
    chips = words(args.topologies, "topologies")
    pick(chips, _testing.TOPOLOGIES, "topology")
    widths = [positive(s, "head_dims") for s in words(args.head_dims, "head_dims")]
    lengths = [positive(s, "seq") for s in words(args.seq, "seq")]
    directions = words(args.directions, "directions", lambda: list(DIRECTIONS))
    pick(directions, DIRECTIONS, "direction")
    K = args.heads if args.kv_heads is None else args.kv_heads
    if min(args.heads, K) < 1 or args.heads % K:
        raise InputError(f"--heads {args.heads} --kv_heads {K}: heads must be a multiple")
    print(f"libtpu {importlib.metadata.version('libtpu')}, limit {VMEM_LIMIT / 2**20:.0f} MiB")
    for chip in chips:
        for name in names:
            cases = [(H, T, d) for H in widths for T in lengths for d in directions]
            records = [_compiled(args, K, name, chip, *case) for case in cases]
            writer.add(records)
            print(f"\n{name}, {chip}, {args.dtype}, {args.heads} heads ({K} of keys)")
            print(_table(records), flush=True)


def _compiled(args, K: int, name: str, chip: str, H: int, T: int, direction: str) -> Record:
    """One program."""
    record: Record = {
        "group": "compile", "name": name, "topology": chip, "head_dim": H, "seq": T,
        "direction": direction, "dtype": args.dtype, "heads": args.heads, "kv_heads": K,
        "libtpu": importlib.metadata.version("libtpu"),
    }  # fmt: skip
    make = {"block_sparse": _block_sparse, "lsh_attention": _lsh}[name]
    program, shapes = make(args, K, H, T, direction == "forward+backward")
    start = time.perf_counter()
    try:
        compiled = _testing.compile_for_tpu(program, *shapes, topology=chip)
    except Exception as e:  # whatever the compiler raises is what the table is about
        return record | {"error": str(e).strip().splitlines()[0][:200]}
    memory = compiled.memory_analysis()
    return record | {
        "compile_s": time.perf_counter() - start,
        "vmem": vmem_of_kernels(compiled.as_text()),
        "temp_bytes": int(memory.temp_size_in_bytes),
    }


def vmem_of_kernels(text: str) -> dict[str, int]:
    """{kernel: bytes of VMEM set aside for it} from a compiled program's text."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if "tpu_custom_call" not in line:
            continue
        name = re.search(r"(block_sparse_[a-z]+|lsh_attention_[a-z]+)", line)
        used = line.partition('"used_scoped_memory_configs":[')[2].partition("]")[0]
        sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used)
        label = name.group(1) if name else f"kernel {len(found)}"
        found[label] = max([found.get(label, 0), *map(int, sizes)])
    return found


def _with_gradients(attend, backward: bool):
    """The program of q, k, v and the rest, forward or with the gradients of q, k, v."""

    def loss(q, k, v, *rest):
        o, lse = attend(q, k, v, *rest)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

    return jax.value_and_grad(loss, (0, 1, 2)) if backward else attend


def _block_sparse(args, K: int, H: int, T: int, backward: bool):
    tiles = tpu.legal_tiles(Tiles(args.block, args.block), T, T)
    live = Causal().block_map(T, T, tiles.block_q, tiles.block_k)

    def attend(q, k, v):
        return tpu.block_sparse_attention(
            q, k, v, Causal(), live.tiles(), scale=H**-0.5, tiles=tiles, apart=(1, 1)
        )

    shapes = [jax.ShapeDtypeStruct((1, T, n, H), args.dtype) for n in (args.heads, K, K)]
    return _with_gradients(attend, backward), shapes


def _lsh(args, K: int, H: int, T: int, backward: bool):
    """The first level of the recursion: T/2 queries, strict, on T/2 keys, per kv head."""
    b, m, half, G = args.block_size, args.sample_size, T // 2, args.heads // K
    Q, M = min(128, b), -(-half // b)
    C = (G * half + M * (Q - 1)) // Q

    def attend(q, k, v, k_sample, v_sample, block, block_sample, bias, bias_sample):
        x = Problem(q, k, v, k_sample, v_sample, block, block_sample, bias, bias_sample)
        return lsh_tpu(x, H**-0.5)

    real = functools.partial(jax.ShapeDtypeStruct, dtype=args.dtype)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes: list[Any] = [real((K, C, Q, H)), real((K, M, b, H)), real((K, M, b, H))]
    shapes += [real((K, m, H)), real((K, m, H)), ints((K, C)), ints((K, m))]
    shapes += [wide((K, M, b)), wide((K, m))]
    return _with_gradients(attend, backward), shapes


def _table(records: list[Record]) -> str:
    rows = []
    for r in records:
        head = [str(r["head_dim"]), str(r["seq"]), r["direction"]]
        if "error" in r:
            rows.append([*head, "no", r["error"], ""])
            continue
        vmem = ", ".join(f"{n.split('_')[-1]} {x / 2**20:.2f}" for n, x in r["vmem"].items())
        rows.append([*head, f"{r['compile_s']:.1f} s", vmem, f"{r['temp_bytes'] / 2**20:.0f}"])
    return table(["D", "T", "direction", "compiled", "VMEM, MiB", "temporaries, MiB"], rows)
