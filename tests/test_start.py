"""Runs that begin with given weights: `Recipe.start`."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.data.pipeline import Data
from causal_jax.data.tokenizers import Bytes
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pair import Pair
from causal_jax.models.pretrained import save, spec_of
from causal_jax.nn.lora import LoRA
from causal_jax.objectives.distil import Distil
from causal_jax.paths import named_leaves
from causal_jax.training.loop import train
from causal_jax.training.optimizer import AdamW
from causal_jax.training.recipe import Checkpoints, Evaluation, Recipe
from causal_jax.training.run import load_run
from causal_jax.training.sharding import MeshSpec

SPEC = Decoder(layers=2, width=16, heads=2, context=32)


def recipe(folder, **changes):
    return Recipe(
        **{
            "model": SPEC,
            "data": Data(tokenizer=Bytes(), context=32, batch=8),
            "steps": 1,
            "evaluation": Evaluation(every=0, final_batches=0),
            "checkpoint": Checkpoints(every=0),
            "workdir": str(folder),
            **changes,
        }
    )


def leaves(model):
    return {n: np.asarray(x) for n, x in named_leaves(nnx.split(model)[1]).items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(recipe(folder))
    return folder


def test_a_run_goes_on_from_another_with_adapters(first, tmp_path, capsys):
    model = dataclasses.replace(SPEC, lora=LoRA(rank=2))
    mesh = MeshSpec(data=2, fsdp=2, tensor=2)
    end = train(
        recipe(tmp_path / "run", model=model, start=str(first), trainable="lora_", mesh=mesh)
    )
    before = leaves(load_run(first).model)
    after = {n: np.asarray(x) for n, x in named_leaves(end.state["params"]).items()}
    assert set(before) < set(after)
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    said = capsys.readouterr().out
    assert f"start: step 1 of {first}; drawn: attention/k/lora_a" in said


def test_layers_are_moved_to_where_they_now_are(first, tmp_path):
    """Two layers that differ lie in two stacks; with a step of no size they are the old ones."""
    from causal_jax.training.optimizer import SGD

    model = dataclasses.replace(SPEC, attention=(Dense(), Dense(window=4)))
    end = train(recipe(tmp_path / "run", model=model, start=str(first), optimizer=SGD(lr=1e-30)))
    before = leaves(load_run(first).model)["stack/blocks/0/0/mlp/up/kernel"]
    places = named_leaves(end.state["params"]).items()
    after = [np.asarray(x) for name, x in places if name.endswith("mlp/up/kernel")]
    assert len(after) == 2
    np.testing.assert_array_equal(np.concatenate(after), before)


def test_what_is_drawn_is_what_a_run_from_scratch_draws(first, tmp_path):
    model = dataclasses.replace(SPEC, lora=LoRA(rank=2))
    frozen = {"model": model, "trainable": "norm", "seed": 3}
    fresh = train(recipe(tmp_path / "fresh", **frozen)).state["params"]
    begun = train(recipe(tmp_path / "begun", start=str(first), **frozen)).state["params"]
    name = "stack/blocks/0/0/attention/q/lora_a"
    np.testing.assert_array_equal(named_leaves(fresh)[name], named_leaves(begun)[name])


def test_a_resumed_run_needs_its_start_no_more(first, tmp_path, monkeypatch):
    from causal_jax.training import start

    folder = tmp_path / "run"
    train(recipe(folder, start=str(first)))
    monkeypatch.setattr(start, "parameters", lambda *_: pytest.fail("read again"))
    assert train(recipe(folder, start=str(first), steps=2)).step == 2
    with pytest.raises(InputError, match="start: the run has"):
        train(recipe(folder, start=""))


def test_a_checkpoint_of_transformers_is_a_start(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from causal_jax.data.tokenizers import Pretrained, PretrainedTokenizer
    from causal_jax.data.tokenizers.pretrained import Marks

    folder = tmp_path / "weights"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    pieces = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens(["<end>"])
    theirs = PretrainedTokenizer(pieces, Marks(eos=256), Pretrained(str(folder)))
    weights = dataclasses.replace(SPEC, vocab=257).build(jax.random.key(5))
    save(folder, weights, theirs)
    model = spec_of(folder, dropout=0.1)
    data = Data(tokenizer=Pretrained(str(folder)), context=32, batch=8)
    end = train(recipe(tmp_path / "run", model=model, data=data, start=str(folder)))
    assert end.step == 1
    assert f"start: {folder}\n" in capsys.readouterr().out
    moved = [np.abs(leaf - named_leaves(end.state["params"])[n]).max()
             for n, leaf in leaves(weights).items()]  # fmt: skip
    assert 0 < max(moved) < 0.01


def test_what_cannot_be_a_start(first, tmp_path):
    with pytest.raises(InputError, match=r"nowhere/at-all.*: no such file or folder"):
        train(recipe(tmp_path / "a", start="./nowhere/at-all/x"))
    with pytest.raises(InputError, match=r"3 layers|cannot become 3"):
        train(recipe(tmp_path / "b", model=dataclasses.replace(SPEC, layers=3), start=str(first)))
    with pytest.raises(InputError, match="cannot become"):
        train(recipe(tmp_path / "c", model=dataclasses.replace(SPEC, width=32), start=str(first)))
    from causal_jax.data.tokenizers import BPE

    other = Data(tokenizer=BPE(vocab=300), context=32, batch=8)
    with pytest.raises(InputError, match=r"data\.tokenizer is .* the same text has other ids"):
        train(recipe(tmp_path / "d", data=other, start=str(first)))


def test_other_kinds_of_model_go_by_name(tmp_path):
    from tiny import Tiny

    train(recipe(tmp_path / "tiny", model=Tiny()))
    end = train(recipe(tmp_path / "again", model=Tiny(), start=str(tmp_path / "tiny"),
                       trainable="norm"))  # fmt: skip
    before, after = leaves(load_run(tmp_path / "tiny").model), named_leaves(end.state["params"])
    np.testing.assert_array_equal(after["embed/table"], before["embed/table"])
    with pytest.raises(InputError, match=r"shares no parameter|cannot become"):
        train(recipe(tmp_path / "no", model=Tiny(width=8), start=str(tmp_path / "tiny")))
    assert jax.tree.leaves(end.state)


def test_a_pair_begins_with_two_and_keeps_the_teacher(first, tmp_path, capsys):
    model = Pair(student=dataclasses.replace(SPEC, layers=1), teacher=SPEC, weights=str(first))
    mesh = MeshSpec(data=2, fsdp=2, tensor=2)
    common = {"model": model, "objective": Distil(), "optimizer": AdamW(lr=1e-2), "mesh": mesh}
    end = train(recipe(tmp_path / "run", **common))
    assert "teacher: step 1 of" in capsys.readouterr().out
    state = named_leaves(end.state["params"])
    for name, leaf in leaves(load_run(first).model).items():
        np.testing.assert_array_equal(state[f"teacher/{name}"], leaf)
        assert state[f"teacher/{name}"].sharding == state[f"student/{name}"].sharding
    assert not any("teacher/" in name for name in named_leaves(end.state["opt"]))
    again = load_run(tmp_path / "run").model
    assert again.spec.layers == 1  # what reads a run finds the student
    with pytest.raises(InputError, match="nowhere"):
        train(recipe(tmp_path / "x", model=dataclasses.replace(model, weights="nowhere")))
