"""`bench attention`: our mechanisms x masks x lengths, beside other people's exact attention."""

import argparse
import functools
import itertools
import sys

import jax
import numpy as np

from causal_jax import config
from causal_jax.attention import AttentionSpec, attention
from causal_jax.bench import mask_names, peers
from causal_jax.bench.options import pick, positive, words
from causal_jax.bench.report import (
    Record,
    Writer,
    add_ratios,
    case_table,
    plot_lines,
    proportionality,
)
from causal_jax.bench.timing import Candidate, jax_candidate, matmul, matmul_flops, measure
from causal_jax.errors import InputError
from causal_jax.masks import Mask

TILE = 128  # granularity at which live tiles, and so useful operations, are counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group."""
    parser.add_argument(
        "--names",
        default="all",
        metavar="LIST",
        help="mechanisms: all, or NAME[/IMPLEMENTATION][:FIELD=VALUE...],... "
        "(dense, dense/reference, dense:window=256:sinks=4)",
    )
    parser.add_argument("--masks", default="causal", metavar="LIST", help="see below")
    parser.add_argument(
        "--cases",
        action="store_true",
        help="every mechanism's own benchmark cases (shape and settings) instead of the next five",
    )
    parser.add_argument("--seq", metavar="LIST", help="sequence lengths (default 2048)")
    parser.add_argument("--heads", type=int, help="query heads (default 4)")
    parser.add_argument("--kv_heads", type=int, help="key/value heads (default: as heads)")
    parser.add_argument("--head_dim", type=int, help="default 64")
    parser.add_argument("--batch", type=int, help="default 1")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--bwd", action="store_true", help="also time forward + backward")
    parser.add_argument(
        "--peers",
        default="jax,torch",
        metavar="LIST",
        help=f"other implementations to time beside ours: {', '.join(peers.PEERS)}, or none",
    )
    parser.epilog = f"masks:\n{mask_names.describe()}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


