"""Every recipe in configs/ in its smoke mode: it loads, trains, saves, and goes on where it was."""

import json
from pathlib import Path

import pytest

from causal_jax import config
from causal_jax.errors import InputError
from causal_jax.train import main

CONFIGS = sorted(Path("configs").glob("*.py"))
# Run by default: one of each family. Titans come from one factory, plain decoders are like
# quickstart, of a teacher and its student the teacher is run, and test_surgery trains adapters.
LONG = [p for p in CONFIGS if p.stem.startswith("titans_") and p.stem != "titans_mac_170m"]
others = ("lm_small", "corpus_best", "lm_1b", "leaf_distil", "lora_smollm2")
LONG += [p for p in CONFIGS if p.stem in others]

STAGED = [p for p in CONFIGS if p.stem.startswith("linearize_")]  # tests/test_stages.py runs them


@pytest.fixture(params=CONFIGS, ids=[p.stem for p in CONFIGS])
def path(request):
    return request.param


@pytest.fixture(
    params=[
        pytest.param(p, marks=pytest.mark.slow if p in LONG else ())
        for p in CONFIGS
        if p not in STAGED
    ],
    ids=[p.stem for p in CONFIGS if p not in STAGED],
)
def trained(request):
    """One of each family by default."""
    return request.param


def test_the_docstring_is_a_recipe_card(path):
    text = path.read_text()
    assert f"python -m causal_jax.train --config {path}\n" in text or "--config.data" in text
    assert f"{path}:smoke" in text


def test_full_recipe_loads_and_serialises(path):
    try:
        recipe = config.load(str(path), [])
    except InputError as e:
        if "pip install" not in str(e):
            raise
        pytest.skip(f"needs a pretrained model: {e}")
    assert config.from_json(config.to_json(recipe)) == recipe
    for one in [stage.recipe for stage in getattr(recipe, "stages", ())] or [recipe]:
        length = one.data.context or one.data.source.task.length  # a task has its own
        assert one.model.flops_per_token(length) > 0


def test_unknown_argument_is_refused(path):
    with pytest.raises(InputError, match="smoke"):
        config.load(f"{path}:smok", [])


def test_smoke_trains_saves_and_goes_on(trained, tmp_path, capsys):
    words = ["--config", f"{trained}:smoke", "--config.workdir", str(tmp_path / "run")]
    assert main([*words, "--config.steps", "3"]) == 0
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "going on from step 3" in said
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    steps = [r["step"] for r in records if "grad_norm" in r or "lr" in r]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "run/loss.png").stat().st_size > 1000
