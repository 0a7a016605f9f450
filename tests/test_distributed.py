"""Two processes that talk over loopback do what one process does."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from test_training import CONFIG
from tiny import compiled  # noqa: F401

from causal_jax import train
from causal_jax.paths import named_leaves
from causal_jax.training import report
from causal_jax.training.run import load_run


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    return str(path)


def _start(recipe_file, folder, *words, processes, devices):
    """The training command in so many processes, each with so many devices."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "causal_jax.train", "--config", recipe_file]
    command += ["--config.workdir", str(folder), "--config.mesh.data", "-1", *words]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for index in range(processes):
        env = os.environ | cache | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return started


def _finish(started):
    try:
        ended = [p.communicate(timeout=240) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * len(started), ended
    return [out for out, _ in ended]


def _losses(folder, split="train"):
    records = report.read(folder / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["split"] == split}


def _params(folder):
    return {k: np.asarray(v) for k, v in named_leaves(nnx.split(load_run(folder).model)[1]).items()}


def _same(a, b):
    for split in ("train", "validation", "final"):
        one, two = _losses(a, split), _losses(b, split)
        assert one.keys() == two.keys()
        np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    one, two = _params(a), _params(b)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, err_msg=name)


WORDS = ["--config.optimizer.schedule.kind", "constant", "--config.accumulate", "2"]
SPLIT = ["--config.mesh.data", "1", "--config.mesh.fsdp", "2"]


def test_two_processes_equal_one(recipe_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    started = _start(recipe_file, two, *WORDS, *SPLIT, processes=2, devices=1)
    words = ["--config", recipe_file, "--config.workdir", str(one), "--config.mesh.data", "2"]
    assert train.main([*words, *WORDS]) == 0
    first, second = _finish(started)
    assert "(2 process(es))" in first
    assert "step 8/8" in first
    assert "step" not in second  # one speaks for all
    _same(one, two)


@pytest.mark.slow
def test_two_processes_go_on_as_one(recipe_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    _finish(_start(recipe_file, one, *WORDS, processes=1, devices=2))
    half = [*WORDS, *SPLIT, "--config.steps", "4"]
    _finish(_start(recipe_file, two, *half, processes=2, devices=1))
    for steps, processes in (("6", 2), ("8", 1)):  # from what they wrote together
        words = [*WORDS, "--config.steps", steps]
        first, *_ = _finish(
            _start(recipe_file, two, *words, processes=processes, devices=2 // processes)
        )
        assert f"going on from step {int(steps) - 2}" in first
    assert _losses(one) == pytest.approx(_losses(two), rel=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(recipe_file, tmp_path):
    run = tmp_path / "run"
    words = ["--config.steps", "100000", "--config.report.every", "5"]
    started = _start(recipe_file, run, *words, processes=2, devices=1)
    end = time.time() + 120
    while len(_losses(run)) < 3:
        assert time.time() < end
        assert all(p.poll() is None for p in started), _finish(started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)  # only one is told
    first, _ = _finish(started)
    done = int(re.search(r"a signal to another process: saved at step (\d+) of", first)[1])
    assert done % 5 == 0
    steps = str(done + 3)
    alone = _start(recipe_file, run, "--config.steps", steps, processes=1, devices=2)
    (out,) = _finish(alone)
    assert f"going on from step {done}" in out


@pytest.mark.slow
def test_four_processes_lose_one_and_two_go_on(recipe_file, tmp_path):
    run = tmp_path / "run"
    words = ["--config.steps", "100000", "--config.checkpoint.every", "5"]
    started = _start(recipe_file, run, *words, processes=4, devices=1)
    try:
        end = time.time() + 200
        while not any(run.glob("checkpoints/[0-9]*")) or len(_losses(run)) < 8:
            assert time.time() < end
            assert all(p.poll() is None for p in started), [p.communicate() for p in started]
            time.sleep(0.05)
        started[2].send_signal(signal.SIGKILL)
        rest = [p for i, p in enumerate(started) if i != 2]
        ended = [p.communicate(timeout=200) for p in rest]
    finally:
        for p in started:
            p.kill()
    assert all(p.returncode not in (0, None) for p in rest)
    said = "".join(err for _, err in ended)
    assert "another process of this run ended or cannot be reached" in said
    assert "Start all of them again" in said
    done = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    words = ["--config.steps", str(done + 3)]
    first, _ = _finish(_start(recipe_file, run, *words, processes=2, devices=2))
    assert f"going on from step {done}" in first