Subject = tuple[str, AttentionSpec, str | None]  # label, mechanism, implementation named or None
Shape = tuple[int, int, int, int, int]  # B, T, N, K, H


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time every case and print its table as it is finished."""
    problems = own_cases(args) if args.cases else chosen_shapes(args)
    names = [] if args.peers == "none" else words(args.peers, "peers")
    pick(names, peers.PEERS, "peer")
    baselines = words(args.baseline, "baseline") if args.baseline else names
    pick(baselines, [*names, *(s[0] for _, subjects in problems for s in subjects)], "baseline")
    # every mask is made once before the first minute of measuring, so that a mistake costs nothing
    wanted = words(args.masks, "masks")
    masks = {(m, s[1]): mask_names.parse(m, s[1]) for m in wanted for s, _ in problems}
    directions = (False, True) if args.bwd else (False,)
    for (shape, subjects), m, backward in itertools.product(problems, wanted, directions):
        case = make_case(masks[m, shape[1]], shape, args.dtype, backward, args.seed)
        records = run_case(case, subjects, names, baselines, args)
        writer.add(records)
        print(f"\n{_title(records[0])}\n{case_table(records, baselines)}", flush=True)
    print_fits(writer.records)
    if writer.folder is not None:
        plot(writer)


def chosen_shapes(args: argparse.Namespace) -> list[tuple[Shape, list[Subject]]]:
    """All mechanisms at the shapes given on the command line."""
    subjects = [parse_subject(s) for s in words(args.names, "names", all_names)]
    lengths = [positive(s, "seq") for s in words(args.seq or "2048", "seq")]
    sizes = {"batch": args.batch, "heads": args.heads, "head_dim": args.head_dim}
    defaults = {"batch": 1, "heads": 4, "head_dim": 64}
    B, N, H = (defaults[k] if v is None else v for k, v in sizes.items())
    K = N if args.kv_heads is None else args.kv_heads
    if min(B, N, K, H) < 1 or N % K:
        raise InputError(
            f"--batch {B} --heads {N} --kv_heads {K} --head_dim {H}: "
            "all at least 1, heads a multiple of kv_heads"
        )
    return [((B, n, N, K, H), subjects) for n in lengths]


def own_cases(args: argparse.Namespace) -> list[tuple[Shape, list[Subject]]]:
    """The cases tagged "bench" in the registry, those of one shape together."""
    for option in ("seq", "heads", "kv_heads", "head_dim", "batch"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option}: with --cases the shapes come from the mechanisms")
    problems: dict[Shape, list[Subject]] = {}
    for text in words(args.names, "names", all_names):
        label, _, implementation = parse_subject(text)
        name = label.partition("/")[0]
        if ":" in label:
            raise InputError(f"--names {text!r}: with --cases the settings come from the cases")
        for c in attention.cases(name, "bench"):
            B, T, N, H = c.shape
            if c.S not in (None, T):
                continue  # cross-attention: the masks here are of self-attention
            fields = "".join(f":{k}={v}" for k, v in c.spec.items())
            subject = (label + fields, attention[name](**c.spec), implementation)
            problems.setdefault((B, T, N, c.kv_heads or N, H), []).append(subject)
    if not problems:
        raise InputError(f"--cases: {args.names} has no benchmark cases")
    return list(problems.items())


def run_case(
    case: peers.Case,
    subjects: list[Subject],
    names: list[str],
    baselines: list[str],
    args: argparse.Namespace,
) -> list[Record]:
    """One record per mechanism and peer, all timed in turns."""
    candidates, refused, chosen, flops = [], [], {}, {}
    makers = [(name, functools.partial(peers.PEERS[name], name, case)) for name in names]
    makers += [
        (name, functools.partial(subject_candidate, name, spec, implementation, case))
        for name, spec, implementation in subjects
    ]
    for name, make in makers:
        try:
            candidates.append(make())
        except NotImplementedError as e:
            refused.append({"name": name, "note": str(e)})
    for name, spec, implementation in subjects:
        chosen[name] = chosen_by(spec, implementation, case)
        flops[name] = useful_flops(spec, case)
    ceiling = matmul(case.dtype)
    *timings, top = measure([*candidates, ceiling], repeats=args.repeats, rss=args.rss)
    per_second = matmul_flops() / min(top.seconds)
    differences = max_differences(candidates)
    common = describe(case)
    records = []
    for timing in timings:
        r = common | timing.record() | {"max_diff": differences.get(timing.name)}
        r["flops"] = flops.get(timing.name, common["live_flops"])
        r["flops_per_s"] = r["flops"] / timing.median
        r["of_matmul"] = r["flops_per_s"] / per_second
        r["matmul_flops_per_s"] = per_second
        if chosen.get(timing.name):
            r["implementation"], r["note"] = chosen[timing.name][0], ": ".join(chosen[timing.name])
        records.append(r)
    records += [common | r for r in refused]
    add_ratios(records, baselines)
    return records


def make_case(
    mask: mask_names.NamedMask, shape: Shape, dtype: str, backward: bool, seed: int
) -> peers.Case:
    """Normal random q, k, v and cotangent."""
    B, T, N, K, H = shape
    rng = np.random.default_rng(seed)
    q, k, v, do = (rng.standard_normal((B, T, n, H), np.float32) for n in (N, K, K, N))
    return peers.Case(q, k, v, do, mask, dtype, backward)


def subject_candidate(
    name: str, spec: AttentionSpec, implementation: str | None, case: peers.Case
) -> Candidate:
    """One of our mechanisms. The mask is an argument: what arrays it holds stay data."""
    key = jax.random.key(0) if spec.needs_key else None

    def attend(q, k, v, mask):
        return spec(q, k, v, mask=mask, key=key, implementation=implementation)

    program = peers.attention_program(attend, case.backward)
    return jax_candidate(
        name, program, *case.jax_arrays(), case.mask.mask, collect=peers.numpy_list
    )


def chosen_by(
    spec: AttentionSpec, implementation: str | None, case: peers.Case
) -> tuple[str, str] | None:
    """(name, reason) of the implementation where none was named and the module explains."""
    choose = getattr(sys.modules[type(spec).__module__], "choose", None)
    allowed = getattr(spec, "allowed", None)
    named = implementation or getattr(spec, "implementation", None)
    if choose is None or allowed is None or named:
        return None
    q, k, v = (jax.ShapeDtypeStruct(x.shape, case.dtype) for x in (case.q, case.k, case.v))
    return tuple(choose(q, k, v, mask=allowed(case.mask.mask)))


def max_differences(candidates: list[Candidate]) -> dict[str, float]:
    """Largest difference of each result (output, gradients) from the first candidate's."""
    out: dict[str, float] = {}
    first = None
    for c in candidates:
        if c.collect is None:
            continue
        arrays = c.collect(c.call())
        if first is None:
            first = arrays
        else:
            out[c.name] = max(float(np.abs(a - b).max()) for a, b in zip(first, arrays))
    return out


def describe(case: peers.Case) -> Record:
    """The case as one JSON object."""
    (B, T, N, H), K = case.q.shape, case.k.shape[2]
    live, every = live_tiles(case.mask.mask, B, T, N)
    return {
        "group": "attention",
        "mask": case.mask.name,
        "direction": "forward+backward" if case.backward else "forward",
        "batch": B,
        "seq": T,
        "heads": N,
        "kv_heads": K,
        "head_dim": H,
        "dtype": case.dtype,
        "live_fraction": live / every,
        "live_flops": tile_flops(case, live),
    }


