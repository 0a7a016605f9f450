"""`bench explain`: which implementation of dense attention serves a case, and why."""

import argparse

import jax
import jax.numpy as jnp

from causal_jax.attention import choose
from causal_jax.attention._implementations import refusals
from causal_jax.bench import mask_names
from causal_jax.bench.attention import live_tiles
from causal_jax.bench.options import positive, words
from causal_jax.bench.report import Writer
from causal_jax.errors import InputError
from causal_jax.hardware import target

PLATFORMS = ("cpu", "gpu", "tpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--masks", default="causal", metavar="LIST", help="see below")
    parser.add_argument("--seq", default="2048", metavar="LIST", help="sequence lengths")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: as heads)")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--soft_cap", type=float)
    parser.add_argument("--platform", choices=PLATFORMS, help="default: where jax runs")
    parser.epilog = f"masks:\n{mask_names.describe()}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Print one table per mask and length; records as the other groups."""
    N, H = args.heads, args.head_dim
    K = N if args.kv_heads is None else args.kv_heads
    if min(N, K, H) < 1 or N % K:
        raise InputError(
            f"--heads {N} --kv_heads {K} --head_dim {H}: at least 1, heads a multiple of kv_heads"
        )
    platform = args.platform or target()
    for T in (positive(s, "seq") for s in words(args.seq, "seq")):
        q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.dtype(args.dtype)) for n in (N, K))
        for name in words(args.masks, "masks"):
            mask = mask_names.parse(name, T).mask
            case = {"mask": mask, "soft_cap": args.soft_cap, "platform": platform}
            choice, refused = choose(q, k, k, **case), refusals(q, k, k, **case)
            live, every = live_tiles(mask, 1, T, N)
            record = {
                "group": "explain",
                "mask": name,
                "seq": T,
                "platform": platform,
                "live_fraction": live / every,
                "implementation": choice.name,
                "reason": choice.reason,
                "refused": refused,
            }
            writer.add([record])
            print(f"\n{name}, n = {T}, {platform}: {100 * live / every:.1f} % of tiles live")
            for n, why in refused.items():
                told = f"no: {why}" if why else "could be named"
                told = f"chosen: {choice.reason}" if n == choice.name else told
                print(f"  {n:<10} {told}", flush=True)
