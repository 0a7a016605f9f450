"""`bench taps`: what looking inside costs, and what one program for a whole map saves.

    plain            the forward pass, no tap
    taps off         the same through `run` without edits; also: is it the same program?
    read resid_post  of all layers
    read pattern     of all layers, all heads (T x T numbers each: the dense path)
    knock out        one head, one query, one key of one layer, given as an argument
    steer            one layer, one position

"over plain" compares least times, "CPU" (on a CPU) medians of the process's own processor time,
which a busy machine disturbs far less. Then the map of patches over layers and
positions: `sweep`, beside a Python loop over `run` and one over a compiled `run` that takes the
edit as an argument; compiling included. Loops are timed on `--points` of the map and scaled up.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.bench import recipes
from causal_jax.bench.report import Record, Writer, milliseconds, table
from causal_jax.bench.timing import Candidate, jax_candidate, measure
from causal_jax.errors import InputError
from causal_jax.interp.edges import knock_out
from causal_jax.interp.edits import patch, steer
from causal_jax.interp.sweeps import sweep
from causal_jax.taps import run as run_tapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument("--model", metavar="SOURCE", help="pretrained weights, as of generate")
    parser.add_argument("--run", metavar="DIR", help="a run folder")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a pass; default 256")
    parser.add_argument("--batch", type=int, default=1, help="rows of a pass; default 1")
    parser.add_argument(
        "--positions", type=int, default=8, help="tokens of the map's prompt; 0: no map"
    )
    parser.add_argument("--points", type=int, default=12, help="of the map, in each loop")
    parser.add_argument("--chunk", type=int, default=32, help="runs side by side in the sweep")
    parser.epilog = (
        f"without --model and --run: --config F[:arg] (default {recipes.DEFAULT}), random weights"
    )


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time the passes, then the map."""
    if args.baseline or args.rss:
        raise InputError(
            "--baseline, --rss: the baseline is the plain pass; memory is in the table"
        )
    name, model = _model(args)
    for option, low in (("seq", 2), ("batch", 1), ("positions", 0), ("points", 1), ("chunk", 1)):
        if getattr(args, option) < low:
            raise InputError(f"--{option} {getattr(args, option)}: expected at least {low}")
    rng = np.random.default_rng(args.seed)
    common = {"group": "taps", "model": name, "layers": model.spec.layers}

    tokens = jnp.asarray(rng.integers(0, model.spec.vocab, (args.batch, args.seq)), jnp.int32)
    records = passes(model, tokens, args.repeats)
    records = [common | {"batch": args.batch, "seq": args.seq} | r for r in records]
    writer.add(records)
    print(f"\n{name}: {model.spec.layers} layers, batch {args.batch}, {args.seq} tokens")
    print(show(records), flush=True)
    if not args.positions:
        return
    prompt = jnp.asarray(rng.integers(0, model.spec.vocab, (1, args.positions)), jnp.int32)
    records = [common | r for r in maps(model, prompt, args.points, args.chunk)]
    writer.add(records)
    print(f"\nmap of {model.spec.layers} layers x {args.positions} positions, compiling included")
    rows = [
        [r["name"], f"{r['seconds']:.1f}", f"{r['compile_s']:.1f}", f"{r['over_sweep']:.1f}x"]
        for r in records
    ]
    print(table(["", "seconds", "of it compiling", "over sweep"], rows), flush=True)


