"""Evaluation against brute force, and both reading verbs on a run folder."""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax import evaluate, generate, scoring, train
from causal_jax.config import to_json
from causal_jax.data.packing import ConcatRows, Stream
from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Synthetic, Text
from causal_jax.data.tasks.copying import Copying
from causal_jax.data.tasks.needle import Needle
from causal_jax.data.tasks.recall import Recall
from causal_jax.data.tokenizers import BPE, Bytes, Ids
from causal_jax.errors import InputError
from causal_jax.memory import Delta
from causal_jax.models.decoder import Decoder
from causal_jax.nn.titans import LMM
from causal_jax.scoring import score, state_bytes
from causal_jax.training.checkpoint import Store
from causal_jax.training.recipe import Recipe
from causal_jax.training.run import Run, load_run
from causal_jax.training.state import init_state

BYTES = Bytes().train([])
TINY = Decoder(vocab=258, layers=2, width=16, heads=2, context=64)
TEXTS = ["The for statement. " * 9, "Ünïcode, twice two. " * 3, "short", "x"]


def build(**changes):
    return dataclasses.replace(TINY, **changes).build(jax.random.key(0))


def stream(texts):
    parts = [np.array([BYTES.bos, *BYTES.encode(t), BYTES.eos]) for t in texts]
    return Stream(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def batches(rows, size):
    """Rows in batches, the last one filled with rows that count nothing."""
    rows = list(rows)
    blank = {k: np.zeros_like(v) for k, v in rows[0].items()}
    rows += [blank] * (-len(rows) % size)
    for i in range(0, len(rows), size):
        yield {k: np.stack([r[k] for r in rows[i : i + size]]) for k in blank}


def test_score_is_log_softmax_and_argmax(monkeypatch):
    model = build(logits_soft_cap=5.0)
    (batch,) = batches(list(ConcatRows(stream(TEXTS), 50))[:3], 3)
    logits = np.asarray(
        model(
            jnp.asarray(batch["tokens"]),
            segments=jnp.asarray(batch["segments"]),
            positions=jnp.asarray(batch["positions"]),
        )
    ).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    for most in (1 << 26, 258 * 3 * 7):  # at once, and in pieces that do not divide the length
        monkeypatch.setattr(scoring, "_LOGITS", most)
        jax.clear_caches()
        nll, best = score(model, batch)
        np.testing.assert_allclose(nll, want, atol=2e-5)
        np.testing.assert_array_equal(best, logits.argmax(-1) == batch["targets"])


@pytest.mark.parametrize("mixer", [None, LMM(memory=Delta(tile=4), persistent=1)])
def test_a_row_read_window_after_window_is_the_row(mixer):
    changes = {} if mixer is None else {"attention": (mixer,)}
    model, task = build(**changes), Recall(length=20, pairs=2, keys=6, values=6)
    batch = task.batch(0, range(3))
    for whole, parts in zip(score(model, batch), score(model, batch, 8)):
        assert parts.shape == (3, 20)
        np.testing.assert_allclose(parts, whole, atol=1e-4)
    grows = state_bytes(model, 64) / state_bytes(model, 32)
    assert (grows == 1) == (mixer is not None)
    batch["segments"] = np.tile(np.arange(20) // 10, (3, 1))
    with pytest.raises(InputError, match="window=8"):
        score(model, batch, 8)


def test_a_model_that_knows_nothing():
    model: Any = build(tied=False)
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    got = evaluate.score_text(model, batches(ConcatRows(stream(TEXTS), 32), 2), BYTES.piece_bytes())
    size = sum(len(t.encode()) for t in TEXTS)
    assert got.bytes == size
    assert got.targets == size + len(TEXTS)  # every byte, and the end of every document
    np.testing.assert_allclose(got.loss, math.log(258), rtol=1e-6)
    figures = got.figures()
    np.testing.assert_allclose(figures["perplexity"], 258, rtol=1e-5)
    np.testing.assert_allclose(
        figures["bits_per_byte"], math.log2(258) * got.targets / size, rtol=1e-6
    )


def test_text_does_not_depend_on_the_batch():
    model, rows = build(), ConcatRows(stream(TEXTS), 24, 8)
    first, *others = (
        evaluate.score_text(model, batches(rows, size), BYTES.piece_bytes()) for size in (1, 3, 16)
    )
    for other in others:
        assert (other.targets, other.bytes, other.correct) == (
            first.targets,
            first.bytes,
            first.correct,
        )
        np.testing.assert_allclose(other.nats, first.nats, rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def full_pass(graph, params, tokens):
    return nnx.merge(graph, params)(tokens)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (40, 10), (300, 50)])
def test_loss_by_context_is_what_separate_passes_say(context, stride):
    """Every target once, predicted from the tokens of its document that its row shows."""
    model, text = build(), stream(TEXTS[:2])
    got = evaluate.score_text(
        model, batches(ConcatRows(text, context, stride), 4), BYTES.piece_bytes()
    )
    (graph, params), nats, pair = nnx.split(model), 0.0, 0
    for begin, end in zip(text.starts[:-1], text.starts[1:], strict=True):
        document = text.tokens[begin:end]
        opens = pair
        for at in range(len(document) - 1):
            row = max(0, -(-(pair - context + 1) // stride))
            first = max(0, row * stride - opens)
            seen = np.zeros(context, np.int64)  # one shape: what stands behind is not attended to
            seen[: at + 1 - first] = document[first : at + 1]
            logits = full_pass(graph, params, seen[None])[0, at - first]
            nats -= float(jax.nn.log_softmax(logits)[document[at + 1]])
            pair += 1
    assert got.targets == pair
    np.testing.assert_allclose(got.nats, nats, rtol=1e-5)


class Copier(nnx.Module):
    """Says what stood `back` tokens before the question; makes mistakes on the ids `wrong`."""

    def __init__(self, vocab, back, wrong=()):
        self.spec, self.back, self.wrong = dataclasses.replace(TINY, vocab=vocab), back, wrong

    def hidden(self, tokens, *, segments, positions):
        said = jnp.roll(tokens, self.back, axis=1)
        for token in self.wrong:
            said = jnp.where(said == token, 0, said)
        return jax.nn.one_hot(said, self.spec.vocab)

    def unembed(self, h):
        return 20.0 * h


def test_one_who_copies_is_right_and_one_who_errs_is_measured():
    task = Copying(length=16, data=8, symbols=20)
    right = evaluate.score_task(Copier(task.vocab, 8), task, rows=50, batch=16)
    figures = right.figures()
    assert (figures["exact"], figures["token"], figures["tokens"]) == (1.0, 1.0, 400)
    assert figures["loss"] < 1e-4
    got = evaluate.score_task(Copier(task.vocab, 8, wrong=(5, 9)), task, rows=50, batch=16, seed=3)
    data = task.batch(3, range(50))["tokens"][:, :8]
    bad = (data == 5) | (data == 9)
    assert 0 < bad.sum() < 400
    assert (got.rows, got.tokens) == (50, 400)
    assert got.correct == 400 - bad.sum()
    assert got.exact == 50 - bad.any(axis=1).sum()


@pytest.mark.parametrize(
    "task", [Recall(length=20, pairs=3), Copying(12, 1, 2), Needle(100)], ids=str
)
def test_tasks_do_not_depend_on_the_batch_and_match_brute_force(task):
    model = build(vocab=task.vocab)
    scores = [evaluate.score_task(model, task, rows=13, batch=b, seed=1) for b in (1, 4, 13)]
    logits = np.asarray(model(jnp.asarray(task.batch(1, range(13))["tokens"])))
    made = task.batch(1, range(13))
    asked, right = made["weights"] > 0, logits.argmax(-1) == made["targets"]
    for got in scores:
        assert (got.rows, got.tokens) == (13, asked.sum())
        assert got.correct == (right & asked).sum()
        assert got.exact == sum(r[a].all() for r, a in zip(right, asked, strict=True))
        np.testing.assert_allclose(got.nats, scores[0].nats, rtol=1e-5)


def test_a_needle_in_another_tokenizer():
    task = Needle(length=200)
    pairs = BPE(vocab=300).train([task.text(5, i)[0] for i in range(10)])
    got = evaluate.score_task(build(vocab=pairs.vocab), task, tokenizer=pairs, rows=5, batch=2)
    answers = [pairs.encode(task.text(evaluate.TASK_SEED, i)[1]) for i in range(5)]
    assert got.tokens == sum(map(len, answers))


def write_run(folder, recipe, tokenizer, steps=(3, 7)):
    """A run folder with real parts: what training leaves behind, without the training."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(recipe)))
    tokenizer.save(folder / "tokenizer")
    store, tx = Store(folder / "checkpoints", keep=9), recipe.optimizer.transformation()
    for step in steps:
        ema = recipe.ema is not None
        state = init_state(recipe.model, tx, jax.random.key(step), ema=ema)
        state["step"] = jnp.asarray(step, jnp.int32)
        if ema:
            state["params"] = jax.tree.map(jnp.zeros_like, state["params"])
        store.save(step, state, {"validation": float(step)})
    store.wait()
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("".join(f"Line {i} of the text.\n" for i in range(60)))
    source = Text(path=str(folder / "a.txt"), held_out=0.3)
    recipe = Recipe(model=TINY, data=Data(source=source, context=32, batch=4, threads=0))
    return write_run(folder / "run", recipe, BYTES)


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    task = Recall(length=20, pairs=2, keys=6, values=6)
    model = dataclasses.replace(TINY, vocab=task.vocab, rotary=None, learned_positions=True)
    recipe = Recipe(
        model=model, data=Data(source=Synthetic(task=task), context=0, batch=4), ema=0.9
    )
    return write_run(folder / "run", recipe, Ids(task.vocab).train([]))


def test_a_run_comes_back_as_it_was(text_run, task_run):
    run = load_run(text_run)
    assert isinstance(run, Run)
    assert run.step == 7
    assert run.tokenizer.fingerprint() == BYTES.fingerprint()
    for which, step in (("latest", 7), ("best", 3), (3, 3), ("7", 7)):
        got, want = load_run(text_run, which), TINY.build(jax.random.key(step))
        assert got.step == step
        for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (got.model, want)), strict=True):
            np.testing.assert_array_equal(a, b)
    # Where the run keeps an average of the parameters, that is the model.
    averaged = load_run(task_run)
    assert all(np.asarray(a).any() for a in jax.tree.leaves(nnx.state(averaged.model.embed)))


def test_a_vocabulary_left_to_the_tokenizer(tmp_path, text_run):
    folder = shutil.copytree(text_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vocab"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    assert load_run(folder).recipe.model.vocab == 258


def test_evaluate_command_on_text(text_run, tmp_path, capsys):
    def figures(*words):
        out = tmp_path / "deep" / "figures.json"
        assert evaluate.main(["--run", str(text_run), "--out", str(out), *words]) == 0
        return json.loads(out.read_text())

    report = figures()
    assert report["step"] == 7
    assert report["tasks"] == []
    (record,) = report["text"]
    assert (record["split"], record["context"], record["stride"]) == ("validation", 32, 32)
    assert f"{record['bits_per_byte']:.4f}" in capsys.readouterr().out
    several = figures("--context", "8,16,32", "--batch", "3")["text"]
    assert [r["context"] for r in several] == [8, 16, 32]
    assert {r["stride"] for r in several} == {4}
    assert {r["targets"] for r in several} == {record["targets"]}  # the same targets for each
    assert {r["bytes"] for r in several} == {record["bytes"]}
    again = figures("--context", "8,16,32", "--batch", "16")["text"]
    for a, b in zip(several, again, strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-6)
    train = figures("--split", "train")["text"][0]
    whole = len((text_run.parent / "a.txt").read_text())
    assert train["bytes"] + record["bytes"] == whole
    assert figures("--limit", "2", "--split", "train")["text"][0]["targets"] == 2 * 4 * 32
    report = figures("--task", "needle:length=100/120,depth=0/1", "--rows", "5")
    assert report["text"] == []
    assert [(t["length"], t["depth"]) for t in report["tasks"]] == [
        (100, 0.0),
        (100, 1.0),
        (120, 0.0),
        (120, 1.0),
    ]
    assert all(t["rows"] == 5 and t["tokens"] == 30 for t in report["tasks"])


def test_evaluate_command_on_a_task(task_run, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert evaluate.main(["--run", str(task_run), "--out", str(out), "--rows", "10"]) == 0
    (record,) = json.loads(out.read_text())["tasks"]
    assert (record["task"], record["pairs"], record["tokens"]) == ("recall", 2, 20)
    words = ["--run", str(task_run), "--task", "recall:pairs=2/3,keys=6,values=6,length=20"]
    assert evaluate.main([*words, "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["tasks"]) == 2
    table = capsys.readouterr().out
    assert "exact" in table
    assert "0.0100" in table  # the dials are in the table


def test_data_that_changed_since_is_pointed_out(text_run, capsys):
    from causal_jax.data.pipeline import prepare

    record = text_run / "data.json"
    assert evaluate.main(["--run", str(text_run)]) == 0
    assert "warning" not in capsys.readouterr().err
    record.write_text(json.dumps({"source": "0" * 64, "tokenizer": "0" * 64}))
    assert evaluate.main(["--run", str(text_run)]) == 0
    assert "warning: the data is not what" in capsys.readouterr().err
    run = load_run(text_run)
    fingerprint = prepare(run.recipe.data, tokenizer=run.tokenizer).fingerprint
    record.write_text(json.dumps({"source": fingerprint, "tokenizer": "0" * 64}))
    assert evaluate.main(["--run", str(text_run)]) == 0
    assert "warning" not in capsys.readouterr().err
    record.unlink()


CONFIG = """
from causal_jax.data.pipeline import Data
from causal_jax.data.sources import Text
from causal_jax.models.decoder import Decoder
from causal_jax.training.recipe import Recipe

def get_config():
    model = Decoder(layers=1, width=16, heads=2, context=64)
    source = Text(path="{text}", held_out=0.2)
    return Recipe(model=model, data=Data(source=source, context=32, batch=8, threads=0), steps=3)
"""


def test_a_trained_run_is_evaluated_as_training_did(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of the text.\n" for i in range(80)))
    (tmp_path / "tiny.py").write_text(CONFIG.format(text=tmp_path / "a.txt"))
    folder, out = str(tmp_path / "run"), tmp_path / "figures.json"
    words = ["--config", str(tmp_path / "tiny.py"), "--config.workdir", folder]
    assert train.main(words) == 0
    said = capsys.readouterr().out
    assert evaluate.main(["--run", folder, "--out", str(out), "--batch", "3"]) == 0
    (figures,) = json.loads(out.read_text())["text"]
    assert f"bits/byte {figures['bits_per_byte']:.4f}" in said
    capsys.readouterr()
    assert generate.main(["--run", folder, "--prompt", "Line 7", "--max_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Line 7")


BAD = [
    (["--run", "no/such"], "--run no/such: does not exist"),
    (["--run", "EMPTY"], "holds no config.json"),
    (["--run", "TEXT", "--checkpoint", "5"], "checkpoint '5': use latest, best or one of"),
    (["--run", "TEXT", "--task", "recal"], "did you mean 'recall'"),
    (
        ["--run", "TEXT", "--task", "recall"],
        "it is made of ids, but this run reads text; tasks of text: babilong, needle, sniah",
    ),
    (["--run", "TEXT", "--task", "needle:length=9"], "length 9"),
    (["--run", "TEXT", "--context", "8,x"], "--context 8,x: numbers with commas"),
    (["--run", "TEXT", "--context", "0"], "--context 0: every number is at least 1"),
    (["--run", "TEXT", "--context", "8", "--stride", "9"], "stride is 9"),
    (["--run", "TEXT", "--batch", "0"], "--batch 0: at least 1"),
    (["--run", "TEXT", "--out", "EMPTY"], "cannot be written"),
    (["--run", "TASK", "--split", "train"], "trained on a task, which has no text"),
    (
        ["--run", "TASK", "--task", "needle"],
        "made of text, but this run reads ids; tasks of ids: c",
    ),
    (["--run", "TASK", "--task", "recall"], "it has 65 ids, the run was trained with 13"),
    (
        ["--run", "TASK", "--task", "recall:pairs=2,keys=6,values=6,length=80"],
        "tokens of a row 80: the model has a table of 64 positions",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(w) for w, _ in BAD])
def test_evaluate_refuses(words, message, text_run, task_run, tmp_path, capsys):
    places = {"TEXT": text_run, "TASK": task_run, "EMPTY": tmp_path}
    assert evaluate.main([str(places.get(w, w)) for w in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_damaged_checkpoint_and_a_missing_one(text_run, tmp_path, capsys):
    folder = shutil.copytree(text_run, tmp_path / "run")
    for path in (folder / "checkpoints" / "7").rglob("*"):
        if path.is_file() and path.parent.name != "7":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoint 7 .* --checkpoint 3 is the next older"):
        load_run(folder)
    assert load_run(folder, 3).step == 3
    shutil.rmtree(folder / "checkpoints")
    assert generate.main(["--run", str(folder), "--prompt", "x"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_generate_command(text_run, capsys):
    words = ["--run", str(text_run), "--max_tokens", "20", "--seed", "4", "--checkpoint", "best"]
    assert generate.main([*words, "--prompt", "Line"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("Line")
    assert "ended by" in first.err
    assert generate.main([*words, "--prompt", "Line"]) == 0
    assert capsys.readouterr().out == first.out
    assert generate.main([*words, "--prompt", "Line", "--prompt", "A longer one"]) == 0
    both = capsys.readouterr().out
    assert first.out.strip("\n") in both
    assert "=== prompt 1\nA longer one" in both
    greedy = [*words, "--temperature", "0", "--top_k", "3", "--top_p", "0.9", "--min_p", "0.1"]
    assert generate.main([*greedy, "--prompt", "Line"]) == 0


def test_generate_command_speaks_ids(task_run, capsys):
    words = ["--run", str(task_run), "--max_tokens", "2", "--prompt"]
    assert generate.main([*words, "1 8 2  9 1"]) == 0
    said = capsys.readouterr().out.split()
    assert said[:5] == ["1", "8", "2", "9", "1"]
    assert len(said) == 7
    assert generate.main([*words, "1 8 two"]) == 2
    got = capsys.readouterr()
    assert got.out == ""
    assert "'two' is no id of this model; write numbers from 0 to 12" in got.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "no/such"], "--run no/such: does not exist"),
        (["--prompt", "y" * 64], "the model's context is 64"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--max_tokens", "0"], "max_tokens 0"),
        (["--stop", ""], "stop ''"),
        (["--checkpoint", "last"], "checkpoint 'last'"),
    ],
)
def test_generate_refuses(words, message, text_run, capsys):
    assert generate.main(["--run", str(text_run), "--prompt", "x", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_help_as_a_process(verb):
    got = subprocess.run(
        [sys.executable, "-m", f"causal_jax.{verb}", "--help"], capture_output=True, text=True
    )
    assert got.returncode == 0
    assert "--run DIR" in got.stdout
    assert "example: python -m causal_jax." in got.stdout
