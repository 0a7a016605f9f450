"""Runs in stages: one after another, resumed, and refused in an order that loses something."""

import dataclasses
import json

import pytest

from causal_jax import config
from causal_jax.errors import InputError
from causal_jax.train import main
from causal_jax.training.run import load_run
from causal_jax.training.stages import Stage, Stages, check_order

CONFIG = "configs/linearize_smollm2.py:smoke"


def test_all_stages_run_resume_and_end_in_a_model(tmp_path, capsys):
    words = ["--config", CONFIG, "--config.workdir", str(tmp_path / "run")]
    assert main([*words, "--config.stages.2.recipe.steps", "1"]) == 0
    assert "drawn: attention/lawcat/" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["type"].endswith("Stages")
    assert main(words) == 0  # two stages are done, the last goes on
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 2
    assert "going on from step 1" in out
    run = load_run(tmp_path / "run" / "finetune")
    assert run.step == 2
    assert not any(s.teach for s in run.recipe.model.layer_specs())
    assert main(["--config", str(tmp_path / "run")]) == 0  # the folder is a config too
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_an_order_that_loses_what_was_trained_is_refused():
    teacher, transfer, finetune = config.load(CONFIG).stages
    check_order(Stages((teacher, transfer, finetune)))
    with pytest.raises(InputError, match=r"transfer comes after finetune.*lora"):
        check_order(Stages((teacher, finetune, transfer)))
    with pytest.raises(InputError, match=r"teacher comes after transfer.*lawcat"):
        check_order(Stages((transfer, teacher)))


def test_names_and_folders_of_stages_are_checked():
    teacher = config.load(CONFIG).stages[0]
    with pytest.raises(InputError, match="name of its own"):
        Stages((teacher, teacher))
    with pytest.raises(InputError, match="at least one"):
        Stages(())
    with pytest.raises(InputError, match="stage name"):
        Stage("a/b", teacher.recipe)
    with pytest.raises(InputError, match="that of the whole"):
        Stage("a", dataclasses.replace(teacher.recipe, workdir="x"))
