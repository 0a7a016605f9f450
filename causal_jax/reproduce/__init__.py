"""Check a published claim: one command, from the claim to figures and a verdict.

    python -m causal_jax.reproduce --list                  every system, its claims, last figures
    python -m causal_jax.reproduce NAME                    the small setting: two CPU cores, minutes
    python -m causal_jax.reproduce NAME --full             the paper's sizes
    python -m causal_jax.reproduce NAME --set steps=100    with one setting changed
    python -m causal_jax.reproduce --all                   every entry that is not measured yet
    python -m causal_jax.reproduce report                  one page of all evidence, with plots

A run leaves evidence.json (rows, figures, settings, versions, device, commit) and its plots in a
folder, runs/reproduce/NAME by default. The same command continues a run that was interrupted, and
shows the evidence of one that is finished; --fresh begins anew.

Exit codes: 0 every claim holds, 3 one does not, 2 the user's input, 1 anything else.
"""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from causal_jax import config
from causal_jax.environment import make_deterministic
from causal_jax.errors import InputError
from causal_jax.papers import Paper, papers
from causal_jax.reproduce import catalogue, pages
from causal_jax.reproduce.folder import ROOT, Record, RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept; the same command continues", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _main(words: Sequence[str]) -> int:
    args = _parse(words)
    if args.list:
        print(catalogue.listing(args.runs))
        return 0
    if args.all:
        return _all(args)
    if args.name == "report":
        for path in pages.write(args.runs, args.out or args.runs / "report", keep=args.keep):
            print(path)
        return 0
    return _one(args)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m causal_jax.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="the entry to run, or `report`")
    add("--list", action="store_true", help="every system: state, claims, last figures")
    add("--all", action="store_true", help="run every entry; finished ones are skipped")
    add("--full", action="store_true", help="the large setting")
    add("--seeds", type=int, metavar="N", help="independent runs")
    add("--set", action="append", default=[], metavar="K=V", help="change a setting; repeatable")
    add("--out", type=Path, metavar="DIR", help="folder of this run, or of the report")
    add("--fresh", action="store_true", help="throw away what the folder holds of earlier runs")
    add("--runs", type=Path, default=ROOT, metavar="DIR", help=f"all runs (default {ROOT})")
    add("--jobs", type=int, default=1, metavar="N", help="--all: entries at the same time")
    add("--deterministic", action="store_true", help="the same bits every time on a GPU too")
    add("--keep", action="store_true", help="report: keep the evidence in the checkout, too")
    args = parser.parse_args(words)
    if args.deterministic:
        make_deterministic()
    given = [bool(args.name), args.list, args.all]
    if sum(given) != 1:
        parser.error("give one of NAME, report, --list, --all")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: expected at least 1")
    one = bool(args.name) and args.name != "report"
    _only(args, one, "a NAME", ("seeds", "set"))
    _only(args, one or args.name == "report", "a NAME or report", ("out",))
    _only(args, one or args.all, "a NAME or --all", ("full", "fresh"))
    _only(args, args.all, "--all", ("jobs",))
    _only(args, args.name == "report", "report", ("keep",))
    return args


def _only(args: argparse.Namespace, ok: bool, where: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(args, name)
        if not ok and value not in (None, [], False) and not (name == "jobs" and value == 1):
            raise InputError(f"--{name} goes with {where}")


def _one(args: argparse.Namespace) -> int:
    """Run one entry, or show the evidence that its folder already holds."""
    settings = _settings(args.name, args)
    folder = RunFolder(args.out or args.runs / _folder(args.name, settings, args), args.name)
    with folder.opened(settings, fresh=args.fresh):
        record = folder.record()
        if record is None:
            print(f"{args.name}: {type(settings).title} (arXiv {settings.arxiv}) -> {folder.out}")
            record = folder.finish(settings, settings.run(folder))
        else:
            print(f"{args.name}: measured {record['env']['time']}; --fresh measures again")
    print(f"\n{catalogue.table(record)}\n\n{folder.out}/evidence.json")
    return 0 if record["holds"] else 3


def _settings(name: str, args: argparse.Namespace) -> Paper:
    """The settings of a run, every change applied."""
    cls = papers[catalogue.entry(name)]
    settings = cls.full() if args.full else cls.small()
    if args.seeds is not None:
        settings = dataclasses.replace(settings, seeds=args.seeds)
    words = []
    for change in args.set:
        field, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: expected SETTING=VALUE")
        words += [f"--set.{field}", *value.split(" ")]
    return config.override(settings, words, prefix="set")


def _folder(name: str, settings: Paper, args: argparse.Namespace) -> str:
    """The default folder of a run: changed settings have one of their own."""
    plain = type(settings).full() if args.full else type(settings).small()
    changed = "" if settings == plain else f"-{config.fingerprint(settings)[:6]}"
    return f"{name}{'-full' if args.full else ''}{changed}"


def _all(args: argparse.Namespace) -> int:
    """Every entry in a process of its own, so that none can bring down the others."""
    import concurrent.futures
    import subprocess

    def run(name: str) -> tuple[str, int]:
        command = [sys.executable, "-m", "causal_jax.reproduce", name, "--runs", str(args.runs)]
        command += ["--full"] * args.full + ["--fresh"] * args.fresh
        return name, subprocess.run(command, env=os.environ).returncode

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        codes = dict(pool.map(run, papers.names()))
    print("\n" + catalogue.summary(args.runs, codes, "-full" if args.full else ""))
    worst = (code if code in (0, 2, 3) else 1 for code in codes.values())
    return min(worst, key=(1, 2, 3, 0).index)


__all__ = ["Record", "RunFolder", "main"]
