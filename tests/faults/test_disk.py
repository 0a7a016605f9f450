"""A disk that fills up while a run is saved: one message, exit code 2, nothing older lost."""

import errno
import resource
import shutil
import subprocess

import pytest

from causal_jax import train
from causal_jax.training.checkpoint import Store
from faults.runs import assert_same, recipe_file

WORDS = [
    "--config.model.width=64",  # a checkpoint is larger than logs and programs
    "--config.evaluation.final_batches=0",
    "--config.optimizer.schedule.kind=constant",  # the same, however long the run
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config file, a run nothing happened to)."""
    folder = tmp_path_factory.mktemp("whole")
    file = recipe_file(folder)
    assert _train(file, folder / "run") == 0
    return file, folder / "run"


def _train(file, run, *words):
    return train.main(["--config", file, "--config.workdir", str(run), *WORDS, *words])


def _refused(run, err, *left):
    """What the user is told, and what is left."""
    assert err.startswith("error: "), err
    assert "the disk is full" in err
    assert "same command" in err
    assert "Traceback" not in err
    assert Store(run / "checkpoints").steps() == [*left]


def test_a_limit_on_the_size_of_files(whole, tmp_path, capsys):
    file, same = whole
    run = tmp_path / "run"
    assert _train(file, run, "--config.steps=6") == 0
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, before[1]))  # EFBIG beyond it
    try:
        assert _train(file, run) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert f"checkpoint 8 could not be written to {run / 'checkpoints'}" in err
    assert "checkpoint 6 is complete" in err
    _refused(run, err, 4, 6)
    assert _train(file, run) == 0
    assert "going on from step 6" in capsys.readouterr().out
    assert_same(same, run)


def test_a_small_file_system(whole, tmp_path, capsys, monkeypatch):
    file, same = whole
    place = tmp_path / "place"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    run, ballast, save = place / "run", place / "ballast", Store.save

    def full(store, step, state, meta):
        if step == 8:
            store.wait()  # the one before is complete
            _fill(ballast)
        save(store, step, state, meta)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "save", full)
            assert _train(file, run) == 2
        _refused(run, capsys.readouterr().err, 4)
        assert _train(file, run) == 2  # still full: refused before anything is done
        err = capsys.readouterr().err
        assert "make room" in err, err
        ballast.unlink()
        assert _train(file, run) == 0
        assert "going on from step 4" in capsys.readouterr().out
        assert_same(same, run)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(path):
    """Write until nothing more goes in."""
    with path.open("wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)):
                pass
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
