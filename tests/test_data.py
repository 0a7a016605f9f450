"""The pipeline: an exact order whoever serves it; validation that counts every byte once."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from causal_jax.data import BPE, Bytes, Corpus, Data, Ids, Synthetic, Text, load_tokenizer, prepare
from causal_jax.data.sources.task import HELD_OUT_SEED
from causal_jax.data.tasks.needle import Needle
from causal_jax.data.tasks.recall import Recall
from causal_jax.errors import InputError

ONE = (0, 1)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path):
    """Sixty documents of different lengths as JSON lines."""
    rng = np.random.default_rng(0)
    path = tmp_path / "text.jsonl"
    documents = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) + " é\n" for _ in range(60)]
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return Text(path=str(path), held_out=0.2)


def take(prepared, n):
    it = iter(prepared.train)
    return [next(it) for _ in range(n)]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype


def joined(parts):
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def counted(batch):
    mask = batch["weights"] > 0
    return batch["targets"][mask]


# --- training order -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_batches_keep_the_contract(text, packing):
    prepared = Data(source=text, context=48, batch=6, packing=packing).prepare(process=ONE)
    (batch,) = take(prepared, 1)
    ints = ("tokens", "targets", "segments", "positions")
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        **dict.fromkeys(ints, ((6, 48), "int32")),
        "weights": ((6, 48), "float32"),
    }
    assert batch["tokens"].max() < prepared.vocab == 258


@pytest.mark.parametrize("packing", ["concat", "fit"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_shows_every_target_once(text, packing, shuffle):
    data = Data(source=text, context=32, batch=4, packing=packing, shuffle=shuffle, threads=0)
    prepared = data.prepare(process=ONE)
    n = prepared.rows_per_epoch
    rows = joined(take(prepared, 2 * n // 4 + 1))
    want = np.sort(np.concatenate([prepared.tokenizer.encode(d) for d in text.documents("train")]))
    for epoch in range(2):
        targets = counted({k: v[epoch * n : (epoch + 1) * n] for k, v in rows.items()})
        targets = np.sort(targets[targets != prepared.tokenizer.eos])
        np.testing.assert_array_equal(targets, want)
    first, second = (rows["tokens"][e * n : (e + 1) * n] for e in range(2))
    assert (first == second).all() != shuffle
    if shuffle and packing == "concat":  # cut at other places: other rows, not only another order
        known = {row.tobytes() for row in first}
        assert sum(row.tobytes() in known for row in second) < n / 4


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_the_order_depends_on_seed_alone(text, packing):
    data = Data(source=text, context=32, batch=4, packing=packing)
    first = take(data.prepare(process=ONE), 5)
    for again in (dataclasses.replace(data, threads=0), data):
        for a, b in zip(first, take(again.prepare(process=ONE), 5), strict=True):
            same(a, b)
    other = take(dataclasses.replace(data, seed=1).prepare(process=ONE), 1)[0]
    assert (other["tokens"] != first[0]["tokens"]).any()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_together_see_what_one_would(text, count):
    data = Data(source=text, context=32, batch=6)
    whole = data.prepare(process=ONE)
    parts = [data.prepare(process=(p, count)) for p in range(count)]
    for together in zip(take(whole, 12), *(take(p, 12) for p in parts), strict=True):
        same(together[0], joined(together[1:]))
    held = [list(p.validation()) for p in parts]
    for together in zip(list(whole.validation()), *held, strict=True):
        same(together[0], joined(together[1:]))
    assert {p.validation().bytes for p in parts} == {whole.validation_bytes}


@pytest.mark.parametrize("threads", [0, 2])
def test_the_iterator_state_is_json_and_exact(text, threads):
    data = Data(source=text, context=32, batch=4, threads=threads)
    it = iter(data.prepare(process=ONE).train)
    for _ in range(7):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    want = [next(it) for _ in range(40)]  # beyond the end of the epoch
    again = iter(data.prepare(process=ONE).train)
    next(again)
    again.set_state(state)
    for a in want:
        same(a, next(again))
    # one of two processes goes on from the same state with its half
    half = iter(data.prepare(process=(1, 2)).train)
    half.set_state(state)
    same({k: v[2:] for k, v in want[0].items()}, next(half))


def test_the_iterator_goes_through_an_orbax_checkpoint(text, tmp_path):
    from orbax.checkpoint import v1 as ocp

    data = Data(source=text, context=32, batch=4)
    it = iter(data.prepare(process=ONE).train)
    for _ in range(3):
        next(it)
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save_checkpointables(3, {"data": it})
        want = [next(it) for _ in range(3)]
        fresh = iter(data.prepare(process=ONE).train)
        checkpointer.load_checkpointables(3, {"data": fresh})
    for a in want:
        same(a, next(fresh))


# --- validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Bytes(), BPE(vocab=300)])
@pytest.mark.parametrize(
    ("context", "stride"), [(None, None), (7, None), (64, 16), (100_000, None)]
)
def test_validation_counts_every_byte_once_at_any_context(text, spec, context, stride):
    prepared = Data(source=text, tokenizer=spec, context=32, batch=4).prepare(process=ONE)
    documents = text.documents("validation")
    want = sum(len(d.encode()) for d in documents)
    validation = prepared.validation(context=context, stride=stride)
    assert validation.bytes == prepared.validation_bytes == want
    coded = [prepared.tokenizer.encode(d) for d in documents]
    assert validation.targets == sum(len(ids) + 1 for ids in coded)  # each eos too
    shapes = {b["tokens"].shape for b in validation}
    assert shapes == {(4, context or 32)}
    targets = np.concatenate([counted(b) for b in validation])
    assert len(targets) == validation.targets
    written = prepared.tokenizer.decode(targets)
    assert sorted(written) == sorted("".join(documents))
    if context == 100_000:
        assert written == "".join(documents)
    nats = validation.targets * math.log(prepared.vocab)  # a model that knows nothing
    per_byte = validation.targets / want * math.log2(prepared.vocab)
    assert validation.bits_per_byte(nats) == pytest.approx(per_byte)


def test_validation_is_padded_limited_and_indexed(text):
    prepared = Data(source=text, context=32, batch=7).prepare(process=ONE)
    validation = prepared.validation()
    rows = -(-(validation.targets) // 32)
    assert len(validation) == -(-rows // 7)
    assert rows % 7 != 0, "the case of a last batch that is not full"
    last = validation[-1]
    assert (last["segments"][rows % 7 :] == -1).all()
    assert not last["weights"][rows % 7 :].any()
    same(last, validation[len(validation) - 1])
    same(validation[0], next(iter(prepared.validation())))
    short = prepared.validation(limit=1)
    assert len(short) == 1
    assert short.targets == 7 * 32
    assert 0 < short.bytes < validation.bytes
    with pytest.raises(IndexError):
        validation[len(validation)]
    assert len(validation[:2]) == 2
    # the totals of all batches, which are not counted by making them, and of as many batches
    all_of_them = prepared.validation(limit=len(validation))
    assert (all_of_them.targets, all_of_them.bytes) == (validation.targets, validation.bytes)


def test_the_training_split_can_be_evaluated_too(text):
    prepared = Data(source=text, context=32, batch=4).prepare(process=ONE)
    size = sum(len(d.encode()) for d in text.documents("train"))
    assert prepared.batches("train", context=20).bytes == size
    with pytest.raises(InputError, match="split is 'test'; one of train, validation"):
        prepared.batches("test")


def test_no_held_out_text_is_an_input_error(text):
    source = Text(path=text.path, held_out=0.0)
    prepared = Data(source=source, context=32, batch=4).prepare(process=ONE)
    assert prepared.validation_bytes == 0
    with pytest.raises(InputError, match="Text holds no text out"):
        prepared.validation()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "validation context is 0"),
        ({"batch": 0}, "validation batch is 0"),
        ({"limit": 0}, "validation limit is 0"),
        ({"stride": 33}, "validation stride is 33; from 1 to the context 32"),
        ({"batch": 3}, "validation batch is 3, which 2 processes cannot share"),
    ],
)
def test_impossible_validation_is_refused(text, fields, message):
    prepared = Data(source=text, context=32, batch=4).prepare(process=(0, 2))
    with pytest.raises(InputError, match=message):
        prepared.validation(**fields)


# --- tokenizer, cache, run folder -----------------------------------------------------------------


def test_the_tokenizer_sees_training_text_only(tmp_path):
    (tmp_path / "train.txt").write_text("ordinary words of training text " * 50)
    (tmp_path / "held.txt").write_text("xylophone " * 200)
    source = Text(path=str(tmp_path / "train.txt"), validation=str(tmp_path / "held.txt"))
    prepared = Data(source=source, tokenizer=BPE(vocab=300), context=32).prepare(process=ONE)
    assert any(b"ordinary" in p for p in prepared.tokenizer.pieces)
    assert not any(b"xy" in p for p in prepared.tokenizer.pieces)


def test_what_was_made_once_is_read_again(text, cache, monkeypatch):
    data = Data(source=text, tokenizer=BPE(vocab=300), context=32, batch=4)
    first = data.prepare(process=ONE)
    assert isinstance(first.streams["train"].tokens, np.memmap)
    assert first.streams["train"].tokens.dtype == np.uint16
    monkeypatch.setattr(BPE, "train", None)  # a second training would fail
    monkeypatch.setattr(type(first.tokenizer), "encode_documents", None)
    same(take(first, 1)[0], take(data.prepare(process=ONE), 1)[0])
    left_over = [p for p in cache.rglob("*") if p.name.startswith(".")]
    assert left_over == []


def test_two_processes_may_prepare_at_once(cache):
    code = (
        "import sys, time; from causal_jax.data import BPE, Data\n"
        "import grain, tensorflow_datasets, tokenizers\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "p = Data(tokenizer=BPE(vocab=300), context=64).prepare(process=(0, 1))\n"
        "print(p.tokenizer.fingerprint(), next(iter(p.train))['tokens'].sum())"
    )
    env = {"CAUSAL_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, text=True, env=env, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert [p for p in cache.rglob("*") if p.name.startswith(".")] == []


def test_a_run_folder_keeps_its_tokenizer(text, tmp_path):
    data = Data(source=text, tokenizer=BPE(vocab=300), context=32, batch=4)
    first = data.prepare(tmp_path / "run", process=ONE)
    saved = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert saved.fingerprint() == first.tokenizer.fingerprint()
    again = data.prepare(tmp_path / "run", process=ONE)
    same(take(first, 1)[0], take(again, 1)[0])
    with pytest.raises(InputError, match=r"data.tokenizer is Bytes\(\), but the run .*BPE"):
        Data(source=text, context=32, batch=4).prepare(tmp_path / "run", process=ONE)
    other = BPE(vocab=300).train(["other text " * 40])
    with pytest.raises(InputError, match=r"data\.tokenizer is another BPE"):
        prepare(data, tmp_path / "run", tokenizer=other, process=ONE)
    assert prepare(data, tokenizer=saved, process=ONE).tokenizer is saved


def test_changed_data_under_a_run_is_refused(text, tmp_path):
    data = Data(source=text, context=32, batch=4)
    data.prepare(tmp_path / "run", process=ONE)
    with open(text.path, "a") as f:
        f.write('{"text": "one more document"}\n')
    with pytest.raises(InputError, match=r"its content is not what the run in .* began with"):
        data.prepare(tmp_path / "run", process=ONE)
    data.prepare(tmp_path / "another", process=ONE)
    (tmp_path / "another" / "data.json").write_text("{")
    with pytest.raises(InputError, match=r"data\.json is damaged"):
        data.prepare(tmp_path / "another", process=ONE)


def test_only_the_first_process_writes(text, tmp_path):
    Data(source=text, context=32, batch=4).prepare(tmp_path / "run", process=(1, 2))
    assert not (tmp_path / "run").exists()


def test_an_unusable_cache_names_its_variable(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAUSAL_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set CAUSAL_JAX_CACHE to a folder"):
        Data(source=text, context=32, batch=4).prepare(process=ONE)


# --- bad sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "data.context is 0; at least 1"),
        ({"batch": 0}, "data.batch is 0; at least 1"),
        ({"seed": -1}, "data.seed is -1; at least 0"),
        ({"seed": 1 << 31}, "data.seed is 2147483648; at most 2147483647"),
        ({"threads": -1}, "data.threads is -1"),
        ({"packing": "best"}, "data.packing is 'best'; one of concat, fit"),
        ({"context": 10_000_000}, "the training text has only .* tokens; give a shorter context"),
        ({"batch": 5}, "data.batch is 5, which 2 processes cannot share evenly"),
        ({"tokenizer": Ids(300)}, "has no mark for the end"),
    ],
)
def test_impossible_data_is_refused(text, fields, message):
    with pytest.raises(InputError, match=message):
        Data(**{"source": text, "context": 32, "batch": 4} | fields).prepare(process=(0, 2))


def test_a_vocabulary_that_is_too_small_is_refused(text):
    prepared = Data(source=text, context=32, batch=4).prepare(process=ONE)
    prepared.check_vocab(258)
    prepared.check_vocab(320)
    with pytest.raises(InputError, match=r"model\.vocab is 257, the tokenizer has 258 ids"):
        prepared.check_vocab(257)


# --- tasks ----------------------------------------------------------------------------------------


def test_a_task_is_served_as_rows(tmp_path):
    task = Recall(length=40, pairs=4)
    data = Data(source=Synthetic(task, validation_rows=10), context=0, batch=4, seed=3)
    prepared = data.prepare(tmp_path / "run", process=ONE)
    assert (prepared.config.context, prepared.vocab) == (40, task.vocab)
    batches = take(prepared, 3)
    for step, batch in enumerate(batches):
        same(batch, task.batch(3, range(4 * step, 4 * step + 4)))
    half = take(data.prepare(process=(1, 2)), 1)[0]
    same(half, {k: v[2:] for k, v in batches[0].items()})
    assert load_tokenizer(tmp_path / "run" / "tokenizer").encode("1 2").tolist() == [1, 2]
    validation = prepared.validation()
    assert len(validation) == 3
    same(validation[0], task.batch(HELD_OUT_SEED, range(4)))
    assert validation.targets == 10 * 4  # 10 rows, an answer per pair; padding has none
    assert (validation[2]["segments"][2:] == -1).all()
    assert validation.bytes == prepared.validation_bytes == prepared.rows_per_epoch == 0
    with pytest.raises(InputError, match="no text and have no bytes"):
        validation.bits_per_byte(1.0)
    with pytest.raises(InputError, match="a task trains on rows without end"):
        prepared.batches("train")
    with pytest.raises(InputError, match="validation context is 80"):
        prepared.validation(context=80)
    again = take(Data(source=data.source, context=40, batch=4, seed=4).prepare(process=ONE), 1)[0]
    assert (again["tokens"] != batches[0]["tokens"]).any()


def test_a_written_task_has_the_byte_tokenizer():
    data = Data(source=Synthetic(Needle(length=128)), context=128, batch=2)
    prepared = data.prepare(process=ONE)
    (batch,) = take(prepared, 1)
    assert "What is the pass key?" in prepared.tokenizer.decode(batch["tokens"][0])
    assert prepared.vocab == 258


def test_a_written_task_takes_any_tokenizer(tmp_path):
    task = Needle(length=160)
    source = Synthetic(task, validation_rows=6)
    data = Data(source=source, tokenizer=BPE(vocab=400), context=90, batch=3)
    prepared = data.prepare(tmp_path)
    tokenizer = prepared.tokenizer
    assert tokenizer.vocab == 400
    batch = next(iter(prepared.train))
    assert batch["tokens"].shape == (3, 90)
    for row in range(3):
        prompt, answer = task.text(0, row)
        real = batch["segments"][row] == 0
        asked = batch["weights"][row] > 0
        assert not asked[~real].any()
        assert tokenizer.decode(batch["targets"][row][asked]) == answer
        whole = [*batch["tokens"][row][real], batch["targets"][row][real][-1]]
        assert tokenizer.decode(np.array(whole)[1:]) == prompt + answer  # bos in front
    assert [b["tokens"].shape for b in prepared.validation()] == [(3, 90)] * 2
    again = data.prepare(tmp_path)  # the tokenizer beside the run
    assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    short = dataclasses.replace(data, context=20)
    with pytest.raises(
        InputError, match=r"data.context is 20, but a row of the task has \d+ tokens"
    ):
        short.prepare()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 32}, "data.context is 32, the task's rows have 64 tokens; give 0"),
        ({"tokenizer": BPE()}, "the task is written in Ids"),
        ({"shuffle": False}, "say nothing about a task"),
        ({"packing": "fit"}, "say nothing about a task"),
    ],
)
def test_what_a_task_cannot_honour_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Data(**{"source": Synthetic(Recall(length=64)), "context": 0} | fields)


# --- the default ----------------------------------------------------------------------------------


def test_the_default_is_the_corpus_in_bytes():
    prepared = Data().prepare(process=ONE)
    documents = Corpus().documents("validation")
    assert prepared.validation_bytes == len("".join(documents).encode())
    assert prepared.streams["train"].documents == len(Corpus().documents("train"))
    (batch,) = take(prepared, 1)
    assert batch["tokens"].shape == (16, 256)


def test_importing_data_loads_no_optional_package():
    code = (
        "import sys, causal_jax.data\n"
        "names = ['tensorflow_datasets', 'tokenizers', 'array_record', 'grain', 'tensorflow']\n"
        "print([n for n in names if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
