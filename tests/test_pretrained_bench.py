"""`bench pretrained` compares equal work, and says so when it is not."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from gguf_files import write_gguf
from pretrained_models import torch_model

from causal_jax.bench import main
from causal_jax.bench import pretrained as bench


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", torch_model("llama2")))


def test_prefill_and_decoding_beside_transformers(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT", 8)
    words = f"pretrained --model {file} --lengths 16 --tokens 4 --repeats 1 --peers sdpa"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    records = [json.loads(x) for x in (tmp_path / "bench.jsonl").read_text().splitlines()]
    both = ["causal_jax", "transformers sdpa"]
    assert [(r["case"], r["name"]) for r in records] == [
        *(("prefill of 16 tokens", name) for name in both),
        *(("4 tokens after 8", name) for name in both),
    ]
    for r in records:
        work = 16 if r["case"].startswith("prefill") else 4
        assert r["tokens_per_s"] == pytest.approx(work / r["median_s"])
    assert "transformers sdpa" in records[0]["faster_than"]
    assert "vs transformers sdpa" in capsys.readouterr().out


def test_models_that_differ_are_not_timed(file, monkeypatch, capsys):
    read = bench._transformers

    def other(*args):
        model = read(*args)
        model.lm_head.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(bench, "_transformers", other)
    words = f"pretrained --model {file} --lengths 16 --tokens 0 --repeats 1 --peers eager"
    assert main(words.split()) == 2
    assert "transformers eager gives other logits than causal_jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lengths 65", "the model's context is 64"),
        ("--peers flash", "unknown peer 'flash'"),
        ("--dtype int8", "unknown dtype 'int8'"),
        ("--model nowhere.gguf", "no such file"),
        ("--config configs/quickstart.py", "takes its model by --model"),
    ],
)
def test_wrong_words(file, words, message, capsys):
    assert main(["pretrained", "--model", file, *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_timed_prefill_fills_the_cache(file):
    model, _ = bench.load(file)
    tokens = np.arange(12, dtype=np.int32)[None]
    logits, cache = bench._prefill(model, tokens).call()
    assert int(cache.length) == 12
    graph, params = nnx.split(model)
    full = jax.jit(lambda p, t: nnx.merge(graph, p)(t))(params, tokens)
    np.testing.assert_allclose(logits, full[:, -1], atol=1e-5)
