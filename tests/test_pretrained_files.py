"""Safetensors in and out: shards, meshes, half precision, and files that are no good."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pretrained_models import ids, logits, torch_logits, torch_model

from causal_jax.attention import Dense
from causal_jax.errors import InputError
from causal_jax.models.pretrained import families, load, save
from causal_jax.models.pretrained._checkpoint import Checkpoint, build
from causal_jax.models.pretrained._safetensors import safetensors_checkpoint
from causal_jax.models.pretrained._views import View
from causal_jax.paths import named_leaves
from causal_jax.training.sharding import MeshSpec, make_mesh, state_shardings


@pytest.fixture(scope="module")
def theirs():
    return torch_model("llama2")


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    return tmp_path / "shards"


def same(a, b):
    for (name, x), y in zip(named_leaves(a).items(), named_leaves(b).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def params(model):
    return nnx.state(model, nnx.Param)


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_file_and_shards_are_one_model(folder, shards):
    whole = params(load(folder)[0])
    same(whole, params(load(folder / "model.safetensors")[0]))
    same(whole, params(load(shards)[0]))


def test_half_precision(theirs, tmp_path):
    torch_model("llama2").bfloat16().save_pretrained(tmp_path / "half")
    ours, _ = load(tmp_path / "half")
    tokens = ids(2, 21)
    read = type(theirs).from_pretrained(tmp_path / "half", dtype="float32")
    reference = torch_logits(read, tokens)
    np.testing.assert_allclose(logits(ours, tokens), reference, atol=1e-4, rtol=0)
    narrow, _ = load(tmp_path / "half", param_dtype="bfloat16", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params(narrow))} == {jnp.dtype("bfloat16")}
    same(params(narrow), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(ours)))
    assert np.abs(logits(narrow, tokens) - reference).mean() < 0.05 * reference.std()
    save(tmp_path / "again", narrow, dtype="bfloat16")
    same(params(load(tmp_path / "again")[0]), params(ours))


def test_names_without_the_models_prefix(tmp_path):
    theirs = torch_model("gpt2")
    theirs.transformer.save_pretrained(tmp_path / "base")
    tokens = ids(2, 21)
    got = logits(load(tmp_path / "base")[0], tokens)
    np.testing.assert_allclose(got, torch_logits(theirs, tokens), atol=1e-4, rtol=0)


def test_sharded_parameters_equal_whole_ones(folder):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(name, shape):
        cut = (None,) * (len(shape.shape) - 2) + ("fsdp", "tensor")
        is_cut = name.endswith("kernel") and not name.startswith("head")  # 61 words
        return NamedSharding(mesh, PartitionSpec(*cut if is_cut else ()))

    sharded = params(load(folder, place=place)[0])
    same(sharded, params(load(folder)[0]))
    up = named_leaves(sharded)["stack/blocks/0/0/mlp/up/kernel"]
    assert {s.data.shape for s in up.addressable_shards} == {(3, 32 // 2, 48 // 4)}


def test_training_rules_place_the_parameters(folder):
    mesh = make_mesh(MeshSpec(fsdp=4, tensor=2))
    heads = {"q": 4, "k": 2, "v": 2}

    def place(name, leaf):
        return state_shardings(mesh, {name: leaf}, heads=heads)[0][name]

    placed = params(load(folder, place=place)[0])
    same(placed, params(load(folder)[0]))
    wanted, _ = state_shardings(mesh, placed, heads=heads)
    for leaf, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == sharding
    up = named_leaves(placed)["stack/blocks/0/0/mlp/up/kernel"]
    assert {s.data.shape for s in up.addressable_shards} == {(3, 32 // 4, 48 // 2)}


def test_a_device_reads_its_own_block_only(folder):
    """The blocks asked of each tensor cover it once, however it is cut and turned."""
    checkpoint = safetensors_checkpoint(folder)
    read: dict[str, int] = {}

    def counting(name, view):
        def block(index):
            out = view.read(index)
            read[name] = read.get(name, 0) + out.size
            return out

        return View(view.shape, block)

    counted = {name: counting(name, view) for name, view in checkpoint.tensors.items()}
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(name, shape):
        cut = [None] * len(shape.shape)
        cut[-2 if name.endswith("down/kernel") else -1] = "fsdp"
        fits = shape.shape[-1] % 8 == 0 and name != "embed/table"
        return NamedSharding(mesh, PartitionSpec(*cut) if fits else PartitionSpec())

    spec = families["llama"].decoder(checkpoint.config)
    counted = Checkpoint(checkpoint.where, checkpoint.config, counted)
    build(spec, families["llama"], counted, place=place)
    assert read == {name: int(np.prod(v.shape)) for name, v in checkpoint.tensors.items()}


@pytest.mark.parametrize("keep", [0, 4, 8, 500, -1000, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or damaged"):
        load(folder)


def test_missing_files(shards, folder, tmp_path):
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"missing shards {lost.name}"):
        load(shards)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"no model\.safetensors.*pytorch_model\.bin must be saved"
    ):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: missing"):
        load(folder)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "nowhere.safetensors")


def test_an_index_that_promises_too_much(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = next(iter(index["weight_map"].values()))
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks model\.layers\.9\.extra"):
        load(shards)


def test_tensors_and_model_that_do_not_match(folder):
    change(folder, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"parameters without a tensor: layers/3/"):
        load(folder)
    change(folder, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"no parameter: layers/2/.*\(9 in all\)"):
        load(folder)
    change(folder, num_hidden_layers=3, intermediate_size=40)
    with pytest.raises(InputError, match=r"shapes .*layers/0/mlp/gate/kernel \(32, 48\), expected"):
        load(folder)
    change(folder, intermediate_size=48, attention_bias=True)
    with pytest.raises(InputError, match=r"without a tensor: layers/0/attention/k/bias.*\(12 in"):
        load(folder)


def test_configs_that_make_no_model(folder):
    change(folder, model_type="lama")
    with pytest.raises(InputError, match=r"unknown model family 'lama'; did you mean 'llama'"):
        load(folder)
    change(folder, model_type="llama", hidden_act="relu6")
    with pytest.raises(InputError, match="hidden_act='relu6' is not supported, only 'silu'"):
        load(folder)
    change(folder, hidden_act="silu", num_key_value_heads=3)
    with pytest.raises(InputError, match="makes no model: kv_heads must divide heads"):
        load(folder)
    change(folder, num_key_value_heads="two")
    with pytest.raises(InputError, match="the config makes no model"):
        load(folder)
    change(folder, num_key_value_heads=2, rope_parameters={"rope_type": "dynamic"})
    with pytest.raises(InputError, match="rope scaling 'dynamic' is not supported"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is no JSON"):
        load(folder)


def test_only_how_a_model_is_run_can_be_changed(folder):
    assert load(folder, context=16, dtype="bfloat16", scan=False)[0].spec.context == 16
    with pytest.raises(InputError, match=r"\['heads'\] cannot be changed"):
        load(folder, heads=2)


def test_save_refuses_what_the_files_cannot_say(folder, tmp_path):
    model = load(folder)[0]
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        save(folder, model)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model)
    with pytest.raises(InputError, match=r"llama cannot describe.*post_norm=True"):
        changed(model, post_norm=True, save_as=tmp_path / "a")
    with pytest.raises(InputError, match=r"(?s)no family describes.*llama: attention="):
        changed(model, attention=(Dense(window=4, sinks=1),), family=None, save_as=tmp_path / "b")
    assert not (tmp_path / "a").exists()


def changed(model, *, save_as, family="llama", **fields):
    model = nnx.merge(*nnx.split(model))
    model.spec = dataclasses.replace(model.spec, **fields)
    return save(save_as, model, family=family)


def test_a_large_model_is_cut_into_shards(folder, tmp_path):
    model = load(folder)[0]
    out = save(tmp_path / "out", model, shard_bytes=20_000)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(p.stat().st_size for p in out.glob("*.safetensors")) < 25_000
    same(params(load(out)[0]), params(model))
