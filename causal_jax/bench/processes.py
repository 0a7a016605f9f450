"""`bench processes`: training in one process with P devices beside P processes with one each.

The same command, config, global batch and order of the data; the processes talk over loopback. What
is lost is what talking between processes costs: on a cluster the network takes loopback's place.
Tokens per second are those the run itself reports, medians over its records without the first.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from causal_jax.bench import recipes
from causal_jax.bench.report import Record, Writer, table
from causal_jax.errors import InputError
from causal_jax.training import report

_WORDS = {
    "mesh.data": "-1",
    "mesh.fsdp": "1",
    "checkpoint.every": "0",
    "evaluation.every": "0",
    "evaluation.final_batches": "0",
    "evaluation.ngrams": "0",
    "report.plot": "False",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group; `--config F[:arg] --config.a.b V` is read before argparse."""
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="default 2")
    parser.add_argument("--steps", type=int, default=40, help="of each run; default 40")
    parser.add_argument("--every", type=int, default=5, help="steps per record; default 5")
    parser.epilog = (
        f"--config F[:arg] (default {recipes.DEFAULT}); --repeats rounds of two runs each; CPU only"
    )


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Train here and there, in turns."""
    if args.baseline or args.rss:
        raise InputError("--baseline, --rss: the baseline is the run in one process")
    if args.processes < 2 or args.every < 1 or args.steps < 3 * args.every:
        raise InputError(
            f"--processes {args.processes}, --every {args.every}, --steps {args.steps}: expected "
            "at least 2, at least 1, and three records or more"
        )
    recipe = recipes.load(args)
    if recipe.data.batch % (args.processes * recipe.accumulate):
        raise InputError(
            f"data.batch = {recipe.data.batch} cannot be shared out to {args.processes} processes"
        )
    spec = args.config or recipes.DEFAULT
    shapes = {"one process": (1, args.processes), "processes": (args.processes, 1)}
    rates: dict[str, list[float]] = {name: [] for name in shapes}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            for name, (count, devices) in shapes.items():
                run_folder = Path(folder) / f"{count}_{turn}"
                words = ["--config", spec, *args.overrides, f"--config.workdir={run_folder}"]
                words += [f"--config.{field}={value}" for field, value in _WORDS.items()]
                words += [f"--config.steps={args.steps}", f"--config.report.every={args.every}"]
                rates[name] += train_together(words, run_folder, count, devices)
    records: list[Record] = [
        {
            "group": "processes",
            "name": name,
            "config": spec,
            "overrides": list(args.overrides),
            "processes": count,
            "devices_each": devices,
            "batch": recipe.data.batch,
            "seq": recipes.context(recipe),
            "tokens_per_s": statistics.median(rates[name]),
            "min": min(rates[name]),
            "max": max(rates[name]),
            "records": len(rates[name]),
        }
        for name, (count, devices) in shapes.items()
    ]
    writer.add(records)
    one = records[0]["tokens_per_s"]
    rows = [
        [
            f"{r['processes']} x {r['devices_each']} device(s)",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['min']:,.0f}-{r['max']:,.0f}",
            f"{100 * r['tokens_per_s'] / one:.0f} %",
        ]
        for r in records
    ]
    print(table(["processes x devices", "tokens/s", "range", "of one process"], rows), flush=True)


def train_together(words: Sequence[str], folder: Path, count: int, devices: int) -> list[float]:
    """The training command in `count` processes; tokens/s of its records, the first left out.

    Raises:
        InputError: a process failed; what it said.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if count > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-m", "causal_jax.train", *words]
    started = [
        subprocess.Popen(
            command,
            env=env | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [p.communicate()[1] for p in started]
    finally:
        for p in started:
            p.kill()
    failed = [text for p, text in zip(started, said) if p.returncode]
    if failed:
        raise InputError(f"{count} process(es) with {devices} device(s) each: {failed[0][-1500:]}")
    found = [r for r in report.read(folder / "metrics.jsonl") if "tokens_per_s" in r]
    return [r["tokens_per_s"] for r in found[1:]]