def passes(model: Any, tokens: jax.Array, repeats: int) -> list[Record]:
    """One record per way to run one forward pass; all take turns."""
    graph, params = nnx.split(model)
    middle, last = model.spec.layers // 2, tokens.shape[1] - 1

    def tapped(params: Any, tokens: jax.Array, edits: Any, capture: tuple) -> Any:
        return run_tapped(nnx.merge(graph, params), tokens, edits=edits, capture=capture)

    def plain(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    def off(params: Any, tokens: jax.Array) -> jax.Array:
        return tapped(params, tokens, (), ())[0]

    cut = knock_out(layer=middle, head=0, query=last, key=0)
    pushed = steer(jnp.ones(model.spec.width), layer=middle, position=last)

    def read(site: str) -> Callable:
        return lambda params, tokens: tapped(params, tokens, (), (site,))

    def edited(params: Any, tokens: jax.Array, edits: Any) -> jax.Array:
        return tapped(params, tokens, edits, ())[0]

    candidates = [
        jax_candidate("plain", plain, params, tokens),
        jax_candidate("taps off", off, params, tokens),
        jax_candidate("read resid_post", read("resid_post"), params, tokens),
        jax_candidate("read pattern", read("attn.pattern"), params, tokens),
        jax_candidate("knock out", edited, params, tokens, cut),
        jax_candidate("steer", edited, params, tokens, pushed),
    ]
    records = [t.record() for t in measure(candidates, repeats=repeats)]
    for r in records:
        r["over_plain"] = r["min_s"] / records[0]["min_s"] - 1.0
    if jax.default_backend() == "cpu":
        spent = _processor_time(candidates, repeats)
        for r, seconds in zip(records, spent):
            r |= {"cpu_s": seconds, "cpu_over_plain": seconds / spent[0] - 1.0}
    same = _program(plain, params, tokens) == _program(off, params, tokens)
    records[1]["same_program"] = same
    return records


def _processor_time(candidates: Sequence[Candidate], repeats: int) -> list[float]:
    """Median processor seconds of one call, all candidates in turns."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats):
        for c, out in zip(candidates, seconds):
            start = time.process_time()
            c.wait(c.call())
            out.append(time.process_time() - start)
    return [statistics.median(s) for s in seconds]


def _program(f: Callable, *args: Any) -> str:
    """The lowered program, its name aside."""
    return jax.jit(f).lower(*args).as_text().replace(f"jit_{f.__name__}", "jit_f")


def maps(model: Any, prompt: jax.Array, points: int, chunk: int) -> list[Record]:
    """Seconds for a whole map of patches: the sweep, a loop of compiled runs, a loop of runs."""
    graph, params = nnx.split(model)
    L, T = model.spec.layers, prompt.shape[1]
    other = (prompt + 1) % model.spec.vocab
    clean = jax.jit(
        lambda p, x: run_tapped(nnx.merge(graph, p), x, capture=["resid_post"])[1]["resid_post"]
    )(params, other)
    jax.block_until_ready(clean)
    number = np.linspace(0, L * T - 1, min(points, L * T)).astype(int)
    grid = [(int(i // T), int(i % T)) for i in number]

    def swept() -> Any:
        edits_of = functools.partial(_patch_at, clean)
        return sweep(
            _top, functools.partial(model, prompt), edits_of, range(L), range(T), chunk=chunk
        )

    @jax.jit
    def compiled(params: Any, tokens: jax.Array, edits: Any) -> jax.Array:
        return _top(run_tapped(nnx.merge(graph, params), tokens, edits=edits)[0])

    def by_argument(layer: int, position: int) -> Any:
        return compiled(params, prompt, patch(clean, layer=layer, position=position))

    def by_hand(layer: int, position: int) -> Any:
        return _top(
            run_tapped(model, prompt, edits=patch(clean, layer=layer, position=position))[0]
        )

    first, again = _seconds(swept), _seconds(swept)
    records: list[Record] = [
        {"name": "sweep", "seconds": first, "compile_s": first - again, "measured_points": L * T}
    ]
    for name, one in (("loop, compiled run", by_argument), ("loop of runs", by_hand)):
        first = _seconds(lambda one=one: one(*grid[0]))
        each = [_seconds(lambda one=one, at=at: one(*at)) for at in grid]
        mean = float(np.mean(each))
        records.append(
            {
                "name": name,
                "seconds": first + mean * (L * T - 1),
                "compile_s": first - mean,
                "measured_points": len(grid),
            }
        )
    for r in records:
        r["over_sweep"] = r["seconds"] / records[0]["seconds"]
    return records


def _seconds(f: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def _patch_at(clean: jax.Array, layer: Any, position: Any) -> Any:
    return patch(clean, layer=layer, position=position)


def _top(logits: jax.Array) -> jax.Array:
    return logits[:, -1].max()


def show(records: list[Record]) -> str:
    """The records of the passes as text."""
    rows = [
        [
            r["name"],
            milliseconds(r["median_s"]),
            milliseconds(r["min_s"]),
            f"{100 * r['spread']:.0f} %",
            f"{100 * r['over_plain']:+.1f} %",
            f"{100 * r['cpu_over_plain']:+.1f} %" if "cpu_over_plain" in r else "-",
            f"{(r['temp_bytes'] or 0) / 2**20:.1f}",
            {True: "yes", False: "no"}.get(r.get("same_program"), ""),  # pyright: ignore
        ]
        for r in records
    ]
    columns = ["", "median ms", "min ms", "spread", "over plain", "CPU", "temp MiB", "same program"]
    return table(columns, rows)


def _model(args: argparse.Namespace) -> tuple[str, Any]:
    if args.model and args.run:
        raise InputError("--model and --run: give one of them")
    if (args.model or args.run) and (args.config or args.overrides):
        raise InputError("--config: without --model and --run only")
    if args.model:
        from causal_jax.models.pretrained import load

        return args.model, load(args.model)[0]
    if args.run:
        from causal_jax.training.run import load_run

        return args.run, load_run(args.run).model
    recipe = recipes.load(args)
    return args.config or recipes.DEFAULT, recipe.model.build(jax.random.key(recipe.seed))