def live_tiles(mask: Mask, B: int, T: int, N: int) -> tuple[float, int]:
    """(live tiles, all tiles) over batch and heads."""
    tile = min(TILE, T)
    cnt = np.asarray(mask.block_map(T, T, tile, tile).cnt)
    return float(np.broadcast_to(cnt, (B, N, cnt.shape[-1])).sum()), B * N * (-(-T // tile)) ** 2


def tile_flops(case: peers.Case, live: float) -> float:
    """Operations of `live` tiles b x b: 2 products of 2 b b H each forward, 5 more backward."""
    tile, products = min(TILE, case.length), 7 if case.backward else 2
    return products * 2.0 * tile * tile * case.q.shape[-1] * live


def useful_flops(spec: AttentionSpec, case: peers.Case) -> float:
    """Operations to be done: of the live tiles, or the mechanism's count if it approximates."""
    (B, T, N, H), allowed = case.q.shape, getattr(spec, "allowed", None)
    if allowed is not None:
        return tile_flops(case, live_tiles(allowed(case.mask.mask), B, T, N)[0])
    if spec.exact_when(T):
        return tile_flops(case, live_tiles(case.mask.mask, B, T, N)[0])
    return B * spec.cost(T, T, N, H, H) * (3.5 if case.backward else 1.0)


def parse_subject(text: str) -> Subject:
    """`NAME[/IMPLEMENTATION][:FIELD=VALUE...]` -> (the text, the spec, the implementation)."""
    head, *fields = text.split(":")
    name, _, implementation = head.partition("/")
    spec = attention[name]
    if any("=" not in f for f in fields):
        raise InputError(f"--names {text!r}: expected NAME[/IMPLEMENTATION][:FIELD=VALUE...]")
    try:
        made = config.override(spec(), [f"--{name}.{f}" for f in fields], prefix=name)
    except TypeError as e:
        raise InputError(f"--names {text!r}: {e}") from e
    return text, made, implementation or None


def all_names() -> list[str]:
    """Every registered mechanism that works as causal self-attention."""
    return [n for n in attention.names() if "self-causal" in attention[n].patterns]


def print_fits(records: list[Record]) -> None:
    """How well time follows the live fraction, where a run has at least three different ones."""
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for r in (r for r in records if "median_s" in r):
        key = (r["name"], r["seq"], r["direction"])
        groups.setdefault(key, []).append((r["live_fraction"], 1e3 * r["median_s"]))
    fits = {key: proportionality(points) for key, points in groups.items()}
    if any(fits.values()):
        print("\nmilliseconds = a + b x (live fraction):")
    for (name, n, direction), fit in fits.items():
        if fit is not None:
            print(
                f"  {name}, n = {n}, {direction}: a = {fit['intercept']:.3g}, "
                f"b = {fit['slope']:.3g}, R2 = {fit['r2']:.4f}; proportional within "
                f"{100 * fit['within']:.0f} %"
            )


def plot(writer: Writer) -> None:
    """Time against length (a panel per mask) and live fraction (a panel per length)."""
    assert writer.folder is not None
    timed = [r for r in writer.records if r["group"] == "attention" and "median_s" in r]
    for direction in dict.fromkeys(r["direction"] for r in timed):
        rows = [r for r in timed if r["direction"] == direction]
        short = "fwd" if direction == "forward" else "fwd_bwd"
        for file, panel, x, xlabel, log in (
            ("n", "mask", "seq", "sequence length", True),
            ("live_fraction", "seq", "live_fraction", "live fraction of tiles", False),
        ):
            panels: dict[str, dict[str, list]] = {}
            for r in rows:
                title = f"n = {r['seq']}" if panel == "seq" else r[panel]
                point = (float(r[x]), 1e3 * r["median_s"], r["mask"])
                panels.setdefault(title, {}).setdefault(r["name"], []).append(point)
            path = writer.folder / f"attention_{short}_vs_{file}.png"
            heading = f"{direction}, {writer.env['device']}, {rows[0]['dtype']}"
            if plot_lines(path, panels, xlabel=xlabel, log=log, title=heading):
                print(f"plot: {path}")


def _title(r: Record) -> str:
    return (
        f"{r['mask']}, n = {r['seq']}, {r['direction']}: batch {r['batch']}, {r['heads']} heads "
        f"({r['kv_heads']} kv) of {r['head_dim']}, {r['dtype']}, "
        f"{100 * r['live_fraction']:.1f} % of tiles live"
    )
