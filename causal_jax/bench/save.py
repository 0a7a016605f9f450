"""`bench save`: what a checkpoint costs the training that goes on beside it.

    step     median of plain steps, run as training runs them (one dispatched ahead)
    call     how long the training thread is in `Store.save`, an earlier save being over
    stalled  that, over the step
    slowed   a stretch of steps with one save after its first, less the same stretch without
    written  from the call until the checkpoint is complete

Stretches with and without a save take turns; medians of `--repeats` of them. `amortised` is the
median slowing spread over the `checkpoint.every` steps of the config: what a run pays in all.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from causal_jax.bench import recipes
from causal_jax.bench.report import Record, Writer, milliseconds, table
from causal_jax.errors import InputError
from causal_jax.training.checkpoint import Store, check_space
from causal_jax.training.sharding import make_mesh, put_batch
from causal_jax.training.state import new_state, size_in_bytes, state_of
from causal_jax.training.step import step_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this group; `--config F[:arg] --config.a.b V` is read before argparse."""
    parser.add_argument("--steps", type=int, default=4, help="of a stretch; default 4")
    parser.add_argument("--folder", metavar="DIR", help="where to write (default: a temporary one)")
    parser.epilog = f"--config F[:arg] (default {recipes.DEFAULT}) chooses the model"


def run(args: argparse.Namespace, writer: Writer) -> None:
    """Time stretches of steps with and without a save."""
    if args.baseline or args.rss:
        raise InputError("--baseline, --rss: the baseline is the stretch without a save")
    if args.steps < 2:
        raise InputError(f"--steps {args.steps}: expected at least 2")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        training = _Training(recipes.load(args), args.seed, Path(folder))
        record = training.record(args.repeats, args.steps)
    record |= {"config": args.config or recipes.DEFAULT, "overrides": list(args.overrides)}
    writer.add([record])
    print(f"\nsaving {record['state_bytes'] / 2**20:.1f} MiB, {args.repeats} times")
    print(_show(record), flush=True)


class _Training:
    """A recipe's step and state, and a place for checkpoints."""

    def __init__(self, recipe: Any, seed: int, folder: Path):
        mesh = make_mesh(recipe.mesh)
        abstract, _ = state_of(recipe, mesh)
        self.size = size_in_bytes(abstract)
        check_space(folder, 3 * self.size)
        self.step = step_of(recipe, abstract, mesh)
        tx = recipe.optimizer.transformation()
        self.state = new_state(recipe.model, tx, abstract, recipe.seed, trainable=recipe.trained)
        self.rows, self.key = put_batch(mesh, recipes.random_batch(recipe, seed)), jax.random.key(0)
        self.store, self.saves = Store(folder, keep=1, keep_best=0), 0
        self.every = recipe.checkpoint.every

    def stretch(self, steps: int, *, save: bool) -> tuple[float, float, float]:
        """(seconds of the steps, in the call, from the call until all is written)."""
        begun, called, pending = time.perf_counter(), 0.0, None
        start = begun
        for i in range(steps):
            self.state, report = self.step(self.state, self.rows, self.key)
            if pending is not None:
                jax.device_get(pending)
            pending = report
            if i == 0 and save:  # the loop takes in the report before it saves
                jax.device_get(pending)
                self.saves += 1
                start = time.perf_counter()
                self.store.save(self.saves, self.state, {"validation": None})
                called = time.perf_counter() - start
        jax.device_get(pending)
        seconds = time.perf_counter() - begun
        self.store.wait()
        return seconds, called, time.perf_counter() - start

    def record(self, repeats: int, steps: int) -> Record:
        """All figures, in seconds."""
        for save in (False, True):  # compiles
            self.stretch(2, save=save)
        plain, saving, calls, written = [], [], [], []
        for _ in range(repeats):
            plain.append(self.stretch(steps, save=False)[0])
            seconds, called, complete = self.stretch(steps, save=True)
            saving.append(seconds)
            calls.append(called)
            written.append(complete)
        step = statistics.median(plain) / steps
        slowed = statistics.median(b - a for a, b in zip(plain, saving))
        return {
            "group": "save",
            "name": "causal_jax",
            "state_bytes": self.size,
            "samples": repeats,
            "steps": steps,
            "step_s": step,
            "call_s": statistics.median(calls),
            "call_max_s": max(calls),
            "stalled": statistics.median(calls) / step,
            "slowed_s": slowed,
            "slowed": slowed / step,
            "spread": (max(plain) - min(plain)) / statistics.median(plain),
            "written_s": statistics.median(written),
            "every": self.every,
            "amortised": slowed / step / self.every if self.every else None,
        }


def _show(r: Record) -> str:
    rows = [
        ["step", milliseconds(r["step_s"]), ""],
        ["call", milliseconds(r["call_s"]), f"{100 * r['stalled']:.1f} % of a step"],
        ["slowed", f"{1e3 * r['slowed_s']:.0f}", f"{100 * r['slowed']:.0f} % of a step"],
        ["written after", milliseconds(r["written_s"]), ""],
    ]
    text = table(["", "median ms", ""], rows)
    if r["amortised"] is not None:
        text += f"\na save every {r['every']} steps: {100 * r['amortised']:.2f} % of the run"
    return f"{text}\nstretches of {r['steps']} plain steps spread by {100 * r['spread']:.0f} %"
