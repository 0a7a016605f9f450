"""Data that changes, folders that cannot be written, numbers that are not: said, and survived."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from causal_jax import train
from causal_jax.training import report
from faults.runs import outcome, recipe_file


def _train(file, run, *words):
    return train.main(["--config", file, "--config.workdir", str(run), *words])


def test_a_data_file_that_changes_under_the_run(tmp_path, capsys):
    text, run, file = tmp_path / "text.txt", tmp_path / "run", recipe_file(tmp_path)
    original = "\n\n".join(f"paragraph {i} says {i * i}" for i in range(400))
    text.write_text(original)
    words = ["--config.data.source", "text", "--config.data.source.path", str(text)]
    assert _train(file, run, *words, "--config.steps=4") == 0
    text.write_text(original.replace("paragraph 7 ", "paragraph 8 "))
    capsys.readouterr()
    assert _train(file, run, *words) == 2
    err = capsys.readouterr().err
    assert "its content is not what the run in" in err
    assert "put the old text back" in err
    text.write_text(original)
    assert _train(file, run, *words) == 0
    assert "going on from step 4" in capsys.readouterr().out


def test_a_folder_that_is_read_only(tmp_path, capsys):
    place = tmp_path / "place"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    if not mounted:
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere, and nothing can be mounted here")
        place.chmod(0o500)
    try:
        assert _train(recipe_file(tmp_path), place / "run") == 2
        err = capsys.readouterr().err
        assert f"--config.workdir {place / 'run'} cannot be written to" in err
        assert "choose another" in err
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


NAN = '''
import dataclasses, jax, jax.numpy as jnp
from causal_jax.objectives.next_token import NextToken

@dataclasses.dataclass(frozen=True)
class Poisoned(NextToken):
    """A loss that is not a number for some batches."""
    def loss(self, model, batch, key):
        value, metrics = super().loss(model, batch, key)
        bad = batch["tokens"].sum() % 3 == 0
        return jnp.where(bad & (key is not None), jnp.nan, value), metrics

plain = get_config
def get_config():
    return dataclasses.replace(plain(), objective=Poisoned())
'''


def test_batches_whose_loss_is_not_a_number_are_left_out(tmp_path, capsys):
    file, run = recipe_file(tmp_path), tmp_path / "run"
    Path(file).write_text(Path(file).read_text() + NAN)
    assert _train(file, run, "--config.steps=16", "--config.skip=12") == 0
    out = capsys.readouterr().out
    left_out = out.count("not finite, left out")
    assert 0 < left_out < 16
    params, _ = outcome(run)
    assert all(np.isfinite(p).all() for p in params.values())
    losses = [r["loss"] for r in report.read(run / "metrics.jsonl") if r["split"] == "final"]
    assert np.isfinite(losses).all()
