"""The command line: sites, capture, patch and sweep on a run folder, and what they refuse."""

import json

import numpy as np
import pytest
from test_evaluate import BYTES, write_run

from causal_jax.data.pipeline import Data
from causal_jax.interp.__main__ import main
from causal_jax.models.decoder import Decoder
from causal_jax.training.recipe import Recipe

PAIR = ["--clean", "the cat", "--corrupt", "the dog", "--answer", "a", "--wrong", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = Decoder(vocab=258, layers=3, width=16, heads=4, kv_heads=2, context=32)
    recipe = Recipe(model=spec, data=Data(context=32, batch=4, threads=0))
    return write_run(tmp_path_factory.mktemp("interp") / "run", recipe, BYTES, steps=(3,))


def test_sites_are_listed_with_their_shapes(folder, capsys):
    assert main(["sites", "--run", str(folder), "--prompt", "abc"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["resid_post"].split(None, 1) == ["float32", "[3, 1, 4, 16]"]  # bos in front
    assert lines["attn.pattern"].endswith("[3, 1, 4, 4, 4]")


def test_captures_are_written(folder, tmp_path):
    out = tmp_path / "sub" / "acts.npz"
    words = ["--prompt", "abc", "--site", "attn.*", "--site", "resid_post", "--out", str(out)]
    assert main(["capture", "--run", str(folder), *words]) == 0
    with np.load(out) as acts:
        assert acts["attn.pattern"].shape == (3, 1, 4, 4, 4)
        np.testing.assert_allclose(acts["attn.pattern"].sum(-1), 1.0, rtol=1e-5)
        assert acts["tokens"].tolist() == [256, 97, 98, 99]
        assert acts["pieces"].tolist() == ["<bos>", "a", "b", "c"]


def test_a_map_is_what_single_patches_say(folder, tmp_path, capsys):
    out = tmp_path / "maps"
    words = ["--run", str(folder), *PAIR]
    assert main(["sweep", *words, "--out", str(out), "--chunk", "7"]) == 0
    assert "one program" in capsys.readouterr().out
    record = json.loads((out / "map.json").read_text())
    shares = np.array(record["recovered_percent"])
    assert shares.shape == (3, 8)
    np.testing.assert_allclose(shares[2, -1], 100.0, atol=1e-2)  # read out there
    np.testing.assert_allclose(shares[:, :5], 0.0, atol=1e-2)  # the same tokens, nothing moved
    assert (out / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "map.html").read_text().count("<h2>") == 4
    for layer, position in ((0, 5), (1, 7)):
        assert main(["patch", *words, "--layer", str(layer), "--position", str(position)]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert f"{shares[layer, position]:.1f} % recovered" in said
    assert main(["patch", *words, "--layer", "0", "--phrase", "dog"]) == 0
    assert "100.0 % recovered" in capsys.readouterr().out


def test_a_map_over_heads(folder, tmp_path):
    out = str(tmp_path / "heads")
    assert main(["sweep", "--run", str(folder), *PAIR, "--over", "head", "--out", out]) == 0
    record = json.loads((tmp_path / "heads" / "map.json").read_text())
    assert record["site"] == "attn.z"
    assert np.array(record["recovered_percent"]).shape == (3, 4)


def test_wrong_words_end_with_2_and_say_what_would_be_right(folder, tmp_path, capsys):
    run = ["--run", str(folder)]
    longer = [*PAIR[:1], "the cats", *PAIR[2:]]
    for words, message in (
        (["sites", "--run", str(tmp_path / "none")], "does not exist"),
        (["capture", *run, "--prompt", "a", "--site", "q", "--out", "x.npy"], "ends in .npz"),
        (
            ["capture", *run, "--prompt", "a", "--site", "resid_pots", "--out", "x.npz"],
            "nearest: resid_post",
        ),
        (["patch", *run, *longer, "--layer", "0"], "they must be as many"),
        (["patch", *run, *PAIR, "--layer", "5"], "layer=5 is outside 0..2"),
        (["patch", *run, *PAIR, "--layer", "0", "--position", "30"], "is outside 0..7"),
        (["patch", *run, *PAIR, "--layer", "0", "--phrase", "cat"], "does not occur"),
        (["patch", *run, *PAIR, "--layer", "0", "--head", "1"], "has no heads"),
        (["patch", *run, *PAIR[:-1], "a", "--layer", "0"], "begin with the same token"),
        (["sweep", *run, *PAIR, "--site", "embed"], "it is in no layer"),
        (["sweep", *run, *PAIR, "--site", "mlp_out", "--over", "head"], "it has no heads"),
        (["sweep", *run, *PAIR, "--chunk", "0"], "chunk=0"),
        (["sites", "--model", "x", "--checkpoint", "best"], "only a run"),
        (["sites", "--model", str(tmp_path / "none.gguf")], "none.gguf"),
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: "), said
        assert message in said, said
