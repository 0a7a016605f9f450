"""`bench taps`: its records, and that an untapped pass is the same program."""

import json

import jax
import numpy as np
import pytest

from causal_jax.bench import main
from causal_jax.bench.taps import maps, passes
from causal_jax.models.decoder import Decoder


@pytest.fixture(scope="module")
def model():
    spec = Decoder(vocab=31, layers=2, width=8, heads=2, context=32)
    return spec.build(jax.random.key(0))


def test_taps_that_do_nothing_are_the_same_program(model):
    records = {r["name"]: r for r in passes(model, jax.numpy.ones((1, 9), "int32"), 1)}
    assert records["taps off"]["same_program"] is True
    assert records["plain"]["over_plain"] == 0
    assert set(records) >= {"read resid_post", "read pattern", "knock out", "steer"}
    assert all(r["min_s"] > 0 and r["cpu_s"] > 0 for r in records.values())


def test_loops_are_scaled_to_the_whole_map(model):
    records = {r["name"]: r for r in maps(model, jax.numpy.ones((1, 5), "int32"), 3, 4)}
    assert records["sweep"]["measured_points"] == 10
    assert records["sweep"]["over_sweep"] == 1
    for name in ("loop, compiled run", "loop of runs"):
        r = records[name]
        assert r["measured_points"] == 3
        per_run = (r["seconds"] - r["compile_s"]) / 10
        assert 0 < per_run < r["seconds"]
        np.testing.assert_allclose(r["over_sweep"], r["seconds"] / records["sweep"]["seconds"])


def test_command(tmp_path, capsys):
    words = "taps --config configs/quickstart.py:smoke --seq 8 --positions 2 --points 1 --repeats 1"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [r["name"] for r in records[-3:]] == ["sweep", "loop, compiled run", "loop of runs"]
    assert "same program" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq 1", "--seq 1: expected at least 2"),
        ("--rss", "--baseline, --rss"),
        ("--model a --run b", "give one of them"),
        ("--run b --config configs/quickstart.py", "without --model and --run only"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert main(["taps", *words.split()]) == 2
    assert message in capsys.readouterr().err
