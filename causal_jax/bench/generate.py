"""`bench generate`: greedy decoding with a cache: tokens per second, step time by position.

The model has random weights: speed does not depend on what is written. "late / early" is the mean
step time of the last quarter of the positions over that of the first: how far a step's time
depends on its position.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from causal_jax.bench import recipes
from causal_jax.bench.options import positive, words
from causal_jax.bench.report import Record, Writer, plot_lines, table
from causal_jax.errors import InputError
from causal_jax.generate import generate
from causal_jax.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group; `--config F[:arg] --config.a.b V` is read before argparse."""
    parser.add_argument("--prompt_length", type=int, default=16, help="tokens")
    parser.add_argument("--batch", default="1", metavar="LIST", help="rows decoded together")
    parser.add_argument(
        "--max_tokens", type=int, default=0, help="tokens to make (0: fill the model's context)"
    )
    parser.epilog = (
        f"--config F[:arg] (default {recipes.DEFAULT}) and --config.a.b V choose the model"
    )


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time whole continuations, chunk by chunk, and print the table."""
    recipe = recipes.load(args)
    spec = recipe.model
    length = getattr(spec, "context", 0)
    if not length:
        raise InputError(f"--config {args.config}: {type(spec).__name__} does not decode")
    if args.baseline:
        raise InputError("--baseline: this group has no peers")
    if args.rss:
        raise InputError("--rss: not measured in this group")
    room = length - args.prompt_length
    tokens = args.max_tokens or room
    if args.prompt_length < 1 or not 0 < tokens <= room:
        raise InputError(
            f"--prompt_length {args.prompt_length} --max_tokens {tokens}: "
            f"both at least 1 and together at most the model's context of {length}"
        )
    batches = [positive(b, "batch") for b in words(args.batch, "batch")]
    model: Any = spec.build(jax.random.key(recipe.seed))
    models = {"generate": model}
    if getattr(spec, "scan", False):
        models["layers apart"] = model.unstacked()
    common = {
        "group": "generate",
        "config": args.config or recipes.DEFAULT,
        "overrides": list(args.overrides),
        "params": spec.param_count(),
        "prompt_length": args.prompt_length,
        "tokens": tokens,
        "context": length,
        "dtype": getattr(spec, "dtype", None),
    }
    rng = np.random.default_rng(args.seed)
    for batch in batches:
        prompts = rng.integers(0, spec.vocab, (batch, args.prompt_length), np.int32)
        records = time_models(models, prompts, tokens, args.repeats)
        records = [common | {"batch": batch} | r for r in records]
        writer.add(records)
        print(
            f"\ngreedy decoding of {' '.join([common['config'], *common['overrides']])}: "
            f"{common['params'] / 1e6:.2f} M parameters, batch {batch}, "
            f"prompt {args.prompt_length}, {tokens} new tokens, {common['dtype']}"
        )
        print(show(records), flush=True)
    if writer.folder is not None:
        path = writer.folder / "generate_step_vs_position.png"
        panels: dict[str, dict[str, list]] = {}
        for r in (r for r in writer.records if r["group"] == "generate"):
            points = [(float(p), 1e3 * s, "") for p, s in zip(r["positions"], r["step_s"])]
            panels.setdefault(f"batch {r['batch']}", {})[r["name"]] = points
        title = f"decoding step by position, {writer.env['device']}"
        if plot_lines(
            path, panels, xlabel="position", log=False, title=title, ylabel="milliseconds per step"
        ):
            print(f"plot: {path}")


def time_models(
    models: dict[str, Any], prompts: np.ndarray, tokens: int, repeats: int
) -> list[Record]:
    """One record per model; the models take turns, one whole continuation each."""
    first, clocks = {}, {name: [] for name in models}
    for name, model in models.items():
        first[name] = continuation(model, prompts, tokens)[0][-1]
    for _ in range(repeats):
        for name, model in models.items():
            clocks[name].append(continuation(model, prompts, tokens))
    return [
        record(name, clocks[name], len(prompts), prompts.shape[1], first[name]) for name in models
    ]


def continuation(
    model: Any, prompts: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(seconds until each chunk arrived, tokens per row by then, seconds in all)."""
    clock, made = [], []
    start = time.perf_counter()

    def arrived(ids: np.ndarray) -> None:
        clock.append(time.perf_counter() - start)
        made.append(ids.shape[1])

    generate(
        model,
        list(prompts),
        max_tokens=tokens,
        sampling=Sampling(temperature=0.0),
        on_tokens=arrived,
    )
    return np.array(clock), np.cumsum(made), time.perf_counter() - start


def record(name: str, runs: list[tuple], batch: int, prompt: int, first: float) -> Record:
    """Medians over the repeats. The first chunk, which waits for the prefill, is no step time."""
    made = runs[0][1]
    clocks = np.stack([r[0] for r in runs])
    seconds = [r[2] for r in runs]
    median = statistics.median(seconds)
    steps = np.median(np.diff(clocks, axis=1), axis=0) / np.diff(made)
    quarter = max(1, len(steps) // 4)
    out = {
        "name": name,
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "spread": (max(seconds) - min(seconds)) / median,
        "samples": len(seconds),
        "compile_s": first - float(np.median(clocks[:, -1])),
        "tokens_per_s": batch * int(made[-1]) / median,
        "positions": [int(prompt + m) for m in made[1:]],
        "step_s": [float(s) for s in steps],
    }
    if len(steps) >= 2:
        early, late = float(steps[:quarter].mean()), float(steps[-quarter:].mean())
        out |= {"early_step_s": early, "late_step_s": late, "late_over_early": late / early}
    return out


def show(records: list[Record]) -> str:
    """The records as text."""
    columns = ["", "tokens/s", "ms per step", "spread", "compile s", "early ms", "late ms"]
    rows = []
    for r in records:
        known = "late_over_early" in r
        row = [
            r["name"],
            f"{r['tokens_per_s']:,.0f}",
            f"{1e3 * r['batch'] / r['tokens_per_s']:.3f}",
            f"{100 * r['spread']:.0f} %",
            f"{r['compile_s']:.2f}",
            f"{1e3 * r['early_step_s']:.3f}" if known else "-",
            f"{1e3 * r['late_step_s']:.3f}" if known else "-",
            f"{r['late_over_early']:.3f}" if known else "-",
        ]
        rows.append(row)
    return table([*columns, "late / early"], rows)
