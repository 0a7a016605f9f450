"""Plan a run for chips nobody here has: `python -m causal_jax.plan --config F --topology T`.

The real training step is compiled ahead of time for that topology on this machine's processor:
what it needs of a chip's memory, how many operations it does, what the chips say to each other, and
a roofline of the step. Nothing is allocated and nothing runs. Exit codes: 0 it fits, 2 the user's
input (a plan that does not fit is one), 1 anything else.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  python -m causal_jax.plan --config configs/lm_1b.py --topology v5e:16x16
  python -m causal_jax.plan --config configs/lm_1b.py --topology v5p:4x4x4 --mesh fsdp=16,tensor=4
  python -m causal_jax.plan --config configs/lm_1b.py --topology v5e:4x4 --search --out plan
  python -m causal_jax.plan --config configs/quickstart.py --topology cpu

--config.FIELD VALUE changes one field of the config, as in training."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compile for chips, never run on one
    from causal_jax.config import take_words
    from causal_jax.errors import InputError

    try:
        spec, overrides, rest = take_words(sys.argv[1:] if argv is None else list(argv))
        args = _parser().parse_args(rest)
        args.config, args.overrides = spec, overrides
        if spec is None:
            raise InputError("--config is missing: a config file or a run folder")
        return _plan(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.plan",
        usage="%(prog)s --config F[:ARG] [--config.FIELD VALUE ...] --topology T [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topology", required=True, help="v5e:16x16, v5p:4x4x4, ..., cpu, cpu:8")
    add("--slices", type=int, default=1, help="so many of them; `data` goes across")
    add("--mesh", metavar="AXIS=N,...", help="in place of the config's, e.g. fsdp=64,tensor=4")
    add("--batch", type=int, help="rows per step over all chips, in place of the config's")
    add("--serve", action="store_true", help="also prefill and decoding at data.context tokens")
    add("--search", action="store_true", help="try other meshes, remat and microbatches")
    add("--limit", type=int, default=6, help="compilations of a search (default 6)")
    add("--minutes", type=float, default=30.0, help="and no longer than this (default 30)")
    add("--out", metavar="DIR", help="folder for plan.json and plan.png")
    return parser


def _plan(args: Any) -> int:
    from causal_jax.bench.recipes import load
    from causal_jax.errors import InputError
    from causal_jax.plan import chips, programs, show
    from causal_jax.plan.estimate import ASSUMPTIONS, estimate
    from causal_jax.plan.search import describe, search

    if args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    if not args.minutes > 0:
        raise InputError(f"--minutes must be above 0, got {args.minutes:g}")
    recipe = load(args)
    if args.mesh is not None:
        recipe = dataclasses.replace(recipe, mesh=_mesh(args.mesh, recipe.mesh))
    if args.batch is not None:
        recipe = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, batch=args.batch)
        )
    out = _folder(args.out)
    target = chips.target(args.topology, args.slices)
    names = []
    record: dict[str, Any] = {"config": args.config, "assumed": ASSUMPTIONS}
    if args.search:
        found = search(
            recipe,
            target,
            args.limit,
            lambda line: print(line, flush=True),
            minutes=args.minutes,
        )
        print(show.ranking(found))
        recipe, best = found[0]
        names = [describe(r, e) for r, e in found[:6]]
        record["search"] = [{"what": describe(r, e)} | e.json() for r, e in found]
        estimates = [best]
    else:
        estimates = [estimate(programs.training_step(recipe, target), recipe, target)]
    print(show.text(estimates[0]), flush=True)
    for program in programs.serving(recipe, target) if args.serve else ():
        estimates.append(estimate(program, recipe, target))
        print(show.text(estimates[-1]), flush=True)
    record["programs"] = [e.json() for e in estimates]
    if target.platform == "cpu":
        record["process"] = _process(max(e.peak for e in estimates) * len(target.devices))
    print(show.assumptions())
    if out is not None:
        (out / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
        shown = [e for _, e in found[:6]] if args.search else estimates
        show.picture(shown, out / "plan.png", names)
        print(f"written: {out / 'plan.json'}, {out / 'plan.png'}")
    bad = [e.name for e in estimates if not e.fits]
    if bad:
        raise InputError(f"{', '.join(bad)} does not fit on {target.name}; see the notes above")
    return 0


def _process(peak: int) -> dict[str, int]:
    """Peak resident memory of a process that runs this, on Linux: this one with all libraries."""
    from orbax.checkpoint import v1  # noqa: F401

    import causal_jax.training.loop  # noqa: F401

    status = Path("/proc/self/status")
    now = int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024 if status.exists() else 0
    print(
        f"process: {now / 2**20:.0f} MiB of libraries and programs (this process, now) + "
        f"{peak / 2**20:.0f} MiB = {(now + peak) / 2**20:.0f} MiB resident at the peak"
    )
    return {"libraries": now, "program": peak, "peak": now + peak}


def _mesh(text: str, old: Any) -> Any:
    from causal_jax.errors import InputError
    from causal_jax.training.sharding import AXES, MeshSpec

    sizes: dict[str, int] = {"data": 1}
    for word in text.split(","):
        axis, equals, n = word.strip().partition("=")
        if axis not in AXES or not equals or not n.removeprefix("-").isdecimal():
            raise InputError(
                f"--mesh {text}: {word!r} is not AXIS=N (axes: {', '.join(AXES)}; -1: the rest)"
            )
        sizes[axis] = int(n)
    return MeshSpec(**sizes, rules=old.rules)


def _folder(name: str | None) -> Path | None:
    from causal_jax.errors import InputError

    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {name}: cannot be written ({e.strerror})") from e
    return Path(name)


if __name__ == "__main__":
    sys.exit(main())
