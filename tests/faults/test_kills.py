"""SIGKILL at any moment: the resumed run ends bit-identical to the undisturbed one."""

import random
import signal

import pytest

from causal_jax import train
from faults.runs import WORDS, assert_same, moment, recipe_file, start


def _killed(tmp_path, kinds, steps):
    file, run, whole = recipe_file(tmp_path), tmp_path / "run", tmp_path / "whole"
    words = [*WORDS, "--config.steps", str(steps)]
    assert train.main(["--config", file, "--config.workdir", str(whole), *words]) == 0
    draw, log, kills = random.Random(0), tmp_path / "log.txt", 0
    for kind in kinds:
        process = start(file, run, *words, log=log)
        moment(kind, run, process, draw)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    last = start(file, run, *words, log=log)
    assert last.wait() == 0, log.read_text()[-3000:]
    assert kills == len(kinds), f"only {kills} of {len(kinds)} were killed before the end"
    assert "Traceback" not in log.read_text()
    assert_same(whole, run)


def test_killed_while_saving(tmp_path):
    _killed(tmp_path, ["save"], 96)


@pytest.mark.slow
def test_killed_at_25_moments(tmp_path):
    kinds = ["start", "save", "eval", "step", "save"] * 5
    random.Random(1).shuffle(kinds)
    _killed(tmp_path, kinds, 1600)
