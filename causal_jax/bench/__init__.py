"""Measure speed beside other implementations, in one run, in turns.

    python -m causal_jax.bench attention --masks causal,window:256 --seq 2048,8192 --bwd
    python -m causal_jax.bench train --config configs/quickstart.py
    python -m causal_jax.bench generate --config configs/quickstart.py
    python -m causal_jax.bench taps --model smollm2
    python -m causal_jax.bench pretrained --model smollm2 --rss

Prints one table per case; `--out DIR` also appends `DIR/bench.jsonl` (one line per figure, with
device, versions and commit) and draws plots. "vs X" is how many times faster than X. Exit codes:
0 done, 2 wrong input, 1 anything else.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from causal_jax.bench.report import Writer
from causal_jax.config import take_words
from causal_jax.environment import environment
from causal_jax.errors import InputError

GROUPS = {
    "attention": "registered mechanisms x masks x lengths, beside jax.nn, torch, ...",
    "explain": "which implementation of dense attention serves a case, and why; times nothing",
    "hyper": "HyperAttention, causal: beside exact attention and a plain PyTorch HyperAttention",
    "compile": "our TPU kernels compiled ahead of time: does it, VMEM, temporaries; runs nothing",
    "memory": "memories that learn while reading, beside titans-pytorch and the token recurrence",
    "linear": "a LAWCAT layer beside exact attention and a torch recurrence; decoding",
    "train": "one optimisation step of a config's model, beside the same model in torch",
    "save": "what a checkpoint costs the training beside it",
    "processes": "training in one process beside several, over loopback",
    "generate": "decoding with a key/value cache: tokens per second, step time by position",
    "pretrained": "a pretrained decoder beside transformers: prefill, decoding, memory",
    "taps": "what reading and changing activations costs; a map of patches as one program",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one group; returns the exit code."""
    try:
        spec, overrides, rest = take_words(sys.argv[1:] if argv is None else argv)
        args = _parse(rest)
        args.config, args.overrides = spec, overrides
        if args.group in ("attention", "explain", "hyper", "compile") and (spec or overrides):
            raise InputError(
                f"--config: the group {args.group} has no model; give --seq, --heads, ..."
            )
        if args.repeats < 1:
            raise InputError(f"--repeats {args.repeats}: expected at least 1")
        env = environment()
        writer = Writer(args.out, env)
        print(", ".join(f"{k} {v}" for k, v in env.items()), flush=True)
        _module(args.group).run(args, writer)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = parser.add_subparsers(dest="group", required=True, metavar="GROUP")
    for name, about in GROUPS.items():
        sub = groups.add_parser(name, help=about, description=about)
        if name in words:  # the other groups' modules need not even be importable
            _module(name).add_arguments(sub)
        sub.add_argument("--repeats", type=int, default=7, help="samples of each candidate")
        sub.add_argument("--seed", type=int, default=0, help="of the random inputs")
        sub.add_argument(
            "--baseline", metavar="LIST", help="whom to give ratios against (default: the peers)"
        )
        sub.add_argument(
            "--rss", action="store_true", help="also measure peak host memory of one call (Linux)"
        )
        sub.add_argument("--out", metavar="DIR", help="folder for bench.jsonl and plots")
    return parser.parse_args(words)


def _module(group: str):
    return importlib.import_module(f"{__name__}.{group}")
