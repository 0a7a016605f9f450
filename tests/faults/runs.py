"""A small run to be disturbed: started as its own process, killed at a chosen moment, compared."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from test_training import CONFIG

from causal_jax.paths import named_leaves
from causal_jax.training import report
from causal_jax.training.run import load_run

EVERY = 8  # steps between checkpoints, and between validations
WORDS = ["--config.checkpoint.every", str(EVERY), "--config.evaluation.every", str(EVERY)]


def recipe_file(folder: Path) -> str:
    """The config of the tests of training."""
    path = folder / "small.py"
    path.write_text(CONFIG.format(tests=str(Path(__file__).parent.parent)))
    return str(path)


def start(file: str, run: Path, *words: str, log: Path | None = None) -> subprocess.Popen:
    """`python -m causal_jax.train` in a process of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",  # the same programs as in this process
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "causal_jax.train", "--config", file]
    command += ["--config.workdir", str(run), *words]
    out = subprocess.PIPE if log is None else log.open("a")
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=env)


def last_step(run: Path) -> int:
    """Of the records so far."""
    return max((r["step"] for r in report.read(run / "metrics.jsonl")), default=0)


def wait(condition, process: subprocess.Popen, seconds: float = 120.0) -> bool:
    """Until the condition holds; False where the process ended first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)
    return True


def moment(kind: str, run: Path, process: subprocess.Popen, draw: random.Random) -> None:
    """Wait for a moment of a run: in the making ("start"), while it saves, validates, or steps."""
    begun = last_step(run)
    if kind == "start":  # importing, reading, compiling, restoring
        time.sleep(draw.uniform(0.0, 5.0))
        return
    wait(lambda: last_step(run) > begun + draw.randrange(2 * EVERY), process)
    if kind == "save":
        unfinished = "checkpoints/*.orbax-checkpoint-tmp*"
        wait(lambda: any(run.glob(unfinished)), process)
        time.sleep(draw.uniform(0.0, 0.05))
    elif kind == "eval":
        wait(lambda: last_step(run) % EVERY == 0, process)
        time.sleep(draw.uniform(0.0, 0.02))
    else:
        time.sleep(draw.uniform(0.0, 0.2))


def outcome(run: Path) -> tuple[dict, dict]:
    """(parameters, records without times) of a finished run."""
    params = named_leaves(nnx.split(load_run(run).model)[1])
    records = report.read(run / "metrics.jsonl")
    kept = {(r["split"], r["step"]): (r.get("loss"), r.get("grad_norm")) for r in records}
    assert len(kept) == len(records), "a step was recorded twice"
    return {name: np.asarray(x) for name, x in params.items()}, kept


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit."""
    (p, r), (q, s) = outcome(one), outcome(other)
    assert r == s
    assert p.keys() == q.keys()
    for name in p:
        np.testing.assert_array_equal(p[name], q[name], err_msg=name)
